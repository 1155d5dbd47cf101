"""Work of a run from made-up lines of metrics.jsonl."""

from typing import Any

import pytest

from fedamole.reporting.work import short_count, work_of


def train(client: str, **values: int) -> dict[str, Any]:
    return {"round": 0, "client": client, "split": "train", **values}


def validation(client: str, method: str, **values: int) -> dict[str, Any]:
    return {"round": 0, "client": client, "split": "validation", "method": method, **values}


def test_tokens_are_per_client_over_the_run_and_the_row_s_own() -> None:
    """Two clients, two rounds: (100 + 50) / 2 trained; (10 + 4) / 2 read forward, 1000 of another row left out."""
    lines = [
        train("a", steps=3, backward_tokens=100, forward_tokens=10, probed=2, trained_parameters=8),
        train("b", steps=5, backward_tokens=50, forward_tokens=0, trained_parameters=16),
        validation("a", "ours", forward_tokens=4, probed=1),
        validation("a", "ours_ft", forward_tokens=1000, probed=100),
        validation("a", "base"),
        {"round": 0, "split": "round"},
    ]
    assert work_of(lines, "ours", clients=2, rounds=2) == {
        "steps": 2.0,
        "probed": 0.75,
        "forward_tokens": 7.0,
        "backward_tokens": 75.0,
        "parameters": 12.0,
    }
    assert work_of(lines, "ours_ft", clients=2, rounds=2)["forward_tokens"] == 505.0


def test_exchanges_of_a_round_add_up() -> None:
    """One client, one round of three exchanges; the counts of trained parameters are those of the round so far."""
    lines = [
        train("a", steps=2, backward_tokens=20, forward_tokens=0, trained_parameters=8),
        train("a", exchange=1, steps=1, backward_tokens=10, forward_tokens=0, trained_parameters=12),
        train("a", exchange=2, steps=0, backward_tokens=0, forward_tokens=5, probed=3, trained_parameters=12),
    ]
    assert work_of(lines, "ours", clients=1, rounds=1) == {
        "steps": 3.0,
        "probed": 3.0,
        "forward_tokens": 5.0,
        "backward_tokens": 30.0,
        "parameters": 12.0,
    }


def test_runs_of_earlier_versions_have_no_counts() -> None:
    assert work_of([train("a", steps=3), train("b", steps=5)], "ours", clients=2, rounds=1) == {"steps": 4.0}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (1234, "1.23k"),
        (12_345, "12.3k"),
        (99_960, "100k"),
        (123_456, "123k"),
        (999_600, "1.00M"),
        (2_500_000, "2.50M"),
        (7e9, "7.00G"),
        (float("nan"), "nan"),
    ],
)
def test_large_counts_in_three_digits(value: float, text: str) -> None:
    assert short_count(value) == text
