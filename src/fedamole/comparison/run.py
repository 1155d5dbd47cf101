"""Running a comparison: run its trials, check them against stored ones, count and list them."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from fedamole.comparison.budgets import SET_BY_PLANS, planned, size_of
from fedamole.comparison.file import Comparison
from fedamole.comparison.trials import LOCK, MAY_DIFFER, Trial, TrialListener, reuse_run, run_trials
from fedamole.config import Config, to_config
from fedamole.files import exclusive
from fedamole.runs.run_folder import SUMMARY, RunFolder


def run_comparison(comparison: Comparison, listener: TrialListener) -> list[Trial]:
    """Run every unfinished trial, grid searches first; return the trials that failed.

    Raises:
        RunError: Another process is running the comparison (both would write the same folders), or a stored trial has
            other settings.
    """
    comparison.folder.mkdir(parents=True, exist_ok=True)
    refusal = f"{comparison.folder}: another process is running this comparison; wait for it or stop it"
    with exclusive(comparison.folder / LOCK, refusal):
        return _run_comparison(comparison, listener)


def _run_comparison(comparison: Comparison, listener: TrialListener) -> list[Trial]:
    comparison = planned(comparison)
    check_stored(comparison)
    workers, tried = comparison.settings.workers, set[str]()
    while trials := [
        trial
        for arm in comparison.arms
        for trial in chain.from_iterable(comparison.grid_trials(arm).values())
        if trial.name not in tried
    ]:
        run_trials(trials, workers, listener)
        tried.update(trial.name for trial in trials)  # the next pass may add rates that widen the grids
    if tried:
        _reuse_grid(comparison)
        check_stored(comparison)
    run_trials([trial for arm in comparison.arms for trial in comparison.trials(arm)], workers, listener)
    return failures(comparison)


def check_stored(comparison: Comparison, may_differ: Sequence[str] = MAY_DIFFER) -> None:
    """Raise RunError if a stored trial has other settings than the comparison, apart from those in `may_differ`."""
    for trial in comparison.all_trials():
        trial.refuse_other_config(str(comparison.path), may_differ)


def check_shown(comparison: Comparison) -> None:
    """Check stored trials before their tables are shown without a run; settings that a plan computes may differ."""
    settings = comparison.settings
    computed = (*SET_BY_PLANS.get(settings.budget, ()), *SET_BY_PLANS.get(settings.match, ()))
    check_stored(comparison, (*MAY_DIFFER, *computed))


def failures(comparison: Comparison) -> list[Trial]:
    """Return the trials whose last attempt failed."""
    return [trial for trial in comparison.all_trials() if trial.state == "failed"]


def _reuse_grid(comparison: Comparison) -> None:
    """Copy the grid's runs at the chosen learning rates to the trials of these seeds, which have the same settings."""
    for arm in comparison.arms:
        grid, chosen = comparison.grid_trials(arm), comparison.chosen(arm)
        for trial in comparison.trials(arm):
            for tried in grid[chosen[next(iter(trial.variants))].rate]:
                if tried.seed == trial.seed:
                    reuse_run(trial, tried.path)


def preview(comparison: Comparison) -> list[dict[str, Any]]:
    """Return one record per trial with what `fedamole compare` would do with it; runs nothing."""
    comparison = planned(comparison)
    check_stored(comparison)
    records: list[dict[str, Any]] = []
    for arm in comparison.arms:
        trials = [*chain.from_iterable(comparison.grid_trials(arm).values()), *comparison.trials(arm)]
        records += [_record(trial.name, list(trial.variants), _action(trial), trial.config) for trial in trials]
        if comparison.settings.learning_rates and not comparison.chosen(arm):
            waiting = _record("", list(arm.variants), "wait for its learning rate", to_config(arm.tables))
            records += [
                {**waiting, "trial": f"{arm.scenario}/{arm.name}-s{seed}", "learning_rate": None}
                for seed in comparison.settings.seeds
            ]
    return records


def _record(trial: str, methods: list[str], action: str, config: Config) -> dict[str, Any]:
    size = " ".join(map(str, size_of(config)))
    rounds, rate = config.federation.rounds, config.training.learning_rate
    return {"trial": trial, "methods": methods, "action": action, "size": size, "rounds": rounds, "learning_rate": rate}


def _action(trial: Trial) -> str:
    if trial.state == "failed":
        return f"run again; it failed: {trial.error}"
    return {"new": "run", "unfinished": "resume", "finished": "skip (finished)"}[trial.state]


def outlook(comparison: Comparison) -> str:
    """Return one sentence: finished trials, trials left, and the estimated time for the latter."""
    trials = {trial.name: trial for trial in comparison.all_trials()}
    finished = [trial for trial in trials.values() if trial.state == "finished"]
    waiting = [arm for arm in comparison.arms if not comparison.trials(arm)]
    left = len(trials) - len(finished) + len(waiting) * len(comparison.settings.seeds)
    counts = f"{len(finished)} trials are finished, {left} are left"
    if comparison.settings.learning_rates and comparison.settings.widen:
        counts += ", and wider grids may add some"
    if not finished or not left:
        return counts
    summaries = [RunFolder(trial.path).read_json(SUMMARY) for trial in finished]
    seconds = sum(summary["seconds_update"] + summary["seconds_evaluate"] for summary in summaries) / len(finished)
    minutes = left * seconds / comparison.settings.workers / 60
    return f"{counts}; at {seconds:.0f} s each (mean of the finished ones), the rest takes about {minutes:.0f} minutes"


def progress(comparison: Comparison) -> dict[str, int]:
    """Return the number of trials in each state; those that wait for their learning rate count as new."""
    counts: dict[str, int] = {"finished": 0, "failed": 0, "unfinished": 0, "new": 0}
    for arm in comparison.arms:
        trials: Sequence[Trial] = comparison.trials(arm)
        counts["new"] += 0 if trials else len(comparison.settings.seeds)
        for trial in trials:
            counts[trial.state] += 1
    return counts
