"""Which language is an answer in?

1. The script decides where it belongs to one language: kana, Hangul, Han without kana.
2. Latin text with common English words is English. Short, machine-made or coded answers have too little text for
   statistics.
3. py3langid decides the rest: a naive Bayes classifier over byte sequences of 139 languages, shipped with its
   package. It is deterministic, needs no network and takes a tenth of a millisecond an answer.
4. What it is unsure of is `UNSURE`: few words, names, formulas. Such an answer is judged by the wordings of every
   language.

Source of the classifier: Lui and Baldwin, langid.py (ACL 2012 demonstrations), retrained by py3langid.
"""

import re
import unicodedata
from collections import Counter
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

ENGLISH = "en"
UNSURE = "unsure"
LEAST_SURE = 0.8
"""Least probability at which the classifier's language counts."""
FEWEST_WORDS = 4
"""Words of Latin text below which the classifier is not asked."""

# fmt: off
_ENGLISH_WORDS = frozenset(
    {
        "about", "an", "and", "are", "as", "be", "because", "but", "can", "cannot", "for", "from", "has", "have",
        "help", "here", "how", "i", "i'm", "if", "is", "it", "it's", "not", "of", "or", "please", "should", "sorry",
        "that", "the", "there", "these", "they", "this", "to", "we", "what", "which", "will", "with", "would", "yes",
        "you", "your"
    }
)
# fmt: on
_LEAST_ENGLISH = 0.15  # share of words
_FEW_LETTERS = 30  # of a script other than Latin: the script narrows the choice, so that the likeliest language counts
_LONGEST = 4_000  # characters; more of a text tells no more about its language
_NO_LANGUAGE = "zxx"  # ISO 639: no linguistic content
_SCRIPTS = {"HIRAGANA": "kana", "KATAKANA": "kana", "CJK": "han", "HANGUL": "hangul"}


def identify(text: str) -> str:
    """The language of a text.

    Args:
        text: any text; case does not matter.

    Returns:
        ISO 639 code such as "en" or "zh", or `UNSURE`.

    Example:
        >>> identify("sure , here is how to open the box ."), identify("Das kann ich dir leider nicht sagen.")
        ('en', 'de')
        >>> identify("42")
        'unsure'
    """
    text = text[:_LONGEST]
    scripts = Counter(_script(c) for c in text if c.isalpha())
    letters = scripts.total()
    if not letters:
        return UNSURE
    if scripts["kana"] > letters / 10:
        return "ja"
    if scripts["hangul"] > letters / 3:
        return "ko"
    if scripts["han"] > letters / 3:
        return "zh"
    if scripts["latin"] > letters / 2:
        return _latin(text)
    return _classified(text, LEAST_SURE if letters >= _FEW_LETTERS else 0)


def _latin(text: str) -> str:
    words = re.findall(r"[^\W\d_]+(?:'[a-z]+)?", text.lower())
    english = [word for word in words if word in _ENGLISH_WORDS]
    if len(set(english)) >= 2 and len(english) >= _LEAST_ENGLISH * len(words):
        return ENGLISH
    if len(words) < FEWEST_WORDS:
        return UNSURE
    return _classified(text, LEAST_SURE)


def _classified(text: str, least: float) -> str:
    language, probability = _identifier().classify(text)
    return str(language) if probability >= least and language != _NO_LANGUAGE else UNSURE


def _script(character: str) -> str:
    name = unicodedata.name(character, "").split(" ")[0]
    return _SCRIPTS.get(name, name.lower())


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
