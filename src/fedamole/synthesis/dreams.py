"""Dreams: inputs that several models recognise with confidence, and what is averaged over the models.

Source: Singh et al., "CoDream: Exchanging dreams instead of models for federated aggregation with heterogeneous
models", 2024, https://arxiv.org/abs/2402.15968, whose loss follows Yin et al., "Dreaming to Distill", CVPR 2020,
https://arxiv.org/abs/1912.08795. Entropies and divergences are in nats.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.synthesis.matching import Features, Objective
from fedamole.synthesis.rows import SoftLabels

SMALLEST = 1e-6
"""Divisors are at least this, for real states that do not vary."""


@dataclass(frozen=True)
class Dreaming(Objective):
    """Mean entropy + alpha sum over layers of the distance to real states - lambda mean JS(own, other).

    The entropy is that of the model's distribution for a dream. The second model is the one that is to learn from the
    dreams: where the two differ (Jensen-Shannon divergence), it has something to learn.
    """

    statistics_weight: float
    """Weight alpha of the distances of mean and variance of the hidden states (`states_distance`)."""
    disagreement_weight: float
    """Weight lambda of the divergence from the second model."""
    tokens: tuple[int, ...] = ()
    """First tokens of the answer options, which the distributions are over; empty: the whole vocabulary."""

    needs_layers = real_once = True

    @override
    def loss(self, synthetic: Features, classes: Tensor, real: Mapping[int, Features]) -> Tensor:
        own = self._log_probabilities(synthetic.logits)
        total = entropies(own).mean()
        if self.statistics_weight:
            for features in real.values():
                for dreamt, seen in zip(synthetic.layers, features.layers, strict=True):
                    total = total + self.statistics_weight * states_distance(dreamt, seen)
        if self.disagreement_weight and synthetic.other is not None:
            divergences = jensen_shannon(own, self._log_probabilities(synthetic.other))
            total = total - self.disagreement_weight * divergences.mean()
        return total

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        return (logits[:, list(self.tokens)] if self.tokens else logits).log_softmax(1)


def entropies(logs: Tensor) -> Tensor:
    """Return the entropy (N) of distributions that are given as log-probabilities (N, k)."""
    return -(logs.exp() * logs).sum(1)


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence (N), from 0 to log 2, of log-probabilities (N, k)."""
    mean = torch.logaddexp(first, second) - math.log(2)
    return entropies(mean) - (entropies(first) + entropies(second)) / 2


def states_distance(dreamt: Tensor, seen: Tensor) -> Tensor:
    """Return |mean - m|^2 / sum(v) + |variance - v|^2 / |v|^2 of two sets of states (N, d) and (M, d).

    m and v are mean and variance of the second set by dimension, as the divisor is M. The two quotients make the
    distance independent of the scale of the states, which differs between layers and bases.
    """
    mean, variance = seen.mean(0), seen.var(0, correction=0)
    means = (dreamt.mean(0) - mean).square().sum() / variance.sum().clamp(min=SMALLEST)
    variances = (dreamt.var(0, correction=0) - variance).square().sum()
    return means + variances / variance.square().sum().clamp(min=SMALLEST**2)


def top_labels(logits: Tensor, tokens: Sequence[int], most: int) -> SoftLabels:
    """Return soft labels (N, 1, most) from the logits (N, k) of some token ids: the most likely ones, which sum to 1.

    With fewer tokens than `most`, id 0 with probability 0 fills the rest.
    """
    ids = torch.tensor(tokens).expand(logits.shape)
    return _most_likely(ids, logits.softmax(1), most)


def mean_labels(labels: Sequence[SoftLabels]) -> SoftLabels:
    """Return the mean of soft labels (N, 1, k) of the same N rows: the k most likely ids, whose sum is 1 again."""
    most, last = labels[0].ids.shape[2], max(int(each.ids.max()) for each in labels)
    total = torch.zeros(len(labels[0].ids), last + 1)
    for each in labels:
        total.scatter_add_(1, each.ids[:, 0], each.probabilities[:, 0].float())
    return _most_likely(torch.arange(last + 1).expand(total.shape), total, most)


def _most_likely(ids: Tensor, values: Tensor, most: int) -> SoftLabels:
    """Return the largest values (N, k), divided by their sum, with their token ids (N, k)."""
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :most]
    kept, padding = values.gather(1, order), (0, most - order.shape[1])
    kept = kept / kept.sum(1, keepdim=True).clamp(min=SMALLEST)
    own = torch.where(kept > 0, ids.gather(1, order), 0)
    return SoftLabels(*(torch.nn.functional.pad(it, padding).unsqueeze(1) for it in (own, kept)))
