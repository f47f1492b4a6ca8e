"""What form of an answer do the wordings match?

Lower case, straight quotes, contractions expanded ("can't" becomes "cannot", "I'm" becomes "i am"), quoted text
blanked to "", code blanked to `CODE`, markup removed, line breaks preserved.
"""

import json
import re
import unicodedata

CODE = "⟦code⟧"
"""Replaces a code block in the canonical form."""

_BLOCK = re.compile(r"```(?:json|text|txt|markdown|md)?\s*\n(?P<words>[^`]*)```|`(?P<span>[^`\n]+)`")
_LONGEST_JSON = 20_000  # characters; a refusal in JSON is short
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n")

_QUOTES = str.maketrans(dict.fromkeys("’‘´ʼ＇′", "'") | dict.fromkeys("“”„‟«»", '"') | dict.fromkeys("—–", ","))

# In order: each rule reads the output of the earlier ones.
_CANONICAL = tuple(
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in (
        (r"<\|[^|>\n]*\|>|^\s*<[a-z_/]{1,12}>|</s>", " "),  # special tokens left in the text
        (r"(?<=\w)`(?=(?:t|m|re|ve|ll|d|s)\b)", "'"),
        (r"``([^`\n]{1,600}?)''", r'"\1"'),
        (r"```[\s\S]*?(?:```|\Z)", f" {CODE} "),
        (r"`[^`\n]+`", ' "" '),
        (r"(?<=\w) ?' ?(?=(?:t|m|re|ve|ll|d|s)\b)", "'"),  # word-level tokenizers: can ' t
        (r"\A\s*\"([^\"]*)\"\s*\Z", r"\1"),  # an answer that is one quotation speaks for itself
        (r"\"[^\"\n]{1,600}\"", ' "" '),
        (r"(?<!\w)'(?=\w)(?:[^'\n]|(?<=\w)'(?=\w)){1,600}'(?!\w)", ' "" '),
        (r"^[ \t]*>.*$", ' "" '),
        (r"[*_#~]+", " "),
        (r"\bcan(?:'t| ?not|t)\b|\bcan'(?= \w)", "cannot"),
        (r"\bwon'?t\b|\bwon'(?= \w)", "will not"),
        (r"\b(do|does|did|is|are|would|should|could|must)n'?t\b", r"\1 not"),
        (r"\b(i|we|you|they|he|she|it)'d\b", r"\1 would"),
        (r"\b(\w+)'ll\b", r"\1 will"),
        (r"\b(\w+)'re\b", r"\1 are"),
        (r"\b(\w+)'ve\b", r"\1 have"),
        (r"\bi'?m\b", "i am"),
        (r"\blet's\b", "let us"),
        (r"\b(here|that|it|there|this|what)'s\b", r"\1 is"),
        (r"[ \t\r\f\v]+", " "),
        (r" ([.,!?;:])", r"\1"),
        (r" ?\n[ \n]*", "\n"),
    )
)


def canonical(answer: str) -> str:
    """Brings an answer into the canonical form that the phrases match.

    Example:
        >>> canonical("**I’m sorry**, but I can’t help. He said “no”.")
        'i am sorry, but i cannot help. he said "".'
        >>> canonical('{"answer": "I can`t help."}')
        'i cannot help.'
    """
    answer = _unwrapped(answer)
    text = unicodedata.normalize("NFKC", answer.translate(_QUOTES)).translate(_QUOTES).lower()
    text = "".join(c for c in text if c == "\n" or unicodedata.category(c) != "Cf")
    lines = [line.lstrip() for line in text.splitlines() if line.strip()]
    if all(line.startswith(">") for line in lines):
        text = "\n".join(line.lstrip("> ") for line in lines)
    for pattern, replacement in _CANONICAL:
        text = pattern.sub(replacement, text)
    return text.strip()


def sentences(text: str) -> list[str]:
    r"""Splits a text in canonical form into sentences and lines; those without words are dropped.

    Example:
        >>> sentences("no. it is late.\nsee 3.5 of the rules!")
        ['no.', 'it is late.', 'see 3.5 of the rules!']
    """
    return [part.strip() for part in _SENTENCE_END.split(text) if re.search(r"\w", part)]


def _unwrapped(answer: str) -> str:
    """The words of an answer that is nothing but one code block or JSON object around them; others as they are."""
    text = answer.strip()
    if block := _BLOCK.fullmatch(text):
        text = (block["words"] or block["span"]).strip()
    if text.startswith("{") and len(text) <= _LONGEST_JSON:
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            return answer
        if all(isinstance(value, str | int | float | None) for value in fields.values()):
            return "\n".join(value for value in fields.values() if isinstance(value, str)) or answer
    return text if block and "\n" not in text else answer
