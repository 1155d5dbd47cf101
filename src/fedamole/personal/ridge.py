"""The one linear map, and the one LoRA, that come nearest to what a mixture of experts does to some text.

For one module with inputs x (d_in) and the mixture's outputs delta(x) (d_out) over n tokens, C = X^T X / n and
M = C + ridge * mean(diag C) * I:

    W* = argmin_W  mean |delta(x) - W x|^2 + ridge * mean(diag C) * |W|^2  =  (Delta^T X / n) M^-1

and among the maps of rank r the least of the same sum is the truncated SVD of W* M^(1/2), brought back by M^(-1/2): an
error counts by how much of it the inputs can see (`merging/low_rank.py`).

Reduced-rank ridge regression: Mukherjee, Zhu, "Reduced rank ridge regression and its kernel extensions", 2011.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedamole.merging.low_rank import Svd, moment_root, padded, truncate
from fedamole.model.moments import Moments


@dataclass(frozen=True)
class Factors:
    """A LoRA of one module: W = B A."""

    a: Tensor
    """(r, d_in), float32 on the CPU."""
    b: Tensor
    """(d_out, r), float32 on the CPU."""
    unexplained: float
    """Share of the sum of |delta|^2 that it misses; 0 is exact, 1 is what no LoRA at all would miss."""


def best_lora(sums: Moments, rank: int, ridge: float) -> Factors:
    """The LoRA of rank r nearest to the outputs seen, by the formula at the top of this file.

    `ridge` is relative to the mean square of the inputs' numbers, and above 0: with fewer tokens than d_in it is what
    decides. Dimensions that neither inputs nor outputs have are filled with zeros.
    """
    n = max(sums.tokens, 1)
    root = moment_root(sums.xx / n, ridge)
    # W* L = Delta^T X / n L^-T, transposed.
    weighted = torch.linalg.solve_triangular(root, sums.xy / n, upper=False)
    a, b = truncate(Svd(*torch.linalg.svd(weighted.T, full_matrices=False)), rank, root)
    missed = sums.yy - 2 * (b.T @ sums.xy.T * a).sum() + ((b.T @ b) * (a @ sums.xx @ a.T)).sum()
    unexplained = float(missed.clamp(min=0) / sums.yy) if float(sums.yy) > 0 else 0.0
    return Factors(*padded((a, b), rank), unexplained)
