"""The linear map and the LoRA nearest to a mixture: by hand, against lstsq, and against a search."""

import torch
from torch import Tensor

from fedamole.model.moments import Moments
from fedamole.personal.ridge import best_lora

CPU = torch.device("cpu")


def sums(x: Tensor, y: Tensor) -> Moments:
    result = Moments(x.shape[1], y.shape[1], CPU)
    for rows in zip(x.split(7), y.split(7), strict=True):
        result.add(*rows)
    return result


def drawn(tokens: int = 200, d_in: int = 6, d_out: int = 5) -> tuple[Tensor, Tensor]:
    """Inputs of very unequal sizes that hang together, outputs that are no linear map of them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, d_in, generator=generator, dtype=torch.float64)
    x = x * torch.tensor([9.0, 4, 2, 1, 0.5, 0.1]) @ torch.randn(d_in, d_in, generator=generator, dtype=torch.float64)
    w = torch.randn(d_in, d_out, generator=generator, dtype=torch.float64)
    return x, x @ w * (x[:, :1] > 0) + torch.randn(tokens, d_out, generator=generator, dtype=torch.float64)


def test_by_hand() -> None:
    """Inputs (2, 0) and (0, 1), so C = diag(2, 1/2); outputs (2, 0) and (0, 1.5), so W* = diag(1, 1.5).

    W* is larger in the second direction, but the inputs are twice as large in the first: W* C^(1/2) = diag(1.41, 1.06).
    The best map of rank 1 keeps the first, and misses 1.5^2 of 2^2 + 1.5^2.
    """
    x, y = torch.tensor([[2.0, 0], [0, 1]]), torch.tensor([[2.0, 0], [0, 1.5]])
    lora = best_lora(sums(x, y), 1, 1e-12)
    assert torch.allclose(lora.b @ lora.a, torch.tensor([[1.0, 0], [0, 0]]), atol=1e-6)
    assert abs(lora.unexplained - 2.25 / 6.25) < 1e-6
    full_rank = best_lora(sums(x, y), 2, 1e-12)
    assert torch.allclose(full_rank.b @ full_rank.a, torch.tensor([[1.0, 0], [0, 1.5]]), atol=1e-6)
    assert full_rank.unexplained < 1e-6


def test_the_ridge_by_hand() -> None:
    """One input of size 2, output 4: W = 2 without a penalty. mean x^2 = 4, so a ridge of 1 gives 8 / (4 + 4) = 1."""
    lora = best_lora(sums(torch.tensor([[2.0]]), torch.tensor([[4.0]])), 1, 1.0)
    assert torch.allclose(lora.b @ lora.a, torch.tensor([[1.0]]))


def test_the_whole_rank_is_least_squares() -> None:
    x, y = drawn()
    lora = best_lora(sums(x, y), 5, 1e-13)
    expected = torch.linalg.lstsq(x, y).solution
    assert torch.allclose((lora.b @ lora.a).T.double(), expected, rtol=1e-4, atol=1e-5)
    left = (y - x @ expected).square().sum() / y.square().sum()
    assert abs(lora.unexplained - float(left)) < 1e-5


def test_no_other_lora_of_that_rank_is_nearer() -> None:
    """Alternating least squares on the penalised sum, from several beginnings, comes to the same and no lower."""
    x, y = drawn()
    rank, penalty = 2, 0.01 * float(x.square().mean())

    def cost(w: Tensor) -> float:
        return float((y - x @ w.T).square().sum() / len(x) + penalty * w.square().sum())

    lora = best_lora(sums(x, y), rank, 0.01)
    ours = cost(lora.b.double() @ lora.a.double())
    # The penalty as further rows of x with outputs 0 makes it plain least squares.
    rows = torch.cat([x / len(x) ** 0.5, penalty**0.5 * torch.eye(6, dtype=torch.float64)])
    expected = torch.cat([y / len(x) ** 0.5, torch.zeros(6, 5, dtype=torch.float64)])
    costs = []
    for seed in range(4):
        b = torch.randn(5, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for _ in range(200):
            q, _ = torch.linalg.qr(b)
            a = torch.linalg.lstsq(rows, expected @ q).solution.T
            b = torch.linalg.lstsq(rows @ a.T, expected).solution.T
        costs.append(cost(b @ a))
    assert min(costs) > ours * (1 - 1e-5)
    assert min(costs) < ours * (1 + 1e-4)


def test_dimensions_that_are_not_there_are_zeros() -> None:
    x, y = drawn()
    lora = best_lora(sums(x, y), 8, 1e-6)
    assert (lora.a.shape, lora.b.shape) == ((8, 6), (5, 8))
    assert not lora.a[5:].any()
    assert not lora.b[:, 5:].any()


def test_a_mixture_that_adds_nothing() -> None:
    x, _ = drawn()
    lora = best_lora(sums(x, torch.zeros(200, 5)), 2, 1e-4)
    assert not (lora.b @ lora.a).any()
    assert lora.unexplained == 0
