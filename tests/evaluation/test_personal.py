"""Scores of one client's model, and summaries over clients."""

from collections.abc import Callable
from typing import Any

import pytest

from fedamole.data.examples import Example
from fedamole.data.tokens import tokenise
from fedamole.errors import ConfigError
from fedamole.evaluation.likelihood import option_losses
from fedamole.evaluation.personal import EvaluationSettings, losses_of, majority_scores, scores_of
from fedamole.evaluation.summary import over_clients
from fedamole.model.bank import Bank
from fedamole.model.base import Base

OPTIONS = ("cat", "dog", "cow")
CLASSES = [Example("a ", "", f"text {i}\n", OPTIONS[i % 3], OPTIONS) for i in range(7)]
TEXTS = [Example("a ", "", f"text {i}\n", f"answer {i % 2}") for i in range(5)]


def test_majority_of_classes() -> None:
    """Answers of training: cat 3, dog 2, cow 2. Test: cat is right in 3 of 7."""
    scores = majority_scores(CLASSES, CLASSES, EvaluationSettings())
    assert scores == {"accuracy": pytest.approx(300 / 7), "score": pytest.approx(300 / 7)}


def test_majority_of_texts_and_ties() -> None:
    scores = majority_scores(TEXTS, TEXTS[:2], EvaluationSettings(generation_score="exact_match"))
    assert scores["exact_match"] == scores["score"] == 50
    assert majority_scores(TEXTS[:2], TEXTS[:1], EvaluationSettings())["rouge_l"] == 100


def test_the_option_with_the_lowest_loss_is_the_answer(base: Callable[..., Base]) -> None:
    bank, settings = Bank(base()), EvaluationSettings()
    rows = tokenise(CLASSES, bank.base.tokenizer, 64).rows
    (losses,) = option_losses(bank, [[(row.prompt, row.options) for row in rows]], 1000)
    right = sum(
        example.options[result.index(min(result))] == example.answer
        for example, result in zip(CLASSES, losses, strict=True)
    )
    (scores,) = scores_of(bank, [rows], [CLASSES], settings)
    assert scores["score"] == scores["accuracy"] == pytest.approx(100 * right / 7)
    own = [result[example.options.index(example.answer)] for example, result in zip(CLASSES, losses, strict=True)]
    sizes = [len(row.answer) for row in rows]
    expected = sum(loss * size for loss, size in zip(own, sizes, strict=True)) / sum(sizes)
    assert losses_of(bank, [rows], settings)[0] == pytest.approx(expected, abs=1e-5)


def test_free_text_reports_all_scores(base: Callable[..., Base]) -> None:
    bank = Bank(base())
    rows = tokenise(TEXTS, bank.base.tokenizer, 64).rows
    settings = EvaluationSettings(generation_score="token_f1", max_new_tokens=3)
    (scores,) = scores_of(bank, [rows], [TEXTS], settings)
    assert set(scores) == {"rouge_l", "exact_match", "token_f1", "score"}
    assert scores["score"] == scores["token_f1"]


def test_over_clients_by_hand() -> None:
    """40, 60, 80: mean 60, worst 40, deviation sqrt((400 + 0 + 400) / 3)."""
    summary = over_clients({"b": 60.0, "a": 80.0, "c": 40.0})
    assert (summary.mean, summary.worst, summary.worst_client) == (60, 40, "c")
    assert summary.spread == pytest.approx((800 / 3) ** 0.5)


@pytest.mark.parametrize("key", ["max_new_tokens", "batch_tokens"])
def test_limits_must_leave_something(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        EvaluationSettings(**dict[str, Any]({key: 0}))


def test_the_least_likely_option_is_never_the_answer(base: Callable[..., Base]) -> None:
    """Right answers made the most, and then the least, likely option of each row: accuracy 100 and 0."""
    bank = Bank(base())
    rows = tokenise(CLASSES, bank.base.tokenizer, 64).rows
    (losses,) = option_losses(bank, [[(row.prompt, row.options) for row in rows]], 1000)
    for pick, accuracy in ((min, 100), (max, 0)):
        right = [OPTIONS[option_losses_.index(pick(option_losses_))] for option_losses_ in losses]
        examples = [Example("a ", "", f"text {i}\n", answer, OPTIONS) for i, answer in enumerate(right)]
        assert scores_of(bank, [rows], [examples], EvaluationSettings())[0]["score"] == accuracy
