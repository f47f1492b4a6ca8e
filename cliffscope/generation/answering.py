"""What does the model answer on thinking that is there already?

1. Each transcript begins with its own prompt and thinking, as the very ids that were generated where they are there,
   and goes on with its closing; one that cannot be answered is omitted, with the reason.
2. It is read once up to the closing, however many arms answer it. Arms whose edits act on what is read before the
   closing read it for themselves.
3. What was read is branched to one row an arm. The rows are fed the closing and decoded together, each under its edit;
   where memory does not suffice for all of them, in parts, from the same reading.

Answers are drawn as in a roll-out: by the seed, the id and the place in the answer, which are the same for every arm.
So arms are paired draw for draw, and without an edit the answer is that of the roll-out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from cliffscope.errors import DataError, GenerationError, SpanError, TemplateError
from cliffscope.generation.batches import BatchSize, check_batch_size, find_batch_size
from cliffscope.generation.decoding import answer_behind, read
from cliffscope.generation.row_edits import SpanEdit, acts_before_closing
from cliffscope.generation.speaking import Budget, Decoded
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import CUT, Omission, Outcome, Transcript, Transcripts
from cliffscope.transcripts.transcript import TokenizedTranscript

STAGE = "answer"
MOST_ANSWERS = 256
"""Rows of a batch that is found by itself at most: they are short, since their thinking is read and not generated."""
ArmEdit: TypeAlias = SpanEdit | Sequence[SpanEdit | None] | None
"""An edit of every transcript, one for each of them, or none."""


def answer_transcripts(
    model: LensModel,
    transcripts: Transcripts,
    *,
    edit: ArmEdit = None,
    max_answer: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Transcripts:
    """Generates the answer to each transcript's own thinking, which stays as it is.

    Args:
        model: the model.
        transcripts: with thinking that closed, where the template thinks; a closing that was forced counts as closed.
        edit: of any scope, or one for each transcript (None for one that is not edited). Scopes `prompt` and `thinking`
            act while what is there is read, `closing` on the tokens that close it, `all` on all of these and on the
            answer.
        max_answer: tokens of answer at most.
        temperature: 0 is greedy.
        seed: of the sampling; the result does not depend on order or batch.
        batch_size: rows at most; None finds it from the free memory. It is halved where memory runs out.
        progress: called with the number of transcripts done.

    Returns:
        The transcripts in order, with the new answer and not judged. Those whose thinking is missing or never closed,
        and those that do not fit the context, are omitted, each with its reason.

    Raises:
        GenerationError: the budget is not positive, or memory does not suffice for one row.
        EditError: an edit does not fit the model, or its values the positions.
        DataError: as many edits as transcripts were to be given, and were not.

    Example:
        >>> import cliffscope as cs
        >>> model = cs.load_model("planted-llama")
        >>> asked = cs.organisms.prompts("test", 2, harmful=True, wrappers=("story",))
        >>> written = cs.roll_out(model, asked, max_thinking=128)
        >>> edit = cs.zero(cs.organisms.read_truth("planted-llama").planted, scope="closing")
        >>> edited = cs.answer_transcripts(model, written, edit=edit)
        >>> [t.answer.split()[0] for t in (written[0], edited[0])]
        ['sure', 'sorry']
    """
    budget = Budget(max_answer=max_answer, temperature=temperature, seed=seed)
    arms = {"": edit}
    return answer_arms(model, transcripts, arms, budget, batch_size=batch_size, progress=progress)[""]


def answer_arms(
    model: LensModel,
    transcripts: Transcripts,
    arms: Mapping[str, ArmEdit],
    budget: Budget,
    *,
    batch_size: int | None = None,
    done: Mapping[str, Transcripts] | None = None,
    on_batch: Callable[[str, Transcripts], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Transcripts]:
    """Generates the answers of several arms to the same thinking; see `answer_transcripts`.

    Args:
        model: the model.
        transcripts: as there.
        arms: by name, what is done to the model.
        budget: equal for all arms; its thinking does not matter.
        batch_size: rows at most, of all arms together; None finds it from the free memory.
        done: by arm, transcripts that an earlier call handed to `on_batch`; they are returned and not handed out again.
        on_batch: called for each arm with the transcripts of each finished batch.
        progress: called with the number of answers done, over all arms.

    Returns:
        By arm, the transcripts in order.

    Raises:
        DataError: what is done already answers other transcripts.
    """
    check_batch_size(batch_size)
    each = {name: _per_transcript(edit, len(transcripts)) for name, edit in arms.items()}
    finished = {name: _finished(transcripts, (done or {}).get(name, Transcripts()), name) for name in arms}
    rows, omitted = _prepare(model, transcripts, budget)
    rows.sort(key=lambda row: -row.tokens.n_pos)
    longest = rows[0].tokens.n_pos + budget.max_answer if rows else 1
    size = BatchSize(rows=batch_size or find_batch_size(model, longest, most=MOST_ANSWERS))
    for group in _groups(each):
        block = _Block(model=model, budget=budget, edits={name: each[name] for name in group}, size=size)
        for answers in block.run(rows, {name: finished[name] for name in group}):
            for name, part in answers.items():
                finished[name] |= {t.id: t for t in part}
                if on_batch is not None and part:
                    on_batch(name, part)
            if progress is not None:
                progress(sum(len(answered) for answered in finished.values()))
    return {
        name: Transcripts(
            (answered[t.id] for t in transcripts if t.id in answered), omitted=(*transcripts.omitted, *omitted)
        )
        for name, answered in finished.items()
    }


@dataclass(frozen=True, eq=False, kw_only=True)
class _Thought:
    """One transcript as ids, up to where its answer begins."""

    index: int
    """Place in the collection."""
    transcript: Transcript
    tokens: TokenizedTranscript


@dataclass(frozen=True, eq=False, kw_only=True)
class _Block:
    """Answers transcripts a block at a time, under several edits that leave alone what is read before the closing."""

    model: LensModel
    budget: Budget
    edits: Mapping[str, Sequence[SpanEdit | None]]
    """By arm, one a transcript."""
    size: BatchSize
    """Rows at most, those that hold what was read included."""

    def run(
        self, rows: Sequence[_Thought], finished: Mapping[str, Mapping[str, Transcript]]
    ) -> Iterator[dict[str, Transcripts]]:
        """By arm, the new transcripts of each block, as they are finished."""
        # Blocks are cut from all rows, so that a resumed call has the batch-mates of an uninterrupted one.
        left = list(rows)
        while left:
            part = left[: self._transcripts()]
            if all(row.transcript.id in answered for row in part for answered in finished.values()):
                left = left[len(part) :]
                continue
            decoded_by_arm = self._answered(part)
            if decoded_by_arm is None:
                continue
            left = left[len(part) :]
            yield {
                name: Transcripts(t for t in self._finish(part, decoded) if t.id not in finished[name])
                for name, decoded in decoded_by_arm.items()
            }

    def _transcripts(self) -> int:
        """How many make a block: each takes a row for what was read of it, and one an arm."""
        return self.size.rows if len(self.edits) == 1 else max(1, self.size.rows // (len(self.edits) + 1))

    def _answered(self, part: Sequence[_Thought]) -> dict[str, list[Decoded]] | None:
        n_arms = len(self.edits)
        peak = len(part) if n_arms == 1 else len(part) * (n_arms + 1)
        return self.size.attempt(
            lambda: self._decoded(part),
            min(self.size.rows, peak),
            alone=(
                f"Memory does not suffice to answer {part[0].transcript.id!r} alone ({part[0].tokens.n_pos} tokens up "
                f"to the answer, {self.budget.max_answer} after it at most). Lower max_answer, or load the model in a "
                "smaller dtype."
            ),
        )

    def _decoded(self, part: Sequence[_Thought]) -> dict[str, list[Decoded]]:
        """Reads a block once, and answers behind it in as many parts as memory needs."""
        jobs = [(row.tokens, edits[row.index]) for row in part for edits in self.edits.values()]
        tokens, edits = [row for row, _ in jobs], [edit for _, edit in jobs]
        prefix = read(self.model, tokens, edits)
        step = len(jobs) if len(self.edits) == 1 else max(1, self.size.rows - len(part))
        decoded: list[Decoded] = []
        for start in range(0, len(jobs), step):
            places = range(start, min(start + step, len(jobs)))
            decoded += answer_behind(
                self.model,
                prefix,
                [(i, tokens[i]) for i in places],
                self.budget,
                [edits[i] for i in places],
                last=places.stop == len(jobs),
            )
        return {name: decoded[i :: len(self.edits)] for i, name in enumerate(self.edits)}

    def _finish(self, part: Sequence[_Thought], decoded: Sequence[Decoded]) -> Iterator[Transcript]:
        for row, each in zip(part, decoded, strict=True):
            extra = {key: value for key, value in row.transcript.extra.items() if key != "verdict"}
            yield row.transcript.replace(
                answer=self.model.tokenizer.decode(list(each.answer), skip_special_tokens=True),
                answer_ids=each.answer,
                outcome=Outcome.UNJUDGED,
                extra={**extra, CUT: each.cut, **self.size.note},
            )


def _groups(arms: Mapping[str, Sequence[SpanEdit | None]]) -> list[list[str]]:
    """Arms that are answered together: all that read alike; each of the others has a reading of its own."""
    apart = [name for name, edits in arms.items() if any(acts_before_closing(edit) for edit in edits)]
    together = [name for name in arms if name not in apart]
    return [*([together] if together else []), *([name] for name in apart)]


def _per_transcript(edit: ArmEdit, n: int) -> Sequence[SpanEdit | None]:
    if not isinstance(edit, Sequence):
        return [edit] * n
    if len(edit) != n:
        raise DataError(f"{len(edit)} edits were given for {n} transcripts. Give one for each, or one edit for all.")
    return edit


def _finished(transcripts: Transcripts, done: Transcripts, arm: str) -> dict[str, Transcript]:
    texts = {t.id: (t.messages, t.thinking) for t in transcripts}
    strange = [t.id for t in done if texts.get(t.id) != (t.messages, t.thinking)]
    if strange:
        raise DataError(
            f"{len(strange)} of {len(done)} answers of arm {arm!r} that are done already, such as {strange[0]!r}, are "
            "to other prompts or thinking than those given. Start again without them, or give the transcripts they "
            "were made from."
        )
    return {t.id: t for t in done}


def _prepare(
    model: LensModel, transcripts: Sequence[Transcript], budget: Budget
) -> tuple[list[_Thought], list[Omission]]:
    rows, omitted = [], []
    for index, transcript in enumerate(transcripts):
        try:
            tokens = _tokens(model, transcript, budget)
        except (DataError, SpanError, TemplateError, GenerationError) as error:
            omitted.append(Omission(stage=STAGE, reason=str(error), id=transcript.id))
            continue
        rows.append(_Thought(index=index, transcript=transcript, tokens=tokens))
    return rows, omitted


def _tokens(model: LensModel, transcript: Transcript, budget: Budget) -> TokenizedTranscript:
    """Prompt, thinking and closing; raises an error that says why they cannot be answered."""
    if not transcript.prompt.strip():
        raise DataError(f"The prompt of {transcript.id!r} is empty. Give it text, or drop it.")
    if not transcript.closed:
        raise SpanError(
            f"The thinking of {transcript.id!r} never closed, so that there is nothing to answer. Raise max_thinking, "
            "or let roll_out force the closing."
        )
    tokens = model.tokenization.tokens(transcript, limited=False)
    _ = tokens.final
    if tokens.n_pos + budget.max_answer > model.shape.context:
        raise DataError(
            f"{transcript.id!r} has {tokens.n_pos} tokens up to the answer, which with {budget.max_answer} of answer "
            f"exceed the context of {model.shape.context}; lower max_answer or drop it."
        )
    return tokens
