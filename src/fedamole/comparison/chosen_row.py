"""The row `chosen` of a comparison: within a seed, each client has its best method by its own validation."""

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedamole.comparison.choice_table import explanation
from fedamole.comparison.file import Comparison
from fedamole.errors import ConfigError
from fedamole.evaluation.summary import over_clients
from fedamole.personal.paired_losses import PairedErrors
from fedamole.reporting.choosing import Choice, StandardError, candidate_of, check_measure, choose
from fedamole.reporting.results import CHOSEN, Scenario, SeedResult, TrialResult, runs_of
from fedamole.reporting.runs import Run

log = logging.getLogger(__name__)

SUMMED = ("steps", "probed", "forward_tokens", "backward_tokens", "mib_down", "mib_up", "seconds")
"""Measures of the row CHOSEN that are sums over the runs of all candidates, since all of them have to be trained."""


def with_chosen(comparison: Comparison, scenarios: Sequence[Scenario], margin: float) -> tuple[list[Scenario], str]:
    """Return the scenarios with the row CHOSEN, and its explanation for the caption of a table.

    Raises ConfigError for a method of this name and for a margin that cannot be applied, and RunError for runs that
    cannot be compared.
    """
    if CHOSEN in comparison.methods:
        raise ConfigError(f"variants.{CHOSEN}: --choose adds a row of this name; rename the variant")
    alone, measures = comparison.settings.target, list[str]()
    present = alone if alone in comparison.methods else None
    if present is None:
        log.warning("%s is not compared, so nothing shows that a chosen model is better than training alone", alone)
    results = []
    for scenario in scenarios:
        trials = [trial for trial in comparison.results() if trial.scenario == scenario.name]
        runs = runs_of(trials)
        measures.append(check_measure([*runs.values()]))
        results.append(scenario_with_chosen(scenario, trials, runs, alone, margin, PairedErrors()))
    sentences = dict.fromkeys(explanation(measure, present, margin) for measure in measures)
    about = (
        f"{CHOSEN}: {' '.join(sentences)} Its steps, tokens, MiB and seconds are the sums over the runs of all methods."
    )
    return results, about


def scenario_with_chosen(
    scenario: Scenario,
    trials: Sequence[TrialResult],
    runs: Mapping[Path, Run],
    alone: str,
    margin: float,
    standard_error: StandardError,
) -> Scenario:
    """Return a scenario of a comparison with the row CHOSEN: within each seed, every client chooses among the methods.

    A seed has the row if all methods have a finished run of it, apart from methods that trained nothing. The measures
    SUMMED are sums over the runs of all candidates, peak memory is the largest.

    Args:
        scenario: The scenario without the row.
        trials: Its finished trials.
        runs: Their runs; see `runs_of`.
        alone: Method that stands for training alone.
        margin: See `choose`.
        standard_error: See `choose`.
    """
    results = []
    for seed in scenario.seeds:
        of_seed = [trial for trial in trials if trial.seed == seed]
        if {trial.method for trial in of_seed} != set(scenario.trained):
            continue
        fit = [trial for trial in of_seed if trial.method in scenario.candidates]
        candidates = [
            candidate_of(runs[trial.path], trial.variant, trial.method, trial.method == alone) for trial in fit
        ]
        by_method = {method: _of_seed(scenario.methods[method], seed) for method in scenario.candidates}
        distinct = {trial.path: by_method[trial.method] for trial in fit}
        if candidates:
            results.append(_seed_result(seed, choose(candidates, margin, standard_error), [*distinct.values()]))
    if not results:
        return scenario
    return replace(scenario, methods={**scenario.methods, CHOSEN: tuple(results)})


def _of_seed(results: Sequence[SeedResult], seed: int) -> SeedResult:
    return next(result for result in results if result.seed == seed)


def _seed_result(seed: int, choices: Sequence[Choice], results: Sequence[SeedResult]) -> SeedResult:
    """Return the row CHOSEN of one seed; `results` has one entry per run of the candidates."""
    tests = {choice.client: choice.chosen.test(choice.client) for choice in choices}
    scores = {client: test["score"] for client, test in tests.items() if test}
    losses = {client: test["loss"] for client, test in tests.items() if "loss" in test}
    about = over_clients(scores)
    measures = {"score": about.mean, "worst": about.worst, "spread": about.spread}
    if losses:
        measures["loss"] = statistics.fmean(losses.values())
    for key in SUMMED:
        if all(key in result.measures for result in results):
            measures[key] = sum(result.measures[key] for result in results)
    measures["memory"] = max(result.measures["memory"] for result in results)
    return SeedResult(seed, scores, losses, measures, rounds=0, learning_rate=0.0)
