"""Thompson sampling with a linear model of rewards: Agrawal, Goyal, "Thompson Sampling for Contextual Bandits with
Linear Payoffs", ICML 2013, https://arxiv.org/abs/1209.3352.

The expected reward of an arm with the context x (q) is theta . x, with the prior theta ~ N(0, I / p). After contexts X
(n, q) with rewards y (n), theta is normal with the mean A^-1 b, where A = p I + X^T X and b = X^T y.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LinearRewards:
    """What is known of theta."""

    precision: Array
    """A (q, q), symmetric and positive definite."""
    response: Array
    """b (q)."""

    @staticmethod
    def prior(size: int, precision: float = 1.0) -> "LinearRewards":
        """Return the model of q = `size` features before any reward; `precision` is p, above 0."""
        return LinearRewards(precision * np.eye(size), np.zeros(size))

    def updated(self, contexts: Array, rewards: Array) -> "LinearRewards":
        """Return the model after more contexts (n, q) with their rewards (n)."""
        return LinearRewards(self.precision + contexts.T @ contexts, self.response + contexts.T @ rewards)

    def mean(self) -> Array:
        """Return the mean of theta (q)."""
        mean: Array = np.linalg.solve(self.precision, self.response).astype(np.float64)
        return mean

    def sample(self, deviation: float, rng: np.random.Generator) -> Array:
        """Draw theta (q) from N(A^-1 b, deviation^2 A^-1)."""
        # With A = L L^T, the covariance of L^-T z for a standard normal z is A^-1.
        noise: Array = np.linalg.solve(np.linalg.cholesky(self.precision).T, rng.standard_normal(len(self.response)))
        return self.mean() + deviation * noise


def highest(scores: Array, count: int, rng: np.random.Generator) -> list[int]:
    """Return the indices of the `count` highest scores, highest first; equal scores are in random order."""
    shuffled = rng.permutation(len(scores))
    order: list[int] = shuffled[np.argsort(-scores[shuffled], kind="stable")][:count].tolist()
    return order
