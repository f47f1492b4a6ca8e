"""What does the model think and answer?

1. Prompts are rendered; those that do not fit the context are omitted, with the reason.
2. They are sorted by length and decoded in batches whose size is found from the free memory, and halved where that was
   too much after all.
3. Each finished batch is handed out, so that it can be kept; what was kept is not generated again.
4. Answers come back in the prompts' order, whatever the batches were.

Greedy by default: what is measured is then the model's first choice. Decoding itself is in decoding.py, answers on
thinking that is there already in answering.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from cliffscope.errors import DataError, GenerationError
from cliffscope.generation.batches import BatchSize, check_batch_size, find_batch_size
from cliffscope.generation.decoding import decode, spans_seen
from cliffscope.generation.row_edits import SpanEdit
from cliffscope.generation.speaking import Budget, Decoded
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import CUT, FORCED, Message, Omission, Outcome, Transcript, Transcripts
from cliffscope.transcripts.transcript import (
    CLOSING_IDS,
    Span,
    TokenizedTranscript,
    make_each,
    tell_control_tokens,
)

STAGE = "roll_out"


def roll_out(
    model: LensModel,
    prompts: Transcripts,
    *,
    edit: SpanEdit | None = None,
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
        model: the model.
        prompts: transcripts; thinking and answer they already have are replaced.
        edit: of any scope, under which thinking and answer are generated; `all` acts up to and including the answer.
            Values that differ by position need a scope whose text is not generated: the prompt, or the closing.
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
        EditError: the edit does not fit the model, or its values the positions.

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
    sampled = sample_prompts(prompts, samples)
    return continue_roll_out(
        model,
        sampled,
        budget,
        edit=edit,
        system=system,
        batch_size=batch_size,
        done=done,
        on_batch=on_batch,
        progress=progress,
    )


def continue_roll_out(
    model: LensModel,
    prompts: Transcripts,
    budget: Budget,
    *,
    edit: SpanEdit | None = None,
    thinking_only: bool = False,
    system: str | None = None,
    batch_size: int | None = None,
    done: Transcripts | None = None,
    on_batch: Callable[[Transcripts], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Transcripts:
    """What `roll_out` does once the samples of each prompt are apart and the budget is checked; see there.

    With `thinking_only` transcripts end where their thinking does, and have no answer.
    """
    check_batch_size(batch_size)
    prompts = prompts.map(lambda t: bare_prompt(t, system))
    finished = _finished(prompts, done)
    rows, omitted = _prepare(model, prompts, budget)
    rows.sort(key=lambda row: -row.tokens.n_pos)
    size = batch_size or find_batch_size(model, max((row.tokens.n_pos for row in rows), default=0) + budget.room(model))
    batches = _Batches(model=model, budget=budget, edit=edit, thinking_only=thinking_only, size=BatchSize(rows=size))
    for start in range(0, len(rows), size):
        # Batches are cut from all rows, so that a resumed call has the batch-mates of an uninterrupted one.
        batch = [row for row in rows[start : start + size] if row.transcript.id not in finished]
        for part in batches.run(batch):
            finished |= {t.id: t for t in part}
            if on_batch is not None:
                on_batch(part)
            if progress is not None:
                progress(len(finished))
    ordered = [finished[t.id] for t in prompts if t.id in finished]
    return Transcripts(ordered, omitted=(*prompts.omitted, *omitted))


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


@dataclass(frozen=True, eq=False, kw_only=True)
class _Prompt:
    """One prompt as ids."""

    transcript: Transcript
    tokens: TokenizedTranscript


@dataclass(frozen=True, eq=False, kw_only=True)
class _Batches:
    """Decodes batches, in halves once memory has run out."""

    model: LensModel
    budget: Budget
    edit: SpanEdit | None
    thinking_only: bool
    size: BatchSize

    def run(self, rows: list[_Prompt]) -> Iterator[Transcripts]:
        """The transcripts of one batch, in one part or, where memory runs out, in several as they are finished."""
        while rows:
            part = rows[: self.size.rows]
            outputs = self._decoded(part)
            if outputs is not None:
                yield Transcripts(self._finish(row, decoded) for row, decoded in zip(part, outputs, strict=True))
                rows = rows[len(part) :]

    def _decoded(self, rows: Sequence[_Prompt]) -> list[Decoded] | None:
        """What was generated, or None where memory ran out; then the size has been halved."""
        tokens = [row.tokens for row in rows]
        return self.size.attempt(
            lambda: decode(self.model, tokens, self.budget, [self.edit] * len(rows), thinking_only=self.thinking_only),
            len(rows),
            alone=(
                f"Memory does not suffice to generate {rows[0].transcript.id!r} alone ({tokens[0].n_pos} tokens of "
                f"prompt, {self.budget.room(self.model)} after it at most). Lower the budgets, or load the model in a "
                "smaller dtype."
            ),
        )

    def _finish(self, row: _Prompt, decoded: Decoded) -> Transcript:
        decode_ids, thinks = self.model.tokenizer.decode, self.model.template.thinks
        answered = decoded.closed and not self.thinking_only
        stale = {CLOSING_IDS, "verdict"}
        extra = {key: value for key, value in row.transcript.extra.items() if key not in stale}
        return row.transcript.replace(
            thinking=decode_ids(list(decoded.thinking)) if thinks else None,
            thinking_ids=decoded.thinking if thinks else None,
            answer=decode_ids(list(decoded.answer), skip_special_tokens=True) if answered else None,
            answer_ids=decoded.answer if answered else None,
            closed=decoded.closed,
            extra={
                **extra,
                FORCED: decoded.forced,
                CUT: decoded.cut,
                **_closing_note(self.model, decoded),
                **self.size.note,
            },
        )


def _closing_note(model: LensModel, decoded: Decoded) -> dict[str, object]:
    """The closing's ids, where they are not those that are spliced behind such thinking anyway."""
    if not (decoded.closed and model.template.thinks):
        return {}
    _, closing, spliced = spans_seen(model, decoded)
    return {} if spliced else {CLOSING_IDS: closing}


def _finished(prompts: Transcripts, done: Transcripts | None) -> dict[str, Transcript]:
    messages = {t.id: t.messages for t in prompts}
    strange = [t.id for t in done or () if messages.get(t.id) != t.messages]
    if strange:
        raise DataError(
            f"{len(strange)} of {len(done or ())} transcripts that are done already, such as {strange[0]!r}, answer "
            "other prompts than those given. Start again without them, or give the prompts they were made from."
        )
    return {t.id: t for t in done or ()}


def _prepare(
    model: LensModel, prompts: Sequence[Transcript], budget: Budget
) -> tuple[list[_Prompt], tuple[Omission, ...]]:
    room = budget.room(model)

    def prepare(transcript: Transcript) -> _Prompt:
        tokens = _prompt_tokens(model, transcript)
        if tokens.n_pos + room > model.shape.context:
            raise DataError(
                f"prompt of {tokens.n_pos} tokens and budgets of {room}, closing included, exceed the context of "
                f"{model.shape.context}; lower the budgets or drop it"
            )
        return _Prompt(transcript=transcript, tokens=tokens)

    rows, omitted = make_each(prompts, prepare, stage=STAGE)
    tell_control_tokens([row.tokens for row in rows])
    return rows, omitted


def _prompt_tokens(model: LensModel, transcript: Transcript) -> TokenizedTranscript:
    """A prompt up to where generation begins: behind the prompt, or without thinking behind its own tail."""
    if not transcript.prompt.strip():
        raise DataError(f"The prompt of {transcript.id!r} is empty. Give it text, or drop it.")
    thinks = model.template.thinks
    bare = transcript.replace(thinking="" if thinks else None)
    tokens = model.tokenization.tokens(bare, limited=False)
    if not thinks:
        return tokens
    stop = tokens.span(Span.PROMPT).stop
    return replace(tokens, token_ids=tokens.token_ids[:stop], bounds=(stop,) * 4)
