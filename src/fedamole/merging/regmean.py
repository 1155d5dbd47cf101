"""RegMean: Jin, Ren, Preotiuc-Pietro, Cheng, "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR
2023, https://arxiv.org/abs/2212.09849, for LoRAs of one base.

Of one module, client i's change is W_i = B_i A_i and G_i = mean of x x^T over its inputs. The merged change W has the
least mean |W x - W_i x|^2, summed over the clients, each on its own inputs:

    W = (sum_i W_i G_i) S^-1,    S = sum_i G_i.

As the base is common, the solution for the changes is that for the weights. It is a product of stacks: the B_i side by
side times the A_i G_i S^-1, so no matrix of the size of a change is formed. To a given rank it is truncated in the
metric S (`low_rank.py`), because an error counts by how much of it the inputs see.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.merging.low_rank import Factors, moment_root, product_svd, truncate

RIDGE = 1e-6
"""Added to the diagonal of S, relative to its mean, so that directions without inputs have a solution."""


def check_off_diagonal(value: float, name: str) -> None:
    """Raise a ConfigError for a factor of the off-diagonal moments that is not from 0 to 1; `name` is the setting's."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} = {value}: must be at least 0 and at most 1")


def regmean(factors: Sequence[Factors], moments: Sequence[Tensor], rank: int) -> Factors:
    """Merge one module's factors, given each client's moments G_i (d_in, d_in); return A and B of at most `rank`.

    The moments are positive semidefinite, and multiplied by a client's weight if weights differ. The result is float64.
    """
    total = torch.stack([gram.double() for gram in moments]).sum(0)
    root = moment_root(total, RIDGE)
    turned = torch.cat([a.double() @ gram.double() for (a, _), gram in zip(factors, moments, strict=True)])
    # (A_i G_i M^-1) L = A_i G_i L^-T, for M = L L^T.
    weighted = torch.linalg.solve_triangular(root, turned.T, upper=False).T
    return truncate(product_svd(weighted, torch.cat([b.double() for _, b in factors], dim=1)), rank, root)
