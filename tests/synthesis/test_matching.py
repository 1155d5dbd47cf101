"""Distribution matching by hand."""

import pytest
import torch

from fedamole.synthesis.matching import DistributionMatching, Features


def features(hidden: list[list[float]], logits: list[list[float]]) -> Features:
    return Features(torch.tensor(hidden), torch.tensor(logits))


def test_the_loss_by_hand() -> None:
    """Class 0: means (1, 2) and (0, 0), 5; logits (2, 0, 0, 0) and 0: 4 / 4. Class 1: means (1, 1) and (1, 3), 4."""
    synthetic = features([[1.0, -1.0], [-1.0, 1.0], [1.0, 3.0]], [[0.0] * 4] * 3)
    real = {
        0: features([[0.0, 2.0], [2.0, 2.0]], [[4.0, 0.0, 0.0, 0.0], [0.0] * 4]),
        1: features([[1.0, 1.0]], [[0.0] * 4]),
    }
    classes = torch.tensor([0, 0, 1])
    assert float(DistributionMatching().loss(synthetic, classes, real)) == pytest.approx(5 + 1 + 4)
    assert float(DistributionMatching(0.5).loss(synthetic, classes, real)) == pytest.approx(9.5)
    assert float(DistributionMatching().loss(synthetic, classes, {1: real[1]})) == pytest.approx(4)


def test_one_step_moves_a_vector_to_the_real_mean() -> None:
    """Features that are the vector itself, real mean (2, 4), s = 0, step 0.25: s = (1, 2)."""
    vector = torch.zeros(1, 2, requires_grad=True)
    real = {0: Features(torch.tensor([[1.0, 3.0], [3.0, 5.0]]), torch.zeros(2, 3))}
    loss = DistributionMatching().loss(Features(vector, torch.zeros(1, 3)), torch.tensor([0]), real)
    (gradient,) = torch.autograd.grad(loss, vector)
    assert (vector - 0.25 * gradient).tolist() == [[1.0, 2.0]]
