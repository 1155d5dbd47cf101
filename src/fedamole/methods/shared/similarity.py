"""Similarity of clients by what they have trained."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fedamole.model.params import Tensors


def cosine_similarities(rows: Sequence[Sequence[Tensor]], columns: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return (rows, columns), float64: the mean cosine similarity over modules; an entry is a tensor per module.

    The similarity to a tensor of zeros is 0.
    """
    total = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    modules = len(rows[0]) if rows else 0
    for module in range(modules):
        unit = [
            F.normalize(torch.stack([entry[module].flatten().double() for entry in entries]), dim=1)
            for entries in (rows, columns)
        ]
        total += unit[0] @ unit[1].T
    return total / max(modules, 1)


def similarities(changes: Mapping[str, Tensors]) -> dict[str, Tensor]:
    """Return the cosine similarity of each client's tensors to those of every client, sorted by name, by client (C)."""
    names = sorted(changes)
    tensors = [[tensor for _, tensor in sorted(changes[name].items())] for name in names]
    return dict(zip(names, cosine_similarities(tensors, tensors), strict=True))
