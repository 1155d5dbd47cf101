"""Texts as words for ROUGE, exact match and F1, in every script.

Both scorers that these scores come from know English alone: Google's ROUGE tokenizer keeps a-z and 0-9, SQuAD's
normalisation removes ASCII punctuation. For ASCII text the functions here give their very words.

Other text is brought to Unicode's NFKC form and case-folded first, so that full-width and half-width letters, composed
and decomposed accents, and upper and lower case are the same. Characters that are not seen (soft hyphens, joiners,
marks of direction, variation selectors) are removed. Scripts that set no space between words are read character by
character, each with its combining marks; a symbol such as an emoji is a word of its own.
"""

import re
import string
import unicodedata
from functools import lru_cache

_ASCII_WORD = re.compile(r"[a-z0-9]+")
_ARTICLE = re.compile(r"\b(a|an|the)\b")

_WITHOUT_SPACES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19FF),  # Tai Le, New Tai Lue, Khmer symbols
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x2FDF),  # Han radicals
    (0x3005, 0x3007),  # Han iteration mark and zero
    (0x3021, 0x303C),  # Han numerals
    (0x3041, 0x312F),  # Hiragana, Katakana, Bopomofo
    (0x31A0, 0x31FF),  # Bopomofo, strokes, Katakana
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0xA4CF),  # Han, Yi
    (0xA980, 0xA9FF),  # Javanese, Myanmar
    (0xAA60, 0xAADF),  # Myanmar, Tai Viet
    (0xF900, 0xFAFF),  # Han
    (0x1AFF0, 0x1B16F),  # Kana
    (0x20000, 0x3FFFF),  # Han
)
_ZERO_WIDTH_SPACE = "\u200b"
# SQuAD removes ASCII punctuation without leaving a space; typographic apostrophes and hyphens are the same marks.
_INSIDE_WORDS = string.punctuation + "\u2018\u2019\u2010"


class RougeTokenizer:
    """Words of a text for `rouge_score.rouge_scorer.RougeScorer(tokenizer=...)`."""

    def tokenize(self, text: str) -> list[str]:
        """Return runs of letters, digits and their marks; all else separates words."""
        if text.isascii():
            return _ASCII_WORD.findall(text.lower())
        return "".join(letter if _is_word(letter) else " " for letter in _spaced(text)).split()


def squad_words(text: str) -> list[str]:
    """Words without punctuation and English articles, as SQuAD's scorer compares them."""
    spaced = text.lower() if text.isascii() else _spaced(text)
    bare = "".join(map(_without_punctuation, spaced))
    return _ARTICLE.sub(" ", bare).split()


def _spaced(text: str) -> str:
    """Normalised text with spaces around every character that is a word of its own."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    parts = list[str]()
    alone = False
    for letter in folded:
        kind = _kind(letter)
        if kind == "unseen":
            continue
        if kind == "mark":  # stays with the character that it follows
            parts.append(letter)
            continue
        if alone or kind == "alone":
            parts.append(" ")
        parts.append(letter)
        alone = kind == "alone"
    return "".join(parts)


@lru_cache(maxsize=65536)
def _kind(letter: str) -> str:
    code, category = ord(letter), unicodedata.category(letter)
    if letter == _ZERO_WIDTH_SPACE:
        return "other"
    if category in ("Cf", "Me") or 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF or code == 0x034F:
        return "unseen"
    if category[0] == "M":
        return "mark"
    if category == "So" or any(first <= code <= last for first, last in _WITHOUT_SPACES):
        return "alone"
    return "other"


@lru_cache(maxsize=65536)
def _is_word(letter: str) -> bool:
    category = unicodedata.category(letter)
    return category[0] in "LNM" or category == "So"


@lru_cache(maxsize=65536)
def _without_punctuation(letter: str) -> str:
    if letter in _INSIDE_WORDS:
        return ""
    # Other scripts have punctuation that separates words, such as the dot between Tibetan syllables.
    return " " if letter == _ZERO_WIDTH_SPACE or unicodedata.category(letter)[0] == "P" else letter
