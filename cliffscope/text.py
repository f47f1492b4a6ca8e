r"""Which characters may a text hold, and how is text from elsewhere shown?

1. Half of a surrogate pair belongs to no Unicode text: no file, tokenizer or server accepts it.
2. Control characters, NUL included, are allowed, since models write them. Shown raw, they would move a terminal's
   cursor, colour it or reverse the line, so they are shown as JSON escapes instead: ESC as `\u001b`.

Knows no transcripts.
"""

import re

# C0 without tab and newline, DEL and C1; line and paragraph separators; overrides of the writing direction; surrogates.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BREAKS = re.compile("[\t\n]")


def visible(text: str, *, one_line: bool = False) -> str:
    r"""The text with each control character shown as a JSON escape.

    Args:
        text: from a model, a file or a server.
        one_line: show tabs and newlines as escapes too.

    Returns:
        Text that a terminal and a UTF-8 file accept.

    Example:
        >>> print(visible("id-\x1b[31m"))
        id-\u001b[31m
    """
    shown = _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return _BREAKS.sub(lambda match: repr(match[0])[1:-1], shown) if one_line else shown


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded, which half of a surrogate pair cannot.

    Example:
        >>> is_unicode(chr(0)), is_unicode(chr(0xD800))
        (True, False)
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
