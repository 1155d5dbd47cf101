"""The ablations keep the bounds and differ from reverse selection only in why an expert is chosen."""

import numpy as np
import numpy.typing as npt
import pytest

from fedamole.assignment.baselines import homogeneous, random_probabilities
from fedamole.assignment.relevance import choice_probabilities
from fedamole.assignment.reverse_selection import Bounds, InfeasibleError, select, select_for_remaining

EXPERTS = [f"expert-{i:02}" for i in range(30)]
CLIENTS = [f"site-{c}" for c in range(10)]
PAPER = Bounds(expert_choices=2, min_experts=2, max_experts=8)


def draw(
    seed: int, bounds: Bounds = PAPER, experts: list[str] = EXPERTS, clients: list[str] = CLIENTS
) -> npt.NDArray[np.bool_]:
    rng = np.random.default_rng(seed)
    P = random_probabilities(expert_ids=experts, client_ids=clients, rng=rng)
    return select_for_remaining(P, bounds, expert_ids=experts, client_ids=clients)


def test_random_assignment_is_reverse_selection_on_a_uniform_draw() -> None:
    """The ids here are sorted, so the draw stands as it comes from the generator."""
    P = np.random.default_rng(3).random((30, 10))
    assert (draw(3) == select(P, PAPER, expert_ids=EXPERTS, client_ids=CLIENTS)).all()


def test_random_assignment_keeps_bounds_repeats_and_varies() -> None:
    X = draw(0)
    assert (X.sum(axis=1) == 2).all()
    assert X.sum(axis=0).min() >= 2
    assert X.sum(axis=0).max() <= 8
    assert (draw(0) == X).all()
    assert (draw(1) != X).any()


def test_one_generator_gives_each_module_its_own_draw() -> None:
    rng = np.random.default_rng(0)
    first, second = (random_probabilities(expert_ids=EXPERTS, client_ids=CLIENTS, rng=rng) for _ in range(2))
    assert (first != second).any()


def test_random_assignment_belongs_to_ids() -> None:
    order = np.random.default_rng(5).permutation(10)
    again = draw(0, clients=[CLIENTS[c] for c in order])
    assert (again == draw(0)[:, order]).all()


def test_random_assignment_favours_no_client() -> None:
    """Over 200 draws every pair is expected 200 * 2 / 10 = 40 times, standard deviation sqrt(32) = 5.7."""
    counts = np.sum([draw(seed) for seed in range(200)], axis=0)
    assert counts.sum() == 200 * 60
    assert counts.min() > 40 - 5 * 5.7
    assert counts.max() < 40 + 5 * 5.7
    assert counts.std() == pytest.approx(5.7, rel=0.2)


def test_homogeneous_by_hand() -> None:
    """Four experts choose one of two clients, so each client holds two: the two that lose least move."""
    P = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3]])
    X = homogeneous(P, Bounds(1, 0, 4), expert_ids=EXPERTS[:4], client_ids=CLIENTS[:2])
    assert X[:, 0].tolist() == [True, True, False, False]
    assert X[:, 1].tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("E", "C", "k_c", "loads"), [(30, 10, 2, [6] * 10), (5, 3, 2, [3, 3, 4]), (7, 4, 3, [5, 5, 5, 6])]
)
def test_homogeneous_loads_are_floor_or_ceil(E: int, C: int, k_c: int, loads: list[int]) -> None:
    """60 / 10 = 6; 10 / 3 = 3 and one over; 21 / 4 = 5 and one over; P pulls all to the first client."""
    P = choice_probabilities(np.add.outer(np.arange(E) / E, -np.arange(C, dtype=float) * 3))
    X = homogeneous(P, Bounds(k_c, 1, E), expert_ids=EXPERTS[:E], client_ids=CLIENTS[:C])
    assert (X.sum(axis=1) == k_c).all()
    assert sorted(X.sum(axis=0).tolist()) == loads


def test_homogeneous_after_clients_left_keeps_the_limit_of_memory() -> None:
    """60 choices of 6 clients would be 10 each, but 8 is the limit; every expert still has a holder."""
    P = np.random.default_rng(0).random((30, 6))
    X = homogeneous(P, PAPER, expert_ids=EXPERTS, client_ids=CLIENTS[:6])
    assert X.sum(axis=0).tolist() == [8] * 6
    assert X.any(axis=1).all()
    X = homogeneous(P[:, :1], PAPER, expert_ids=EXPERTS, client_ids=CLIENTS[:1])
    assert X.sum(axis=0).tolist() == [8]


def test_no_clients_is_an_error() -> None:
    with pytest.raises(InfeasibleError, match="1 <= clients"):
        homogeneous(np.empty((30, 0)), PAPER, expert_ids=EXPERTS, client_ids=[])
    with pytest.raises(InfeasibleError, match="1 <= clients"):
        draw(0, clients=[])
