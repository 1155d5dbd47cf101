"""What the runs of a comparison say, by scenario and method: from run folders alone."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fedamole.errors import RunError
from fedamole.federation.best import best_round_of, mean_best_round
from fedamole.federation.summary import nothing_trained, updates_of
from fedamole.reporting.runs import Run, read_run
from fedamole.reporting.significance import Gain, gain
from fedamole.reporting.work import work_of
from fedamole.runs.run_files import BASE, MAJORITY
from fedamole.runs.run_folder import METRICS, RunFolder

MIB = 2**20
ALL = "all scenarios"


@dataclass(frozen=True)
class Entry:
    """A finished run seen as one method: which row of its summary to read."""

    scenario: str
    method: str
    row: str
    seed: int
    path: Path
    at_edge: bool = False
    """Whether its learning rate is the lowest or the highest of those that were tried for it."""


@dataclass(frozen=True)
class Result:
    """One method with one seed in one scenario, at its best validation round."""

    seed: int
    scores: dict[str, float]
    """Test score of each client, 0 to 100."""
    losses: dict[str, float]
    """Test loss of each client, nats per answer token; empty for a constant answer."""
    measures: dict[str, float]
    """Values of MEASURES; those of training are missing for the base and the constant answer."""
    rounds: int
    learning_rate: float
    at_edge: bool = False
    """Whether the learning rate is the lowest or the highest of those that were tried."""
    untrained: bool = False
    """Whether every update of its run failed."""

    def values(self, measure: str) -> dict[tuple[Any, ...], float]:
        """Its values by (client, seed) for score and loss, and by (seed,) for every other measure that it has."""
        if measure in ("score", "loss"):
            by_client = self.scores if measure == "score" else self.losses
            return {(client, self.seed): value for client, value in by_client.items()}
        return {(self.seed,): self.measures[measure]} if measure in self.measures else {}


@dataclass(frozen=True)
class Measure:
    """A column of the table of methods."""

    key: str
    title: str
    digits: int
    best: Literal["highest", "lowest"] | None = None
    """Which value is the best one, where it can get a star."""
    varies: bool = True
    """Whether the deviation over the seeds is shown; costs hardly vary."""
    short: bool = False
    """Whether it is a large count, shown with k, M or G."""


MEASURES = (
    Measure("score", "score", 1, "highest"),
    Measure("worst", "worst client", 1, "highest"),
    Measure("spread", "spread", 1),
    Measure("loss", "loss", 3, "lowest"),
    Measure("best_round", "best round", 0),
    Measure("steps", "steps", 1, varies=False),
    Measure("probed", "probed", 1, varies=False),
    Measure("forward_tokens", "forward tokens", 0, varies=False, short=True),
    Measure("backward_tokens", "backward tokens", 0, varies=False, short=True),
    Measure("parameters", "trained parameters", 0, varies=False, short=True),
    Measure("mib_down", "MiB down", 3, varies=False),
    Measure("mib_up", "MiB up", 3, varies=False),
    Measure("seconds", "seconds", 0, varies=False),
    Measure("memory", "memory MiB", 0, varies=False),
)
"""Over the clients: mean score, worst score, standard deviation of the scores, mean loss; then the run's costs: those
of `work_of`, traffic per client and round, seconds and peak memory."""


@dataclass(frozen=True)
class Scenario:
    """All finished runs of one scenario; every one of them had the same data in the same splits."""

    name: str
    clients: tuple[str, ...]
    methods: dict[str, tuple[Result, ...]]
    """Results by method, one per seed; base and majority first, there once."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What clients are called in tables, where that is not their name."""

    @property
    def trained(self) -> dict[str, tuple[Result, ...]]:
        """The methods without base and majority."""
        return {name: found for name, found in self.methods.items() if name not in (BASE, MAJORITY)}

    @property
    def candidates(self) -> dict[str, tuple[Result, ...]]:
        """The methods that can get a star: trained ones, without those of which every update of a run failed."""
        return {name: found for name, found in self.trained.items() if not any(result.untrained for result in found)}

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds that any method has a finished run of."""
        return tuple(sorted({result.seed for found in self.trained.values() for result in found}))

    def label(self, method: str) -> str:
        """A method's name in a table, with how many seeds it has where some are missing."""
        have = len(self.methods[method])
        missing = method in self.trained and have < len(self.seeds)
        return f"{method} ({have} of {len(self.seeds)} seeds)" if missing else method


def read_scenarios(entries: Sequence[Entry]) -> list[Scenario]:
    """Read finished runs, in the order of the entries; runs of a scenario on different data are a RunError."""
    grouped: dict[str, list[Entry]] = {}
    for entry in entries:
        grouped.setdefault(entry.scenario, []).append(entry)
    return [_scenario(name, found) for name, found in grouped.items()]


def _scenario(name: str, entries: Sequence[Entry]) -> Scenario:
    runs = {entry.path: read_run(entry.path) for entry in entries}
    first = runs[entries[0].path]
    for run in runs.values():
        if run.partition != first.partition:
            raise RunError(
                f"{run.path} and {first.path} had different data, splits or base, so scenario {name} makes no table; "
                "move the older ones away and call again"
            )
    # Neither depends on the seed: they count as seed 0, so that scenarios whose first runs differ in it fit together.
    methods: dict[str, tuple[Result, ...]] = {
        row: (replace(_result(first, row), seed=0),) for row in (BASE, MAJORITY) if row in first.summary["rows"]
    }
    found: dict[str, list[Result]] = {}
    for entry in entries:
        found.setdefault(entry.method, []).append(_result(runs[entry.path], entry.row, entry.at_edge))
    methods |= {method: tuple(sorted(rows, key=lambda row: row.seed)) for method, rows in found.items()}
    return Scenario(name, tuple(sorted(first.summary["rows"][BASE]["clients"])), methods, first.labels)


def _result(run: Run, row: str, at_edge: bool = False) -> Result:
    summary, found = run.summary, run.summary["rows"][row]
    config = RunFolder(run.path).tables()
    scores = {client: values["score"] for client, values in found["clients"].items()}
    losses = {client: values["loss"] for client, values in found["clients"].items() if "loss" in values}
    measures = {"score": found["mean"], "worst": found["worst"], "spread": found["spread"]}
    if losses:
        measures["loss"] = statistics.fmean(losses.values())
    if row not in (BASE, MAJORITY):
        measures |= {
            "best_round": mean_best_round(found),
            **work_of(RunFolder(run.path).lines(METRICS), row, len(scores), summary["rounds"]),
            "mib_down": summary["bytes_down_per_client_round"] / MIB,
            "mib_up": summary["bytes_up_per_client_round"] / MIB,
            "seconds": summary["seconds_update"] + summary["seconds_evaluate"],
            "memory": summary["peak_memory_mib"],
        }
    rate = config["training"]["learning_rate"]
    return Result(run.seed, scores, losses, measures, summary["rounds"], rate, at_edge, run.untrained)


def best_validation_loss(path: Path, row: str) -> float:
    """Mean validation loss over all clients of a finished run's best rounds; infinite for a run that diverged.

    A run diverged where that mean is not a finite number, or where every update of every client failed: what was scored
    then is the untrained model. A client that did not train in that round counts with its model of the round before, in
    the end with the base. The test split is not read.
    """
    folder = RunFolder.open(path)
    found = folder.read_json("summary.json")["rows"][row]
    lines = list(folder.lines(METRICS))
    if nothing_trained(updates_of(lines)):
        return math.inf
    latest: dict[str, float] = {}
    for line in lines:
        if line["split"] != "validation" or line["method"] not in (BASE, row):
            continue
        best = best_round_of(found, line["client"])
        if line["method"] == BASE if best is None else line["round"] <= best:
            latest[line["client"]] = line["loss"]
    mean = sum(latest.values()) / len(latest)
    return mean if math.isfinite(mean) else math.inf


@dataclass(frozen=True)
class Against:
    """The reference against one other method, in one scenario or in all of them together."""

    scenario: str
    method: str
    measure: str
    """score (higher is better) or loss (lower is)."""
    gain: Gain


def gains(scenarios: Sequence[Scenario], reference: str) -> list[Against]:
    """Reference minus every other method, over the pairs (client, seed) that both have; then over all scenarios."""
    others = list(dict.fromkeys(name for found in scenarios for name in found.trained if name != reference))
    listed = []
    for other in others:
        for measure in ("score", "loss"):
            pairs = {found.name: _pairs(found, reference, other, measure) for found in scenarios}
            listed += [
                Against(name, other, measure, gain(found, higher=measure == "score"))
                for name, found in pairs.items()
                if found
            ]
            together = {(name, *key): value for name, found in pairs.items() for key, value in found.items()}
            if sum(map(bool, pairs.values())) > 1:
                listed.append(Against(ALL, other, measure, gain(together, higher=measure == "score")))
    order = [*(found.name for found in scenarios), ALL]
    return sorted(listed, key=lambda found: order.index(found.scenario))


def _pairs(scenario: Scenario, reference: str, other: str, measure: str) -> dict[tuple[Any, ...], float]:
    """Differences by (client, seed)."""
    ours, theirs = (
        {result.seed: result.scores if measure == "score" else result.losses for result in scenario.methods[name]}
        if name in scenario.methods
        else {}
        for name in (reference, other)
    )
    return {
        (client, seed): ours[seed][client] - theirs[seed][client]
        for seed in sorted(ours.keys() & theirs.keys())
        for client in sorted(ours[seed].keys() & theirs[seed].keys())
    }
