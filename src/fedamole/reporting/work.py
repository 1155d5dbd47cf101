"""Work done by the clients of a run (steps, tokens, parameters), computed from its metrics.jsonl."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def work_of(lines: Iterable[Mapping[str, Any]], variant: str, clients: int, rounds: int) -> dict[str, float]:
    """Return the work of one variant (scored model) of a run, as means over the clients of the federation.

    Forward passes without training count during a round, and where a model is assembled before it is scored. Keys that
    no line has, as in runs of earlier versions, are left out.

    Returns:
        steps: optimiser steps per client and round.
        probed: examples read in forward passes only, per client and round.
        forward_tokens: tokens, without padding, that a client reads in forward passes only, in the whole run.
        backward_tokens: tokens, without padding, that a client reads in forward and backward passes, in the whole run.
        parameters: parameters that a client trains in a round in which it trains, over all exchanges of the round.
    """
    train, counted = [], []
    for line in lines:
        if line["split"] == "train":
            train.append(line)
        if line["split"] == "train" or (line["split"] == "validation" and line["method"] == variant):
            counted.append(line)

    def total(key: str) -> float:
        return float(sum(line.get(key, 0) for line in counted))

    work = {"steps": total("steps") / (clients * rounds)}
    if any("probed" in line for line in counted):
        work["probed"] = total("probed") / (clients * rounds)
    if any("backward_tokens" in line for line in train):
        work |= {key: total(key) / clients for key in ("forward_tokens", "backward_tokens")}
    sizes = dict[tuple[int, str], int]()
    for line in train:
        if "trained_parameters" in line:  # counts from the first exchange of the round on
            key = line["round"], line["client"]
            sizes[key] = max(sizes.get(key, 0), line["trained_parameters"])
    if sizes:
        work["parameters"] = sum(sizes.values()) / len(sizes)
    return work


def short_count(value: float) -> str:
    """Format a count with three digits, with k for thousands, M for millions and G for 10^9."""
    if not math.isfinite(value):
        return str(value)
    for unit, letter in UNITS:
        if value >= 0.9995 * unit:
            return f"{_three_digits(value / unit)}{letter}"
    return f"{value:.0f}"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
