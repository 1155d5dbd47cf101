"""Maps of low rank: the truncated singular value decomposition, in the metric of a module's inputs or without one.

For inputs x with second moments M = mean of x x^T = L L^T, a map W costs mean |W x|^2 = |W L|^2. So the map of rank r
that is nearest to W, as the inputs see it, is the truncated SVD of W L, brought back by L^-1:

    U S V^T = W L,    B = U_r S_r^(1/2),    A = S_r^(1/2) V_r^T L^-1.

Without moments L is the identity, and B A the best approximation in the Frobenius norm.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fedamole.errors import ConfigError

Factors = tuple[Tensor, Tensor]
"""A (r, d_in) and B (d_out, r) of one module; its change of the base is B A."""
LoraFactors = Mapping[str, Factors]
"""The factors of a LoRA by module, with the scaling multiplied into B."""


class Svd(NamedTuple):
    """U (d_out, k), S (k) and V^T (k, d_in) of a matrix."""

    u: Tensor
    s: Tensor
    vt: Tensor


def product_svd(a: Tensor, b: Tensor) -> Svd:
    """Return the SVD of B A (d_out, d_in), float64, without forming the product.

    It is that of the core of two QR decompositions, and k the smallest of R, d_in and d_out.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return Svd(q_b @ u, s, vt @ q_a.T)


def moment_root(moments: Tensor, ridge: float) -> Tensor:
    """Return Cholesky's L of moments + ridge * mean(diagonal) * I, float64. `ridge` must be above 0."""
    moments = moments.double()
    size = len(moments)
    penalty = ridge * max(float(moments.trace()) / size, torch.finfo(torch.float32).tiny)
    root: Tensor = torch.linalg.cholesky(
        moments + penalty * torch.eye(size, dtype=torch.float64, device=moments.device)
    )
    return root


def truncate(svd: Svd, rank: int, root: Tensor | None = None) -> Factors:
    """Return A and B of at most `rank` from the SVD of W L, or of W if there is no `root` L, float64."""
    kept = min(rank, len(svd.s))
    sizes = svd.s[:kept].sqrt()
    a, b = sizes[:, None] * svd.vt[:kept], svd.u[:, :kept] * sizes
    return (a if root is None else torch.linalg.solve_triangular(root, a, upper=False, left=False)), b


def padded(factors: Factors, rank: int) -> Factors:
    """Return A and B as float32 on the CPU, filled with zeros up to `rank`."""
    a, b = factors
    missing = rank - len(a)
    return F.pad(a, (0, 0, 0, missing)).float().cpu().contiguous(), F.pad(b, (0, missing)).float().cpu().contiguous()


def of_rank(factors: Factors, rank: int) -> Factors:
    """Return factors of exactly this rank that are nearest to B A in the Frobenius norm."""
    a, b = factors
    return padded(truncate(product_svd(a, b), rank), rank) if len(a) > rank else padded(factors, rank)


def check_same_modules(loras: Mapping[str, LoraFactors]) -> None:
    """Raise a ConfigError unless the LoRAs, by name, adapt the same modules with the same sizes, and there are some."""
    if not loras:
        raise ConfigError("there is no LoRA to merge")
    first, expected = next(iter(loras.items()))
    for name, lora in loras.items():
        if different := sorted(lora.keys() ^ expected.keys()):
            raise ConfigError(f"{first} and {name} cannot be merged: only one of them adapts {different[0]}")
        for module, (a, b) in lora.items():
            other_a, other_b = expected[module]
            sizes, others = (a.shape[1], b.shape[0]), (other_a.shape[1], other_b.shape[0])
            if sizes != others:
                raise ConfigError(
                    f"{first} and {name} cannot be merged: {module} maps {others[0]} values to {others[1]} in {first}, "
                    f"{sizes[0]} to {sizes[1]} in {name}"
                )


def with_all_modules(loras: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """Give each LoRA, by name, the modules that only others adapt, with a change of zero.

    There B is zero. A is the mean of the others' A's, so that it alters no mean of A's; if their ranks differ, no such
    mean exists, and it is zero too.
    """
    fillers: dict[str, Factors] = {}
    for module in dict.fromkeys(module for lora in loras.values() for module in lora):
        pairs = [lora[module] for lora in loras.values() if module in lora]
        (first, b), ranks = pairs[0], {len(a) for a, _ in pairs}
        a = torch.stack([a for a, _ in pairs]).mean(0) if len(ranks) == 1 else torch.zeros_like(first)
        fillers[module] = a, torch.zeros_like(b)
    return {
        name: {module: lora.get(module, filler) for module, filler in fillers.items()} for name, lora in loras.items()
    }


def inner(first: LoraFactors, second: LoraFactors) -> float:
    """Return the inner product of two LoRAs' changes, summed over the modules.

    That of two changes is <B A, B' A'> = sum of (B^T B') * (A A'^T), so no change is formed.
    """
    total = 0.0
    for module, (a, b) in first.items():
        other_a, other_b = second[module]
        total += float(((b.double().T @ other_b.double()) * (a.double() @ other_a.double().T)).sum())
    return total


def change_similarities(loras: Sequence[LoraFactors]) -> Tensor:
    """Return the cosine similarities (N, N), float64, of the changes of N LoRAs, all modules together.

    A LoRA that changes nothing has similarity 0 to all.
    """
    products = torch.zeros(len(loras), len(loras), dtype=torch.float64)
    for i, first in enumerate(loras):
        for j, second in enumerate(loras[: i + 1]):
            products[i, j] = products[j, i] = inner(first, second)
    norms = products.diagonal().sqrt()
    return torch.where(norms.outer(norms) > 0, products / norms.outer(norms), 0.0)


def stacked_mean(factors: Sequence[Factors]) -> Factors:
    """Stack factors so that the product of the stacks is exactly the mean of the changes."""
    return torch.cat([a for a, _ in factors]), torch.cat([b / len(factors) for _, b in factors], dim=1)
