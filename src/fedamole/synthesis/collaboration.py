"""Synthetic examples whose class predictions agree with those of several clients.

Source: Wang et al., "An Aggregation-Free Federated Learning for Tackling Data Heterogeneity" (FedAF), CVPR 2024,
https://arxiv.org/abs/2404.18962.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fedamole.synthesis.matching import Features, Objective

DIRECTIONS = 50
"""Directions of a sliced Wasserstein distance; they are the same in all steps, clients and runs."""


@dataclass(frozen=True)
class Collaborative(Objective):
    """Another objective plus w times the sum over classes of the distance to the mean option logits of all clients.

    The distance is the sliced Wasserstein distance between the option logits of a class's synthetic examples and the
    mean option logits of this class by client, both without their mean over the options. A class without any adds 0.
    """

    objective: Objective
    weight: float
    """Weight w of the distances."""
    tokens: tuple[int, ...]
    """First tokens of the options."""
    logits: Mapping[int, Tensor]
    """Mean option logits (clients, options) by class."""

    @override
    def loss(self, synthetic: Features, classes: Tensor, real: Mapping[int, Features]) -> Tensor:
        total = self.objective.loss(synthetic, classes, real)
        if not self.weight or not self.logits:
            return total
        own = centred(synthetic.logits[:, list(self.tokens)])
        for label, logits in sorted(self.logits.items()):
            if bool((classes == label).any()):
                total = total + self.weight * sliced_wasserstein(own[classes == label], centred(logits.to(own)))
        return total


def centred(logits: Tensor) -> Tensor:
    """Subtract from logits (n, options) their mean over the options, which no probability depends on."""
    return logits - logits.mean(1, keepdim=True)


def sliced_wasserstein(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean over fixed directions of the W_1 distance between the projections of two sets (n, k) and (m, k).

    If n and m differ, the smaller set's sorted projections are interpolated linearly to the size of the larger one.
    """
    size = max(len(first), len(second))
    axes = F.normalize(torch.randn(DIRECTIONS, first.shape[1], generator=torch.Generator().manual_seed(0)), dim=1)
    a, b = (_resized((points @ axes.to(first).T).sort(0).values, size) for points in (first, second))
    return (a - b).abs().mean()


def _resized(values: Tensor, size: int) -> Tensor:
    """Interpolate sorted values (n, k) linearly to (size, k)."""
    if len(values) == size:
        return values
    return F.interpolate(values.T.unsqueeze(0), size=size, mode="linear", align_corners=True).squeeze(0).T
