"""Assignment of experts by how much a client's tokens use them (FedMoE, https://arxiv.org/abs/2408.11304).

The paper publishes neither thresholds nor code: the rules below are this project's. All of them are for one module with
E experts. A share is the fraction of a client's routed (token, slot) pairs that went to an expert, 0 for an expert that
it does not hold. Ties are broken by the lower expert id.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedamole.assignment.relevance import Scores


@dataclass(frozen=True)
class Thresholds:
    """Limits of what a client holds in a module."""

    coverage: float
    """Sum of the shares of the experts that are kept after the search."""
    drop_below: float
    """A review drops experts with less than this multiple of an even share."""
    review_every: int
    """Rounds after the search from one review to the next."""
    min_experts: int
    max_experts: int


def usage_shares(usage: Mapping[int, float], experts: int) -> Scores:
    """Return the shares (E,) of the experts from their usage; they sum to 1.

    `usage` is the fraction of the tokens routed to each expert held, by id. It comes from a client: values are limited
    to the range from 0 to 1 and NaN counts as 0. If no expert is used, all have the same share.
    """
    held = sorted(usage)
    values = np.clip(np.nan_to_num(np.array([usage[expert] for expert in held], dtype=np.float64)), 0, 1)
    shares = np.zeros(experts)
    if held:
        total = values.sum()
        shares[held] = values / total if total > 0 else 1 / len(held)
    return shares


def next_experts(
    shares: Mapping[str, Scores], held: Mapping[str, list[int]], client: str, rounds: int, limits: Thresholds
) -> list[int]:
    """Return the experts of a client in its next round, sorted by id.

    `rounds` is the number of its rounds since the end of its search, negative during the search. `shares` (E,) and
    `held` are by client.
    """
    if rounds == 0:
        return smallest_cover(shares[client], limits)
    if rounds < 0 or rounds % limits.review_every:
        return held[client]
    return reviewed(shares, held, client, limits)


def smallest_cover(shares: Scores, limits: Thresholds) -> list[int]:
    """Return the smallest set of experts whose shares add up to the coverage, sorted by id.

    Experts are added by share. The set has at least `min_experts` and at most `max_experts`, whatever it covers.
    """
    order = np.argsort(-shares, kind="stable")
    # Shares such as 0.6 + 0.3 may sum to slightly less than 0.9.
    needed = int(np.searchsorted(np.cumsum(shares[order]), limits.coverage - 1e-9)) + 1
    return sorted(order[: min(max(needed, limits.min_experts), limits.max_experts)].tolist())


def reviewed(
    shares: Mapping[str, Scores], held: Mapping[str, Sequence[int]], client: str, limits: Thresholds
) -> list[int]:
    """Return the experts of a client after a review of what it holds, sorted by id.

    First, experts are dropped whose share is below `drop_below` times an even share, the least used first, down to
    `min_experts`. Then the expert is added that the most similar client uses most, of those that the client does not
    hold, if there is one and it makes no more than `max_experts`. Similarity is the cosine of the shares.

    `shares` (E,) and `held` are by client; only clients with shares are compared. A dropped expert is not added again
    in the same review.
    """
    own, before = shares[client], list(held[client])
    least_used = sorted(before, key=lambda expert: (own[expert], -expert))
    unused = [expert for expert in least_used if own[expert] < limits.drop_below / len(before)]
    dropped = unused[: max(0, len(before) - limits.min_experts)]
    kept = [expert for expert in before if expert not in dropped]
    others = sorted(name for name in shares if name != client)
    if others and len(kept) < limits.max_experts:
        peer = max(others, key=lambda name: _cosine(own, shares[name]))  # the first by name of those equally similar
        candidates = [expert for expert in held[peer] if expert not in before and shares[peer][expert] > 0]
        kept += sorted(candidates, key=lambda expert: (-shares[peer][expert], expert))[:1]
    return sorted(kept)


def _cosine(a: Scores, b: Scores) -> float:
    """Cosine of two vectors of shares, rounded so that equal ones stay equal on every machine."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return round(float(a @ b) / norms, 12) if norms > 0 else 0.0
