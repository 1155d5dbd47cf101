"""Reverse selection: `select` of this package against general solvers, to the optimum and per whole call.

Ours is an integer min-cost flow (OR-Tools) with everything in: sorting ids, quantising, solving, proving the optimum.
The opponents solve the same matrices, building their problem included (the constraint matrices, which do not change,
are kept for SciPy's two):

    scip     cvxpy + SCIP, a general MILP solver: the way of the paper's authors; `pip install cvxpy pyscipopt`
    milp     scipy.optimize.milp (HiGHS) on the same values
    linprog  scipy.optimize.linprog (highs-ds) on costs scaled to a median of 1e3; the relaxation is integral

They run in a process of their own, because highspy, which cvxpy imports, cannot live in one with OR-Tools. It holds the
matrices before the clock starts and answers with one word, so neither its start nor any transfer is timed.

Columns: the opponent's median time divided by ours; the gap, which is the opponent's objective minus ours divided by
ours (negative where the opponent stops short, nan where it breaks the bounds); and whether ours is exact: in no module
further below the opponent than the quantisation allows, E k_c 1e-9.

Target: at least 100 times faster than cvxpy + SCIP for a round of 64 modules of 30 x 10 and for 300 x 100.
The full form takes about three minutes on two slow cores, most of them spent in the LP of 3000 x 1000.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.sparse
from measure import arguments, interleaved, report

Values = npt.NDArray[np.float64]
Chosen = npt.NDArray[np.bool_]

PICKS, FEWEST, RANK = 2, 2, 8


@dataclass(frozen=True)
class Size:
    """E, C and hi of so many modules; how often each is timed, quick (0: left out) and full; by whom."""

    experts: int
    clients: int
    most: int
    modules: int
    quick: int
    full: int
    opponents: tuple[str, ...] = ("scip", "milp", "linprog")

    def __str__(self) -> str:
        """Modules x experts x clients."""
        return f"{f'{self.modules}x' if self.modules > 1 else ''}{self.experts}x{self.clients}"


SIZES = (
    Size(30, 10, 8, modules=1, quick=5, full=21),
    Size(30, 10, 8, modules=64, quick=2, full=5),
    Size(300, 100, 8, modules=1, quick=1, full=5),
    Size(1000, 200, 13, modules=1, quick=0, full=3, opponents=("milp", "linprog")),
    Size(3000, 1000, 8, modules=1, quick=0, full=1, opponents=("linprog",)),
)


# the opponents, in their own process
def scip(P: Values, size: Size) -> Chosen:
    """Solve it as a mixed-integer program by cvxpy and SCIP."""
    import cvxpy

    X = cvxpy.Variable(P.shape, boolean=True)
    loads = cvxpy.sum(X, axis=0)
    constraints = [cvxpy.sum(X, axis=1) == PICKS, loads >= FEWEST, loads <= size.most]
    cvxpy.Problem(cvxpy.Maximize(cvxpy.sum(cvxpy.multiply(P, X))), constraints).solve(solver=cvxpy.SCIP)
    return np.asarray(X.value) > 0.5


def milp(P: Values, size: Size) -> Chosen:
    """Solve it as a mixed-integer program by SciPy's HiGHS, without a tolerated gap."""
    rows, columns = sums(size)
    constraints = [
        scipy.optimize.LinearConstraint(rows, PICKS, PICKS),
        scipy.optimize.LinearConstraint(columns, FEWEST, size.most),
    ]
    answer = scipy.optimize.milp(
        -P.ravel(), integrality=np.ones(P.size), bounds=(0, 1), constraints=constraints, options={"mip_rel_gap": 0}
    )
    return np.asarray(answer.x).reshape(P.shape) > 0.5


def linprog(P: Values, size: Size) -> Chosen:
    """Solve its linear relaxation, which has an integral optimum, by HiGHS's dual simplex on scaled costs."""
    rows, columns = sums(size)
    costs = P.max(axis=1, keepdims=True) - P
    answer = scipy.optimize.linprog(
        (costs * (1e3 / np.median(costs))).ravel(),
        A_ub=scipy.sparse.vstack([columns, -columns]),
        b_ub=np.repeat([size.most, -FEWEST], size.clients),
        A_eq=rows,
        b_eq=np.full(size.experts, PICKS),
        bounds=(0, 1),
        method="highs-ds",
    )
    return np.asarray(answer.x).reshape(P.shape) > 0.5


@lru_cache(maxsize=1)
def sums(size: Size) -> tuple[Any, Any]:
    """Sparse matrices that take a flattened (E, C) array to the sums of its rows and of its columns."""
    one_per_column, one_per_row = np.ones((1, size.clients)), np.ones((1, size.experts))
    rows = scipy.sparse.kron(scipy.sparse.eye_array(size.experts), one_per_column, format="csr")
    columns = scipy.sparse.kron(one_per_row, scipy.sparse.eye_array(size.clients), format="csr")
    return rows, columns


OPPONENTS: dict[str, Callable[[Values, Size], Chosen]] = {"scip": scip, "milp": milp, "linprog": linprog}


def serve(pipe: Connection) -> None:
    """Hold matrices, solve them when told to, hand over what was chosen."""
    size, chosen = SIZES[0], dict[str, list[Chosen]]()
    matrices: list[Values] = []
    while (order := pipe.recv()) is not None:
        match order:
            case "hold", size, matrices:
                pipe.send("held")
            case "solve", name:
                chosen[name] = [OPPONENTS[name](P, size) for P in matrices]
                pipe.send("solved")
            case "chosen", name:
                pipe.send(chosen[name])


class Worker:
    """This process's end of the opponents' process."""

    def __init__(self) -> None:
        """Start it; it ends by `stop`, or with this process."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs,), daemon=True).start()
        theirs.close()

    def ask(self, *order: Any) -> Any:
        """Send an order and wait for the answer."""
        self.pipe.send(order)
        return self.pipe.recv()

    def stop(self) -> None:
        """Let it end."""
        self.pipe.send(None)


# ours, and the comparison
def problem(size: Size) -> tuple[list[Values], Callable[[], list[Chosen]]]:
    """Return the matrices (row softmax of rank-8 Gaussian scores) and what solves them all by `select`."""
    # Imported here alone: the opponents' process reads this file too, and must not load OR-Tools.
    from fedamole.assignment.relevance import choice_probabilities
    from fedamole.assignment.reverse_selection import Bounds, select

    rng = np.random.default_rng(0)
    experts = rng.standard_normal((size.modules, size.experts, RANK))
    clients = rng.standard_normal((size.modules, size.clients, RANK))
    matrices = [choice_probabilities(e @ t.T / np.sqrt(RANK)) for e, t in zip(experts, clients, strict=True)]
    bounds = Bounds(PICKS, FEWEST, size.most)
    expert_ids = [f"expert-{e:02d}" for e in range(size.experts)]
    client_ids = [f"client-{c:02d}" for c in range(size.clients)]
    modules = np.stack(matrices)  # one call for a round, as FedAMoLE makes it
    return matrices, lambda: list(select(modules, bounds, expert_ids=expert_ids, client_ids=client_ids))


def objectives(matrices: list[Values], chosen: list[Chosen], size: Size) -> Values:
    """Sum of P * X of every module; nan where X breaks the bounds."""
    values = []
    for P, X in zip(matrices, chosen, strict=True):
        loads = X.sum(axis=0)
        kept = (X.sum(axis=1) == PICKS).all() and (loads >= FEWEST).all() and (loads <= size.most).all()
        values.append(P[X].sum() if kept else np.nan)
    return np.array(values)


def compare(size: Size, repeats: int, worker: Worker) -> tuple[list[list[object]], dict[str, float]]:
    """Lines of the table and ratios for one size."""
    missing = [module for module in ("cvxpy", "pyscipopt") if find_spec(module) is None]
    names = [name for name in size.opponents if name != "scip" or not missing]
    matrices, ours = problem(size)
    worker.ask("hold", size, matrices)
    seconds = interleaved({"ours": ours, **{name: partial(worker.ask, "solve", name) for name in names}}, repeats)
    best = objectives(matrices, ours(), size)
    allowed = size.experts * PICKS * 1e-9
    lines: list[list[object]] = []
    ratios: dict[str, float] = {}
    for name in names:
        theirs = objectives(matrices, worker.ask("chosen", name), size)
        ratio = ratios[f"select_vs_{name}_at_{size}"] = seconds[name] / seconds["ours"]
        exact = np.isfinite(best).all() and not (theirs > best + allowed).any()
        gap = float((theirs.sum() - best.sum()) / best.sum())
        lines.append([size, name, ratio, f"{gap:.1e}", "yes" if exact else "NO"])
    if len(names) < len(size.opponents):
        lines.append([size, "scip", "not installed: pip install cvxpy pyscipopt", "-", "-"])
    return lines, ratios


def main() -> None:
    """Compare all sizes and report."""
    options = arguments(__doc__)
    worker = Worker()
    lines: list[list[object]] = []
    ratios: dict[str, float] = {}
    for size in SIZES:
        repeats = size.quick if options.quick else size.full
        if repeats:
            more, result = compare(size, repeats, worker)
            lines += more
            ratios |= result
    worker.stop()
    title = (
        f"`select` against general solvers, k_c = {PICKS}, lo = {FEWEST}\ntarget: scip >= 100 at 64x30x10 and 300x100"
    )
    if not options.quick:
        title += "\nleft out, a minute or more per solve: scip from\n1000x200 on, milp at 3000x1000"
    report(title, ["size", "opponent", "time / ours", "gap", "ours exact"], lines, ratios, options.json)


if __name__ == "__main__":
    main()
