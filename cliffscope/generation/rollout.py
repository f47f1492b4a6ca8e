"""What does the model think and answer?

1. Prompts are rendered. Those that do not fit the context are omitted, with the reason.
2. They are sorted by length and decoded in batches. The batch size is derived from the free memory, and halved if
   memory runs out.
3. Each finished batch is handed to the caller, who can store it; stored transcripts are not generated again.
4. Answers are returned in the order of the prompts.

Greedy by default, so that the model's first choice is measured. Decoding itself is in decoding.py.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from cliffscope.errors import DataError, GenerationError
from cliffscope.generation.decoding import Budget, Decoded, decode
from cliffscope.memory import free_bytes, is_out_of_memory
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import Message, Omission, Outcome, Transcript, Transcripts
from cliffscope.transcripts.transcript import Span, tokenize

__all__ = [
    "Budget",
    "bare_prompt",
    "check_left",
    "continue_roll_out",
    "find_batch_size",
    "roll_out",
    "sample_prompts",
]

log = logging.getLogger(__name__)
ROLL_OUT_STAGE = "roll_out"
MAX_ROWS = 64
"""Maximum rows of a batch whose size is derived: larger ones gain little speed, and an interruption loses more."""
HALVED = "batch_halved_to"
"""Key in `extra` of transcripts that were generated after memory ran out: the batch size from then on."""
_MEMORY_SHARE = 0.5
"""Share of the free memory that a batch may use."""


def roll_out(
    model: LensModel,
    prompts: Transcripts,
    *,
    max_thinking: int = 1024,
    max_answer: int = 128,
    temperature: float = 0.0,
    force_closing: bool = True,
    system: str | None = None,
    seed: int = 0,
    samples: int = 1,
    batch_size: int | None = None,
    done: Transcripts | None = None,
    on_batch: Callable[[Transcripts], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Transcripts:
    """Generates thinking and answer for each prompt.

    Args:
        model: the model; edit its weights around the call to generate under an edit.
        prompts: transcripts; any thinking and answer that they have are replaced.
        max_thinking: maximum tokens of thinking.
        max_answer: maximum tokens of answer.
        temperature: 0 is greedy.
        force_closing: close thinking that reaches its budget; otherwise it is left unfinished.
        system: system message for each prompt that has none.
        seed: seed of the sampling; the result depends on neither order nor batches.
        samples: answers for each prompt; more than one needs a temperature, and ids then end in "/sample-1" and so on.
        batch_size: maximum rows in a batch; None derives it from the free memory. It is halved if memory runs out.
        done: transcripts that an earlier call handed to `on_batch`; they are returned and not generated again.
        on_batch: called with the transcripts of each finished batch.
        progress: called with the number of transcripts done.

    Returns:
        Transcripts in the order of the prompts, with the exact generated ids. Prompts that do not fit the context are
        omitted, with the reason. If memory ran out, `extra["batch_halved_to"]` holds the new batch size.

    Raises:
        GenerationError: a budget is not positive, or a single row does not fit into memory.
        DataError: the `done` transcripts answer different prompts.

    Example:
        >>> import cliffscope as cs
        >>> model = cs.load_model("planted-llama")
        >>> prompts = cs.organisms.prompts("test", 2, harmful=True)
        >>> cs.roll_out(model, prompts)[0].answer.split()[0]
        'sorry'
    """
    budget = Budget(
        max_thinking=max_thinking,
        max_answer=max_answer,
        temperature=temperature,
        force_closing=force_closing,
        seed=seed,
    )
    if samples > 1 and not temperature:
        raise GenerationError(f"samples={samples} at temperature 0 would all be equal. Pass a temperature above 0.")
    questions = sample_prompts(prompts, samples)
    return continue_roll_out(
        model, questions, budget, system=system, batch_size=batch_size, done=done, on_batch=on_batch, progress=progress
    )


def continue_roll_out(
    model: LensModel,
    prompts: Transcripts,
    budget: Budget,
    *,
    system: str | None = None,
    batch_size: int | None = None,
    done: Transcripts | None = None,
    on_batch: Callable[[Transcripts], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Transcripts:
    """Generates one transcript for each prompt under a checked budget; see `roll_out`."""
    if batch_size is not None and batch_size < 1:
        raise GenerationError(f"batch_size={batch_size}: expected at least 1 row.")
    questions = prompts.map(lambda t: bare_prompt(t, system))
    finished = _finished(questions, done)
    rows, omitted = _prepare(model, questions, budget)
    rows.sort(key=lambda row: -len(row.ids))
    size = batch_size or find_batch_size(model, max((len(row.ids) for row in rows), default=0) + budget.room(model))
    batches = _Batches(model=model, budget=budget, size=size)
    for start in range(0, len(rows), size):
        # Batches are cut from all rows, so that a resumed call has the same batch-mates as an uninterrupted one.
        batch = [row for row in rows[start : start + size] if row.transcript.id not in finished]
        for part in batches.run(batch):
            finished |= {t.id: t for t in part}
            if on_batch is not None:
                on_batch(part)
            if progress is not None:
                progress(len(finished))
    answered = [finished[t.id] for t in questions if t.id in finished]
    return Transcripts(answered, omitted=(*questions.omitted, *omitted))


def check_left(transcripts: Transcripts) -> None:
    """Raises GenerationError with the first reason if every prompt of a roll-out was omitted."""
    if not len(transcripts):
        why = f": {transcripts.omitted[0].kind}" if transcripts.omitted else ""
        raise GenerationError(
            f"No transcript is left: every prompt was omitted{why}. Lower the budgets, or choose different prompts."
        )


def sample_prompts(prompts: Transcripts, samples: int) -> Transcripts:
    """Repeats each prompt for the number of answers that it gets.

    Args:
        prompts: with unique ids.
        samples: answers for each prompt, at least 1.

    Returns:
        The prompts themselves for one sample; otherwise copies with new ids and the prompt's id in
        `extra["sample_of"]`.

    Raises:
        GenerationError: `samples` is below 1.
    """
    if samples < 1:
        raise GenerationError(f"samples={samples}: expected at least 1 answer for each prompt.")
    if samples == 1:
        return prompts
    copies = (
        t.replace(id=f"{t.id}/sample-{i}", extra={**t.extra, "sample_of": t.id})
        for t in prompts
        for i in range(1, samples + 1)
    )
    return Transcripts(copies, omitted=prompts.omitted)


def bare_prompt(transcript: Transcript, system: str | None = None) -> Transcript:
    """Strips a transcript to its prompt.

    Args:
        transcript: a transcript, with or without an answer.
        system: system message to add unless the messages already start with one.

    Returns:
        Its messages, without thinking, answer and outcome.
    """
    messages = transcript.messages
    if system is not None and messages[0].role != "system":
        messages = (Message(role="system", content=system), *messages)
    return transcript.replace(
        messages=messages,
        thinking=None,
        thinking_ids=None,
        answer=None,
        answer_ids=None,
        outcome=Outcome.UNJUDGED,
    )


def find_batch_size(model: LensModel, length: int) -> int:
    """The number of rows whose caches take at most half of the free memory.

    Args:
        model: the loaded model.
        length: tokens of the longest row.

    Returns:
        A power of two from 1 to `MAX_ROWS`.
    """
    rows = max(1, min(MAX_ROWS, int(_MEMORY_SHARE * free_bytes(model.device) / max(1, row_bytes(model, length)))))
    return 1 << (rows.bit_length() - 1)


def row_bytes(model: LensModel, length: int) -> int:
    """Bytes that a row of `length` tokens takes during generation, for its cache and its logits."""
    shape, each = model.shape, torch.empty(0, dtype=model.dtype).element_size()
    # Twice, since a growing cache and a shrinking batch are copied. The logits are three arrays in fp32 or wider.
    cache = 2 * 2 * length * shape.n_layers * shape.n_kv_heads * shape.d_head * each
    return cache + 3 * 4 * len(model.tokenizer)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Prompt:
    """A prompt with its ids."""

    transcript: Transcript
    ids: list[int]


@dataclass(eq=False, kw_only=True)
class _Batches:
    """Decodes batches, in halves once memory has run out."""

    model: LensModel
    budget: Budget
    size: int
    halved: bool = False

    def run(self, rows: list[_Prompt]) -> Iterator[Transcripts]:
        """Yields the transcripts of one batch: in one part or, if memory runs out, in several."""
        while rows:
            part = rows[: self.size]
            decoded = self._decode(part)
            if decoded is not None:
                yield Transcripts(self._finish(row, result) for row, result in zip(part, decoded, strict=True))
                rows = rows[len(part) :]

    def _decode(self, rows: Sequence[_Prompt]) -> list[Decoded] | None:
        """The results, or None if memory ran out; the batch size has then been halved."""
        try:
            return decode(self.model, [row.ids for row in rows], [row.transcript.id for row in rows], self.budget)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) == 1:
                raise GenerationError(
                    f"There is not enough memory to generate {rows[0].transcript.id!r} alone ({len(rows[0].ids)} "
                    f"prompt tokens, up to {self.budget.room(self.model)} after them). Lower the budgets, or load the "
                    "model in a smaller dtype."
                ) from error
            self.size, self.halved = max(1, len(rows) // 2), True
            log.warning("Memory ran out with %d rows; continuing with %d rows in a batch.", len(rows), self.size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _finish(self, row: _Prompt, decoded: Decoded) -> Transcript:
        decode_ids, thinks = self.model.tokenizer.decode, self.model.template.thinks
        halved = {HALVED: self.size} if self.halved else {}
        return row.transcript.replace(
            thinking=decode_ids(list(decoded.thinking)) if thinks else None,
            thinking_ids=decoded.thinking if thinks else None,
            answer=decode_ids(list(decoded.answer), skip_special_tokens=True) if decoded.closed else None,
            answer_ids=decoded.answer if decoded.closed else None,
            closed=decoded.closed,
            extra={**row.transcript.extra, "forced_closing": decoded.forced, **halved},
        )


def _finished(questions: Transcripts, done: Transcripts | None) -> dict[str, Transcript]:
    messages = {t.id: t.messages for t in questions}
    strangers = [t.id for t in done or () if messages.get(t.id) != t.messages]
    if strangers:
        raise DataError(
            f"{len(strangers)} of {len(done or ())} finished transcripts, such as {strangers[0]!r}, do not answer "
            "these prompts. Pass the prompts that they were generated from, or start again without them."
        )
    return {t.id: t for t in done or ()}


def _prepare(model: LensModel, prompts: Sequence[Transcript], budget: Budget) -> tuple[list[_Prompt], list[Omission]]:
    rows, omitted = [], []
    room = budget.room(model)
    for transcript in prompts:
        try:
            ids = _prompt_ids(model, transcript)
        except DataError as error:
            omitted.append(Omission(stage=ROLL_OUT_STAGE, reason=str(error), id=transcript.id))
            continue
        if len(ids) + room > model.shape.context:
            reason = (
                f"prompt of {len(ids)} tokens and budgets of {room}, including the closing, exceed the context of "
                f"{model.shape.context}; lower the budgets or drop the prompt"
            )
            omitted.append(Omission(stage=ROLL_OUT_STAGE, reason=reason, id=transcript.id))
            continue
        rows.append(_Prompt(transcript=transcript, ids=ids))
    return rows, omitted


def _prompt_ids(model: LensModel, transcript: Transcript) -> list[int]:
    if not transcript.prompt.strip():
        raise DataError(f"The prompt of {transcript.id!r} is empty. Add text, or drop it.")
    thinks = model.template.thinks
    tokens = tokenize(transcript.replace(thinking="" if thinks else None), model.tokenizer, model.template)
    # Without thinking, the closing is the tail of the prompt, so generation starts after it.
    return [int(i) for i in tokens.token_ids[: tokens.span(Span.PROMPT).stop if thinks else tokens.n_pos]]
