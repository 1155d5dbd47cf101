"""Reverse selection-based expert assignment (RSEA): experts choose clients (arXiv 2411.19128).

    maximise    sum P * X,   X in {0,1}^(E x C)
    subject to  every expert chooses k_c clients, every client holds between lo and hi experts.

The paper uses a general MILP solver. The constraint matrix is totally unimodular, so a min-cost flow gives the exact
optimum. P is rounded to 1e-9 and ties are broken by a hash of (expert id, client id): permuting rows or columns
together with their ids permutes the solution.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from fedamole.assignment.identity import Hashes, Index, sorted_index, tie_hashes
from fedamole.assignment.min_cost_flow import Chosen, best_choice
from fedamole.assignment.relevance import ScoreError, Scores
from fedamole.errors import ConfigError


class InfeasibleError(ConfigError):
    """Settings under which no assignment exists."""


@dataclass(frozen=True)
class Bounds:
    """How many clients each expert chooses (k_c), and how many experts a client may hold (lo, hi)."""

    expert_choices: int
    min_experts: int
    max_experts: int


def check_feasible(*, experts: int, clients: int, bounds: Bounds, top_k: int) -> None:
    """Raise InfeasibleError for settings under which no assignment exists.

    Feasible if and only if 0 <= k_c <= C and lo C <= E k_c <= hi C with lo <= hi; the router needs 0 <= top_k <= lo.
    The error names every inequality that fails, its numbers, and values that work.
    """
    settings = _Settings(experts, clients, bounds.expert_choices, bounds.min_experts, bounds.max_experts, top_k)
    failures = _failures(settings)
    if failures:
        raise InfeasibleError(f"no expert assignment exists: {'; '.join(failures)}; {_remedy(settings)}")


def check_holders(*, min_holders: int, choices: int, clients: int) -> None:
    """Raise InfeasibleError if experts cannot have `min_holders` holders; the error names values that work."""
    why = "in a group of two, each client can compute the other's update from the average and its own"
    if min_holders < 1:
        raise InfeasibleError(f"method.min_holders = {min_holders}: must be at least 1")
    if min_holders > clients:
        raise InfeasibleError(
            f"method.min_holders = {min_holders}, but there are {clients} clients ({why}): add clients, or set "
            f"method.min_holders = {clients} if you accept this"
        )
    if choices < min_holders:
        raise InfeasibleError(
            f"method.expert_choices = {choices} is below method.min_holders = {min_holders} ({why}): raise "
            f"expert_choices to {min_holders}, or set method.min_holders = {choices} if you accept this"
        )


def select(P: Scores, bounds: Bounds, *, expert_ids: Sequence[str], client_ids: Sequence[str]) -> Chosen:
    """Compute the optimal assignment of one or several modules.

    Shapes: P (..., E, C) within [0, 1], where leading dimensions are modules; result X like P, True where the client
    holds the expert. A module's sum of P * X is within E k_c 1e-9 of the optimum.
    Errors: `InfeasibleError` for bounds that no X satisfies, `ScoreError` for a P that is not finite or outside [0, 1],
    `ValueError` for ids that repeat or do not fit P, `RuntimeError` for a fault of the solver.
    Source: arXiv 2411.19128, step 6 of the round.
    """
    check_feasible(experts=len(expert_ids), clients=len(client_ids), bounds=bounds, top_k=0)
    index, values, ties = _by_identity(P, expert_ids, client_ids)
    X = np.zeros(P.shape, dtype=bool)
    X[..., *index] = best_choice(
        values, ties, k=bounds.expert_choices, min_load=bounds.min_experts, max_load=bounds.max_experts
    )
    return X


def select_for_remaining(P: Scores, bounds: Bounds, *, expert_ids: Sequence[str], client_ids: Sequence[str]) -> Chosen:
    """Compute the assignment over the clients that remain after others left permanently.

    Shapes, errors and result are those of `select` while the bounds can be satisfied. With few clients left, k_c is
    reduced to C. If max_experts, a memory limit, still does not allow all choices, every client holds max_experts
    experts, and every expert is held by at most k_c clients, and by at least one if there are enough slots. An expert
    without holders keeps its weights.
    Source: this project; clients never leave in the paper. Rounds with a partial cohort use `select` over all known
    clients.
    """
    E, C = len(expert_ids), len(client_ids)
    choices = min(bounds.expert_choices, C)
    if bounds.min_experts > bounds.max_experts or E * choices <= bounds.max_experts * C:
        reduced = replace(bounds, expert_choices=choices)
        return select(P, reduced, expert_ids=expert_ids, client_ids=client_ids)
    index, values, ties = _by_identity(P, expert_ids, client_ids)
    X = np.zeros(P.shape, dtype=bool)
    # The transposed problem: every client chooses max_experts experts.
    transposed = best_choice(
        values.swapaxes(-1, -2),
        ties.T,
        k=bounds.max_experts,
        min_load=int(bounds.max_experts * C >= E),
        max_load=choices,
    )
    X[..., *index] = transposed.swapaxes(-1, -2)
    return X


def _by_identity(P: Scores, expert_ids: Sequence[str], client_ids: Sequence[str]) -> tuple[Index, Scores, Hashes]:
    """Sort P by ids: the index arrays of the sorted order, P in that order, and its tie hashes."""
    if P.shape[-2:] != (len(expert_ids), len(client_ids)):
        raise ValueError(f"P has shape {P.shape} for {len(expert_ids)} experts and {len(client_ids)} clients")
    usable = (P >= 0) & (P <= 1)
    if not usable.all():
        *module, i, c = np.argwhere(~usable)[0]
        raise ScoreError(
            f"P of expert {expert_ids[i]} for client {client_ids[c]} is {P[*module, i, c]}, not a probability within "
            "[0, 1]; pass the output of choice_probabilities for finite scores"
        )
    index = sorted_index(expert_ids, client_ids)
    ties = tie_hashes(expert_ids, client_ids)
    return index, np.asarray(P[..., *index], dtype=np.float64), ties[index]


@dataclass(frozen=True)
class _Settings:
    experts: int
    clients: int
    expert_choices: int
    min_experts: int
    max_experts: int
    top_k: int


def _failures(s: _Settings) -> list[str]:
    """Return the inequalities that fail, with their numbers; none if an assignment exists."""
    choices, demand, capacity = s.experts * s.expert_choices, s.min_experts * s.clients, s.max_experts * s.clients
    product = f"{s.experts} x {s.expert_choices} = {choices}"
    checks = (
        (s.experts >= 1, f"1 <= experts fails: {s.experts}"),
        (s.clients >= 1, f"1 <= clients fails: {s.clients}"),
        (s.top_k >= 0, f"0 <= top_k fails: {s.top_k}"),
        (s.top_k <= s.min_experts, f"top_k <= min_experts fails: {s.top_k} > {s.min_experts}"),
        (
            s.min_experts <= s.max_experts,
            f"min_experts <= max_experts fails: {s.min_experts} > {s.max_experts}",
        ),
        (s.expert_choices >= 0, f"0 <= expert_choices fails: {s.expert_choices}"),
        (s.expert_choices <= s.clients, f"expert_choices <= clients fails: {s.expert_choices} > {s.clients}"),
        (
            demand <= choices,
            "min_experts x clients <= experts x expert_choices fails: "
            f"{s.min_experts} x {s.clients} = {demand} > {product}",
        ),
        (
            choices <= capacity,
            "experts x expert_choices <= max_experts x clients fails: "
            f"{product} > {s.max_experts} x {s.clients} = {capacity}",
        ),
    )
    return [text for holds, text in checks if not holds]


def _remedy(s: _Settings) -> str:
    """Suggest the settings that suffice on their own, each with its nearest working value, else a set of settings."""
    if s.clients < 1:
        return "give at least one client"
    single = [f"{name} to {value}" for name, value in _nearest(s).items() if not _failures(replace(s, **{name: value}))]
    if single:
        return f"set {', or '.join(single)}"
    k = max(s.top_k, 1)
    E = max(s.experts, k)
    choices = min(max(s.expert_choices, ceil_div(k * s.clients, E)), s.clients)
    lo = min(max(s.min_experts, k), E * choices // s.clients)
    hi = max(s.max_experts, ceil_div(E * choices, s.clients))
    suggested = _Settings(E, s.clients, choices, lo, hi, k)
    changed = [f"{n} to {v}" for n, v in asdict(suggested).items() if v != getattr(s, n)]
    return f"set {' and '.join(changed)}"


def _nearest(s: _Settings) -> dict[str, int]:
    """Return, for each setting, the value nearest to the given one in the range that the other settings allow."""
    E, C, k_c = max(s.experts, 1), s.clients, max(s.expert_choices, 1)
    ranges = {
        "expert_choices": (ceil_div(s.min_experts * C, E), min(C, s.max_experts * C // E)),
        "min_experts": (s.top_k, min(s.max_experts, E * s.expert_choices // C)),
        "max_experts": (max(s.min_experts, ceil_div(E * s.expert_choices, C)), s.max_experts),
        "experts": (ceil_div(s.min_experts * C, k_c), s.max_experts * C // k_c),
        "top_k": (1, s.min_experts),
    }
    return {name: max(low, min(getattr(s, name), high)) for name, (low, high) in ranges.items()}


def ceil_div(a: int, b: int) -> int:
    """Return the smallest integer that is at least a / b."""
    return -(-a // b)
