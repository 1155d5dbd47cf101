"""The integer costs, and that the check after each solve would catch a wrong answer."""

import numpy as np
import numpy.typing as npt
import pytest

from fedamole.assignment.min_cost_flow import LARGEST_COST, check_optimal, integer_costs


@pytest.mark.parametrize("shape", [(30, 10), (300, 100), (3000, 1000)])
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1.0])
def test_costs_keep_the_value_above_the_hash(shape: tuple[int, int], spread: float) -> None:
    """Costs stay in the solver's range, and all hashes of a choice weigh less than one unit of value."""
    rng = np.random.default_rng(1)
    values = 0.5 * (1 - spread) + spread * rng.random(shape)
    ties = rng.integers(0, 2**64, shape, dtype=np.uint64)
    costs = integer_costs(values, ties, 2)
    plain = integer_costs(values, np.zeros(shape, np.uint64), 2)
    assert costs.min() >= 0
    assert costs.max() <= LARGEST_COST
    largest_hash = int((costs - plain).max())
    assert largest_hash > 0
    unit = int(np.gcd.reduce(plain.ravel())) if spread else LARGEST_COST
    assert shape[0] * 2 * largest_hash < unit
    quantised = np.rint(values / 1e-9).astype(np.int64)
    if spread:
        assert ((plain // unit) == quantised.max(axis=1, keepdims=True) - quantised).all()


def test_uniform_values_leave_room_for_a_long_hash() -> None:
    """30 x 10, 2 picks: 2^50 / 60 leaves 44 bits where all is tied, and 14 where P spans all of [0, 1]."""
    ties = np.full((30, 10), 2**64 - 1, dtype=np.uint64)
    assert integer_costs(np.full((30, 10), 0.1), ties, 2).max() == 2**44 - 1
    values = np.zeros((30, 10))
    values[:, 0] = 1
    assert integer_costs(values, ties, 2).min() == 2**14 - 1


COSTS = np.array([[0, 5, 9], [0, 3, 9], [0, 4, 9], [7, 0, 9]], dtype=np.int64)


def as_choice(columns: list[int]) -> npt.NDArray[np.bool_]:
    chosen = np.zeros(COSTS.shape, dtype=bool)
    chosen[range(4), columns] = True
    return chosen


def test_check_accepts_the_optimum() -> None:
    """One pick a row, at most 2 a column: rows 0 and 2 keep column 0, row 1 is moved for 3."""
    check_optimal(as_choice([0, 1, 0, 1]), COSTS, 1, 0, 2)


@pytest.mark.parametrize("columns", [[0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 2, 1], [0, 1, 2, 1]])
def test_check_finds_what_could_be_cheaper(columns: list[int]) -> None:
    """By one exchange (rows 1 and 2), by a move into free room, and from column 2 by a chain."""
    with pytest.raises(RuntimeError, match="not optimal"):
        check_optimal(as_choice(columns), COSTS, 1, 0, 2)


def test_check_uses_the_lower_bound() -> None:
    """With at least one in each column the cheapest is row 0 or 2 in column 2; without, it is not."""
    check_optimal(as_choice([2, 0, 0, 1]), COSTS, 1, 1, 2)
    with pytest.raises(RuntimeError, match="not optimal"):
        check_optimal(as_choice([2, 0, 0, 1]), COSTS, 1, 0, 2)


@pytest.mark.parametrize(
    ("columns", "bounds"), [([0, 0, 0, 1], (1, 0, 2)), ([0, 1, 0, 1], (1, 1, 2)), ([0, 1, 0, 1], (2, 0, 2))]
)
def test_check_finds_broken_sums(columns: list[int], bounds: tuple[int, int, int]) -> None:
    with pytest.raises(RuntimeError, match="violated the bounds"):
        check_optimal(as_choice(columns), COSTS, *bounds)


def test_check_finds_the_one_problem_of_several_that_could_be_cheaper() -> None:
    """Problems of different loads and costs, one of them short of its optimum, in every place."""
    best, worse = as_choice([0, 1, 0, 1]), as_choice([0, 0, 1, 1])
    several = np.stack([COSTS, COSTS[::-1], COSTS * 2])
    check_optimal(np.stack([best, best[::-1], best]), several, 1, 0, 2)
    for index, wrong in enumerate((worse, worse[::-1], worse)):
        chosen = np.stack([best, best[::-1], best])
        chosen[index] = wrong
        with pytest.raises(RuntimeError, match="not optimal"):
            check_optimal(chosen, several, 1, 0, 2)


def test_each_problem_has_its_own_room_for_hashes() -> None:
    """Values that span all of [0, 1] beside uniform ones: each as alone."""
    rng = np.random.default_rng(0)
    ties = rng.integers(0, 2**64, (30, 10), dtype=np.uint64)
    values = np.stack([rng.random((30, 10)), np.full((30, 10), 0.1), 0.1 + 1e-6 * rng.random((30, 10))])
    together = integer_costs(values, ties, 2)
    for result, alone in zip(together, values, strict=True):
        assert (result == integer_costs(alone, ties, 2)).all()
