"""The assignment problem of reverse selection: solve it in integers as a min-cost flow and verify each solution.

Every row chooses k columns, every column is chosen by a bounded number of rows, and the sum of the chosen values is
maximal. The constraint matrix is totally unimodular, so the integer solution of the flow is optimal.
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
# The solver multiplies costs by the number of nodes, and the product must fit in 63 bits. It accepts costs below about
# 2^52 for graphs of a few thousand nodes.
LARGEST_COST = 2**50
LARGEST_SCALED_COST = 2**60


def best_choice(values: npt.NDArray[np.float64], ties: Hashes, *, k: int, min_load: int, max_load: int) -> Chosen:
    """Choose k columns in each row, such that the sum of the chosen values is maximal.

    Shapes: values (..., rows, columns) within [0, 1], where leading dimensions are independent problems; ties (rows,
    columns); result like values. Each column is chosen by `min_load` to `max_load` rows; the caller checks that this is
    feasible. Values are rounded to 1e-9; of several optimal choices, the one with the smallest sum of `ties` wins.
    Errors: `RuntimeError` if the solver fails or its solution is not optimal.
    """
    costs = integer_costs(values, ties, k)
    chosen = _solve(costs.reshape(-1, *costs.shape[-2:]), k, min_load, max_load).reshape(costs.shape)
    check_optimal(chosen, costs, k, min_load, max_load)
    return chosen


def integer_costs(values: npt.NDArray[np.float64], ties: Hashes, k: int) -> Integers:
    """Convert values to integer costs whose low bits hold as many bits of the tie hash as fit.

    Shapes: values and result (..., rows, columns), ties (rows, columns). The hashes of a whole choice sum to less than
    one unit of the rounded value. Costs are relative to the best column of each row, which does not change the optimum,
    as every row makes k choices. Nearly uniform values then span a small range, which leaves more bits for the hash
    where many choices are equal.
    """
    quantised = np.rint(values / RESOLUTION).astype(np.int64)
    costs = quantised.max(axis=-1, keepdims=True) - quantised
    rows, columns = values.shape[-2:]
    limit = min(LARGEST_COST, LARGEST_SCALED_COST // (rows + columns + 1))
    levels = limit // ((costs.max(axis=(-2, -1), keepdims=True) + 1) * max(rows * k, 1))
    bits = np.frexp(np.maximum(levels, 1))[1] - 1
    # Shifted twice, as a shift of a 64-bit number by 64 is undefined.
    low = ((ties >> np.uint64(1)) >> (63 - bits).astype(np.uint64)).astype(np.int64)
    result: Integers = costs * (rows * k * (np.int64(1) << bits)) + low
    return result


def check_optimal(chosen: Chosen, costs: Integers, k: int, min_load: int, max_load: int) -> None:
    """Verify in integers that a choice satisfies the bounds and is optimal.

    Shapes: chosen and costs (..., rows, columns). A cheaper choice exists if and only if moving choices from column to
    column along some cycle has a negative cost. The node `sink` closes chains that begin at a column with more than
    `min_load` choices and end at one with fewer than `max_load`. There is no negative cycle if shortest-path relaxation
    (Bellman-Ford) converges. Errors: `RuntimeError` that names what is violated.
    """
    chosen, costs = chosen.reshape(-1, *chosen.shape[-2:]), costs.reshape(-1, *costs.shape[-2:])
    loads, choices = chosen.sum(axis=1), chosen.sum(axis=2)
    if (choices != k).any() or (loads < min_load).any() or (loads > max_load).any():
        raise RuntimeError(
            f"the assignment solver violated the bounds: row sums {np.unique(choices).tolist()} "
            f"instead of {k}, column sums {np.unique(loads).tolist()} outside {min_load}..{max_load}; "
            "this is a fault in fedamole or ortools, please report it with the run folder"
        )
    problems, _, sink = chosen.shape
    # extra[m, a, b]: the smallest cost of moving one choice from column a to column b in problem m.
    # A chain has at most sink + 1 steps of at most LARGEST_SCALED_COST / nodes each, so no sum overflows.
    infinite = 2**62
    extra = np.full((problems, sink + 1, sink + 1), infinite, dtype=np.int64)
    problem, columns, rows = np.nonzero(chosen.transpose(0, 2, 1))
    chosen_costs = costs[problem, rows, columns]
    exchange = np.where(chosen[problem, rows], infinite, costs[problem, rows] - chosen_costs[:, None])
    counts = loads.ravel()
    used = np.flatnonzero(counts)
    if len(used):
        starts = (np.cumsum(counts) - counts)[used]
        extra[used // sink, used % sink, :sink] = np.minimum.reduceat(exchange, starts, axis=0)
    extra[:, :sink, sink][loads < max_load] = 0
    extra[:, sink, :sink][loads > min_load] = 0
    extra[:, np.arange(sink + 1), np.arange(sink + 1)] = 0
    distance = np.zeros((problems, sink + 1), dtype=np.int64)
    for _ in range(sink + 2):
        shorter = (distance[:, :, None] + extra).min(axis=1)
        if (shorter == distance).all():
            return
        distance = shorter
    raise RuntimeError(
        "the assignment solver returned a solution that is not optimal; "
        "this is a fault in fedamole or ortools, please report it with the run folder"
    )


@dataclass(frozen=True)
class _Network:
    """The flow network: an arc from every row to every column, and from every column to the sink.

    The arcs to the sink carry the choices of a column beyond `min_load`.
    """

    tails: npt.NDArray[np.int32]
    heads: npt.NDArray[np.int32]
    nodes: npt.NDArray[np.int32]
    capacities: Integers
    supplies: Integers


def _solve(costs: Integers, k: int, min_load: int, max_load: int) -> Chosen:
    """Solve independent problems with costs (problems, rows, columns); return the choices in the same shape."""
    problems, rows, columns = costs.shape
    network = _network(rows, columns, k, min_load, max_load)
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
                f"the assignment solver ended with {status} for {rows} x {columns}, {k} choices per row, "
                f"{min_load}..{max_load} per column; this is a fault in fedamole or ortools, please report it"
            )
        chosen[problem] = flow.flows(arcs[: rows * columns]) == 1
    return chosen.reshape(costs.shape)


@lru_cache(maxsize=8)
def _network(rows: int, columns: int, k: int, min_load: int, max_load: int) -> _Network:
    nodes = np.arange(rows + columns + 1, dtype=np.int32)
    column_nodes = nodes[rows:-1]
    return _Network(
        tails=np.concatenate([np.repeat(nodes[:rows], columns), column_nodes]),
        heads=np.concatenate([np.tile(column_nodes, rows), np.repeat(nodes[-1:], columns)]),
        nodes=nodes,
        capacities=np.concatenate([np.ones(rows * columns, np.int64), np.full(columns, max_load - min_load)]),
        supplies=np.concatenate([np.full(rows, k), np.full(columns, -min_load), [min_load * columns - rows * k]]),
    )
