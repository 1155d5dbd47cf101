"""Truncation in a metric and without, similarities of changes, and mistakes."""

import pytest
import torch
from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.merging.low_rank import (
    LoraFactors,
    change_similarities,
    check_same_modules,
    moment_root,
    of_rank,
    product_svd,
    truncate,
)


def drawn(rank: int, d_in: int = 6, d_out: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)


def cosine(first: LoraFactors, second: LoraFactors) -> float:
    """Similarity of two changes."""
    return float(change_similarities([first, second])[0, 1])


@pytest.mark.parametrize("rank", [2, 5, 9])
def test_the_svd_of_a_product_is_that_of_the_matrix(rank: int) -> None:
    a, b = drawn(rank)
    svd, change = product_svd(a, b), b.double() @ a.double()
    assert torch.allclose(svd.u * svd.s @ svd.vt, change, atol=1e-10)
    assert torch.allclose(svd.s, torch.linalg.svdvals(change)[: len(svd.s)], atol=1e-10)


def test_the_metric_decides_what_is_kept() -> None:
    """W = diag(1, 1.5). Inputs of sizes 2 and 1/2 weigh it as diag(1.41, 1.06): rank 1 keeps the first value."""
    a, b = torch.eye(2), torch.diag(torch.tensor([1.0, 1.5]))
    root = moment_root(torch.diag(torch.tensor([2.0, 0.5])), 1e-12)
    kept_a, kept_b = truncate(product_svd(a.double() @ root, b), 1, root)
    assert torch.allclose(kept_b @ kept_a, torch.diag(torch.tensor([1.0, 0.0])).double(), atol=1e-6)
    plain_a, plain_b = truncate(product_svd(a, b), 1)
    assert torch.allclose(plain_b @ plain_a, torch.diag(torch.tensor([0.0, 1.5])).double(), atol=1e-6)


def test_a_larger_rank_is_filled_with_zeros_and_changes_nothing() -> None:
    a, b = drawn(2)
    wide_a, wide_b = of_rank((a, b), 4)
    assert (wide_a.shape, wide_b.shape) == ((4, 6), (5, 4))
    assert torch.equal(wide_b @ wide_a, b @ a)


def test_the_cosine_is_that_of_the_changes() -> None:
    first, second = {"m": drawn(2, seed=1), "n": drawn(2, seed=2)}, {"m": drawn(3, seed=3), "n": drawn(3, seed=4)}
    x, y = (torch.cat([(b @ a).flatten() for a, b in lora.values()]) for lora in (first, second))
    assert cosine(first, second) == pytest.approx(float(torch.cosine_similarity(x, y, dim=0)), abs=1e-5)
    assert cosine(first, first) == pytest.approx(1)
    assert cosine(first, {name: (a, -b) for name, (a, b) in first.items()}) == pytest.approx(-1)
    assert cosine(first, {name: (a, 0 * b) for name, (a, b) in first.items()}) == 0


def test_loras_of_different_modules_or_sizes_are_refused() -> None:
    lora = {"m": drawn(2)}
    with pytest.raises(ConfigError, match="there is no LoRA to merge"):
        check_same_modules({})
    with pytest.raises(ConfigError, match="x and y cannot be merged: only one of them adapts n"):
        check_same_modules({"x": lora, "y": {**lora, "n": drawn(2)}})
    with pytest.raises(ConfigError, match="x and y cannot be merged: m maps 6 values to 5 in x, 7 to 5 in y"):
        check_same_modules({"x": lora, "y": {"m": drawn(2, d_in=7)}})
