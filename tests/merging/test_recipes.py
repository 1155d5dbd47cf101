"""Each recipe by hand, and the mistakes that each refuses."""

import pytest
import torch
from torch import Tensor

from fedamole.errors import ConfigError, DataError
from fedamole.merging.low_rank import Factors
from fedamole.merging.moments import check_positive, from_tensors, input_modules, shrink, to_tensors
from fedamole.merging.recipes import merge_dare, merge_linear, merge_regmean, merge_svd, merge_ties
from fedamole.merging.regmean import regmean


def row(*values: float) -> Factors:
    """A change with a single output: B = 1, A the values."""
    return torch.tensor([list(values)]), torch.ones(1, 1)


def change(factors: Factors) -> Tensor:
    return factors[1] @ factors[0]


def test_regmean_by_hand() -> None:
    """x sees only the first input and y only the second, so each decides its own value; the mean would be (4.5, 6)."""
    grams = [torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))]
    merged = change(regmean([row(2, 9), row(7, 3)], grams, 1))
    assert torch.allclose(merged.float(), torch.tensor([[2.0, 3.0]]), atol=1e-4)


def test_equal_moments_give_the_mean() -> None:
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    merged = change(regmean([row(2, 9), row(7, 3)], [gram, gram], 1))
    assert torch.allclose(merged.float(), torch.tensor([[4.5, 6.0]]), atol=1e-4)


def test_regmean_is_least_squares_on_the_inputs() -> None:
    """Against lstsq over the rows of both clients, with full rank."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(40, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    factors = [(torch.randn(2, 4, generator=generator), torch.randn(3, 2, generator=generator)) for _ in range(2)]
    outputs = torch.cat([x @ change(pair).double().T for x, pair in zip(inputs, factors, strict=True)])
    expected = torch.linalg.lstsq(torch.cat(inputs), outputs).solution.T
    merged = change(regmean(factors, [x.T @ x / len(x) for x in inputs], 4))
    assert torch.allclose(merged, expected, rtol=1e-4, atol=1e-5)


def test_shrinking_by_hand() -> None:
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    assert torch.equal(shrink(gram, 0.5), torch.tensor([[2.0, 0.5], [0.5, 2.0]]))
    assert torch.equal(shrink(gram, 1.0), gram)


def test_moments_travel_divided_by_their_trace() -> None:
    gram = torch.tensor([[3e6, 1e6], [1e6, 2e6]])
    packed = to_tensors(gram, 0)
    assert torch.allclose(packed["upper"], torch.tensor([0.6, 0.2, 0.4]))
    assert torch.allclose(packed["log_trace"].exp(), torch.tensor(5e6))
    assert torch.allclose(from_tensors(packed, "m").float(), gram)


def test_the_largest_eigenvector_and_the_rest_of_the_diagonal() -> None:
    """Eigenvalues of [[2, 1], [1, 2]] are 3 along (1, 1) and 1: the first alone is 1.5 everywhere, which leaves 0.5."""
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    packed = to_tensors(gram, 1)
    assert packed["factor"].shape == (2, 1)
    assert torch.allclose(packed["diagonal"] * 4, torch.tensor([0.5, 0.5]))
    assert torch.allclose(from_tensors(packed, "m").float(), torch.tensor([[2.0, 1.5], [1.5, 2.0]]))


@pytest.mark.parametrize(
    ("gram", "reason"),
    [
        ([[1.0, 2.0], [2.0, 1.0]], "not positive semidefinite"),
        ([[-1.0, 0.0], [0.0, -1.0]], "not positive semidefinite"),
        ([[1.0, 0.5], [0.0, 1.0]], "not positive semidefinite"),
        ([[1.0, float("nan")], [float("nan"), 1.0]], "hold NaN or infinity"),
    ],
)
def test_moments_that_are_none_are_refused(gram: list[list[float]], reason: str) -> None:
    with pytest.raises(DataError, match=f"client x, m: the second moments .*{reason}|client x, m: .*{reason}"):
        check_positive(torch.tensor(gram), "client x, m")
    with pytest.raises(DataError, match=f"y, m: .*{reason}"):
        merge_regmean(
            {"x": {"m": row(1, 2)}, "y": {"m": row(1, 2)}},
            {"x": {"m": torch.eye(2)}, "y": {"m": torch.tensor(gram)}},
            1,
            1.0,
        )


def test_moments_of_fewer_tokens_than_inputs_are_positive() -> None:
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 1e3
    check_positive((x.T @ x / 3).float(), "m")


def test_modules_that_read_the_same_input() -> None:
    names = [f"layers.{i}.{part}" for i in (0, 1) for part in ("attn.q_proj", "attn.v_proj", "mlp.up_proj")]
    names += ["layers.0.mlp.gate_proj", "layers.0.attn.o_proj", "lm_head"]
    assert input_modules(names) == {
        "layers.0.attn.q_proj": "layers.0.attn.q_proj",
        "layers.0.attn.v_proj": "layers.0.attn.q_proj",
        "layers.0.attn.o_proj": "layers.0.attn.o_proj",
        "layers.0.mlp.gate_proj": "layers.0.mlp.gate_proj",
        "layers.0.mlp.up_proj": "layers.0.mlp.gate_proj",
        "layers.1.attn.q_proj": "layers.1.attn.q_proj",
        "layers.1.attn.v_proj": "layers.1.attn.q_proj",
        "layers.1.mlp.up_proj": "layers.1.mlp.up_proj",
        "lm_head": "lm_head",
    }


X = {"m": (torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]]))}
Y = {"m": (torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [4.0]]))}


def test_linear_averages_factors_and_svd_averages_changes() -> None:
    """Changes diag(2, 0) and diag(0, 4): their mean is diag(1, 2), at rank 1 diag(0, 2). Factors: (.5 .5), (1 2)."""
    linear = change(merge_linear({"x": X, "y": Y}, 1)["m"])
    assert torch.allclose(linear, torch.tensor([[0.5, 0.5], [1.0, 1.0]]))
    assert torch.allclose(change(merge_svd({"x": X, "y": Y}, 2)["m"]), torch.diag(torch.tensor([1.0, 2.0])), atol=1e-6)
    assert torch.allclose(change(merge_svd({"x": X, "y": Y}, 1)["m"]), torch.diag(torch.tensor([0.0, 2.0])), atol=1e-6)


def test_ties_by_hand() -> None:
    """Of (4, -1, 1, 3) and (-2, -3, 1, 5) half is kept: (4, 0, 0, 3) and (0, -3, 0, 5). Signs +, -, +: 4, -3, 0, 4."""
    loras = {"x": {"m": row(4, -1, 1, 3)}, "y": {"m": row(-2, -3, 1, 5)}}
    assert torch.allclose(change(merge_ties(loras, 1, 0.5)["m"]), torch.tensor([[4.0, -3.0, 0.0, 4.0]]), atol=1e-5)


def test_dare_keeps_a_share_and_leaves_the_global_generator_alone() -> None:
    """Each value of the single change is 0 or 1 / density."""
    lora = {"x": {"m": row(*[1.0] * 400)}}
    before = torch.random.get_rng_state()
    first, again, other = (
        change(merge_dare(lora, 1, 0.25, torch.Generator().manual_seed(seed))["m"]) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    kept = first.abs() > 1e-3
    assert torch.allclose(first[kept], torch.tensor(4.0), atol=1e-4)
    assert 60 < int(kept.sum()) < 140


@pytest.mark.parametrize("density", [0.0, 1.0, -1.0, float("nan")])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ConfigError, match=r"density = .*: must be above 0 and below 1"):
        merge_ties({"x": X}, 1, density)
    with pytest.raises(ConfigError, match=r"density = .*: must be above 0 and below 1"):
        merge_dare({"x": X}, 1, density, torch.Generator())


def test_linear_refuses_different_ranks() -> None:
    wide = {"m": (torch.ones(2, 2), torch.ones(2, 2))}
    with pytest.raises(ConfigError, match=r"linear needs LoRAs of one rank, and these differ \(x 1, y 2\): use svd"):
        merge_linear({"x": X, "y": wide}, 1)
    assert merge_svd({"x": X, "y": wide}, 2)["m"][0].shape == (2, 2)
