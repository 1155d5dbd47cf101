"""How certain the difference of two models' mean losses on the same examples is."""

import math
from collections.abc import Sequence


def standard_error(first: Sequence[float], second: Sequence[float], tokens: Sequence[int]) -> float:
    """Return the standard error of the difference of two mean losses per answer token on the same examples.

    The difference is a ratio: the sum of the examples' differences over the sum of their tokens. Its standard error is
    that of the linearised ratio, for examples drawn at random (Cochran, Sampling Techniques, 3rd edition, chapter 6).

    Args:
        first: Summed loss of each example under one model, in nats.
        second: The same under the other model.
        tokens: Answer tokens of each example.

    Returns:
        The standard error in nats per answer token; infinite for fewer than two examples.
    """
    count, total = len(tokens), sum(tokens)
    if count < 2:
        return math.inf
    differences = [loss - other for loss, other in zip(first, second, strict=True)]
    mean = sum(differences) / total
    squares = sum((value - mean * size) ** 2 for value, size in zip(differences, tokens, strict=True))
    return math.sqrt(count / (count - 1) * squares) / total
