"""By which convention does a model think, as far as its tokenizer and chat template show it?

1. A rendered answered turn with reasoning shows opening and closing exactly; next to it, a prompt whose thinking is
   switched off, and text that the chat template's source puts around reasoning.
2. Whether the model thinks is shown by a generation prompt that ends within an opening tag, by a switch that closes
   thinking, or by instructions in the prompt.
3. The families of families.py are priors: one that fits and that nothing contradicts supplies what is not shown.
4. What is neither shown nor supplied, or is shown in two ways, is a question, asked with all that is known.

Nothing is guessed. Roll-outs answer what stays open (generation/probing.py).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cliffscope.errors import UnclearTemplateError
from cliffscope.transcripts.families import PLAIN, Earlier, Template
from cliffscope.transcripts.observing import Observations, common_start, has_closed
from cliffscope.transcripts.tags import TagPair, counterpart, tags_in

MEASURED = "measured"
"""Name of a template that no family of this package has."""
_WORDS = re.compile(r"think|thought|reason", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """How thinking is opened and closed, as something shows it."""

    think_open: str
    think_close: str
    opening: str
    closing: str


def conclude(seen: Observations, prior: Template | None) -> Template:
    """The convention that observations show, completed by a prior.

    Args:
        seen: from `observe`.
        prior: the first known template that fits, if any.

    Returns:
        A template with the evidence for each field, without the end of its turn.

    Raises:
        UnclearTemplateError: what is shown does not suffice, or contradicts itself.
    """
    if _closed_at_once(seen):
        return _without_thinking(PLAIN, "the generation prompt closes thinking before the model writes anything")
    place, shown = _first_shown(seen)
    if len(shown) > 1:
        raise _ask_which(seen, shown)
    thinks = _shows_thinking(seen, shown)
    if prior is not None and prior.thinks and (not shown or _same(prior, shown[0])):
        return _of_prior(seen, prior, place, thinks)
    if shown and thinks:
        return _measured(seen, shown[0], place, thinks)
    if shown:
        raise _ask_whether(seen, shown[0], f"{place} holds thinking, but nothing says that the model writes any")
    if not _mentions_thinking(seen):
        return _without_thinking(prior or PLAIN, "neither the chat template nor the vocabulary mentions thinking")
    raise _ask_closing(seen) if thinks else _ask_whether(seen, None, _mention(seen))


def textual_pairs(seen: Observations) -> tuple[TagPair, ...]:
    """Pairs of a text with which the prompt opens thinking and each tag that may close it.

    Args:
        seen: from `observe`.

    Returns:
        None where the prompt does not open thinking by a text, or opens it by a tag of a pair.
    """
    opened = "" if _ends_open(seen) else _extra(seen)
    tags = [tag for text in seen.source.texts for tag in tags_in(text)] if opened else []
    around = (seen.head, *seen.after)
    closings = [tag for tag in dict.fromkeys(tags) if tag not in opened and not any(tag in text for text in around)]
    return tuple(TagPair(opening=opened, closing=tag, stem="") for tag in closings)


def _first_shown(seen: Observations) -> tuple[str, tuple[Shown, ...]]:
    """Where opening and closing are shown, in words, and how; the most direct place counts."""
    places = {
        "a rendered answered turn": _rendered,
        "a prompt with thinking off": _switched,
        "the text that the chat template puts around reasoning": _spelled,
    }
    return next(((place, shown) for place, look in places.items() if (shown := look(seen))), ("", ()))


def _rendered(seen: Observations) -> tuple[Shown, ...]:
    """What rendered answered turns show; forms of the message count before tags in its content."""
    apart = [r for r in seen.renderings if not r.form.startswith("tags")]
    shown = []
    for rendering in apart or seen.renderings:
        if not rendering.before.startswith(seen.head):
            continue
        rest, closing = rendering.before[len(seen.head) :], rendering.closing
        close = next(iter(tags_in(closing)), closing.strip())
        opened = _opened_by_prompt(seen, close)
        if rest.strip() and not _ends_open(seen):
            shown.append(Shown(think_open=rest.strip(), think_close=close, opening=rest, closing=closing))
        elif not rest.strip() and opened:
            shown.append(Shown(think_open=opened, think_close=close, opening="", closing=closing))
    return tuple(dict.fromkeys(shown))


def _switched(seen: Observations) -> tuple[Shown, ...]:
    """What a prompt with thinking off shows: empty thinking between its tags, if there is room for newlines."""
    if seen.shut is None or not seen.shut.startswith(seen.head):
        return ()
    rest = seen.shut[len(seen.head) :]
    for pair in seen.pairs:
        before, close, after = rest.partition(pair.closing)
        if not close or after.strip():
            continue
        if seen.head.rstrip().endswith(pair.opening) and before == "\n":
            return (_shown(pair, "", rest),)
        if before.strip() == pair.opening and before.endswith(f"{pair.opening}\n\n"):
            return (_shown(pair, before[:-1], f"\n{close}{after}"),)
    return ()


def _spelled(seen: Observations) -> tuple[Shown, ...]:
    """What the source writes around something that is filled in between a pair of tags."""
    return tuple(dict.fromkeys(shown for pair in seen.pairs for shown in _spelled_runs(seen, pair)))


def _spelled_runs(seen: Observations, pair: TagPair) -> Iterator[Shown]:
    for run in seen.source.runs:
        for i, text in enumerate(run[:-2]):
            end = run[i + 2]
            if text is None or end is None or not end.lstrip().startswith(pair.closing):
                continue
            opening = re.search(rf"{re.escape(pair.opening)}[^<>\[\]]{{0,20}}\Z", text)
            behind = end.partition(pair.closing)[2]
            off = (seen.shut or "").rpartition(pair.closing)
            # Where nothing is filled in behind the text, what follows the tag is written elsewhere.
            complete = len(run) > i + 3 or bool(off[1] and off[2] == behind)
            if opening is not None and complete:
                opened = seen.head.rstrip().endswith(opening[0].strip())
                tag = TagPair(opening=opening[0].strip(), closing=pair.closing, stem=pair.stem)
                yield _shown(tag, "" if opened else opening[0], end)


def _shown(pair: TagPair, opening: str, closing: str) -> Shown:
    return Shown(think_open=pair.opening, think_close=pair.closing, opening=opening, closing=closing)


def _opened_by_prompt(seen: Observations, close: str) -> str:
    """Text by which the generation prompt opens the thinking that `close` ends; "" if it does not."""
    openings = [pair.opening for pair in seen.pairs if pair.closing == close]
    for opening in (*openings, counterpart(close)):
        if opening and seen.head.rstrip().endswith(opening):
            return opening
    return _extra(seen)


def _extra(seen: Observations) -> str:
    """What the generation prompt writes that a turn without reasoning does not begin with."""
    if seen.plain is None:
        return ""
    return seen.head[len(common_start(seen.head, seen.plain)) :].strip()


def _ends_open(seen: Observations) -> bool:
    return any(seen.head.rstrip().endswith(pair.opening) for pair in seen.pairs)


def _closed_at_once(seen: Observations) -> bool:
    return has_closed(seen.head, seen.pairs)


def _shows_thinking(seen: Observations, shown: Sequence[Shown]) -> str:
    """What says that the model thinks, in words; "" if nothing does."""
    tail = seen.head[-40:]
    if _ends_open(seen):
        return f"the generation prompt ends in {tail!r}"
    if has_closed(seen.shut or "", seen.pairs):
        return f"a switch of the chat template closes thinking ({_words(seen.switches_off)})"
    closings = {pair.closing for pair in seen.prompt_pairs}
    if any(s.think_close in closings for s in shown) or (not shown and closings):
        return "the prompt instructs the model to think between tags"
    if _extra(seen):
        return f"the generation prompt ends in {tail!r}, with which no plain answer begins"
    return ""


def _mentions_thinking(seen: Observations) -> bool:
    return bool(_mention(seen))


def _mention(seen: Observations) -> str:
    """Where thinking is mentioned, in words; "" if nowhere."""
    if seen.source_pairs or seen.prompt_pairs:
        pair = (*seen.source_pairs, *seen.prompt_pairs)[0]
        return f"the chat template mentions {pair.closing}, but does not open thinking"
    names = [n for n in (*seen.source.fields, *sorted(seen.source.variables)) if _WORDS.search(n)]
    if names:
        return f"the chat template reads {names[0][:40]!r}, but does not open thinking"
    if any(_WORDS.search(tag) for text in seen.source.texts for tag in tags_in(text)):
        return "the chat template has a tag that speaks of thinking, but does not open thinking"
    if seen.vocabulary_pairs:
        pair = seen.vocabulary_pairs[0]
        return f"the vocabulary has {pair.opening} and {pair.closing}, which the chat template never mentions"
    return _extra(seen) and f"the generation prompt ends in {seen.head[-40:]!r}"


def _same(prior: Template, shown: Shown) -> bool:
    return (prior.think_close, prior.opening, prior.closing) == (shown.think_close, shown.opening, shown.closing)


def _of_prior(seen: Observations, prior: Template, place: str, thinks: str) -> Template:
    source = f"family: published for {prior.models or prior.name}; the chat template does not write it"
    shown = place if place else source
    if not place:
        _check_tags(seen, prior)
        _check_space(seen, prior)
    opening = shown if prior.opening else f"the generation prompt ends in {seen.head[-40:]!r}"
    evidence = {**_common(seen), "thinks": thinks or source, "opening": opening, "closing": shown}
    return replace(prior, evidence=evidence)


def _check_tags(seen: Observations, prior: Template) -> None:
    """Raises UnclearTemplateError where what speaks of thinking has tags, and none is the prior's."""
    pairs = (*seen.source_pairs, *seen.prompt_pairs) or seen.vocabulary_pairs
    if pairs and prior.think_close not in {pair.closing for pair in pairs}:
        raise _ask_closing(seen, f"it has {pairs[0].closing}, where {prior.think_close} was expected")


def _check_space(seen: Observations, prior: Template) -> None:
    """Raises UnclearTemplateError where a text of the source has more newlines behind the tag than the prior."""
    after = prior.closing.partition(prior.think_close)[2]
    for text in seen.source.texts:
        for match in re.finditer(rf"{re.escape(prior.think_close)}(\n*)", text):
            if not after.startswith(match[1]):
                raise _ask_closing(seen, f"its source has {match[0]!r}, where {prior.closing!r} was expected")


def _measured(seen: Observations, shown: Shown, place: str, thinks: str) -> Template:
    opening = thinks if not shown.opening else place
    return Template(
        name=MEASURED,
        think_open=shown.think_open,
        think_close=shown.think_close,
        opening=shown.opening,
        closing=shown.closing,
        template_kwargs=dict(seen.switches_on),
        off=dict(seen.switches_off),
        earlier=_earlier(seen),
        closing_seen=True,
        evidence={**_common(seen), "thinks": thinks, "opening": opening, "closing": place},
    )


def _without_thinking(template: Template, why: str) -> Template:
    return replace(template, evidence={"thinks": why})


def _earlier(seen: Observations) -> Earlier:
    if seen.drops_earlier is None:
        return Earlier.UNKNOWN
    return Earlier.DROPPED if seen.drops_earlier else Earlier.KEPT


def _common(seen: Observations) -> dict[str, str]:
    evidence = {"earlier": "a rendered conversation with an earlier answer"} if seen.drops_earlier is not None else {}
    if seen.switches_on:
        evidence["template_kwargs"] = f"the generation prompt changes with {_words(seen.switches_off)}"
    return evidence


def _words(switches: Mapping[str, bool]) -> str:
    return ", ".join(f"{name}={value}" for name, value in switches.items())


def _ask_which(seen: Observations, shown: Sequence[Shown]) -> UnclearTemplateError:
    ways = " or ".join(sorted({f"{s.opening!r} … {s.closing!r}" for s in shown}))
    return _question(
        f"its renderings contradict each other ({ways})",
        "Which of these does the model write around its thinking?",
        _fields(seen, shown[0]),
    )


def _ask_whether(seen: Observations, shown: Shown | None, why: str) -> UnclearTemplateError:
    return _question(
        why,
        "Does the model write thinking before its answer? If not, pass template='plain'; if so, complete the JSON.",
        _fields(seen, shown),
    )


def _ask_closing(seen: Observations, why: str = "") -> UnclearTemplateError:
    why = why or "the chat template never writes what closes thinking"
    question = "What does the model write between the last word of its thinking and the first of its answer, newlines"
    return _question(why, f"{question} included?", _fields(seen, None))


def _fields(seen: Observations, shown: Shown | None) -> dict[str, object]:
    """The fields of a template as far as they are known, "?" for the rest."""
    pair = seen.pairs[0] if seen.pairs else None
    opened = _opened_by_prompt(seen, pair.closing if pair else "")
    fields: dict[str, object] = {
        "think_open": opened or (pair.opening if pair else "?"),
        "think_close": pair.closing if pair else "?",
        "opening": "" if opened else "?",
        "closing": "?",
    }
    if shown is not None:
        names = ("think_open", "think_close", "opening", "closing")
        fields = {name: getattr(shown, name) for name in names}
    return {**fields, "template_kwargs": dict(seen.switches_on)}


def _question(why: str, question: str, fields: dict[str, object]) -> UnclearTemplateError:
    text = json.dumps(fields, ensure_ascii=False)
    message = (
        f"The chat template follows no known convention that settles how the model thinks: {why}. {question} Pass "
        "template=NAME with a name of cliffscope.TEMPLATES, package.module:name, a .json file such as "
        f"{text}, or template=Template(name=..., think_open=..., think_close=..., opening=..., closing=...). "
        "`cliffscope template --model MODEL --learn --save my.json` lets the model answer."
    )
    return UnclearTemplateError(message, question=question, answer=fields)
