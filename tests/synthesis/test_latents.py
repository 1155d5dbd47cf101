"""Autoencoders of hidden states by hand, and how much one example changes the sums of latent vectors."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from fedamole.synthesis.latents import (
    DECODER,
    ENCODER,
    AutoencoderSizes,
    autoencoder_loss,
    class_means,
    class_sums,
    clipped,
    decode,
    encode,
    new_autoencoder,
    normalised,
)


def autoencoder(width: int = 2) -> dict[str, Tensor]:
    return new_autoencoder(AutoencoderSizes(3, 4, 5), width, torch.Generator().manual_seed(0))


def test_shapes_and_a_pass_by_hand() -> None:
    """Width 2: a hidden state is (1, -1) when normalised."""
    tensors = autoencoder()
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    mean, log_variance = encode(tensors, torch.tensor([[7.0, 3.0]]))
    assert mean.shape == log_variance.shape == (1, 4)
    inner = torch.tanh(tensors[f"{ENCODER}in"] @ torch.tensor([1.0, -1.0]))
    assert torch.allclose(mean[0], tensors[f"{ENCODER}mean"] @ inner, atol=1e-4)
    assert torch.allclose(log_variance[0], tensors[f"{ENCODER}log_variance"] @ inner, atol=1e-4)
    vectors = decode(tensors, torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 3), 2, 0.5)
    assert vectors.shape == (3, 5, 2)
    expected = 0.5 * tensors[f"{DECODER}out"] @ torch.tanh(tensors[f"{DECODER}in"][:, 0])
    assert torch.allclose(vectors[2].flatten(), expected, atol=1e-6)


def test_the_loss_by_hand() -> None:
    """States (1, -1) and (-1, 1): squared error 4. Mean (1, 0), variance (1, e): (1 + 0 + 0 + e - 2) / 4."""
    loss = autoencoder_loss(
        torch.tensor([[3.0, -3.0]]),
        torch.tensor([[-1.0, 1.0]]),
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[0.0, 1.0]]),
        0.1,
    )
    assert float(loss) == pytest.approx(4 + 0.1 * (1 + math.e - 2) / 4, abs=1e-3)
    assert normalised(torch.tensor([[7.0, 3.0]]))[0].tolist() == pytest.approx([1.0, -1.0], abs=1e-4)


def test_sums_and_means_by_hand() -> None:
    """Norm 5. Class 0: (3, 4) and (6, 8), which is clipped to (3, 4); class 2: (0, 1); class 1 has none."""
    latents = {0: torch.tensor([[3.0, 4.0], [6.0, 8.0]]), 2: torch.tensor([[0.0, 1.0]])}
    sums = class_sums(latents, 3, 5.0)
    assert sums.tolist() == [[6.0, 8.0, 10.0], [0.0, 0.0, 0.0], [0.0, 1.0, 5.0]]
    means = class_means(sums, 5.0, 1)
    assert {label: mean.tolist() for label, mean in means.items()} == {0: [3.0, 4.0], 2: [0.0, 1.0]}
    assert set(class_means(sums, 5.0, 2)) == {0}, "a class with too few examples is left out"
    noisy = torch.tensor([[60.0, 80.0, 10.0], [1.0, 1.0, -5.0]], dtype=torch.float64)
    assert {label: mean.tolist() for label, mean in class_means(noisy, 5.0, 1).items()} == {0: [3.0, 4.0]}


def test_replacing_one_example_changes_the_sums_by_at_most_twice_the_norm() -> None:
    """Within a class by 2 C, for opposite vectors; to another class by sqrt(2 C^2 + 2 C^2), which is 2 C too."""
    up, down, kept = torch.tensor([[9.0, 0.0]]), torch.tensor([[-9.0, 0.0]]), torch.tensor([[0.1, 0.2]])
    both = torch.cat([up, kept])
    first = class_sums({0: both, 1: kept}, 2, 1.5)
    within = class_sums({0: torch.cat([down, kept]), 1: kept}, 2, 1.5)
    assert float((first - within).norm()) == pytest.approx(3.0)
    across = class_sums({0: kept, 1: torch.cat([down, kept])}, 2, 1.5)
    assert float((first - across).norm()) == pytest.approx(3.0)


def test_no_example_can_change_them_by_more_whatever_its_latent_vector() -> None:
    """The encoder comes from the coordinator, which may choose one that singles out an example."""
    values = (0.0, 1.0, -1e38, math.inf, -math.inf, math.nan)
    rest = torch.tensor([[0.5, -0.5]])
    vectors = [torch.tensor([pair]) for pair in itertools.product(values, repeat=2)]
    assert all(float(clipped(vector, 1.5).norm()) <= 1.5 * (1 + 1e-6) for vector in vectors)
    sums = [class_sums({0: torch.cat([vector, rest])}, 2, 1.5) for vector in vectors]
    sums += [class_sums({0: rest, 1: vector}, 2, 1.5) for vector in vectors]
    assert all(float((a - b).norm()) <= 3.0 * (1 + 1e-6) for a, b in itertools.combinations(sums, 2))
