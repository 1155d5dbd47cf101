"""Membership inference: AUROC and TPR by hand, and a model that has memorised its examples."""

from typing import Any

import numpy as np
import pytest
from tests.training import alone, random_lora

from fedamole.auditing.membership import MOST_ROWS, attack, drawn, ratios, row_losses
from fedamole.evaluation.likelihood import mean_losses
from fedamole.experiment import prepare
from fedamole.model.bank import Bank


def test_auroc_and_tpr_by_hand() -> None:
    """Of the pairs (member, other), (0.1, 0.2), (0.1, 0.4) and (0.3, 0.4) are in order, (0.3, 0.2) is not."""
    result = attack(np.array([0.1, 0.3]), np.array([0.2, 0.4]))
    assert result.auroc == 0.75
    assert result.tpr == 0.5  # below 0.2: no false positive is allowed of two
    assert result.error == pytest.approx((5 / 48) ** 0.5)
    assert attack(np.ones(3), np.ones(4)).auroc == 0.5
    assert attack(np.ones(3), np.ones(4)).tpr == 0


def test_one_false_positive_of_a_hundred_is_allowed() -> None:
    others = np.arange(100) / 100
    assert attack(np.array([0.005, 0.015]), others).tpr == 0.5
    assert attack(np.array([0.005, 0.015]), others[:99]).tpr == 0


def test_a_loss_that_is_not_finite_is_large() -> None:
    values = ratios(np.array([1.0, np.nan, np.inf]), np.array([2.0, 2.0, 0.0]))
    assert values.tolist()[:1] == [0.5]
    assert values[1] > 1e6
    assert values[2] > 1e6


def test_a_large_split_is_drawn_from() -> None:
    rows = [((i,), (i,)) for i in range(1000)]
    part = drawn(rows, "a", "train")
    assert len(part) == MOST_ROWS
    assert part == drawn(rows, "a", "train") != drawn(rows, "b", "train")


@pytest.fixture(scope="module")
def prepared(runs: Any) -> Any:
    return prepare(runs.load("fedit"))


def test_losses_are_those_of_the_evaluation_in_the_order_of_the_rows(prepared: Any) -> None:
    bank, rows = Bank(prepared.base), prepared.clients["chat"].test.pairs()[:5]
    for adapters in ([], [random_lora(bank)]):
        bank.load(adapters)
        expected = [mean_losses(bank, [[row]], 512)[0] for row in rows]
        assert row_losses(bank, rows, 200) == pytest.approx(expected, rel=1e-5)


def test_a_model_that_has_memorised_its_examples_reveals_them(prepared: Any) -> None:
    from dataclasses import replace

    bank, data = Bank(prepared.base), prepared.clients["mood"]
    train, test = data.train.pairs()[:8], data.train.pairs()[8:16]  # both of one distribution
    settings = replace(prepared.config.training, local_steps=60, batch_size=4)
    result = alone(bank, random_lora(bank), train, settings)
    bank.load([result.adapter])
    tuned = [row_losses(bank, rows, 512) for rows in (train, test)]
    bank.load([])
    untuned = [row_losses(bank, rows, 512) for rows in (train, test)]
    assert attack(*(ratios(after, before) for after, before in zip(tuned, untuned, strict=True))).auroc > 0.8
    assert attack(*untuned).auroc < 0.8
