"""A comparison at work: cells are run, checked against what is stored, counted and listed."""

from collections.abc import Sequence
from typing import Any

from fedamole.cells import FREE, Cell, CellWatcher, copied, run_cells
from fedamole.comparison.budgets import within_bytes
from fedamole.comparison.file import Comparison
from fedamole.config import to_config


def run_comparison(comparison: Comparison, watcher: CellWatcher) -> list[Cell]:
    """Run every cell that is not finished, grids first; return the cells that failed."""
    comparison = within_bytes(comparison)
    check_stored(comparison)
    workers, tried = comparison.settings.workers, set[str]()
    while cells := [
        cell for arm in comparison.arms for cell in comparison.grid(arm).values() if cell.name not in tried
    ]:
        run_cells(cells, workers, watcher)
        tried.update(cell.name for cell in cells)  # the next pass has the rates that widen the grids
    if tried:
        _reuse_grid(comparison)
        check_stored(comparison)
    run_cells([cell for arm in comparison.arms for cell in comparison.cells(arm)], workers, watcher)
    return failures(comparison)


def check_stored(comparison: Comparison, free: Sequence[str] = FREE) -> None:
    """Refuse folders of cells with other settings than the comparison asks for, `free` ones apart (RunError)."""
    for cell in comparison.all_cells():
        cell.refuse_other_config(str(comparison.path), free)


def check_shown(comparison: Comparison) -> None:
    """The same before tables are made without a run; rounds worked out from bytes are taken as they are stored."""
    check_stored(comparison, (*FREE, "federation.rounds") if comparison.settings.budget == "bytes" else FREE)


def failures(comparison: Comparison) -> list[Cell]:
    """Cells whose last try failed."""
    return [cell for cell in comparison.all_cells() if cell.state == "failed"]


def _reuse_grid(comparison: Comparison) -> None:
    """The grid's run of the rate that was chosen is the first seed's cell: the same settings, trained once."""
    first = comparison.settings.seeds[0]
    for arm in comparison.arms:
        grid, chosen = comparison.grid(arm), comparison.chosen(arm)
        for cell in comparison.cells(arm):
            if cell.seed == first:
                copied(cell, grid[chosen[next(iter(cell.rows))].rate].path)


def preview(comparison: Comparison) -> list[dict[str, Any]]:
    """What the next call would do with each cell; runs nothing."""
    comparison = within_bytes(comparison)
    check_stored(comparison)
    listed: list[dict[str, Any]] = []
    for arm in comparison.arms:
        cells = [*comparison.grid(arm).values(), *comparison.cells(arm)]
        for cell in cells:
            config = cell.config
            listed.append(
                {
                    "cell": cell.name,
                    "methods": list(cell.rows),
                    "does": _next(cell),
                    "rounds": config.federation.rounds,
                    "learning_rate": config.training.learning_rate,
                }
            )
        if comparison.settings.learning_rates and not comparison.chosen(arm):
            waiting = "waits for its learning rate"
            rounds = to_config(arm.tables).federation.rounds
            listed += [
                {
                    "cell": f"{arm.scenario}/{arm.name}-s{seed}",
                    "methods": list(arm.rows),
                    "does": waiting,
                    "rounds": rounds,
                    "learning_rate": None,
                }
                for seed in comparison.settings.seeds
            ]
    return listed


def _next(cell: Cell) -> str:
    if cell.state == "failed":
        return f"is tried again; it failed: {cell.error}"
    return {"new": "is run", "unfinished": "is resumed", "finished": "is finished"}[cell.state]


def progress(comparison: Comparison) -> dict[str, int]:
    """How many cells are in which state, those that wait for their learning rate counted as new."""
    counts: dict[str, int] = {"finished": 0, "failed": 0, "unfinished": 0, "new": 0}
    for arm in comparison.arms:
        cells: Sequence[Cell] = comparison.cells(arm)
        counts["new"] += 0 if cells else len(comparison.settings.seeds)
        for cell in cells:
            counts[cell.state] += 1
    return counts
