"""Reverse selection-based expert assignment (RSEA): experts choose clients (arXiv 2411.19128).

    maximise    sum P * X,   X in {0,1}^(E x C)
    subject to  every expert chooses k_c clients, every client holds between lo and hi experts.

The paper solves it with a general MILP solver; the constraints are totally unimodular, so a min-cost flow is
exact. P is quantised to 1e-9 and ties are broken by a hash of (expert id, client id), so that the answer
depends on identities alone: permuting rows or columns together with their ids permutes the answer.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from fedamole.assignment.identity import Hashes, Place, sorted_place, tie_hashes
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
    """Refuse settings under which no assignment exists, before anything runs.

    Feasible iff 0 <= k_c <= C and lo C <= E k_c <= hi C with lo <= hi; the router needs 0 <= top_k <= lo.
    Errors: `InfeasibleError` with every inequality that failed, its numbers, and values that work.
    """
    settings = _Settings(experts, clients, bounds.expert_choices, bounds.min_experts, bounds.max_experts, top_k)
    failures = _failures(settings)
    if failures:
        raise InfeasibleError(f"no expert assignment exists: {'; '.join(failures)}; {_remedy(settings)}")


def check_holders(*, min_holders: int, choices: int, clients: int) -> None:
    """Refuse a smallest group of holders that experts cannot have, before anything runs.

    Errors: `InfeasibleError` that says why groups have to be so large, and what works.
    """
    why = "in a group of two, each can subtract its own update from the average and has the other's"
    if min_holders < 1:
        raise InfeasibleError(f"method.min_holders = {min_holders}: must be at least 1")
    if min_holders > clients:
        raise InfeasibleError(
            f"method.min_holders = {min_holders}, but there are {clients} clients ({why}): find more clients, or set "
            f"method.min_holders = {clients} knowingly"
        )
    if choices < min_holders:
        raise InfeasibleError(
            f"method.expert_choices = {choices} is below method.min_holders = {min_holders} ({why}): raise "
            f"expert_choices to {min_holders}, or set method.min_holders = {choices} knowingly"
        )


def select(P: Scores, bounds: Bounds, *, expert_ids: Sequence[str], client_ids: Sequence[str]) -> Chosen:
    """Solve the assignment of one module, or of each of several, to the optimum.

    Shapes: P (..., E, C) within [0, 1], each of the leading places a module of its own; result X like P, true where
    the client holds the expert. A module's sum of P * X is within E k_c 1e-9 of the optimum.
    Errors: `InfeasibleError` for bounds that no X keeps, `ScoreError` for a P that is not finite or outside
    [0, 1], `ValueError` for ids that repeat or do not fit P, `RuntimeError` for a fault of the solver.
    Source: arXiv 2411.19128, step 6 of the round.
    """
    check_feasible(experts=len(expert_ids), clients=len(client_ids), bounds=bounds, top_k=0)
    place, values, ties = _by_identity(P, expert_ids, client_ids)
    X = np.zeros(P.shape, dtype=bool)
    X[..., *place] = best_choice(
        values, ties, picks=bounds.expert_choices, fewest=bounds.min_experts, most=bounds.max_experts
    )
    return X


def select_for_remaining(P: Scores, bounds: Bounds, *, expert_ids: Sequence[str], client_ids: Sequence[str]) -> Chosen:
    """Solve the assignment over the clients that remain after others left for good.

    Shapes and errors as `select`, whose answer it is while the bounds can be kept. With few clients left, k_c
    is cut to C; where max_experts (a limit of memory) still cannot take all choices, it is kept and gives
    the other side: every client holds max_experts, every expert is held by at most k_c clients, and by at
    least one if there is room for all. An expert that nobody holds keeps its weights.
    Source: this project's; the paper's clients never leave. A partial cohort is no reason to call it: that is
    solved over all known clients.
    """
    E, C = len(expert_ids), len(client_ids)
    choices = min(bounds.expert_choices, C)
    if bounds.min_experts > bounds.max_experts or E * choices <= bounds.max_experts * C:
        kept = replace(bounds, expert_choices=choices)
        return select(P, kept, expert_ids=expert_ids, client_ids=client_ids)
    place, values, ties = _by_identity(P, expert_ids, client_ids)
    X = np.zeros(P.shape, dtype=bool)
    # The same problem with the sides exchanged: now it is the clients whose number of choices is fixed.
    transposed = best_choice(
        values.swapaxes(-1, -2),
        ties.T,
        picks=bounds.max_experts,
        fewest=int(bounds.max_experts * C >= E),
        most=choices,
    )
    X[..., *place] = transposed.swapaxes(-1, -2)
    return X


def _by_identity(P: Scores, expert_ids: Sequence[str], client_ids: Sequence[str]) -> tuple[Place, Scores, Hashes]:
    """Where each (expert, client) stands in P when sorted by id, P in that order, and its tie hashes."""
    if P.shape[-2:] != (len(expert_ids), len(client_ids)):
        raise ValueError(f"P has shape {P.shape} for {len(expert_ids)} experts and {len(client_ids)} clients")
    usable = (P >= 0) & (P <= 1)
    if not usable.all():
        *module, i, c = np.argwhere(~usable)[0]
        raise ScoreError(
            f"P of expert {expert_ids[i]} for client {client_ids[c]} is {P[*module, i, c]}, not a probability within "
            "[0, 1]; give the output of choice_probabilities on finite scores"
        )
    place = sorted_place(expert_ids, client_ids)
    ties = tie_hashes(expert_ids, client_ids)
    return place, np.asarray(P[..., *place], dtype=np.float64), ties[place]


@dataclass(frozen=True)
class _Settings:
    experts: int
    clients: int
    expert_choices: int
    min_experts: int
    max_experts: int
    top_k: int


def _failures(s: _Settings) -> list[str]:
    """The inequalities that fail, each with its numbers; none means that an assignment exists."""
    given, demand, room = s.experts * s.expert_choices, s.min_experts * s.clients, s.max_experts * s.clients
    chosen = f"{s.experts} x {s.expert_choices} = {given}"
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
            demand <= given,
            "min_experts x clients <= experts x expert_choices fails: "
            f"{s.min_experts} x {s.clients} = {demand} > {chosen}",
        ),
        (
            given <= room,
            "experts x expert_choices <= max_experts x clients fails: "
            f"{chosen} > {s.max_experts} x {s.clients} = {room}",
        ),
    )
    return [text for holds, text in checks if not holds]


def _remedy(s: _Settings) -> str:
    """Every single setting that, set to its nearest working value, is enough; else a set of them."""
    if s.clients < 1:
        return "give at least one client"
    alone = [f"{name} to {value}" for name, value in _nearest(s).items() if not _failures(replace(s, **{name: value}))]
    if alone:
        return f"set {', or '.join(alone)}"
    k = max(s.top_k, 1)
    E = max(s.experts, k)
    choices = min(max(s.expert_choices, ceil_div(k * s.clients, E)), s.clients)
    lo = min(max(s.min_experts, k), E * choices // s.clients)
    hi = max(s.max_experts, ceil_div(E * choices, s.clients))
    wanted = _Settings(E, s.clients, choices, lo, hi, k)
    changed = [f"{n} to {v}" for n, v in asdict(wanted).items() if v != getattr(s, n)]
    return f"set {' and '.join(changed)}"


def _nearest(s: _Settings) -> dict[str, int]:
    """For each setting the value nearest to the given one within the range that the others allow."""
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
    """Smallest integer not below a / b."""
    return -(-a // b)
