"""Which part of a text is thinking, and which is answer?

1. `split_reply` splits what a model of a known template wrote.
2. `part_answer` looks for thinking in an answer of unknown origin: a tag pair, a closing tag alone, an opening tag that
   nothing closes, harmony's channels, and what is left of those where their marks were stripped.
3. `part_turn` moves thinking out of a transcript's answer, or says why the answer cannot be judged.

Knows text and templates, no tokens.
"""

import re
from dataclasses import dataclass

from cliffscope.transcripts.families import TEMPLATES, Template
from cliffscope.transcripts.records import Transcript
from cliffscope.transcripts.tags import TagPair, thinking_pairs

SPLIT = "split"
"""Key in a transcript's `extra`: how thinking was told apart from its answer."""
SERVER_REFUSAL = "server_refusal"
"""Key in a transcript's `extra`: the refusal that a server gave in a field of its own."""
_FINAL = re.compile(
    r"<\|channel\|>\s*final\s*(?:<\|constrain\|>[^<]*)?<\|message\|>|(?:^|(?<=\S))assistant\s*final(?=\S)", re.MULTILINE
)
_HARMONY = re.compile(r"<\|(?:start|channel|message|end|return|call)\|>")
_STRIPPED = re.compile(r"\A\s*(?:assistant)?\s*(?:analysis|commentary)(?=[A-Z\"'(\d])")
_OPENINGS = re.compile(r"\A\s*(?:<\|start\|>)?(?:assistant)?\s*(?:<\|channel\|>)?analysis\s*(?:<\|message\|>)?")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """An answer, and the thinking that it held."""

    thinking: str | None
    """The thinking without tags; None if there was none."""
    answer: str | None
    """The answer without thinking; None where it cannot be told apart."""
    reason: str
    """What was found, in words; "" for an answer without thinking."""


def part_answer(text: str, template: Template | None = None, *, thinking: str = "") -> Parts:
    """Tells thinking apart from an answer.

    Args:
        text: an answer, as a file, a log or a server gives it.
        template: a template whose tags count beside those of all known ones.
        thinking: what is known to be thinking already; a closing tag alone then splits only this from the answer.

    Returns:
        The parts. Tags within code are no thinking.

    Example:
        >>> part_answer("<think>Bread is harmless.</think>Mix flour.").answer
        'Mix flour.'
        >>> part_answer("analysisBread is harmless.assistantfinalMix flour.").thinking
        'Bread is harmless.'
        >>> part_answer("<think>Bread is").answer is None
        True
    """
    prose = _CODE.sub(lambda match: " " * len(match[0]), text)
    if _HARMONY.search(prose) or _STRIPPED.match(prose) or re.search(r"\S?assistantfinal\S", prose):
        return _part_harmony(text, prose)
    for pair in _pairs(prose, template):
        parts = _part_tags(text, prose, pair)
        if parts is None:
            continue
        again = (parts.thinking or "").strip() in ("", thinking.strip())
        if not thinking.strip() or again or prose.lstrip().startswith(pair.opening):
            return parts
        return Parts(thinking=None, answer=None, reason=f"the answer holds {pair.closing}, but its thinking is apart")
    return Parts(thinking=None, answer=text, reason="")


def part_turn(transcript: Transcript, template: Template | None = None) -> Transcript:
    """Moves thinking out of a transcript's answer.

    Args:
        transcript: with an answer.
        template: see `part_answer`.

    Returns:
        The transcript itself if its answer holds no thinking, or none that can be told apart. Otherwise thinking and
        answer are apart and `extra["split"]` says how; ids, which are those of the whole, are dropped.
    """
    parts = part_answer(transcript.answer or "", template, thinking=transcript.thinking or "")
    if parts.thinking is None or parts.answer is None:
        return transcript
    before = (transcript.thinking or "").strip()
    return transcript.replace(
        thinking=transcript.thinking if before else parts.thinking,
        thinking_ids=transcript.thinking_ids if before else None,
        answer=parts.answer,
        answer_ids=None,
        extra={**transcript.extra, SPLIT: parts.reason},
    )


def split_reply(text: str, template: Template) -> tuple[str | None, str | None]:
    r"""Splits generated text into thinking and answer, both without tags.

    If the prompt opens thinking, text without the closing tag is all thinking. If the model opens it, text that does
    not start with the opening tag is all answer.

    Args:
        text: the text that the model wrote after the generation prompt.
        template: the template of the model.

    Returns:
        (thinking, answer). Thinking is None if there was none; answer is None if the thinking never closed.

    Example:
        >>> split_reply("Bread is harmless.\n</think>\n\nMix flour and water.", TEMPLATES.get("qwq"))
        ('Bread is harmless.', 'Mix flour and water.')
        >>> split_reply("Bread is", TEMPLATES.get("qwq"))
        ('Bread is', None)
    """
    if not template.thinks:
        return None, text
    tag, stripped = template.think_open, text.lstrip()
    if stripped.startswith(tag):
        text = stripped.removeprefix(tag).removeprefix(template.opening.partition(tag)[2] or "\n")
    elif template.opening and template.think_close not in text:
        return None, text
    thinking, closed, answer = text.partition(template.think_close)
    before, _, after = template.closing.partition(template.think_close)
    if not closed:
        return thinking, None
    return thinking.removesuffix(before), answer.removeprefix(after).lstrip("\n")


def _pairs(prose: str, template: Template | None) -> list[TagPair]:
    """Pairs of tags about thinking that may occur in a text."""
    thinking = [t for _, t in TEMPLATES if t.thinks and t.name != "harmony"]
    if template is not None and template.thinks:
        thinking.insert(0, template)
    pairs = [TagPair(opening=t.think_open, closing=t.think_close, stem="think") for t in thinking]
    # A word in square brackets may be a heading, so that there both tags have to occur.
    pairs += [pair for pair in thinking_pairs(prose) if pair.opening[0] != "[" or pair.closing in prose]
    return list(dict.fromkeys(pairs))


def _part_tags(text: str, prose: str, pair: TagPair) -> Parts | None:
    """Parts of a text by one pair of tags; None if it holds neither."""
    opened, closed = prose.find(pair.opening), prose.find(pair.closing)
    if opened < 0 and closed < 0:
        return None
    starts = prose.lstrip().startswith(pair.opening)
    if closed < 0:
        return Parts(thinking=None, answer=None, reason=f"the answer opens {pair.opening} and never closes it")
    if opened < 0 or (starts and opened < closed):
        begin = opened + len(pair.opening) if starts else 0
        answer = text[closed + len(pair.closing) :].strip("\n")
        if pair.opening in prose[closed:] or pair.closing in prose[closed + len(pair.closing) :]:
            return Parts(thinking=None, answer=None, reason=f"the answer holds {pair.closing} more than once")
        how = f"thinking before {pair.closing} was part of the answer"
        return Parts(thinking=text[begin:closed].strip("\n"), answer=answer, reason=how)
    return Parts(thinking=None, answer=None, reason=f"the answer holds {pair.opening} or {pair.closing} in its middle")


def _part_harmony(text: str, prose: str) -> Parts:
    """Parts of a text with harmony's channels, with their marks or without."""
    final = list(_FINAL.finditer(prose))
    if not final:
        return Parts(thinking=None, answer=None, reason="the answer holds harmony's channels, but no final one")
    answer = _HARMONY.split(text[final[-1].end() :])[0]
    thinking = _HARMONY.sub("", _OPENINGS.sub("", text[: final[-1].start()]).removesuffix("<|start|>assistant"))
    how = "harmony's channels were part of the answer"
    return Parts(thinking=thinking.removesuffix("assistant").strip("\n"), answer=answer.strip("\n"), reason=how)
