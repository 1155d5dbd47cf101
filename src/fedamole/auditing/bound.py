"""Lower bound of epsilon from guesses which canaries were in the training data, all of them in one training.

Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023,
https://arxiv.org/abs/2305.08846, theorem 5.2: let each of m canaries be in the data by a fair coin, and let r of the
coins be guessed from the output of a mechanism. If the mechanism is (epsilon, delta)-private, at least v guesses are
right with a probability of at most

    P[X >= v] + 2 m delta max_{i = 1..v} P[v > X >= v - i] / i,    X ~ Binomial(r, 1 / (1 + exp(-epsilon))).
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

CONFIDENCE = 0.95
LARGEST = 50.0
"""Largest epsilon that is tried; no audit with fewer than 10^20 canaries reaches it."""
SHARES = ((0.5, 0.5), (0.2, 0.2), (0.3, 0.0), (0.1, 0.0), (0.02, 0.0))
"""Shares of the canaries that are guessed to be in (largest scores) and out (smallest scores).

The best bound of these is reported. It holds with `CONFIDENCE`, because each of them is computed with a 1 / len(SHARES)
of the error probability.
"""


def probability(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return the largest probability of so many correct guesses under an (epsilon, delta)-private mechanism.

    Args:
        canaries: Number m of canaries.
        guesses: Number r of guesses.
        correct: Number v of correct guesses.
        epsilon: Epsilon of the mechanism, at least 0.
        delta: Its delta.

    Returns:
        An upper bound of the probability of at least `correct` correct guesses, at most 1.
    """
    accuracy = 1 / (1 + np.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, accuracy))
    if correct == 0 or delta == 0:
        return min(1.0, tail)
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, accuracy))  # P[v > X >= v - i], i = 1 .. v
    worst = float(np.max(below / np.arange(1, correct + 1)))
    return min(1.0, tail + 2 * canaries * delta * worst)


def epsilon_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """Return the lower bound of epsilon at `delta` from so many correct guesses; 0 if they prove nothing."""
    low, high = 0.0, LARGEST
    if probability(canaries, guesses, correct, low, delta) > 1 - confidence:
        return 0.0
    for _ in range(50):
        middle = (low + high) / 2
        if probability(canaries, guesses, correct, middle, delta) <= 1 - confidence:
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True)
class Bound:
    """The result of guessing."""

    epsilon: float
    """Lower bound of epsilon, with `CONFIDENCE`."""
    guesses: int
    correct: int


def best_bound(scores: np.ndarray, included: np.ndarray, delta: float) -> Bound:
    """Return the best bound of the shares of guesses in `SHARES`.

    Args:
        scores: One score for each canary, larger for those that seem to be in the data.
        included: Whether each canary was in the data.
        delta: Delta of the mechanism.

    Returns:
        The bound, and the guesses that it comes from.
    """
    # Equal scores are ordered at random: the order of the canaries must not decide.
    shuffled = np.random.default_rng(0).permutation(len(scores))
    order = shuffled[np.argsort(-scores[shuffled], kind="stable")]
    coins = included[order]
    bounds = []
    for share_in, share_out in SHARES:
        guessed_in, guessed_out = int(len(coins) * share_in), int(len(coins) * share_out)
        correct = int(coins[:guessed_in].sum() + (~coins[len(coins) - guessed_out :]).sum())
        guesses = guessed_in + guessed_out
        confidence = 1 - (1 - CONFIDENCE) / len(SHARES)
        bounds.append(Bound(epsilon_bound(len(coins), guesses, correct, delta, confidence), guesses, correct))
    return max(bounds, key=lambda bound: bound.epsilon)
