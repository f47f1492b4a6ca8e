"""Which texts look like tags, and which of them belong together?

1. A tag is a short text between brackets of any of the usual kinds: `<x>`, `<|x|>`, `<|x>`, `[X]`, `◁x▷`.
2. What it opens or closes is its stem: its name without a slash and without words such as `begin of` and `end of`.
3. An opening and a closing tag of one stem are a pair; a pair whose stem speaks of thinking is evidence of thinking.

Knows neither tokenizers nor chat templates: text in, pairs out.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

TAG = re.compile(
    r"<\|[^<>|\n]{1,40}\|>|<｜[^<>｜\n]{1,40}｜>|<\|[^<>|\s]{1,40}>|<[^<>|/\s][^<>|\s]{0,40}\|>"
    r"|</?[A-Za-z][\w:.-]{0,40}>|\[/?[A-Za-z][\w -]{0,40}\]|◁/?[^◁▷\n]{1,40}▷"
)
"""A text that looks like a tag."""
THINKING = re.compile(
    r"think|thought|reason|reflect|scratch|ponder|deliberat|rationale|analysis|monolog|channel|(?<![a-z])cot(?![a-z])",
    re.IGNORECASE,
)
"""Stems that speak of thinking."""
_OPENS, _CLOSES = frozenset({"begin", "start", "open"}), frozenset({"end", "stop", "close"})
_COUNTERPARTS = (
    ("end_of_", "begin_of_"),
    ("END_OF_", "BEGIN_OF_"),
    ("END_", "START_"),
    ("_end", "_start"),
    ("end_", "start_"),
)


@dataclass(frozen=True, kw_only=True)
class TagPair:
    """An opening tag and the tag that closes it."""

    opening: str
    """Such as `<plan>`."""
    closing: str
    """Such as `</plan>`."""
    stem: str
    """What both are about, in lower case."""

    @property
    def thinking(self) -> bool:
        """Whether it speaks of thinking."""
        return bool(THINKING.search(self.stem))


def tags_in(text: str) -> list[str]:
    """The tags of a text, in order, each once.

    Example:
        >>> tags_in("<plan> so </plan>[BEGIN FINAL RESPONSE]")
        ['<plan>', '</plan>', '[BEGIN FINAL RESPONSE]']
    """
    return list(dict.fromkeys(TAG.findall(text)))


def pairs_of(tags: Iterable[str]) -> tuple[TagPair, ...]:
    """The pairs among tags, in the order of their closing tags.

    Args:
        tags: such as the added tokens of a vocabulary.

    Example:
        >>> [pair.opening for pair in pairs_of(["<|START_THINKING|>", "<|END_THINKING|>", "<tool>"])]
        ['<|START_THINKING|>']
    """
    tags = list(dict.fromkeys(tags))
    opening = {(shape, stem): tag for tag in tags for shape, stem, closes in (_parts(tag),) if not closes}
    pairs = []
    for tag in tags:
        shape, stem, closes = _parts(tag)
        if closes and stem and (shape, stem) in opening:
            pairs.append(TagPair(opening=opening[shape, stem], closing=tag, stem=stem))
    return tuple(pairs)


def counterpart(tag: str) -> str:
    """The tag that a tag implies: the opening one of a closing tag, the closing one of `<x>`, `[X]` or `◁x▷`.

    Args:
        tag: a tag.

    Returns:
        The other one; "" where none is implied.

    Example:
        >>> counterpart("</seed:think>"), counterpart("<|end_of_thought|>"), counterpart("[BEGIN FINAL RESPONSE]")
        ('<seed:think>', '<|begin_of_thought|>', '')
    """
    _, _, closes = _parts(tag)
    if "/" in tag:
        return tag.replace("/", "", 1)
    if closes and tag.startswith("<") and not tag.startswith("<|") and tag.endswith("|>"):
        return f"<|{tag[1:-2]}>"
    if closes:
        return next((tag.replace(end, begin, 1) for end, begin in _COUNTERPARTS if end in tag), "")
    simple = re.fullmatch(r"([<\[◁])(\w[\w:]*)[>\]▷]", tag)
    return f"{simple[1]}/{tag[1:]}" if simple else ""


def thinking_pairs(text: str) -> tuple[TagPair, ...]:
    """The pairs about thinking of a text, those included of which it holds only one tag.

    Example:
        >>> thinking_pairs("content.split('</think>')")[0].opening
        '<think>'
    """
    tags = [tag for tag in tags_in(text) if THINKING.search(tag)]
    written = pairs_of(tags)
    paired = {tag for pair in written for tag in (pair.opening, pair.closing)}
    implied = [pairs_of((tag, counterpart(tag))) for tag in tags if tag not in paired and counterpart(tag)]
    pairs = (*written, *(pair for pairs in implied for pair in pairs))
    return tuple(dict.fromkeys(pair for pair in pairs if pair.thinking))


def _parts(tag: str) -> tuple[str, str, bool]:
    """Brackets, stem in lower case, and whether it closes."""
    shape, name, closes = tag[:1], tag.strip("<>[]◁▷|｜"), "/" in tag
    if tag.startswith("<|") != tag.endswith("|>"):
        shape, closes = "<|>", tag.endswith("|>")
    elif tag.startswith(("<|", "<｜")):
        shape = tag[:2]
    words = [word for word in re.split(r"[_ -]+", name.replace("/", "").lower()) if word]
    closes |= any(word in _CLOSES for word in words)
    stem = [word for word in words if word not in _OPENS | _CLOSES and word != "of"]
    return shape, "_".join(stem), closes
