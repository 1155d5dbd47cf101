"""Selective merging, from Zhao et al., "Model-GLUE: Democratized LLM Scaling for A Large Model Zoo in the Wild",
NeurIPS 2024, https://arxiv.org/abs/2410.05357: a model is merged into the best so far only if that lowers the loss.

Models are sorted by their own loss. Starting with the best, each next model is tried with several coefficients c as
(1 - c) * best + c * next, on the changes. The coefficient with the lowest loss is taken if it is below the best so far;
otherwise the model is left out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.merging.low_rank import LoraFactors, padded, product_svd, truncate

COEFFICIENTS = tuple(step / 10 for step in range(1, 10))
"""Coefficients that are tried: 0.1 .. 0.9."""


@dataclass(frozen=True)
class Selection:
    """The best merge so far of one group of models."""

    factors: LoraFactors
    loss: float
    taken: tuple[tuple[str, float], ...]
    """Names of the models that are part of it, with the coefficient at which each was merged; 1 for the first."""
    refused: tuple[str, ...] = ()
    """Names of the models that would not lower the loss."""


def mean_losses(likelihoods: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Return the mean of the losses by name, of clients that each report exp(-loss) as 0-d tensors.

    A loss counts as at most 69 nats, so that an infinite one does not make all means infinite.
    """
    losses: dict[str, list[float]] = {}
    for row in likelihoods:
        for name, likelihood in row.items():
            losses.setdefault(name, []).append(-math.log(min(max(float(likelihood), 1e-30), 1.0)))
    return {name: sum(values) / len(values) for name, values in losses.items()}


def useful(losses: Mapping[str, float], untuned: Mapping[str, float]) -> list[str]:
    """Return the models that have a lower loss than the untuned base, each at its own client; losses by model."""
    return [name for name, loss in losses.items() if loss < untuned[name]]


def blend(first: LoraFactors, second: LoraFactors, coefficient: float, rank: int) -> LoraFactors:
    """Return the LoRA of a rank that is nearest to (1 - c) * first + c * second, on the changes."""
    blended = {}
    for module, (a, b) in first.items():
        other_a, other_b = second[module]
        stacks = torch.cat([a, other_a]), torch.cat([b * (1 - coefficient), other_b * coefficient], dim=1)
        blended[module] = padded(truncate(product_svd(*stacks), rank), rank)
    return blended


def merge_selectively(
    groups: Mapping[str, Sequence[str]],
    loras: Mapping[str, LoraFactors],
    losses: Mapping[str, float],
    evaluate: Callable[[Mapping[str, tuple[LoraFactors, LoraFactors]]], Mapping[str, Sequence[float]]],
    *,
    rank: int,
    steps: int,
) -> dict[str, Selection]:
    """Merge the models of each group, best first; return one selection for each group.

    Args:
        groups: Names of the models of each group.
        loras: Factors of the models by name.
        losses: Loss of each model alone, by which a group is sorted.
        evaluate: Returns the losses of blends with each of `COEFFICIENTS`, given (best, next) by group. It is called
            once for each step, for all groups that have a next model.
        rank: Rank of the result.
        steps: Largest number of models that are tried in each group after the first.

    Raises:
        ConfigError: A group is empty.
    """
    if not groups or not all(groups.values()):
        raise ConfigError("selective merging needs at least one model that is better than the untuned base")
    groups = {group: sorted(names, key=lambda name: (losses[name], name)) for group, names in groups.items()}
    selections = {
        group: Selection(loras[names[0]], losses[names[0]], ((names[0], 1.0),)) for group, names in groups.items()
    }
    for step in range(1, min(steps + 1, max(len(names) for names in groups.values()))):
        pairs = {
            group: (selections[group].factors, loras[names[step]])
            for group, names in groups.items()
            if len(names) > step
        }
        for group, values in evaluate(pairs).items():
            selections[group] = _extended(selections[group], groups[group][step], pairs[group], values, rank)
    return selections


def _extended(
    selection: Selection, name: str, pair: tuple[LoraFactors, LoraFactors], losses: Sequence[float], rank: int
) -> Selection:
    """Return the selection with the next model merged at its best coefficient, or with that model refused."""
    best = min(range(len(COEFFICIENTS)), key=lambda i: (losses[i], i))
    if not losses[best] < selection.loss:
        return replace(selection, refused=(*selection.refused, name))
    coefficient = COEFFICIENTS[best]
    taken = (*selection.taken, (name, coefficient))
    return replace(selection, factors=blend(*pair, coefficient, rank), loss=losses[best], taken=taken)
