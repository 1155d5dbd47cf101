"""The verdict on finished runs: whether the best of the methods is better than training alone, in one sentence."""

import math
import statistics
from collections.abc import Mapping, Sequence

from fedamole.reporting.learning import lowest_loss
from fedamole.reporting.runs import Run
from fedamole.reporting.significance import gain
from fedamole.runs.run_files import BASE, MAJORITY

ALONE = "local_only"
"""The method that trains every client alone."""

Entries = Sequence[tuple[Run, str]]
"""Runs of one method, one per seed, each with the scored model (variant)."""


def verdict(entries: Mapping[str, Entries]) -> str:
    """Compare the best method with training alone by test score, over pairs of the same client and seed.

    The best method is the one with the lowest validation loss at its best round, as a mean over clients and seeds; the
    test split is not read for this choice. The interval is that of `significance.gain`.

    Args:
        entries: Runs of each column of a table, by its label, all on one partition.

    Returns:
        One sentence; empty if training alone or another method is missing, or if they have no pair in common.
    """
    trained = {
        label: runs
        for label, runs in entries.items()
        if label not in (BASE, MAJORITY) and not any(run.untrained for run, _ in runs)
    }
    alone = next((label for label, runs in trained.items() if all(variant == ALONE for _, variant in runs)), None)
    if alone is None:
        return ""
    losses = {label: _validation_loss(runs) for label, runs in trained.items() if label != alone}
    best = min(losses, key=lambda label: losses[label], default=None)
    if best is None or not math.isfinite(losses[best]):
        return ""
    ours, theirs = _scores(trained[best]), _scores(trained[alone])
    differences = {pair: ours[pair] - theirs[pair] for pair in sorted(ours.keys() & theirs.keys())}
    return _sentence(best, differences) if differences else ""


def _validation_loss(runs: Entries) -> float:
    return statistics.fmean(lowest_loss(run.curves[variant]) for run, variant in runs)


def _scores(runs: Entries) -> dict[tuple[str, int], float]:
    """Return test scores by (client, seed)."""
    return {
        (client, run.seed): values["score"]
        for run, variant in runs
        for client, values in run.summary["rows"][variant]["clients"].items()
    }


def _sentence(name: str, differences: Mapping[tuple[str, int], float]) -> str:
    over_pairs = gain(differences, higher=True)
    by_client: dict[str, list[float]] = {}
    for (client, _), value in differences.items():
        by_client.setdefault(client, []).append(value)
    means = [statistics.fmean(values) for values in by_client.values()]
    seeds = len({seed for _, seed in differences})
    size = f"{_count(len(means), 'client')}, {_count(seeds, 'seed')}"
    points = f"{over_pairs.mean:+.1f} points"
    if math.isnan(over_pairs.low):
        start = f"{name}, the best method by validation loss, against training alone: {points} ({size}, no interval)"
    else:
        details = f"{points} (95 % interval {over_pairs.low:+.1f} to {over_pairs.high:+.1f}; {size})"
        if over_pairs.low > 0:
            start = f"{name} is better than training alone: {details}"
        elif over_pairs.high < 0:
            start = f"Training alone is better than {name}, the best other method by validation loss: {details}"
        else:
            start = f"{name}, the best method by validation loss, is not clearly better than training alone: {details}"
    better, worse = sum(mean > 0 for mean in means), sum(mean < 0 for mean in means)
    return f"{start}. Better for {better}, worse for {worse} of {_count(len(means), 'client')}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
