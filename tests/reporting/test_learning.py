"""The cost to reach a target loss, worked out by hand from made-up runs."""

import csv
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.made_runs import made_run, validation

from fedamole.comparison.records import as_csv, as_records
from fedamole.comparison.tables import build_tables
from fedamole.reporting.learning import RoundState, cost_to_target, learning_curve, lowest_loss
from fedamole.reporting.results import Scenario, read_scenarios

COLUMNS = ("steps to target", "tokens to target")


def train(round_: int, client: str, steps: int, tokens: int, **more: Any) -> dict[str, Any]:
    return {"round": round_, "client": client, "split": "train", "steps": steps, "backward_tokens": tokens, **more}


def test_the_curve_of_a_run() -> None:
    """b takes part in rounds 0 and 2, with two exchanges in round 2. Until it is scored it has the base's loss, 4.

    Round 0: a 3, b not scored: (3 + 4) / 2. Round 1: a 2: (2 + 4) / 2. Round 2: b 1: (2 + 1) / 2.
    """
    lines = [
        validation(-1, "base", "a", 4.0),
        validation(-1, "base", "b", 4.0),
        train(0, "a", 2, 10),
        {"round": 0, "client": "b", "split": "train", "failed": "lost"},
        validation(0, "m", "a", 3.0),
        validation(0, "other", "a", 9.0),
        train(1, "a", 2, 30),
        validation(1, "m", "a", 2.0),
        train(2, "b", 4, 10),
        train(2, "b", 2, 10, exchange=1),
        validation(2, "m", "b", 1.0),
    ]
    curve = learning_curve(lines, "m", 2)
    assert curve == [RoundState(3.5, 1.0, 5.0), RoundState(3.0, 2.0, 20.0), RoundState(1.5, 5.0, 30.0)]
    assert cost_to_target(curve, 3.0) == {"steps_to_target": 2.0, "tokens_to_target": 20.0}
    assert cost_to_target(curve, 1.4) == {"steps_to_target": math.inf, "tokens_to_target": math.inf}
    assert cost_to_target(curve, math.inf) == cost_to_target(curve, 1.4), "a diverged run is no target"
    assert lowest_loss(curve) == 1.5
    assert lowest_loss([RoundState(math.nan, 1.0, 1.0), RoundState(2.0, 2.0, 2.0)]) == 2.0
    assert lowest_loss([RoundState(math.nan, 1.0, 1.0)]) == math.inf


@pytest.fixture
def scenarios(tmp_path: Path) -> list[Scenario]:
    """local_only's means are 3, 2, 2.5 with seed 0 and 3, 1, 1 with seed 1. A round is 4 steps and 200 tokens."""

    def run(method: str, seed: int, *losses: float) -> Any:
        rounds = {method: [{"a": loss + 0.5, "b": loss - 0.5} for loss in losses]}
        return made_run(tmp_path / f"{method}-{seed}", method, rounds, {method: {"a": 50.0, "b": 60.0}}, seed=seed)

    return read_scenarios(
        [
            run("fast", 0, 2.0, 1.0, 1.0),
            run("fast", 1, 2.0, 1.5, 0.5),
            run("half", 0, 3.0, 3.0, 1.9),
            run("half", 1, 3.0, 3.0, 1.9),
            run("slow", 0, 3.0, 2.9, 2.1),
            run("slow", 1, 3.0, 2.9, 2.1),
            run("local_only", 0, 3.0, 2.0, 2.5),
            run("local_only", 1, 3.0, 1.0, 1.0),
        ],
        "local_only",
    )


def test_costs_to_target_are_columns(scenarios: list[Scenario]) -> None:
    """fast: rounds 1 and 3, so (4 + 12) / 2 steps. half: 3 rounds with seed 0, never with seed 1."""
    table = build_tables(scenarios, "fast", target="local_only")[0]
    lines = {line[0]: dict(zip(table.head[1:], line[1:], strict=True)) for line in table.body}
    assert {name: tuple(line[column] for column in COLUMNS) for name, line in lines.items()} == {
        "base": ("", ""),
        "majority": ("", ""),
        "fast": ("8", "400"),
        "half": ("12 (1 of 2 seeds)", "600 (1 of 2 seeds)"),
        "slow": ("-", "-"),
        "local_only": ("8", "400"),
    }
    assert "at most the lowest one of local_only with the same seed; -: no round reached it" in table.caption


def test_costs_to_target_are_records(scenarios: list[Scenario]) -> None:
    records = {
        record["method"]: record
        for record in as_records(scenarios, "fast")
        if (record["table"], record["measure"]) == ("methods", "tokens_to_target")
    }
    assert records["fast"]["values"] == [[0, 200.0], [1, 600.0]]
    assert (records["fast"]["mean"], records["fast"]["n"]) == (400.0, 2)
    assert (records["half"]["mean"], records["half"]["n"], records["half"]["values"]) == (
        600.0,
        1,
        [[0, 600.0], [1, None]],
    )
    assert (records["slow"].get("mean"), records["slow"]["n"]) == (None, 0)
    rows = csv.DictReader(io.StringIO(as_csv([*records.values()])))
    assert [(row["method"], row["mean"], row["n"]) for row in rows] == [
        ("fast", "400.0", "2"),
        ("half", "600.0", "1"),
        ("slow", "", "0"),
        ("local_only", "400.0", "2"),
    ]


def test_without_the_target_there_are_no_such_columns(scenarios: list[Scenario], tmp_path: Path) -> None:
    trial = made_run(tmp_path / "x", "fast", {"fast": [{"a": 1.0, "b": 1.0}]}, {"fast": {"a": 1.0, "b": 1.0}})
    [table, *_] = build_tables(read_scenarios([trial], "local_only"), "fast", target="local_only")
    assert not set(COLUMNS) & set(table.head)
    assert "to target" not in table.caption


def test_variants_of_a_run_share_its_training(tmp_path: Path) -> None:
    """A run without counts of tokens has steps only."""
    losses = {"m": [{"a": 3.0, "b": 3.0}, {"a": 1.0, "b": 1.0}], "m_ft": [{"a": 1.0, "b": 1.0}] * 2}
    tests = {name: {"a": 1.0, "b": 1.0} for name in losses}
    trial = made_run(tmp_path / "m", "m", losses, tests, counted=False)
    both = [trial, replace(trial, method="m_ft", variant="m_ft")]
    [actual] = read_scenarios(both, "m")
    costs = {
        name: {key: value for key, value in results[0].measures.items() if key.endswith("to_target")}
        for name, results in actual.trained.items()
    }
    assert costs == {"m": {"steps_to_target": 8.0}, "m_ft": {"steps_to_target": 4.0}}
