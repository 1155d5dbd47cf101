"""The verdict on finished runs in one sentence: the best method against training alone, or against the yardsticks."""

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
    trained = _trained(entries)
    alone = next((label for label, runs in trained.items() if all(variant == ALONE for _, variant in runs)), None)
    if alone is None:
        return ""
    best = _best({label: runs for label, runs in trained.items() if label != alone})
    if best is None:
        return ""
    ours, theirs = _scores(trained[best]), _scores(trained[alone])
    differences = {pair: ours[pair] - theirs[pair] for pair in sorted(ours.keys() & theirs.keys())}
    return _sentence(best, differences) if differences else ""


def _trained(entries: Mapping[str, Entries]) -> dict[str, Entries]:
    """Return the entries of methods that were trained, without yardsticks and runs in which every update failed."""
    return {
        label: runs
        for label, runs in entries.items()
        if label not in (BASE, MAJORITY) and not any(run.untrained for run, _ in runs)
    }


def _best(trained: Mapping[str, Entries]) -> str | None:
    """Return the label with the lowest validation loss; None if there is no label or no finite loss."""
    losses = {label: _validation_loss(runs) for label, runs in trained.items()}
    best = min(losses, key=lambda label: losses[label], default=None)
    return best if best is not None and math.isfinite(losses[best]) else None


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
    better, worse = sum(mean > 0 for mean in means), sum(mean < 0 for mean in means)
    seeds = len({seed for _, seed in differences})
    size = f"{_count(len(means), 'client')}, {_count(seeds, 'seed')}"
    points = f"{over_pairs.mean:+.1f} points"
    both = f"better for {better} and worse for {worse} of {_count(len(means), 'client')}"
    if math.isnan(over_pairs.low):
        start = f"{name}, the best method by validation loss, against training alone"
        return f"{start}: {points} ({size}, no interval); {both}."
    details = f"{points} (95 % interval {over_pairs.low:+.1f} to {over_pairs.high:+.1f}; {size})"
    if over_pairs.low > 0:
        start = f"{name} is better than training alone for {better} of {_count(len(means), 'client')}"
        others = {0: "no client is worse", 1: "1 client is worse"}.get(worse, f"{worse} clients are worse")
        return f"{start}: {details}; {others}."
    if over_pairs.high < 0:
        return f"Training alone is better than {name}, the best other method by validation loss: {details}; {both}."
    return f"{name}, the best method by validation loss, is not clearly better than training alone: {details}; {both}."


def verdict_on_yardsticks(entries: Mapping[str, Entries]) -> str:
    """Compare the best method with the untuned base and the constant answer, for runs without training alone.

    The best method is chosen as in `verdict`; with training alone as the only method, it is that one.

    Args:
        entries: Runs of each column of a table, by its label, all on one partition.

    Returns:
        One sentence that also states what is not known; empty if no method was trained or the base was not scored.
    """
    trained = _trained(entries)
    best = _best(trained)
    if best is None or BASE not in entries:
        return ""
    scores = _scores(trained[best])
    clients = len({client for client, _ in scores})
    seeds = len({seed for _, seed in scores})
    among = ", the best method by validation loss," if len(trained) > 1 else ""
    mean = f"{statistics.fmean(scores.values()):.1f}"
    against = [_against(scores, entries[BASE], "the untuned base")]
    if MAJORITY in entries:
        against.append(_against(scores, entries[MAJORITY], "the most frequent training answer"))
    alone = all(variant == ALONE for runs in trained.values() for _, variant in runs)
    missing = "no federated method is in this report" if alone else f"a run of {ALONE} would show what sharing adds"
    size = f"{_count(clients, 'client')}, {_count(seeds, 'seed')}"
    return f"{best}{among} has a mean test score of {mean} ({size}): {' and '.join(against)}; {missing}."


def _against(scores: Mapping[tuple[str, int], float], yardstick: Entries, name: str) -> str:
    """Return the mean difference to a yardstick, which is the same for all seeds, with its interval."""
    of_client = {client: score for (client, _), score in _scores(yardstick).items()}
    differences = {pair: score - of_client[pair[0]] for pair, score in scores.items() if pair[0] in of_client}
    over_pairs = gain(differences, higher=True)
    interval = "" if math.isnan(over_pairs.low) else f" (95 % interval {over_pairs.low:+.1f} to {over_pairs.high:+.1f})"
    return f"{over_pairs.mean:+.1f} points against {name}{interval}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
