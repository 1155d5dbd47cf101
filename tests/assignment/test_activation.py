"""Experts chosen by usage: shares, the smallest cover and reviews by hand."""

from typing import Any

import numpy as np
import pytest

from fedamole.assignment.activation import Thresholds, next_experts, reviewed, smallest_cover, usage_shares

NAN = float("nan")


def limits(**changed: Any) -> Thresholds:
    values = {"coverage": 0.9, "drop_below": 0.5, "review_every": 2, "min_experts": 1, "max_experts": 8}
    return Thresholds(**{**values, **changed})


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({0: 1.2, 2: 0.6}, [1 / 1.6, 0, 0.6 / 1.6, 0]),  # values above 1 count as 1
        ({0: 0.9, 1: 0.6, 3: 0.5}, [0.45, 0.3, 0, 0.25]),  # two experts for each token
        ({1: 0.0, 2: 0.0}, [0, 0.5, 0.5, 0]),
        ({1: -3.0, 2: 0.2, 3: NAN}, [0, 0, 1, 0]),
        ({}, [0, 0, 0, 0]),
    ],
)
def test_shares_by_hand(usage: dict[int, float], expected: list[float]) -> None:
    assert usage_shares(usage, 4).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shares", "changed", "expected"),
    [
        ([0.6, 0.3, 0.1], {}, [0, 1]),
        ([0.1, 0.3, 0.6], {}, [1, 2]),
        ([0.6, 0.3, 0.1], {"coverage": 0.91}, [0, 1, 2]),
        ([0.6, 0.3, 0.1], {"coverage": 0.5}, [0]),
        ([0.6, 0.3, 0.1], {"coverage": 0.0, "min_experts": 2}, [0, 1]),
        ([0.6, 0.3, 0.1], {"coverage": 1.0, "max_experts": 2}, [0, 1]),
        ([0.25, 0.25, 0.25, 0.25], {"coverage": 0.5}, [0, 1]),
        ([0.6, 0.4, 0.0], {"coverage": 1.0}, [0, 1]),
    ],
)
def test_the_smallest_cover(shares: list[float], changed: dict[str, Any], expected: list[int]) -> None:
    assert smallest_cover(np.array(shares), limits(**changed)) == expected


SHARES = {
    "a": np.array([0.5, 0.4, 0.1, 0.0, 0.0]),
    "b": np.array([0.4, 0.3, 0.0, 0.2, 0.1]),  # cosine with a 0.32 / (0.648 * 0.548) = 0.90
    "c": np.array([0.0, 0.0, 0.2, 0.0, 0.8]),  # 0.02 / (0.648 * 0.825) = 0.04
}
HELD = {"a": [0, 1, 2], "b": [0, 1, 3, 4], "c": [2, 4]}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, [0, 1, 3]),  # 2 is below 0.5 / 3 and dropped; b uses 3 more than 4
        ({"drop_below": 0.25}, [0, 1, 2, 3]),  # 0.1 is above 0.25 / 3
        ({"min_experts": 3}, [0, 1, 2, 3]),  # nothing may be dropped
        ({"min_experts": 3, "max_experts": 3}, [0, 1, 2]),  # and nothing added
        ({"max_experts": 2}, [0, 1]),
    ],
)
def test_a_review_by_hand(changed: dict[str, Any], expected: list[int]) -> None:
    assert reviewed(SHARES, HELD, "a", limits(**changed)) == expected


def test_a_dropped_expert_is_not_added_in_the_same_review() -> None:
    """The most similar client uses only expert 2 besides those that a keeps."""
    shares = {"a": SHARES["a"], "b": np.array([0.5, 0.3, 0.2, 0.0, 0.0])}
    assert reviewed(shares, {"a": [0, 1, 2], "b": [0, 1, 2]}, "a", limits()) == [0, 1]


def test_a_client_alone_is_only_dropped_from() -> None:
    assert reviewed({"a": SHARES["a"]}, HELD, "a", limits()) == [0, 1]


def test_the_least_used_experts_are_dropped_first() -> None:
    shares = {"a": np.array([0.8, 0.06, 0.04, 0.1, 0.0])}
    assert reviewed(shares, {"a": [0, 1, 2, 3, 4]}, "a", limits(drop_below=1.0, min_experts=3)) == [0, 1, 3]


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [(-1, [0, 1, 2]), (0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 3]), (3, [0, 1, 2]), (4, [0, 1, 3])],
)
def test_a_client_searches_then_chooses_then_is_reviewed(rounds: int, expected: list[int]) -> None:
    held = {name: list(experts) for name, experts in HELD.items()}
    assert next_experts(SHARES, held, "a", rounds, limits()) == expected
    assert held == HELD
