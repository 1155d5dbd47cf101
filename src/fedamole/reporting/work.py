"""What a run's training took, from the lines of its metrics.jsonl."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def work_of(lines: Iterable[Mapping[str, Any]], row: str, clients: int, rounds: int) -> dict[str, float]:
    """Work of one method (a row of the run's summary), as means over the clients of the federation.

    steps, probed: optimiser steps, and examples read in forward passes alone, per client and round.
    forward_tokens, backward_tokens: tokens without padding that a client reads in forward passes alone, and in forward
    and backward passes, in the whole run. parameters: numbers that a client trains in a round in which it trains.

    Forward passes without training count during a round and where a model is assembled before it is scored. Keys that
    no line has, as in runs of earlier versions, are left out.
    """
    train, found = [], []
    for line in lines:
        if line["split"] == "train":
            train.append(line)
        if line["split"] == "train" or (line["split"] == "validation" and line["method"] == row):
            found.append(line)

    def total(key: str) -> float:
        return float(sum(line.get(key, 0) for line in found))

    work = {"steps": total("steps") / (clients * rounds)}
    if any("probed" in line for line in found):
        work["probed"] = total("probed") / (clients * rounds)
    if any("backward_tokens" in line for line in train):
        work |= {key: total(key) / clients for key in ("forward_tokens", "backward_tokens")}
    if sizes := [line["trained_parameters"] for line in train if "trained_parameters" in line]:
        work["parameters"] = sum(sizes) / len(sizes)
    return work


def short(value: float) -> str:
    """A count in three digits, with k for thousands, M for millions and G for 10^9."""
    if not math.isfinite(value):
        return str(value)
    for unit, letter in UNITS:
        if value >= 0.9995 * unit:
            return f"{_three_digits(value / unit)}{letter}"
    return f"{value:.0f}"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
