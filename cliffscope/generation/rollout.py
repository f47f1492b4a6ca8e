"""What does the model think and answer?

1. Prompts are rendered; those that do not fit the context are omitted, with the reason.
2. They are sorted by length and decoded in batches whose size is found from the free memory, and halved where that was
   too much after all.
3. Each finished batch is handed out, so that it can be kept; what was kept is not generated again.
4. Answers come back in the prompts' order, whatever the batches were.

Greedy by default: what is measured is then the model's first choice. Decoding itself is in decoding.py.
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
STAGE = "roll_out"
MOST_ROWS = 64
"""Rows of a batch that is found by itself at most: more gain little speed, and a killed run loses more."""
HALVED = "batch_halved_to"
"""Key in `extra` of transcripts that were generated after memory ran out: the rows of a batch from then on."""
_OF_FREE = 0.5
"""Share of the free memory that a batch may take."""


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
        prompts: transcripts; thinking and answer they already have are replaced.
        max_thinking: tokens of thinking at most.
        max_answer: tokens of answer at most.
        temperature: 0 is greedy.
        force_closing: close thinking that reaches its budget; otherwise it is left unfinished.
        system: system message put before each prompt that has none.
        seed: of the sampling; the result does not depend on order or batch.
        samples: answers a prompt; more than one needs a temperature, and ids end in "/sample-1" and so on.
        batch_size: rows at most; None finds it from the free memory. It is halved where memory runs out.
        done: transcripts that an earlier call handed to `on_batch`; they are returned and not generated again.
        on_batch: called with the transcripts of each finished batch.
        progress: called with the number of transcripts done.

    Returns:
        Transcripts in the prompts' order, with the exact generated ids; prompts that do not fit the context are
        omitted, each with its reason. Where memory ran out, `extra["batch_halved_to"]` says so.

    Raises:
        GenerationError: the budgets are not positive, or memory does not suffice for one row.
        DataError: what is done already answers other prompts.

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
        raise GenerationError(f"samples={samples} at temperature 0 would all be the same. Give a temperature.")
    asked = sample_prompts(prompts, samples)
    return continue_roll_out(
        model, asked, budget, system=system, batch_size=batch_size, done=done, on_batch=on_batch, progress=progress
    )


def continue_roll_out(
    model: LensModel,
    asked: Transcripts,
    budget: Budget,
    *,
    system: str | None = None,
    batch_size: int | None = None,
    done: Transcripts | None = None,
    on_batch: Callable[[Transcripts], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Transcripts:
    """What `roll_out` does once the samples of each prompt are apart and the budget is checked; see there."""
    if batch_size is not None and batch_size < 1:
        raise GenerationError(f"batch_size={batch_size}: expected at least 1 row.")
    asked = asked.map(lambda t: bare_prompt(t, system))
    finished = _finished(asked, done)
    rows, omitted = _prepare(model, asked, budget)
    rows.sort(key=lambda row: -len(row.ids))
    size = batch_size or find_batch_size(model, max((len(row.ids) for row in rows), default=0) + budget.room(model))
    batches = _Batches(model=model, budget=budget, size=size)
    for start in range(0, len(rows), size):
        # Batches are cut from all rows, so that a resumed call has the batch-mates of an uninterrupted one.
        batch = [row for row in rows[start : start + size] if row.transcript.id not in finished]
        for made in batches.run(batch):
            finished |= {t.id: t for t in made}
            if on_batch is not None:
                on_batch(made)
            if progress is not None:
                progress(len(finished))
    kept = [finished[t.id] for t in asked if t.id in finished]
    return Transcripts(kept, omitted=(*asked.omitted, *omitted))


def check_left(transcripts: Transcripts) -> None:
    """Raises GenerationError, with the first reason, if every prompt of a roll-out was omitted."""
    if not len(transcripts):
        why = f": {transcripts.omitted[0].kind}" if transcripts.omitted else ""
        raise GenerationError(
            f"No transcript is left: every prompt was omitted{why}. Lower the budgets or give other prompts."
        )


def sample_prompts(prompts: Transcripts, samples: int) -> Transcripts:
    """Each prompt as often as it is to be answered.

    Args:
        prompts: with unique ids.
        samples: answers a prompt, at least 1.

    Returns:
        The prompts themselves for one sample; else copies with ids of their own, `extra["sample_of"]` the prompt's id.

    Raises:
        GenerationError: fewer than one sample.
    """
    if samples < 1:
        raise GenerationError(f"samples={samples}: expected at least 1 answer a prompt.")
    if samples == 1:
        return prompts
    copies = (
        t.replace(id=f"{t.id}/sample-{i}", extra={**t.extra, "sample_of": t.id})
        for t in prompts
        for i in range(1, samples + 1)
    )
    return Transcripts(copies, omitted=prompts.omitted)


def bare_prompt(transcript: Transcript, system: str | None = None) -> Transcript:
    """A transcript as it is before anything is generated.

    Args:
        transcript: whatever it holds already.
        system: system message put before its messages if they begin with none.

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
    """Rows whose caches take at most half of the free memory; a power of two, at most `MOST_ROWS`.

    Args:
        model: the model, loaded.
        length: tokens of the longest row.

    Returns:
        At least 1.
    """
    rows = max(1, min(MOST_ROWS, int(_OF_FREE * free_bytes(model.device) / max(1, row_bytes(model, length)))))
    return 1 << (rows.bit_length() - 1)


def row_bytes(model: LensModel, length: int) -> int:
    """Memory that a row of so many tokens takes while it is generated: its cache and its logits."""
    shape, each = model.shape, torch.empty(0, dtype=model.dtype).element_size()
    # Twice: a cache that grows is copied, and a batch that shrinks too. The logits are three arrays in fp32 or more.
    cache = 2 * 2 * length * shape.n_layers * shape.n_kv_heads * shape.d_head * each
    return cache + 3 * 4 * len(model.tokenizer)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Prompt:
    """One prompt as ids."""

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
        """The transcripts of one batch, in one part or, where memory runs out, in several as they are finished."""
        while rows:
            part = rows[: self.size]
            made = self._decoded(part)
            if made is not None:
                yield Transcripts(self._finish(row, found) for row, found in zip(part, made, strict=True))
                rows = rows[len(part) :]

    def _decoded(self, rows: Sequence[_Prompt]) -> list[Decoded] | None:
        """What was generated, or None where memory ran out; then the size has been halved."""
        try:
            return decode(self.model, [row.ids for row in rows], [row.transcript.id for row in rows], self.budget)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) == 1:
                raise GenerationError(
                    f"Memory does not suffice to generate {rows[0].transcript.id!r} alone ({len(rows[0].ids)} tokens "
                    f"of prompt, {self.budget.room(self.model)} after it at most). Lower the budgets, or load the "
                    "model in a smaller dtype."
                ) from error
            self.size, self.halved = max(1, len(rows) // 2), True
            log.warning("Memory ran out with %d rows; going on with %d rows a batch.", len(rows), self.size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _finish(self, row: _Prompt, found: Decoded) -> Transcript:
        decode_ids, thinks = self.model.tokenizer.decode, self.model.template.thinks
        halved = {HALVED: self.size} if self.halved else {}
        return row.transcript.replace(
            thinking=decode_ids(list(found.thinking)) if thinks else None,
            thinking_ids=found.thinking if thinks else None,
            answer=decode_ids(list(found.answer), skip_special_tokens=True) if found.closed else None,
            answer_ids=found.answer if found.closed else None,
            closed=found.closed,
            extra={**row.transcript.extra, "forced_closing": found.forced, **halved},
        )


def _finished(asked: Transcripts, done: Transcripts | None) -> dict[str, Transcript]:
    known = {t.id: t.messages for t in asked}
    strange = [t.id for t in done or () if known.get(t.id) != t.messages]
    if strange:
        raise DataError(
            f"{len(strange)} of {len(done or ())} transcripts that are done already, such as {strange[0]!r}, answer "
            "other prompts than those given. Start again without them, or give the prompts they were made from."
        )
    return {t.id: t for t in done or ()}


def _prepare(model: LensModel, prompts: Sequence[Transcript], budget: Budget) -> tuple[list[_Prompt], list[Omission]]:
    rows, omitted = [], []
    room = budget.room(model)
    for transcript in prompts:
        try:
            ids = _prompt_ids(model, transcript)
        except DataError as error:
            omitted.append(Omission(stage=STAGE, reason=str(error), id=transcript.id))
            continue
        if len(ids) + room > model.shape.context:
            reason = (
                f"prompt of {len(ids)} tokens and budgets of {room}, closing included, exceed the context of "
                f"{model.shape.context}; lower the budgets or drop it"
            )
            omitted.append(Omission(stage=STAGE, reason=reason, id=transcript.id))
            continue
        rows.append(_Prompt(transcript=transcript, ids=ids))
    return rows, omitted


def _prompt_ids(model: LensModel, transcript: Transcript) -> list[int]:
    if not transcript.prompt.strip():
        raise DataError(f"The prompt of {transcript.id!r} is empty. Give it text, or drop it.")
    thinks = model.template.thinks
    tokens = tokenize(transcript.replace(thinking="" if thinks else None), model.tokenizer, model.template)
    # Without thinking the closing is the prompt's own tail, so generation begins behind it.
    return [int(i) for i in tokens.token_ids[: tokens.span(Span.PROMPT).stop if thinks else tokens.n_pos]]
