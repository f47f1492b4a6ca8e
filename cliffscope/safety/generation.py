"""What does the model think and answer?

1. Prompts are rendered and left-padded into batches; one forward pass a step, with the cache.
2. Each row thinks until it writes the closing tag; then the rest of the closing is fed to it, as the template has it.
3. A row that reaches its thinking budget has the whole closing fed to it (or, on request, is left unfinished).
4. It answers until it ends its turn or reaches its answer budget. Finished rows leave the batch.

Sampling draws one uniform number a row and step from a seed and the transcript's id, so that a transcript does not
depend on its batch-mates. Greedy by default: what is measured is then the model's first choice.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from cliffscope.errors import DataError, GenerationError
from cliffscope.models import LensModel
from cliffscope.transcripts.records import Message, Omission, Outcome, Transcript, Transcripts
from cliffscope.transcripts.templates import closing_ids
from cliffscope.transcripts.transcript import Span, tokenize

STAGE = "roll_out"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long and how a transcript may be generated; equal for every arm of a comparison."""

    max_thinking: int = 1024
    """Tokens of thinking at most."""
    max_answer: int = 128
    """Tokens of answer at most."""
    temperature: float = 0.0
    """0 is greedy."""
    force_closing: bool = True
    """Whether thinking that reaches its budget is closed for the model; otherwise it is unfinished."""
    seed: int = 0
    """Of the sampling."""

    def __post_init__(self) -> None:
        """Refuses budgets under which nothing can be generated."""
        if self.max_thinking < 1 or self.max_answer < 1 or not self.temperature >= 0:
            raise GenerationError(
                f"max_thinking={self.max_thinking}, max_answer={self.max_answer}, temperature={self.temperature}: "
                "expected at least 1 token each and a temperature of 0 or more."
            )


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
    batch_size: int = 64,
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
        batch_size: rows at most.
        progress: called with the number of transcripts done.

    Returns:
        Transcripts in the prompts' order, with the exact generated ids; prompts that do not fit the context are
        omitted, each with its reason.

    Raises:
        GenerationError: the budgets are not positive.

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
    if batch_size < 1:
        raise GenerationError(f"batch_size={batch_size}: expected at least 1 row.")
    asked = prompts.map(lambda t: _with_system(t, system))
    rows, omitted = _prepare(model, asked, budget)
    done: dict[str, Transcript] = {}
    rows.sort(key=lambda row: -len(row.prompt))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        _generate(model, batch, budget)
        done |= {row.transcript.id: row.finish(model) for row in batch}
        if progress is not None:
            progress(len(done))
    kept = [done[t.id] for t in asked if t.id in done]
    return Transcripts(kept, omitted=(*prompts.omitted, *omitted))


def check_left(transcripts: Transcripts) -> None:
    """Raises GenerationError, with the first reason, if every prompt of a roll-out was omitted."""
    if not len(transcripts):
        why = f": {transcripts.omitted[0].kind}" if transcripts.omitted else ""
        raise GenerationError(
            f"No transcript is left: every prompt was omitted{why}. Lower the budgets or give other prompts."
        )


@dataclass(eq=False, kw_only=True)
class _Row:
    """One transcript in the making."""

    transcript: Transcript
    prompt: list[int]
    closing: list[int]
    """Closing ids, from the template."""
    noise: np.ndarray
    thinks: bool
    thinking: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    """Ids to be fed before the model speaks again."""
    forced_closing: bool = False
    closed: bool = False
    ended: bool = False
    steps: int = 0

    def finish(self, model: LensModel) -> Transcript:
        """The transcript with what was generated."""
        decode = model.tokenizer.decode
        return self.transcript.replace(
            thinking=decode(self.thinking) if self.thinks else None,
            thinking_ids=tuple(self.thinking) if self.thinks else None,
            answer=decode(self.answer, skip_special_tokens=True) if self.closed else None,
            answer_ids=tuple(self.answer) if self.closed else None,
            closed=self.closed,
            extra={**self.transcript.extra, "forced_closing": self.forced_closing},
        )


def _with_system(transcript: Transcript, system: str | None) -> Transcript:
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


def _prepare(model: LensModel, prompts: Sequence[Transcript], budget: Budget) -> tuple[list[_Row], list[Omission]]:
    rows, omitted = [], []
    template, thinks = model.template, model.template.thinks
    for transcript in prompts:
        try:
            tokens = tokenize(transcript.replace(thinking="" if thinks else None), model.tokenizer, template)
        except DataError as error:
            omitted.append(Omission(stage=STAGE, reason=str(error), id=transcript.id))
            continue
        # Without thinking the closing is the prompt's own tail, so generation begins behind it.
        prompt = tokens.token_ids[: tokens.span(Span.PROMPT).stop if thinks else tokens.n_pos].tolist()
        closing = closing_ids(model.tokenizer, template) if thinks else []
        room = (budget.max_thinking if thinks else 0) + len(closing) + budget.max_answer
        if len(prompt) + room > model.shape.context:
            reason = (
                f"prompt of {len(prompt)} tokens and budgets of {room} exceed the context of {model.shape.context}; "
                "lower the budgets or drop it"
            )
            omitted.append(Omission(stage=STAGE, reason=reason, id=transcript.id))
            continue
        noise = _noise(f"{budget.seed}/{transcript.id}", room) if budget.temperature else np.empty(0)
        rows.append(
            _Row(transcript=transcript, prompt=prompt, closing=closing, noise=noise, thinks=thinks, closed=not thinks)
        )
    return rows, omitted


def _noise(key: str, n: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).random(n)


def _generate(model: LensModel, rows: list[_Row], budget: Budget) -> None:
    """Decodes all rows to their ends, writing into them."""
    ends = _end_ids(model)
    batch = model.to_batch([row.prompt for row in rows], left=True)
    ids, mask, positions = batch.ids, batch.mask, batch.positions
    cache = DynamicCache(config=model.hf.config)
    live = rows
    with torch.inference_mode():
        while live:
            output = model.hf(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            chosen = _choose(output.logits[:, -1].float(), live, budget)
            fed = [_advance(model, row, token, budget, ends) for row, token in zip(live, chosen, strict=True)]
            stay = [i for i, row in enumerate(live) if not row.ended]
            keep = torch.tensor(stay, device=mask.device, dtype=torch.long)
            ids = torch.tensor([[fed[i]] for i in stay], device=mask.device, dtype=torch.long)
            if len(stay) < len(live) and stay:
                cache.batch_select_indices(keep)
            mask = torch.cat([mask[keep], torch.ones_like(mask[keep, :1])], 1)
            positions = positions[keep, -1:] + 1
            live = [live[i] for i in stay]


def _choose(logits: Tensor, rows: list[_Row], budget: Budget) -> list[int]:
    if not budget.temperature:
        return [int(token) for token in logits.argmax(-1)]
    totals = torch.softmax(logits.double() / budget.temperature, -1).cumsum(-1).cpu()
    drawn = torch.tensor([[row.noise[row.steps]] for row in rows], dtype=torch.float64) * totals[:, -1:]
    return [int(token) for token in torch.searchsorted(totals, drawn, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)]


def _advance(model: LensModel, row: _Row, token: int, budget: Budget, ends: frozenset[int]) -> int:
    """Takes one token into a row; returns the token to be fed next."""
    row.steps += 1
    if row.forced:
        return row.forced.pop(0)
    if row.closed:
        row.answer.append(token)
        row.ended = token in ends or len(row.answer) >= budget.max_answer
        if token in ends:
            row.answer.pop()
        return token
    if token in ends:
        row.ended = True
        return token
    row.thinking.append(token)
    if _closes(model, row):
        _cut_tag(model, row)
        return token
    if len(row.thinking) >= budget.max_thinking:
        row.forced_closing = row.closed = budget.force_closing
        row.ended = not budget.force_closing
        row.forced = _closing_after(model, row)
    return token


def _closes(model: LensModel, row: _Row) -> bool:
    return model.template.think_close in model.tokenizer.decode(row.thinking[-8:])


def _cut_tag(model: LensModel, row: _Row) -> None:
    """Ends the thinking before its closing tag and queues what the template writes after the tag."""
    tag, decode = model.template.think_close, model.tokenizer.decode
    length = len(row.thinking)
    cut = next(n for n in range(1, length + 1) if tag in decode(row.thinking[length - n :]))
    row.thinking = row.thinking[: length - cut]
    after = model.tokenizer.encode(model.template.closing.partition(tag)[2], add_special_tokens=False)
    row.closed, row.forced = True, list(after)
    bare = closing_ids(model.tokenizer, model.template, after_newline=True)
    newline = row.closing[: len(row.closing) - len(bare)]
    if newline and row.thinking[-len(newline) :] == newline:
        row.thinking = row.thinking[: -len(newline)]


def _closing_after(model: LensModel, row: _Row) -> list[int]:
    carries = str(model.tokenizer.decode(row.thinking[-1:])).endswith("\n")
    return closing_ids(model.tokenizer, model.template, after_newline=carries)


def _end_ids(model: LensModel) -> frozenset[int]:
    """Ids that end a turn, from the generation config and the tokenizer."""
    config = model.hf.generation_config
    declared = config.eos_token_id if config is not None else None
    found = declared if isinstance(declared, list) else [declared]
    return frozenset(int(i) for i in (*found, model.tokenizer.eos_token_id) if i is not None)
