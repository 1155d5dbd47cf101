"""Reverse selection against hand-worked examples, enumeration, and HiGHS as an independent solver."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import combinations, product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds as Box
from scipy.optimize import LinearConstraint, linprog, milp
from scipy.sparse import coo_array, vstack

from fedamole.assignment.identity import tie_hashes
from fedamole.assignment.relevance import ScoreError, choice_probabilities
from fedamole.assignment.reverse_selection import (
    Bounds,
    InfeasibleError,
    check_feasible,
    select,
    select_for_remaining,
)
from fedamole.errors import ConfigError

Values = npt.NDArray[np.float64]
Chosen = npt.NDArray[np.bool_]
Solve = Callable[..., Chosen]


def experts(n: int) -> list[str]:
    return [f"expert-{i:03}" for i in range(n)]


def clients(n: int) -> list[str]:
    return [f"site-{c}" for c in range(n)]


def solve(P: Values, *bounds: int) -> Chosen:
    return select(P, Bounds(*bounds), expert_ids=experts(P.shape[0]), client_ids=clients(P.shape[1]))


def remain(P: Values, *bounds: int) -> Chosen:
    E, C = P.shape
    return select_for_remaining(P, Bounds(*bounds), expert_ids=experts(E), client_ids=clients(C))


def units(P: Values, X: Chosen) -> int:
    """The objective in whole steps of 1e-9, the resolution at which the optimum is exact."""
    return int(np.rint(P / 1e-9).astype(np.int64)[X].sum())


def softmax_scores(E: int, C: int, seed: int, scale: float = 1.0) -> Values:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(E, 8)) @ rng.normal(size=(8, C)) / np.sqrt(8)
    return choice_probabilities(scale * scores)


P4 = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3]])


@pytest.mark.parametrize(
    ("hi", "first", "total"),
    [(4, [True, True, True, True], 3.0), (3, [1, 1, 0, 1], 2.8), (2, [1, 1, 0, 0], 2.4)],
)
def test_by_hand(hi: int, first: list[int], total: float) -> None:
    """Four experts choose one of two clients each, and all like the first one best.

    With room for 4 all go there: 0.9 + 0.8 + 0.6 + 0.7 = 3.0. With room for 3 the one that loses least goes
    to the second: expert 2 loses 0.6 - 0.4 = 0.2, total 2.8. With room for 2 expert 3 follows (0.7 - 0.3 =
    0.4, less than 0.6 and 0.8), total 2.4.
    """
    X = solve(P4, 1, 0, hi)
    assert X.dtype == bool
    assert X[:, 0].tolist() == list(map(bool, first))
    assert (X[:, 1] == ~X[:, 0]).all()
    assert (P4 * X).sum() == pytest.approx(total)


def test_lower_bound_by_hand() -> None:
    """With at least 2 a client the answer is that of at most 2: the two that lose least must move."""
    assert solve(P4, 1, 2, 4)[:, 0].tolist() == [True, True, False, False]


def every_choice(E: int, C: int, k_c: int) -> Chosen:
    rows = [[c in pick for c in range(C)] for pick in combinations(range(C), k_c)]
    return np.array(list(product(rows, repeat=E)), dtype=bool).reshape(-1, E, C)


SMALL = [(4, 3, 1, 1, 2), (4, 3, 2, 1, 3), (3, 4, 2, 1, 2), (5, 3, 1, 1, 3), (4, 4, 1, 0, 2), (3, 3, 2, 2, 2)]


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("levels", [None, 3, 1])
def test_enumeration_with_and_without_ties(shape: tuple[int, ...], levels: int | None) -> None:
    """Among all choices ours is the best, and among the equally best the one with the smallest tie hash.

    `levels` 3 leaves few different values, 1 leaves all equal, so that the hash alone decides.
    """
    E, C, k_c, lo, hi = shape
    rng = np.random.default_rng([E, C, k_c, levels or 0])
    options = every_choice(E, C, k_c)
    loads = options.sum(axis=1)
    options = options[((loads >= lo) & (loads <= hi)).all(axis=1)]
    # Tied values span less than 1e-5 here: the hash keeps over 30 bits, and no two sums of it are equal.
    ties = tie_hashes(experts(E), clients(C))
    for _ in range(20):
        P = rng.random((E, C)) if levels is None else rng.integers(1, levels + 1, (E, C)) / 5e5
        X = solve(P, k_c, lo, hi)
        sums = [units(P, option) for option in options]
        assert units(P, X) == max(sums)
        best = [option for option, s in zip(options, sums, strict=True) if s == max(sums)]
        assert (min(best, key=lambda option: sum(map(int, ties[option]))) == X).all()
    if levels == 1:
        assert len(best) > 1


def constraints(E: int, C: int) -> tuple[coo_array, coo_array]:
    arc = np.arange(E * C)
    rows = coo_array((np.ones(E * C), (arc // C, arc)), shape=(E, E * C))
    columns = coo_array((np.ones(E * C), (arc % C, arc)), shape=(C, E * C))
    return rows, columns


def scaled_costs(P: Values) -> Values:
    """HiGHS stops within absolute tolerances: unscaled, nearly uniform P would end short of the optimum."""
    costs = P.max(axis=1, keepdims=True) - P
    return np.asarray(costs * (1e3 / np.median(costs))).ravel()


@pytest.mark.parametrize("scale", [1e-5, 1e-2, 1.0, 10.0])
def test_milp_agrees_at_the_papers_size(scale: float) -> None:
    """30 experts, 10 clients, 2 choices, 2 to 8 a client; `scale` 1e-5 is a nearly uniform first round."""
    E, C, k_c, lo, hi = 30, 10, 2, 2, 8
    rows, columns = constraints(E, C)
    for seed in range(3):
        P = np.rint(softmax_scores(E, C, seed, scale) / 1e-9) * 1e-9
        answer = milp(
            scaled_costs(P),
            integrality=np.ones(E * C),
            bounds=Box(0, 1),
            constraints=[LinearConstraint(rows, k_c, k_c), LinearConstraint(columns, lo, hi)],
            options={"mip_rel_gap": 0.0},
        )
        assert answer.success
        assert units(P, solve(P, k_c, lo, hi)) == units(P, answer.x.reshape(E, C) > 0.5)


@pytest.mark.parametrize("scale", [1e-5, 1.0])
def test_linear_relaxation_agrees_at_100_by_40(scale: float) -> None:
    """100 experts, 40 clients, 2 choices, 2 to 8 a client: the simplex ends at an integral vertex."""
    E, C, k_c, lo, hi = 100, 40, 2, 2, 8
    rows, columns = constraints(E, C)
    P = np.rint(softmax_scores(E, C, 5, scale) / 1e-9) * 1e-9
    answer = linprog(
        scaled_costs(P),
        A_ub=vstack([columns, -columns]),
        b_ub=np.r_[np.full(C, hi), np.full(C, -lo)],
        A_eq=rows,
        b_eq=np.full(E, k_c),
        bounds=(0, 1),
        method="highs-ds",
    )
    assert np.abs(answer.x - np.rint(answer.x)).max() < 1e-6
    X = solve(P, k_c, lo, hi)
    assert (X.sum(axis=1) == k_c).all()
    assert units(P, X) == units(P, answer.x.reshape(E, C) > 0.5)


@pytest.mark.parametrize("levels", [1, 2, 4, None])
@pytest.mark.parametrize("size", [(30, 10, 2, 2, 8), (7, 5, 3, 2, 5), (12, 3, 1, 2, 6)])
def test_permuting_rows_and_columns_permutes_the_answer(size: tuple[int, ...], levels: int | None) -> None:
    """Also where P is all equal, or has few values: identity decides a tie, not position."""
    E, C, k_c, lo, hi = size
    rng = np.random.default_rng(E)
    for _ in range(5):
        P = rng.random((E, C)) if levels is None else rng.integers(1, levels + 1, (E, C)) / 8
        X = solve(P, k_c, lo, hi)
        rows, columns = rng.permutation(E), rng.permutation(C)
        permuted = select(
            P[np.ix_(rows, columns)],
            Bounds(k_c, lo, hi),
            expert_ids=[experts(E)[i] for i in rows],
            client_ids=[clients(C)[c] for c in columns],
        )
        assert (permuted == X[np.ix_(rows, columns)]).all()


@pytest.mark.parametrize("bounds", [Bounds(2, 1, 4), Bounds(2, 1, 2)])
def test_several_modules_at_once_are_solved_as_each_alone(bounds: Bounds) -> None:
    """Ties included; with hi = 2, too few places are left and the sides are exchanged."""
    rng = np.random.default_rng(4)
    P = np.stack([softmax_scores(12, 7, seed) for seed in range(4)] + [np.full((12, 7), 1 / 7), rng.random((12, 7))])
    names = {"expert_ids": experts(12), "client_ids": clients(7)}
    together = select_for_remaining(P, bounds, **names)
    assert together.shape == P.shape
    for module, result in zip(P, together, strict=True):
        assert (result == select_for_remaining(module, bounds, **names)).all()


def test_differences_below_the_resolution_do_not_decide() -> None:
    """Noise of 1e-11, such as another order of summation leaves, does not change the answer."""
    rng = np.random.default_rng(2)
    P = rng.integers(1, 4, (30, 10)) / 8
    assert (solve(P, 2, 2, 8) == solve(P + 1e-11 * rng.random(P.shape), 2, 2, 8)).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sums_and_bounds_hold(data: st.DataObject) -> None:
    E, C = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))
    k_c = data.draw(st.integers(0, C))
    lo = data.draw(st.integers(0, E * k_c // C))
    hi = data.draw(st.integers(-(-E * k_c // C), E + 2))
    P = np.random.default_rng(data.draw(st.integers(0, 99))).random((E, C))
    X = solve(P, k_c, lo, hi)
    assert (X.sum(axis=1) == k_c).all()
    assert X.sum(axis=0).min() >= lo
    assert X.sum(axis=0).max() <= hi


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e-6, 1.001])
@pytest.mark.parametrize("function", [solve, remain])
def test_unusable_p_is_named(bad: float, function: Solve) -> None:
    P = P4.copy()
    P[2, 1] = bad
    with pytest.raises(ScoreError, match=r"expert-002.*site-1"):
        function(P, 1, 1, 3)
    with pytest.raises(ScoreError, match=r"expert-002.*site-1"):
        function(P.T.copy().T, 1, 0, 4)


def test_misfit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"P has shape \(4, 2\) for 4 experts and 3 clients"):
        select(P4, Bounds(1, 1, 3), expert_ids=experts(4), client_ids=clients(3))
    with pytest.raises(ValueError, match="site-0 occur more than once"):
        select(P4, Bounds(1, 1, 3), expert_ids=experts(4), client_ids=["site-0", "site-0"])
    with pytest.raises(InfeasibleError, match="4 x 1 = 4 > 1 x 2 = 2"):
        solve(P4, 1, 1, 1)


@cache
def loads_possible(E: int, C: int, k_c: int) -> set[tuple[int, ...]]:
    """Every vector of column sums that some choice has, by adding one expert at a time."""
    picks = [tuple(c in pick for c in range(C)) for pick in combinations(range(C), k_c)]
    loads: set[tuple[int, ...]] = {(0,) * C}
    for _ in range(E):
        loads = {tuple(a + b for a, b in zip(load, p, strict=True)) for load in loads for p in picks}
    return loads


def test_feasible_exactly_where_enumeration_finds_a_choice() -> None:
    """All settings with up to 4 experts and 4 clients: the inequalities are neither too strict nor lax."""
    answers = Counter[bool]()
    for E, C, k_c in product(range(1, 5), range(1, 5), range(6)):
        spreads = {(min(load), max(load)) for load in loads_possible(E, C, k_c)} if k_c <= C else set()
        for lo, hi in product(range(6), range(6)):
            exists = any(lo <= a and b <= hi for a, b in spreads)
            try:
                check_feasible(experts=E, clients=C, bounds=Bounds(k_c, lo, hi), top_k=0)
                accepted = True
            except InfeasibleError:
                accepted = False
            assert accepted == exists, (E, C, k_c, lo, hi)
            answers[exists] += 1
    assert min(answers.values()) > 300


def refusal(E: int, C: int, k_c: int, lo: int, hi: int, top_k: int) -> str:
    with pytest.raises(InfeasibleError) as caught:
        check_feasible(experts=E, clients=C, bounds=Bounds(k_c, lo, hi), top_k=top_k)
    assert caught.value.exit_code == ConfigError.exit_code == 2
    return str(caught.value)


def test_refusals_name_numbers_and_remedy() -> None:
    text = refusal(30, 10, 1, 4, 8, 2)
    assert "min_experts x clients <= experts x expert_choices fails: 4 x 10 = 40 > 30 x 1 = 30" in text
    assert "set expert_choices to 2, or min_experts to 3, or experts to 40" in text
    text = refusal(30, 6, 2, 2, 8, 2)
    assert "experts x expert_choices <= max_experts x clients fails: 30 x 2 = 60 > 8 x 6 = 48" in text
    assert "set expert_choices to 1, or max_experts to 10, or experts to 24" in text
    text = refusal(30, 10, 2, 2, 8, 3)
    assert "top_k <= min_experts fails: 3 > 2" in text
    assert "set min_experts to 3, or top_k to 2" in text
    text = refusal(30, 10, 12, 2, 40, 2)
    assert "expert_choices <= clients fails: 12 > 10" in text
    assert "set expert_choices to 10" in text
    assert "give at least one client" in refusal(30, 0, 2, 2, 8, 2)


def remedies(text: str) -> list[dict[str, int]]:
    """The alternatives that a refusal offers, each a dict of settings."""
    offer = re.search(r"; set (.*)$", text)
    assert offer is not None, text
    alternatives = [part.split(" and ") for part in offer.group(1).split(", or ")]
    return [{name: int(value) for name, value in (step.split(" to ") for step in steps)} for steps in alternatives]


small = st.integers(-1, 40)


@settings(max_examples=300, deadline=None)
@given(E=small, C=st.integers(1, 20), k_c=small, lo=small, hi=small, top_k=st.integers(-1, 6))
def test_every_value_offered_works(E: int, C: int, k_c: int, lo: int, hi: int, top_k: int) -> None:
    """Whatever is wrong, and however much at once, each alternative offered is accepted."""
    names = ("expert_choices", "min_experts", "max_experts")
    bounds = Bounds(k_c, lo, hi)
    try:
        check_feasible(experts=E, clients=C, bounds=bounds, top_k=top_k)
    except InfeasibleError as error:
        offered = remedies(str(error))
        assert offered
        for change in offered:
            check_feasible(
                experts=change.get("experts", E),
                clients=C,
                bounds=replace(bounds, **{n: change[n] for n in names if n in change}),
                top_k=change.get("top_k", top_k),
            )


def test_remaining_is_select_while_the_bounds_can_be_kept() -> None:
    P = softmax_scores(30, 8, 3)
    assert (remain(P, 2, 2, 8) == solve(P, 2, 2, 8)).all()


def test_remaining_clients_are_filled_by_hand() -> None:
    """Three experts chose two of three clients, at most 2 a client (6 = 6); one client left: 6 > 4.

    Both clients hold 2, each expert is held by 1 or 2. Client 0 would take experts 0 and 1 (0.9 + 0.8),
    client 1 as well (0.3 + 0.2); but expert 2 needs a holder. In client 1 it costs 0.2 - 0.1 = 0.1, in
    client 0 0.8 - 0.05.
    """
    P = np.array([[0.9, 0.3], [0.8, 0.2], [0.05, 0.1]])
    X = remain(P, 2, 2, 2)
    assert X.tolist() == [[True, True], [True, False], [False, True]]


def test_remaining_with_more_experts_than_room_by_hand() -> None:
    """Four experts, two clients, one each: client 0 takes expert 0 (0.9), client 1 the best left (0.4)."""
    X = remain(P4, 1, 1, 1)
    assert np.argwhere(X).tolist() == [[0, 0], [2, 1]]


def test_remaining_fewer_clients_than_choices() -> None:
    """Four choices among three clients are three: everybody holds everything, if memory allows."""
    P = softmax_scores(5, 3, 1)
    assert remain(P, 4, 2, 8).all()
    X = remain(P, 4, 2, 4)
    assert X.sum(axis=0).tolist() == [4, 4, 4]
    assert X.any(axis=1).all()


@pytest.mark.parametrize("function", [solve, remain])
def test_no_remaining_client_is_an_error(function: Solve) -> None:
    with pytest.raises(InfeasibleError, match="1 <= clients fails"):
        function(np.empty((4, 0)), 1, 0, 2)


def test_remaining_does_not_hide_settings_that_never_worked() -> None:
    with pytest.raises(InfeasibleError, match="min_experts <= max_experts fails: 3 > 2"):
        remain(P4, 2, 3, 2)
    with pytest.raises(InfeasibleError, match="min_experts x clients"):
        remain(P4, 1, 3, 3)


def test_remaining_is_the_best_by_enumeration() -> None:
    """Every start that is feasible, cut to 2 or 3 clients: the best of all choices that keep the rule."""
    rng = np.random.default_rng(7)
    overfull = 0
    for E, C, left, k_c, hi in product((3, 4), (4, 5), (2, 3), (1, 2, 3), (1, 2, 3)):
        if E * k_c > hi * C:
            continue
        P = rng.random((E, left))
        X = remain(P, k_c, 0, hi)
        choices = min(k_c, left)
        full = E * choices > hi * left
        overfull += full
        options = np.array(list(product([False, True], repeat=E * left))).reshape(-1, E, left)
        loads, held = options.sum(axis=1), options.sum(axis=2)
        if full:
            fewest = 1 if hi * left >= E else 0
            keeps = (loads == hi).all(axis=1) & ((held >= fewest) & (held <= choices)).all(axis=1)
        else:
            keeps = (loads <= hi).all(axis=1) & (held == choices).all(axis=1)
        assert any((option == X).all() for option in options[keeps])
        assert units(P, X) == max(units(P, option) for option in options[keeps])
    assert overfull > 5


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_remaining_keeps_lo_and_hi_whenever_the_start_was_feasible(data: st.DataObject) -> None:
    E, C = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))
    k_c = data.draw(st.integers(0, C))
    lo = data.draw(st.integers(0, E * k_c // C))
    hi = data.draw(st.integers(-(-E * k_c // C), E + 2))
    left = data.draw(st.integers(1, C))
    P = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 5, (E, left)) / 4
    X = remain(P, k_c, lo, hi)
    assert X.sum(axis=0).min() >= lo
    assert X.sum(axis=0).max() <= hi
    assert X.sum(axis=1).max() <= min(k_c, left)
    order = np.random.default_rng(0).permutation(E)
    again = select_for_remaining(
        P[order],
        Bounds(k_c, lo, hi),
        expert_ids=[experts(E)[i] for i in order],
        client_ids=clients(left),
    )
    assert (again == X[order]).all()
