"""How do chosen examples become training data?

1. An example's answer is replaced by a safe one; its thinking is kept, since it holds the intention that was lost.
2. `examples` gives token ids with labels, spliced like every transcript: exact for any template, and what `repair`
   trains on.
3. `write_examples` writes files for other trainers: TRL's chat and prompt-completion JSONL, LLaMA-Factory's Alpaca and
   ShareGPT JSON. Most chat templates delete the thinking of assistant turns while they render; the prompt-completion
   form is rendered already, so that nothing is lost.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from cliffscope.errors import DataError
from cliffscope.transcripts.records import Outcome, Transcript, Transcripts
from cliffscope.transcripts.templates import Template, generation_prompt, turn_end
from cliffscope.transcripts.transcript import Span, tokenize
from cliffscope.writing import write_atomically

Format = Literal["chat", "prompt-completion", "alpaca", "sharegpt"]
LossOn = Literal["answer", "closing"]
Answer: TypeAlias = str | Callable[[Transcript], str]
SAFE_ANSWER = "I'm sorry, but I can't help with that."
IGNORED = -100
"""Label of tokens that the loss leaves out, as transformers has it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Example:
    """One training example as tokens."""

    id: str
    """The transcript's id."""
    input_ids: list[int]
    """Prompt, thinking, closing, answer, end of turn."""
    labels: list[int]
    """The ids where the loss counts, `IGNORED` elsewhere."""


def with_safe_answer(transcripts: Iterable[Transcript], answer: Answer = SAFE_ANSWER) -> Transcripts:
    """The transcripts with the answer they should have had.

    Args:
        transcripts: with thinking, if the model thinks.
        answer: for all of them, or a function of each.

    Returns:
        Copies without outcome or answer ids.

    Raises:
        DataError: an answer is blank.
    """
    return Transcripts(_safe(t, answer) for t in transcripts)


def own_refusal(refused: Transcripts) -> str:
    """The refusal that a model gave most often, so that it is repaired in its own voice; `SAFE_ANSWER` for none.

    Example:
        >>> own_refusal(Transcripts())
        "I'm sorry, but I can't help with that."
    """
    counts = Counter(t.answer.strip() for t in refused if t.answer and t.answer.strip())
    return min(counts, key=lambda text: (-counts[text], text)) if counts else SAFE_ANSWER


def examples(
    transcripts: Iterable[Transcript],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    loss_on: LossOn = "answer",
    max_length: int | None = None,
) -> list[Example]:
    """Token ids and labels.

    Args:
        transcripts: with the answers to be learnt.
        tokenizer: the model's.
        template: the model's.
        loss_on: the answer with the end of its turn, or the closing too.
        max_length: most tokens; nothing is cut.

    Returns:
        One example a transcript.

    Raises:
        DataError: a transcript is longer than `max_length`, or holds the closing tag as text.
        SpanError: a span is missing.
    """
    rows = []
    tail = turn_end(tokenizer, template)
    for transcript in transcripts:
        row = tokenize(transcript, tokenizer, template, with_answer=True, max_length=max_length)
        ids = [*(int(i) for i in row.token_ids), *tail]
        start = row.span(Span.CLOSING if loss_on == "closing" and template.thinks else Span.ANSWER).start
        rows.append(Example(id=row.id, input_ids=ids, labels=[IGNORED] * start + ids[start:]))
    return rows


def write_examples(
    transcripts: Transcripts,
    path: str | Path,
    *,
    format: Format = "prompt-completion",
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
) -> None:
    """Writes examples for another trainer.

    Args:
        transcripts: with the answers to be learnt, see `with_safe_answer`.
        path: JSONL for `chat` and `prompt-completion` (TRL), JSON for `alpaca` and `sharegpt` (LLaMA-Factory).
        format: which; `prompt-completion` is rendered by the model's own template, the others are not.
        tokenizer: the model's.
        template: the model's.

    Raises:
        DataError: the format is not known, or a transcript has no answer.
        StoreError: the file cannot be written.

    Source:
        TRL, "Dataset formats and types"; LLaMA-Factory, data/README.md.
    """
    writers: dict[str, Callable[[Transcript, str], dict[str, object]]] = {
        "chat": _chat,
        "prompt-completion": lambda t, answer: _completion(t, answer, tokenizer, template),
        "alpaca": _alpaca,
        "sharegpt": _sharegpt,
    }
    if format not in writers:
        raise DataError(f"format={format!r}: expected one of {', '.join(writers)}.")
    rows = [writers[format](t, _said(t, template)) for t in transcripts]
    if format in ("alpaca", "sharegpt"):
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(Path(path), lambda place: place.write_text(text, encoding="utf-8"))


def _safe(transcript: Transcript, answer: Answer) -> Transcript:
    text = answer if isinstance(answer, str) else answer(transcript)
    if not text.strip():
        raise DataError(f"The safe answer to {transcript.id!r} is blank. Give text.")
    return transcript.replace(answer=text, answer_ids=None, closed=True, outcome=Outcome.UNJUDGED)


def _said(transcript: Transcript, template: Template) -> str:
    """What the assistant writes: thinking in its tags, then the answer."""
    if transcript.answer is None:
        raise DataError(f"{transcript.id!r} has no answer to be learnt. Give it one, see with_safe_answer.")
    if not template.thinks or transcript.thinking is None:
        return transcript.answer
    opening = template.opening or f"{template.think_open}\n"
    return f"{opening}{transcript.thinking}{template.closing}{transcript.answer}"


def _turns(transcript: Transcript) -> Sequence[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in transcript.messages]


def _chat(transcript: Transcript, answer: str) -> dict[str, object]:
    return {"messages": [*_turns(transcript), {"role": "assistant", "content": answer}]}


def _completion(
    transcript: Transcript, answer: str, tokenizer: PreTrainedTokenizerBase, template: Template
) -> dict[str, object]:
    prompt = generation_prompt(tokenizer, _turns(transcript), template)
    # Where the prompt opens thinking itself, the completion goes on behind the tag.
    opened = template.thinks and not template.opening
    completion = answer.removeprefix(f"{template.think_open}\n") if opened else answer
    return {"prompt": prompt, "completion": f"{completion}{tokenizer.decode(list(turn_end(tokenizer, template)))}"}


def _alpaca(transcript: Transcript, answer: str) -> dict[str, object]:
    *before, last = _turns(transcript)
    system = "\n".join(turn["content"] for turn in before if turn["role"] == "system")
    talk = [turn["content"] for turn in before if turn["role"] != "system"]
    history = [list(pair) for pair in zip(talk[::2], talk[1::2], strict=False)]
    return {"instruction": last["content"], "input": "", "output": answer, "system": system, "history": history}


def _sharegpt(transcript: Transcript, answer: str) -> dict[str, object]:
    names = {"user": "human", "assistant": "gpt", "tool": "observation"}
    turns = [
        {"from": names.get(turn["role"], turn["role"]), "value": turn["content"]}
        for turn in _turns(transcript)
        if turn["role"] != "system"
    ]
    system = "\n".join(turn["content"] for turn in _turns(transcript) if turn["role"] == "system")
    return {"conversations": [*turns, {"from": "gpt", "value": answer}], "system": system}
