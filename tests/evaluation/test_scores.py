"""Scores worked out by hand."""

import pytest

from fedamole.evaluation.scores import accuracy, exact_match, generation_scores, rouge_l, token_f1


def test_rouge_l_by_hand() -> None:
    """Longest common subsequence of "the cat sat" and "the cat on the mat sat": 3 of 3 and 3 of 6, F1 = 2/3."""
    assert rouge_l("the cat sat", "the cat on the mat sat") == pytest.approx(100 * 2 / 3)
    assert rouge_l("sat cat the", "the cat sat") == pytest.approx(100 / 3)
    assert rouge_l("", "the cat") == 0


def test_exact_match_forgives_case_punctuation_and_articles() -> None:
    assert exact_match("The Cat!", "cat") == 100
    assert exact_match("two cats", "cat") == 0


def test_token_f1_by_hand() -> None:
    """Shared: cat, sat (2). Given 3, wanted 4 (articles left out): 2 * 2 / 7."""
    assert token_f1("the cat sat down", "a cat sat on mat") == pytest.approx(100 * 4 / 7)
    assert token_f1("cat cat", "cat") == pytest.approx(100 * 2 / 3)
    assert token_f1("", "") == 100
    assert token_f1("", "cat") == 0


def test_means_over_pairs() -> None:
    scores = generation_scores(["cat", "dog"], ["cat", "cow"])
    assert scores == {"rouge_l": 50.0, "exact_match": 50.0, "token_f1": 50.0}
    assert accuracy(["a", "b", "c", "a"], ["a", "b", "b", "b"]) == 50
    with pytest.raises(ValueError):
        accuracy(["a"], ["a", "b"])
