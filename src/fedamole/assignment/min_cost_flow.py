"""The transportation problem behind reverse selection, solved in integers and checked after each solve.

Every row picks the same number of columns, every column is picked within bounds, and the sum of the picked
values is the largest possible. The constraints are totally unimodular, so a min-cost flow is exact.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

from fedamole.assignment.identity import Hashes

Integers = npt.NDArray[np.int64]
Chosen = npt.NDArray[np.bool_]

RESOLUTION = 1e-9
# Below about 2^52 no graph of a few thousand nodes is refused for its cost range; the solver multiplies costs
# by the number of nodes, which must stay within 63 bits.
LARGEST_COST = 2**50
LARGEST_SCALED_COST = 2**60


def best_choice(values: npt.NDArray[np.float64], ties: Hashes, *, picks: int, fewest: int, most: int) -> Chosen:
    """Choose `picks` columns in every row so that the chosen values add up to the largest sum.

    Shapes: values (..., rows, columns) within [0, 1], each of the leading places a problem of its own; ties (rows,
    columns), result like values. Every column is chosen by between `fewest` and `most` rows; the caller has checked
    that this is feasible. Values are quantised to 1e-9; among choices that are equal then, the one with the smallest
    sum of `ties` wins. Errors: `RuntimeError` where the solver fails or its answer does not pass the check.
    """
    costs = integer_costs(values, ties, picks)
    chosen = _solve(costs.reshape(-1, *costs.shape[-2:]), picks, fewest, most).reshape(costs.shape)
    check_optimal(chosen, costs, picks, fewest, most)
    return chosen


def integer_costs(values: npt.NDArray[np.float64], ties: Hashes, picks: int) -> Integers:
    """Turn values into integer costs whose low bits hold as much of the tie hash as fits.

    Shapes: values and result (..., rows, columns), ties (rows, columns). The hashes of a whole choice add up to less
    than one unit of the quantised value. Rows are measured from their best column, as each has to pick anyway; nearly
    uniform values then span a small range and leave room for a long hash exactly where many choices are equal.
    """
    quantised = np.rint(values / RESOLUTION).astype(np.int64)
    costs = quantised.max(axis=-1, keepdims=True) - quantised
    rows, columns = values.shape[-2:]
    limit = min(LARGEST_COST, LARGEST_SCALED_COST // (rows + columns + 1))
    room = limit // ((costs.max(axis=(-2, -1), keepdims=True) + 1) * max(rows * picks, 1))
    bits = np.frexp(np.maximum(room, 1))[1] - 1
    # Shifted twice, as a shift of a 64-bit number by 64 is undefined.
    low = ((ties >> np.uint64(1)) >> (63 - bits).astype(np.uint64)).astype(np.int64)
    result: Integers = costs * (rows * picks * (np.int64(1) << bits)) + low
    return result


def check_optimal(chosen: Chosen, costs: Integers, picks: int, fewest: int, most: int) -> None:
    """Prove in integers that a choice keeps its sums and that no exchange makes it cheaper.

    Shapes: chosen and costs (..., rows, columns). A cheaper choice exists if and only if moving picks from column
    to column along some cycle has a negative extra cost; the node `spare` closes a chain that begins at a
    column above `fewest` and ends at one below `most`. Relaxation that comes to rest proves there is none.
    Errors: `RuntimeError` naming what is violated.
    """
    chosen, costs = chosen.reshape(-1, *chosen.shape[-2:]), costs.reshape(-1, *costs.shape[-2:])
    loads, taken = chosen.sum(axis=1), chosen.sum(axis=2)
    if (taken != picks).any() or (loads < fewest).any() or (loads > most).any():
        raise RuntimeError(
            f"the assignment solver broke its bounds: row sums {np.unique(taken).tolist()} "
            f"instead of {picks}, column sums {np.unique(loads).tolist()} outside {fewest}..{most}; "
            "this is a fault in fedamole or ortools, please report it with the run folder"
        )
    problems, _, spare = chosen.shape
    # extra[m, a, b]: the least that moving one pick from column a to column b adds to the cost.
    # A chain has at most spare + 1 steps of at most LARGEST_SCALED_COST / nodes each: no sum overflows.
    never = 2**62
    extra = np.full((problems, spare + 1, spare + 1), never, dtype=np.int64)
    problem, columns, rows = np.nonzero(chosen.transpose(0, 2, 1))
    picked = costs[problem, rows, columns]
    exchange = np.where(chosen[problem, rows], never, costs[problem, rows] - picked[:, None])
    amounts = loads.ravel()
    used = np.flatnonzero(amounts)
    if len(used):
        starts = (np.cumsum(amounts) - amounts)[used]
        extra[used // spare, used % spare, :spare] = np.minimum.reduceat(exchange, starts, axis=0)
    extra[:, :spare, spare][loads < most] = 0
    extra[:, spare, :spare][loads > fewest] = 0
    extra[:, np.arange(spare + 1), np.arange(spare + 1)] = 0
    distance = np.zeros((problems, spare + 1), dtype=np.int64)
    for _ in range(spare + 2):
        shorter = (distance[:, :, None] + extra).min(axis=1)
        if (shorter == distance).all():
            return
        distance = shorter
    raise RuntimeError(
        "the assignment solver stopped short of the optimum (its answer can be exchanged for a cheaper one); "
        "this is a fault in fedamole or ortools, please report it with the run folder"
    )


@dataclass(frozen=True)
class _Network:
    """Row -> column arcs, then column -> sink arcs for what a column takes above its fewest."""

    tails: npt.NDArray[np.int32]
    heads: npt.NDArray[np.int32]
    nodes: npt.NDArray[np.int32]
    capacities: Integers
    supplies: Integers


def _solve(costs: Integers, picks: int, fewest: int, most: int) -> Chosen:
    """Choices (problems, rows, columns) of independent problems, from costs of that shape."""
    problems, rows, columns = costs.shape
    network = _network(rows, columns, picks, fewest, most)
    unit_costs = np.zeros((problems, len(network.tails)), dtype=np.int64)
    unit_costs[:, : rows * columns] = costs.reshape(problems, -1)
    chosen = np.empty((problems, rows * columns), dtype=bool)
    for problem in range(problems):
        flow = SimpleMinCostFlow()
        arcs = flow.add_arcs_with_capacity_and_unit_cost(
            network.tails, network.heads, network.capacities, unit_costs[problem]
        )
        flow.set_nodes_supplies(network.nodes, network.supplies)
        status = flow.solve()
        if status != flow.OPTIMAL:
            raise RuntimeError(
                f"the assignment solver ended with {status} for {rows} x {columns}, {picks} picks a row, "
                f"{fewest}..{most} a column; this is a fault in fedamole or ortools, please report it"
            )
        chosen[problem] = flow.flows(arcs[: rows * columns]) == 1
    return chosen.reshape(costs.shape)


@lru_cache(maxsize=8)
def _network(rows: int, columns: int, picks: int, fewest: int, most: int) -> _Network:
    nodes = np.arange(rows + columns + 1, dtype=np.int32)
    column_nodes = nodes[rows:-1]
    return _Network(
        tails=np.concatenate([np.repeat(nodes[:rows], columns), column_nodes]),
        heads=np.concatenate([np.tile(column_nodes, rows), np.repeat(nodes[-1:], columns)]),
        nodes=nodes,
        capacities=np.concatenate([np.ones(rows * columns, np.int64), np.full(columns, most - fewest)]),
        supplies=np.concatenate([np.full(rows, picks), np.full(columns, -fewest), [fewest * columns - rows * picks]]),
    )
