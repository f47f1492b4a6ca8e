"""By which convention does a model think, as its own roll-outs show it?

1. A few mild prompts are rolled out greedily, each until an answer has begun behind its thinking, or to a budget.
2. In each roll-out the first tag that closes thinking is looked up, with the space and the tags around it.
3. The most frequent opening and closing become a template, with their shares as evidence; what most roll-outs do not
   share is a question.

Needs no template: nothing is spliced, so that what is seen is what the model writes by itself.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from cliffscope.errors import GenerationError, UnclearTemplateError
from cliffscope.model.load import LensModel
from cliffscope.transcripts.conventions import MEASURED, Shown, textual_pairs
from cliffscope.transcripts.families import PLAIN, TEMPLATES, Template
from cliffscope.transcripts.observing import observe
from cliffscope.transcripts.rendering import render_chat
from cliffscope.transcripts.tags import TAG, TagPair, thinking_pairs
from cliffscope.transcripts.templates import detect_template, encode, stop_sequences, turn_end

PROMPTS = (
    "How do I bake bread?",
    "What is 17 + 25?",
    "Name three rivers in Europe.",
    "Why is the sky blue?",
    "Write a short poem about rain.",
    "How many days has a leap year?",
    "Explain what a bicycle is to a child.",
    "Translate 'good morning' into French.",
)
"""Mild prompts that a model answers with or without much thinking."""
MOST_TOKENS = 1024
"""Tokens a roll-out by default; a reasoning model closes its thinking about a simple question within them."""
ENOUGH = 0.75
"""Share of the roll-outs that closed from which on what they show counts as the model's convention."""
_BEHIND = 8
"""Tokens that are generated behind a closing tag, in which the answer begins."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RolledOut:
    """One roll-out of a model by itself."""

    prompt: str
    """The user's message."""
    ids: tuple[int, ...]
    """What the model wrote."""
    shown: Shown | None
    """How it opened and closed its thinking; None if it closed none within the budget."""
    closing_ids: tuple[int, ...]
    """Ids that hold the closing, as generated; the first may hold the end of the thinking, too."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ConventionProbe:
    """What roll-outs show of a model's convention."""

    template: Template
    """The convention, with evidence."""
    rolled_out: tuple[RolledOut, ...]
    """The roll-outs."""
    share: float
    """Of the roll-outs, how many show the convention."""

    def __repr__(self) -> str:
        """One line: the template, its closing, the share."""
        closing = repr(self.template.closing) if self.template.thinks else "no thinking"
        return f"ConventionProbe({closing}, {self.share:.0%} of {len(self.rolled_out)} roll-outs)"


def probe_convention(
    model: LensModel,
    *,
    prompts: Sequence[str] = PROMPTS,
    max_tokens: int = MOST_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> ConventionProbe:
    """Learns a model's convention from what it writes.

    Args:
        model: loaded with any template, such as `plain`; it is not used.
        prompts: mild ones.
        max_tokens: most tokens of each roll-out; one that has begun its answer behind its thinking ends earlier.
        progress: called with the number of roll-outs done.

    Returns:
        The convention: of the roll-outs where they agree, and `plain` where none holds a tag of thinking.

    Raises:
        GenerationError: the budget is below one token, or there are no prompts.
        UnclearTemplateError: the roll-outs do not agree, or open thinking that they do not close.

    Example:
        >>> import cliffscope as cs
        >>> probe_convention(cs.load_model("planted-llama"), prompts=PROMPTS[:2]).share
        1.0
    """
    if max_tokens < 1 or not prompts:
        raise GenerationError(f"max_tokens={max_tokens} and {len(prompts)} prompts: expected at least one of each.")
    seen = observe(model.tokenizer)
    pairs = tuple(dict.fromkeys((*seen.pairs, *textual_pairs(seen), *_known_pairs())))
    done: list[RolledOut] = []
    for prompt in prompts:
        rendered = render_chat(
            model.tokenizer, [{"role": "user", "content": prompt}], seen.switches_on, generation=True
        )
        ids = _generate(model, rendered, pairs, max_tokens)
        done.append(_read(model, prompt, rendered, ids, pairs))
        if progress is not None:
            progress(len(done))
    return _conclude(model, done, pairs)


def _known_pairs() -> list[TagPair]:
    return [TagPair(opening=t.think_open, closing=t.think_close, stem="think") for _, t in TEMPLATES if t.thinks]


def _generate(model: LensModel, rendered: str, pairs: Sequence[TagPair], max_tokens: int) -> tuple[int, ...]:
    """What the model writes behind a prompt, greedily, until its turn ends or a few tokens behind a closing tag."""
    tokenizer = model.tokenizer
    prompt = encode(tokenizer, rendered)
    if tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]:
        prompt = prompt if prompt[:1] == [tokenizer.bos_token_id] else [int(tokenizer.bos_token_id), *prompt]
    room = model.shape.context - len(prompt)
    ends = _turn_ends(model)

    def stop(ids: torch.Tensor, _: torch.Tensor, **__: object) -> torch.Tensor:
        written = ids[0, len(prompt) :].tolist()
        before = tokenizer.decode(written[: max(0, len(written) - _BEHIND)])
        return torch.tensor([any(pair.closing in before for pair in pairs)], device=ids.device)

    tokens = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        written = cast(Any, model.hf).generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max(1, min(max_tokens, room)),
            do_sample=False,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
            stopping_criteria=[stop],
        )
    return tuple(int(i) for i in written[0, len(prompt) :].tolist())


def _turn_ends(model: LensModel) -> set[int]:
    """Single ids that end the last turn of a conversation: those of an earlier one may end a channel."""
    config = model.hf.generation_config
    declared = config.eos_token_id if config is not None else None
    ends = set(declared if isinstance(declared, list) else [declared])
    sequences = stop_sequences(model.tokenizer, replace(PLAIN, end=str(model.tokenizer.eos_token or "")))
    return {
        int(i)
        for i in (*ends, model.tokenizer.eos_token_id, *(s[0] for s in sequences[:1] if len(s) == 1))
        if i is not None
    }


def _read(model: LensModel, prompt: str, rendered: str, ids: tuple[int, ...], pairs: Sequence[TagPair]) -> RolledOut:
    text = str(model.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
    candidates = [pair for pair in (*pairs, *thinking_pairs(text)) if pair.closing in text]
    ended = [p for p in candidates if p.opening in text or rendered.rstrip().endswith(p.opening)] or candidates
    if not ended:
        return RolledOut(prompt=prompt, ids=ids, shown=None, closing_ids=())
    pair = min(ended, key=lambda p: text.index(p.closing))
    shown = _around(text, rendered, pair)
    return RolledOut(prompt=prompt, ids=ids, shown=shown, closing_ids=_holding(model, ids, shown.closing))


def _around(text: str, rendered: str, pair: TagPair) -> Shown:
    """Opening and closing of a text that a model wrote, with the space and the tags that belong to them."""
    thinking, _, rest = text.partition(pair.closing)
    opened = rendered.rstrip().endswith(pair.opening)
    opening = ""
    if not opened and pair.opening in thinking:
        start = thinking.index(pair.opening) + len(pair.opening)
        opening = thinking[: start + _space(thinking[start:])]
        thinking = thinking[len(opening) :]
    before = thinking[len(thinking.rstrip()) :]
    after = rest[: _space(rest)]
    while (tag := TAG.match(rest, len(after))) is not None:
        end = tag.end()
        after = rest[: end + _space(rest[end:])]
    return Shown(
        think_open=pair.opening, think_close=pair.closing, opening=opening, closing=f"{before}{pair.closing}{after}"
    )


def _space(text: str) -> int:
    return len(text) - len(text.lstrip())


def _holding(model: LensModel, ids: tuple[int, ...], closing: str) -> tuple[int, ...]:
    """The fewest ids, among the earliest, that decode to a text which holds the closing."""
    decode = model.tokenizer.decode
    stop = next(n for n in range(1, len(ids) + 1) if closing in str(decode(list(ids[:n]))))
    start = next(n for n in range(stop - 1, -1, -1) if closing in str(decode(list(ids[n:stop]))))
    return ids[start:stop]


def _conclude(model: LensModel, done: Sequence[RolledOut], pairs: Sequence[TagPair]) -> ConventionProbe:
    closed = [r.shown for r in done if r.shown is not None]
    texts = [str(model.tokenizer.decode(list(r.ids))) for r in done]
    if not closed:
        return _without(model, done, texts, pairs)
    (shown, n), *others = Counter(closed).most_common()
    share = n / len(done)
    if n < ENOUGH * len(closed) or len(closed) < len(done) / 2:
        counts = ", ".join(f"{s.closing!r} {k} times" for s, k in [(shown, n), *others])
        raise _unclear(
            f"of {len(done)} roll-outs, {len(closed)} closed their thinking: {counts}",
            "Which closing does the model write? More tokens (max_tokens) let more roll-outs close.",
            shown,
        )
    return ConventionProbe(template=_template(model, done, shown, n), rolled_out=tuple(done), share=share)


def _without(
    model: LensModel, done: Sequence[RolledOut], texts: Sequence[str], pairs: Sequence[TagPair]
) -> ConventionProbe:
    opened = [text for text in texts if any(text.lstrip().startswith(p.opening) for p in pairs)]
    prompt_opens = any(observe(model.tokenizer).head.rstrip().endswith(p.opening) for p in pairs)
    if opened or prompt_opens:
        raise _unclear(
            f"none of {len(done)} roll-outs closed the thinking that it or its prompt opened",
            "What closes the thinking? Raise max_tokens to see.",
            None,
        )
    ended = sum(len(r.ids) > 0 for r in done)
    why = f"none of {ended} roll-outs holds a tag of thinking"
    template = replace(_prior(model) or PLAIN, evidence={"thinks": why})
    return ConventionProbe(template=template, rolled_out=tuple(done), share=1.0)


def _template(model: LensModel, done: Sequence[RolledOut], shown: Shown, n: int) -> Template:
    evidence = f"{n} of {len(done)} roll-outs"
    ids = Counter(r.closing_ids for r in done if r.shown == shown).most_common(1)[0][0]
    prior, seen = _prior(model), observe(model.tokenizer)
    same = prior is not None and (prior.think_close, prior.opening, prior.closing) == (
        *(shown.think_close, shown.opening, shown.closing),
    )
    on = dict(seen.switches_on)
    base = prior if prior is not None and same else None
    opening = evidence if shown.opening else f"the generation prompt ends in {seen.head[-40:]!r}"
    return Template(
        name=base.name if base else MEASURED,
        think_open=shown.think_open,
        think_close=shown.think_close,
        opening=shown.opening,
        closing=shown.closing,
        template_kwargs=on,
        off=dict(seen.switches_off),
        closing_seen=True,
        end=str(model.tokenizer.decode(list(turn_end(model.tokenizer, replace(PLAIN, template_kwargs=on))))),
        evidence={"thinks": evidence, "opening": opening, "closing": f"{evidence}, mostly as the ids {list(ids)}"},
    )


def _prior(model: LensModel) -> Template | None:
    """What chat template and vocabulary show by themselves; None where they leave a question."""
    try:
        return detect_template(model.tokenizer)
    except UnclearTemplateError:
        return None


def _unclear(why: str, question: str, shown: Shown | None) -> UnclearTemplateError:
    names = ("think_open", "think_close", "opening", "closing")
    answer: dict[str, object] = {name: getattr(shown, name) if shown else "?" for name in names}
    return UnclearTemplateError(
        f"The roll-outs do not settle how the model thinks: {why}. {question} Pass template= with a .json file such as "
        f"{answer}.",
        question=question,
        answer=answer,
    )
