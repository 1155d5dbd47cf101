"""Distillation: a training that follows the token distributions of another model at the answer tokens.

Sources: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531, for a
frozen teacher; Zhang, Xiang, Hospedales, Lu, "Deep Mutual Learning", CVPR 2018, https://arxiv.org/abs/1706.00384, for
two models that are trained together and follow each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fedamole.model.adapter_store import AdapterStore
from fedamole.model.bank import Bank
from fedamole.model.batch import Batch
from fedamole.model.params import Adapter
from fedamole.model.segments import Segments, expand, segment_sum


@dataclass(frozen=True)
class Distillation:
    """How much a training follows another model: (1 - w) * cross-entropy + w * T^2 * KL(other || own)."""

    weight: float = 0.5
    """Weight w of the divergence, from 0 to 1."""
    temperature: float = 1.0
    """Temperature T by which the logits of both models are divided."""

    def __post_init__(self) -> None:
        """Raise ValueError for a weight or a temperature out of range."""
        if not 0 <= self.weight <= 1:
            raise ValueError(f"the weight of a distillation must be from 0 to 1, not {self.weight}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"the temperature of a distillation must be above 0, not {self.temperature}")


def token_divergences(other: Tensor, own: Tensor, temperatures: Tensor) -> Tensor:
    """Return T^2 KL(softmax(other / T) || softmax(own / T)) of each token, (K), in nats, in at least float32.

    Shapes: logits `other` and `own` (K, V), `temperatures` (K). No gradient flows into `other`.
    """
    precise = torch.promote_types(own.dtype, torch.float32)
    column = temperatures.to(precise).unsqueeze(1)
    target, logs = ((logits.to(precise) / column).log_softmax(1) for logits in (other.detach(), own))
    return column.squeeze(1).square() * F.kl_div(logs, target, reduction="none", log_target=True).sum(1)


def partner_logits(logits: Tensor, answers: Segments) -> Tensor:
    """Return for each adapter of a pair the logits (K, V) of the other one; pairs are the adapters 2i and 2i + 1."""
    parts = logits.split(answers.lengths)
    return torch.cat([parts[i ^ 1] for i in range(len(parts))])


class Followed(Protocol):
    """What the C adapters of a group follow in training."""

    def targets(self, batch: Batch, first: int, last: int) -> Any:
        """Return what `losses` needs for a batch of adapters `first` to `last` - 1; no gradient flows into it."""

    def losses(self, losses: Tensor, logits: Tensor, targets: Any, answers: Segments, first: int, last: int) -> Tensor:
        """Return the losses (C) of adapters `first` to `last` - 1 from their mean cross-entropies (C) and logits."""


class FollowedModels(Followed):
    """What the C adapters of a group follow: a frozen teacher each, or without teachers the other one of their pair."""

    def __init__(self, bank: Bank, settings: Sequence[Distillation], teachers: Sequence[Adapter]) -> None:
        """Load the teachers, if any, beside the adapters of `bank`; raises what loading an adapter raises."""
        self.bank, self.teachers = bank, AdapterStore(bank.base, teachers) if teachers else None
        pairs = torch.tensor([[each.weight, each.temperature] for each in settings], dtype=torch.float64)
        self.weights, self.temperatures = pairs.to(bank.store.weights).unbind(1)

    @override
    def targets(self, batch: Batch, first: int, last: int) -> Tensor | None:
        """Return the teachers' logits (K, V) for adapters `first` to `last` - 1, without dropout; None for pairs."""
        if self.teachers is None:
            return None
        without_dropout, bank = replace(batch, dropout_keys=None), self.bank
        with torch.no_grad(), bank.lent(self.teachers, first, last), bank.forward(without_dropout) as logits:
            return logits

    @override
    def losses(
        self, losses: Tensor, logits: Tensor, targets: Tensor | None, answers: Segments, first: int, last: int
    ) -> Tensor:
        """Return the losses (C) of adapters `first` to `last` - 1 from their mean cross-entropies (C) and logits."""
        other = partner_logits(logits, answers) if targets is None else targets
        temperatures = expand(self.temperatures[first:last], answers)
        divergences = segment_sum(token_divergences(other, logits, temperatures), answers) / answers.counts
        weights = self.weights[first:last]
        return (1 - weights) * losses + weights * divergences
