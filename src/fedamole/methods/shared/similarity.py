"""Similarity of clients by what they have trained."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from fedamole.model.params import Tensors


def similarities(changes: Mapping[str, Tensors]) -> Tensor:
    """Return the mean over modules of the cosine similarity of changes, (C, C) in float64, clients by name."""
    names = sorted(changes)
    total = torch.zeros(len(names), len(names), dtype=torch.float64)
    modules = sorted(changes[names[0]]) if names else []
    for module in modules:
        unit = F.normalize(torch.stack([changes[name][module].flatten().double() for name in names]), dim=1)
        total += unit @ unit.T
    return total / max(len(modules), 1)
