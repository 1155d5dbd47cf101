"""Results of finished runs, grouped by scenario and method; computed from run folders."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fedamole.errors import RunError
from fedamole.federation.best import best_round_of, mean_best_round
from fedamole.federation.summary import nothing_trained, updates_of
from fedamole.reporting.learning import cost_to_target, lowest_loss
from fedamole.reporting.runs import Run, read_run
from fedamole.reporting.significance import Gain, gain
from fedamole.runs.run_files import BASE, MAJORITY
from fedamole.runs.run_folder import METRICS, SUMMARY, RunFolder

MIB = 2**20
ALL = "all scenarios"
CHOSEN = "chosen"
"""Row of the tables with the model that each client chose by its own validation (`reporting/choosing.py`)."""


@dataclass(frozen=True)
class TrialResult:
    """A finished run as the result of one method with one seed."""

    scenario: str
    method: str
    """Name of the method in the comparison."""
    variant: str
    """Variant (scored model) of the run to read."""
    seed: int
    path: Path
    at_edge: bool = False
    """Whether the learning rate is the lowest or the highest that was tried for the method."""


@dataclass(frozen=True)
class SeedResult:
    """Test results of one method with one seed in one scenario, at the best validation round."""

    seed: int
    scores: dict[str, float]
    """Test score of each client, 0 to 100."""
    losses: dict[str, float]
    """Test loss of each client in nats per answer token; empty for the constant answer."""
    measures: dict[str, float]
    """Values of MEASURES; those about training are missing for the untuned base and the constant answer. The cost to a
    target that was not reached is infinite."""
    rounds: int
    learning_rate: float
    at_edge: bool = False
    """Whether the learning rate is the lowest or the highest that was tried."""
    untrained: bool = False
    """Whether every update of the run failed."""

    def values(self, measure: str) -> dict[tuple[Any, ...], float]:
        """Return the values of a measure: by (client, seed) for score and loss, by (seed,) for the others."""
        if measure in ("score", "loss"):
            by_client = self.scores if measure == "score" else self.losses
            return {(client, self.seed): value for client, value in by_client.items()}
        return {(self.seed,): self.measures[measure]} if measure in self.measures else {}


def values_of(results: Sequence[SeedResult], measure: str) -> dict[tuple[Any, ...], float]:
    """Return the values of a measure over all seeds; see `SeedResult.values`."""
    return {key: value for result in results for key, value in result.values(measure).items()}


@dataclass(frozen=True)
class Measure:
    """A column of the table of methods."""

    key: str
    title: str
    digits: int
    best: Literal["highest", "lowest"] | None = None
    """Which value is the best; None if the column has no star."""
    varies: bool = True
    """Whether to show the standard deviation over seeds."""
    short: bool = False
    """Whether it is a large count, shown with k, M or G."""
    to_target: bool = False
    """Whether it is a cost to the target, which a seed may not reach."""


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
    Measure("steps_to_target", "steps to target", 0, varies=False, short=True, to_target=True),
    Measure("tokens_to_target", "tokens to target", 0, varies=False, short=True, to_target=True),
    Measure("mib_down", "MiB down", 3, varies=False),
    Measure("mib_up", "MiB up", 3, varies=False),
    Measure("seconds", "seconds", 0, varies=False),
    Measure("memory", "memory MiB", 0, varies=False),
)
"""Over the clients: mean score, worst score, standard deviation of the scores, mean loss. For the run: best round, the
work (see `work_of`), the work until the validation loss reaches the target (see `cost_to_target`), traffic per client
and round, seconds and peak memory."""


@dataclass(frozen=True)
class Scenario:
    """All finished runs of one scenario, which have the same data in the same splits."""

    name: str
    clients: tuple[str, ...]
    methods: dict[str, tuple[SeedResult, ...]]
    """Results by method, one per seed; first those of the untuned base and of the constant answer, once each."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels of clients in tables, for those whose label is not their name."""

    @property
    def trained(self) -> dict[str, tuple[SeedResult, ...]]:
        """The methods without the untuned base, the constant answer and the row CHOSEN."""
        return {name: results for name, results in self.methods.items() if name not in (BASE, MAJORITY, CHOSEN)}

    @property
    def candidates(self) -> dict[str, tuple[SeedResult, ...]]:
        """The methods that can get a star: the trained ones without runs in which every update failed."""
        return {
            name: results for name, results in self.trained.items() if not any(result.untrained for result in results)
        }

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of which any method has a finished run."""
        return tuple(sorted({result.seed for results in self.trained.values() for result in results}))

    def label(self, method: str) -> str:
        """Return a method's name in a table, with its number of seeds if some are missing."""
        count = len(self.methods[method])
        missing = method not in (BASE, MAJORITY) and count < len(self.seeds)
        return f"{method} ({count} of {len(self.seeds)} seeds)" if missing else method


def read_scenarios(trials: Sequence[TrialResult], target: str = "") -> list[Scenario]:
    """Read finished runs, grouped by scenario in the order of `trials`.

    `target` is the method whose lowest mean validation loss is the target of the costs to target (empty: none).

    Raises:
        RunError: Runs of one scenario have different data, splits or bases.
    """
    grouped: dict[str, list[TrialResult]] = {}
    for trial in trials:
        grouped.setdefault(trial.scenario, []).append(trial)
    return [scenario_of(name, of_scenario, runs_of(of_scenario), target) for name, of_scenario in grouped.items()]


def runs_of(trials: Iterable[TrialResult]) -> dict[Path, Run]:
    """Read the runs of trials, each once; see `read_run`."""
    return {path: read_run(path) for path in dict.fromkeys(trial.path for trial in trials)}


def scenario_of(name: str, trials: Sequence[TrialResult], runs: Mapping[Path, Run], target: str = "") -> Scenario:
    """Return a scenario from its trials, whose runs have been read; see `read_scenarios`."""
    first = runs[trials[0].path]
    for run in runs.values():
        if run.partition != first.partition:
            raise RunError(
                f"{run.path} and {first.path} had different data, splits or base, so there is no table of scenario "
                f"{name}; move the older runs away and repeat the command"
            )
    # Base and constant answer do not depend on the seed. They count as seed 0, so that scenarios can be averaged.
    methods: dict[str, tuple[SeedResult, ...]] = {
        variant: (replace(_seed_result(first, variant), seed=0),)
        for variant in (BASE, MAJORITY)
        if variant in first.summary["rows"]
    }
    by_method: dict[str, list[SeedResult]] = {}
    targets = {
        trial.seed: lowest_loss(runs[trial.path].curves[trial.variant]) for trial in trials if trial.method == target
    }
    for trial in trials:
        result = _seed_result(runs[trial.path], trial.variant, trial.at_edge)
        if trial.seed in targets:
            cost = cost_to_target(runs[trial.path].curves[trial.variant], targets[trial.seed])
            result = replace(result, measures={**result.measures, **cost})
        by_method.setdefault(trial.method, []).append(result)
    methods |= {method: tuple(sorted(results, key=lambda result: result.seed)) for method, results in by_method.items()}
    return Scenario(name, tuple(sorted(first.summary["rows"][BASE]["clients"])), methods, first.labels)


def _seed_result(run: Run, variant: str, at_edge: bool = False) -> SeedResult:
    summary, row = run.summary, run.summary["rows"][variant]
    scores = {client: values["score"] for client, values in row["clients"].items()}
    losses = {client: values["loss"] for client, values in row["clients"].items() if "loss" in values}
    measures = {"score": row["mean"], "worst": row["worst"], "spread": row["spread"]}
    if losses:
        measures["loss"] = statistics.fmean(losses.values())
    if variant not in (BASE, MAJORITY):
        measures |= {
            "best_round": mean_best_round(row),
            **run.work[variant],
            "mib_down": summary["bytes_down_per_client_round"] / MIB,
            "mib_up": summary["bytes_up_per_client_round"] / MIB,
            "seconds": summary["seconds_update"] + summary["seconds_evaluate"],
            "memory": summary["peak_memory_mib"],
        }
    rate = run.config["training"]["learning_rate"]
    return SeedResult(run.seed, scores, losses, measures, summary["rounds"], rate, at_edge, run.untrained)


def best_validation_loss(path: Path, variant: str) -> float:
    """Return the mean validation loss over the clients at the best round of a finished run; infinite if it diverged.

    A run has diverged if that mean is not finite, or if every update failed (it then scored the untrained model). A
    client that did not train in the best round counts with its latest earlier model, at first the untuned base. The
    test split is not read.

    Raises:
        RunError: If the run has not scored this variant.
    """
    folder = RunFolder.open(path)
    rows = folder.read_json(SUMMARY)["rows"]
    if variant not in rows:
        raise RunError(
            f"{path}: the finished run has no scores of {variant}, only of {', '.join(rows)}, since it was made for a "
            "comparison without that method; nothing is overwritten: move the folder away, or choose another folder"
        )
    row = rows[variant]
    lines = list(folder.lines(METRICS))
    if nothing_trained(updates_of(lines)):
        return math.inf
    latest = [line["loss"] for line in validation_at_best(lines, row, variant).values()]
    mean = sum(latest) / len(latest)
    return mean if math.isfinite(mean) else math.inf


def validation_at_best(
    lines: Iterable[Mapping[str, Any]], row: Mapping[str, Any], variant: str
) -> dict[str, Mapping[str, Any]]:
    """Return by client the line of metrics.jsonl with the validation of its saved model, that of the best round.

    For a client that did not train up to that round it is the line of the untuned base. `row` is the variant's row of
    summary.json.
    """
    latest: dict[str, Mapping[str, Any]] = {}
    for line in lines:
        if line["split"] != "validation" or line["method"] not in (BASE, variant):
            continue
        best = best_round_of(row, line["client"])
        if line["method"] == BASE if best is None else line["round"] <= best:
            latest[line["client"]] = line
    return latest


@dataclass(frozen=True)
class MethodGain:
    """The gain of the reference over one other method, in one scenario or over all of them."""

    scenario: str
    method: str
    measure: str
    """score (higher is better) or loss (lower is better)."""
    gain: Gain


def gains(scenarios: Sequence[Scenario], reference: str) -> list[MethodGain]:
    """Return the gain of the reference over every other method: per scenario, then over all scenarios.

    Pairs are (client, seed); only those that both methods have count.
    """
    others = list(dict.fromkeys(name for scenario in scenarios for name in scenario.trained if name != reference))
    method_gains = []
    for other in others:
        for measure in ("score", "loss"):
            higher = measure == "score"
            pairs = {scenario.name: differences(scenario, reference, other, measure) for scenario in scenarios}
            method_gains += [
                MethodGain(name, other, measure, gain(by_pair, higher=higher))
                for name, by_pair in pairs.items()
                if by_pair
            ]
            pooled = {(name, *key): value for name, by_pair in pairs.items() for key, value in by_pair.items()}
            if sum(map(bool, pairs.values())) > 1:
                method_gains.append(MethodGain(ALL, other, measure, gain(pooled, higher=higher)))
    order = [*(scenario.name for scenario in scenarios), ALL]
    return sorted(method_gains, key=lambda line: order.index(line.scenario))


def differences(scenario: Scenario, reference: str, other: str, measure: str) -> dict[tuple[Any, ...], float]:
    """Return reference minus other method by (client, seed); `measure` is score or loss.

    The untuned base and the constant answer do not depend on the seed and are compared with every seed.
    """
    ours, theirs = (values_of(scenario.methods.get(name, ()), measure) for name in (reference, other))
    if other in (BASE, MAJORITY):
        by_client = {client: value for (client, _), value in theirs.items()}
        theirs = {pair: by_client[pair[0]] for pair in ours if pair[0] in by_client}
    pairs = sorted(ours.keys() & theirs.keys(), key=lambda pair: (pair[1], pair[0]))
    return {pair: ours[pair] - theirs[pair] for pair in pairs}
