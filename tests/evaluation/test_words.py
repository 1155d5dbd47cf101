"""Words of every script, and the very words of the original scorers for ASCII text."""

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer

from fedamole.evaluation.scores import exact_match, rouge_l, token_f1
from fedamole.evaluation.words import RougeTokenizer, squad_words

ASCII = st.text(st.characters(max_codepoint=127))


@given(ASCII)
def test_ascii_text_has_googles_words(text: str) -> None:
    assert RougeTokenizer().tokenize(text) == DefaultTokenizer().tokenize(text)


def official_squad_words(text: str) -> list[str]:
    """`normalize_answer` of SQuAD's evaluate-v1.1.py, split as its f1_score does."""
    bare = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


@given(ASCII)
def test_ascii_text_has_squads_words(text: str) -> None:
    assert squad_words(text) == official_squad_words(text)


@given(ASCII, st.sampled_from("äéñ한ก中"))
def test_ascii_text_beside_other_text_keeps_its_words(text: str, other: str) -> None:
    """What is ASCII is read alike, whether or not another script stands in the same text."""
    assert RougeTokenizer().tokenize(f"{text} {other}") == [*RougeTokenizer().tokenize(text), other]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Schöne Tür", "schöne tür"),  # an umlaut is a letter
        ("GRÖSSE, Straße", "grösse strasse"),  # case folding: ß is ss
        ("Gro\u0308ße", "grösse"),  # a decomposed umlaut is the same letter
        ("Kranken\u00adhaus", "krankenhaus"),  # a soft hyphen is not seen
        ("立即手术。", "立 即 手 术"),
        ("２０２４年３月", "2024 年 3 月"),  # full-width digits
        ("東京タワーへ", "東 京 タ ワ ー へ"),
        ("ｶﾞｽ", "ガ ス"),  # half-width kana with its mark
        ("葛\U000e0100飾", "葛 飾"),  # a variation selector is not seen
        ("오늘 날씨가 좋다", "오늘 날씨가 좋다"),  # Korean has spaces
        ("ที่นี่", "ที่ นี่"),  # Thai, each letter with its vowel and tone marks
        ("ສະບາຍ", "ສ ະ ບ າ ຍ"),
        ("ភាសា", "ភ\u17b6 ស\u17b6"),
        ("မြန်မာ", "မ\u103c န\u103a မ\u102c"),
        ("हिन्दी में", "हिन्दी में"),  # vowel signs and virama stay in words
        ("ضَرَبَ الوَلَدُ", "ضَرَبَ الوَلَدُ"),
        ("می\u200cخواهم", "میخواهم"),  # a zero-width non-joiner stays inside a word
        ("\u200fשלום עולם\u200e", "שלום עולם"),  # marks of direction are not seen
        ("don’t", "don t"),  # as google reads don't
        ("в 5:30 УТРА", "в 5 30 утра"),
        ("done 👍🏽", "done 👍"),
        ("❤️❤", "❤ ❤"),
        ("a\u200bb", "a b"),
        ("\u0301", "\u0301"),
        ("", ""),
    ],
)
def test_words_for_rouge(text: str, words: str) -> None:
    assert RougeTokenizer().tokenize(text) == words.split()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("„Die Tür“, sagte er.", "die tür sagte er"),
        ("don’t stop", "dont stop"),  # as don't
        ("立即，手术。", "立 即 手 术"),
        ("སྐད་ཡིག", "སྐད ཡིག"),  # the dot between Tibetan syllables separates
        ("ሰላም፡ለዓለም", "ሰላም ለዓለም"),  # and so does Ethiopic punctuation
        ("हाँ।", "हाँ"),
        ("The Größe", "grösse"),  # English articles are left out
        ("9 €", "9 €"),
    ],
)
def test_words_for_exact_match_and_f1(text: str, words: str) -> None:
    assert squad_words(text) == words.split()


@pytest.mark.parametrize(
    "answer",
    [
        "立即手术",
        "ทันที",
        "फ़ौरन ऑपरेशन",
        "чай",
        "γεια σου",
        "שלום",
        "صباح الخير",
        "緊急手術をする",
        "수술",
        "Über Ärzte",
        "ສະບາຍດີ",
        "👍",
    ],
)
def test_the_right_answer_scores_100_in_every_script(answer: str) -> None:
    assert (rouge_l(answer, answer), exact_match(answer, answer), token_f1(answer, answer)) == (100, 100, 100)


def test_partly_right_answers_by_hand() -> None:
    """Of 立即手术 and 立即出院 two of four characters agree, in order: precision and recall 1/2."""
    assert rouge_l("立即手术", "立即出院") == pytest.approx(50)
    assert token_f1("立即手术", "立即出院") == pytest.approx(50)
    assert exact_match("立即手术", "立即出院") == 0
    # "Tür" is one word: not the t and r that google's tokenizer makes of it, which "t r" would match.
    assert rouge_l("t r", "Tür") == 0
    # Thumbs up and down are different words.
    assert exact_match("👍", "👎") == 0


@given(st.text(), st.text())
def test_scores_are_within_bounds_for_any_text(answer: str, reference: str) -> None:
    for score in (rouge_l, exact_match, token_f1):
        assert 0 <= score(answer, reference) <= 100.0001
    assert exact_match(answer, answer) == 100
