"""Distribution matching: synthetic examples whose mean features are those of real examples.

Source: Zhao, Bilen, "Dataset Condensation with Distribution Matching", WACV 2023, https://arxiv.org/abs/2110.04181, as
FedDM uses it. The features are the last hidden state and the logits at the end of the prompt.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override


class Features(NamedTuple):
    """What a forward pass computes at the ends of N prompts, in at least float32."""

    hidden: Tensor
    """(N, d): last hidden states."""
    logits: Tensor
    """(N, V): logits of the first answer token."""
    layers: tuple[Tensor, ...] = ()
    """(N, d) each: hidden states after every decoder layer, for objectives with `needs_layers`."""
    other: Tensor | None = None
    """(N, V): logits under the second adapter of a request, of synthetic examples."""


class Objective(ABC):
    """What synthetic examples are optimised for; the base class of all objectives."""

    needs_real: bool = True
    """Whether the features of real examples are computed."""
    real_once: bool = False
    """Whether they are computed before the first step, in place of in each step from another draw."""
    needs_layers: bool = False
    """Whether it reads `Features.layers`."""

    @abstractmethod
    def loss(self, synthetic: Features, classes: Tensor, real: Mapping[int, Features]) -> Tensor:
        """Return the loss, a scalar, of all synthetic examples.

        Gradients flow into the features `synthetic`, of the examples with these `classes` (N). `real` are the features
        of real examples by class, under the same adapter and without gradients.
        """


@dataclass(frozen=True)
class DistributionMatching(Objective):
    """Sum over classes of |mean h(real) - mean h(synthetic)|^2 + w |mean z(real) - mean z(synthetic)|^2 / V.

    h are hidden states and z logits. A class without real examples contributes nothing.
    """

    logit_weight: float = 1.0
    """Weight w of the logits. They follow from the hidden states, so this only weighs directions of h."""

    @override
    def loss(self, synthetic: Features, classes: Tensor, real: Mapping[int, Features]) -> Tensor:
        total = torch.zeros((), device=synthetic.hidden.device)
        for label, features in sorted(real.items()):
            own = classes == label
            hidden, logits = (
                (theirs.mean(0) - ours[own].mean(0)).square()
                for theirs, ours in ((features.hidden, synthetic.hidden), (features.logits, synthetic.logits))
            )
            total = total + hidden.sum() + self.logit_weight * logits.mean()
        return total
