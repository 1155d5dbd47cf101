"""Validation loss and work of a run after each round, and the work until the loss reaches a target."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedamole.runs.run_files import BASE


@dataclass(frozen=True)
class RoundState:
    """One variant (scored model) of a run after one round; all values are means over the clients of the federation."""

    loss: float
    """Validation loss in nats per answer token. A client not scored in the round counts with its latest model."""
    steps: float
    """Optimiser steps of a client since the start."""
    tokens: float
    """Tokens that a client has read in forward and backward passes since the start; NaN if the run did not count."""


def learning_curve(lines: Iterable[Mapping[str, Any]], variant: str, clients: int) -> list[RoundState]:
    """Return the state after each round in which the variant was scored, from the lines of metrics.jsonl.

    Args:
        lines: Lines of metrics.jsonl, in their order.
        variant: The scored model. Variants of a run share its training.
        clients: Number of clients of the federation.
    """
    steps, tokens = dict[int, float](), dict[int, float]()
    losses = dict[int, dict[str, float]]()
    latest, counted = dict[str, float](), True
    for line in lines:
        round_ = line["round"]
        if line["split"] == "train":
            steps[round_] = steps.get(round_, 0.0) + line.get("steps", 0)
            tokens[round_] = tokens.get(round_, 0.0) + line.get("backward_tokens", 0)
            counted = counted and ("backward_tokens" in line or not line.get("steps"))
        elif line["split"] == "validation" and line["method"] == BASE:
            latest.setdefault(line["client"], line["loss"])
        elif line["split"] == "validation" and line["method"] == variant:
            losses.setdefault(round_, {})[line["client"]] = line["loss"]
    states, all_steps, all_tokens = [], 0.0, 0.0
    for round_ in sorted(steps.keys() | losses.keys()):
        all_steps += steps.get(round_, 0.0)
        all_tokens += tokens.get(round_, 0.0)
        if round_ in losses:
            latest |= losses[round_]
            loss = sum(latest.values()) / len(latest)
            states.append(RoundState(loss, all_steps / clients, all_tokens / clients if counted else math.nan))
    return states


def lowest_loss(curve: Sequence[RoundState]) -> float:
    """Return the lowest loss of a curve; infinite if it has no finite one."""
    return min((state.loss for state in curve if math.isfinite(state.loss)), default=math.inf)


def cost_to_target(curve: Sequence[RoundState], target: float) -> dict[str, float]:
    """Return `steps_to_target` and `tokens_to_target`: the work up to the first round with a loss of at most `target`.

    Both are infinite if no round reaches a finite target. Tokens are missing if the run did not count them.
    """
    reached = next((state for state in curve if state.loss <= target < math.inf), None)
    if reached is None:
        return {"steps_to_target": math.inf, "tokens_to_target": math.inf}
    tokens = {} if math.isnan(reached.tokens) else {"tokens_to_target": reached.tokens}
    return {"steps_to_target": reached.steps, **tokens}
