"""Thompson sampling on a linear model: posterior by hand, the spread of the draws, and ties."""

import numpy as np
import pytest

from fedamole.methods.shared.bandit import LinearRewards, highest


@pytest.mark.parametrize("count", [1, 2, 9])
def test_equal_rewards_of_one_feature_by_hand(count: int) -> None:
    """Context 1 and reward 1, n times: A = 1 + n and the mean is n / (n + 1)."""
    model = LinearRewards.prior(1).updated(np.ones((count, 1)), np.ones(count))
    assert model.precision.tolist() == [[1.0 + count]]
    assert model.mean() == pytest.approx([count / (count + 1)])


def test_two_features_by_hand() -> None:
    """X = [[1, 0], [1, 2]], y = [1, 3]: A = [[3, 2], [2, 5]], b = [4, 6], and A^-1 b = [8, 10] / 11."""
    model = LinearRewards.prior(2).updated(np.array([[1.0, 0.0], [1.0, 2.0]]), np.array([1.0, 3.0]))
    assert model.precision.tolist() == [[3.0, 2.0], [2.0, 5.0]]
    assert model.response.tolist() == [4.0, 6.0]
    assert model.mean() == pytest.approx([8 / 11, 10 / 11])


def test_a_wider_prior_by_hand() -> None:
    """With the precision 0.5 the mean after one reward of 1 is 1 / 1.5."""
    model = LinearRewards.prior(1, 0.5).updated(np.ones((1, 1)), np.ones(1))
    assert model.mean() == pytest.approx([2 / 3])


def test_draws_have_the_mean_and_the_covariance_of_the_posterior() -> None:
    """The inverse of [[3, 2], [2, 5]] is [[5, -2], [-2, 3]] / 11."""
    model, rng = LinearRewards(np.array([[3.0, 2.0], [2.0, 5.0]]), np.array([4.0, 6.0])), np.random.default_rng(0)
    draws = np.array([model.sample(2.0, rng) for _ in range(20_000)])
    assert draws.mean(axis=0) == pytest.approx(model.mean(), abs=0.03)
    assert np.cov(draws.T) == pytest.approx(4 * np.array([[5, -2], [-2, 3]]) / 11, abs=0.06)
    assert model.sample(0.0, rng) == pytest.approx(model.mean())


def test_the_highest_come_first_and_ties_are_drawn() -> None:
    rng = np.random.default_rng(0)
    assert highest(np.array([0.1, 0.9, -1.0, 0.5]), 2, rng) == [1, 3]
    drawn = [tuple(highest(np.array([1.0, 0.0, 0.0, 0.0]), 2, rng)) for _ in range(300)]
    assert {first for first, _ in drawn} == {0}
    assert min(sum(second == index for _, second in drawn) for index in (1, 2, 3)) > 70  # 100 each, deviation 8
