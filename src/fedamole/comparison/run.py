"""A comparison at work: cells are run, checked against what is stored, counted and listed."""

from collections.abc import Sequence
from typing import Any

from fedamole.comparison.budgets import SET_BY_PLANS, planned, size_of
from fedamole.comparison.file import Comparison
from fedamole.comparison.trials import FREE, LOCK, Cell, TrialListener, copied, run_cells
from fedamole.config import Config, to_config
from fedamole.files import exclusive
from fedamole.runs.run_folder import SUMMARY, RunFolder


def run_comparison(comparison: Comparison, listener: TrialListener) -> list[Cell]:
    """Run every cell that is not finished, grids first; return the cells that failed.

    Raises RunError while another process runs the comparison: both would make the same folders.
    """
    comparison.folder.mkdir(parents=True, exist_ok=True)
    refusal = f"{comparison.folder}: another process is running this comparison; wait for it or stop it"
    with exclusive(comparison.folder / LOCK, refusal):
        return _run_comparison(comparison, listener)


def _run_comparison(comparison: Comparison, listener: TrialListener) -> list[Cell]:
    comparison = planned(comparison)
    check_stored(comparison)
    workers, tried = comparison.settings.workers, set[str]()
    while cells := [
        cell for arm in comparison.arms for cell in comparison.grid(arm).values() if cell.name not in tried
    ]:
        run_cells(cells, workers, listener)
        tried.update(cell.name for cell in cells)  # the next pass has the rates that widen the grids
    if tried:
        _reuse_grid(comparison)
        check_stored(comparison)
    run_cells([cell for arm in comparison.arms for cell in comparison.cells(arm)], workers, listener)
    return failures(comparison)


def check_stored(comparison: Comparison, free: Sequence[str] = FREE) -> None:
    """Refuse folders of cells with other settings than the comparison asks for, `free` ones apart (RunError)."""
    for cell in comparison.all_cells():
        cell.refuse_other_config(str(comparison.path), free)


def check_shown(comparison: Comparison) -> None:
    """Check stored cells before tables are shown without a run; settings that a plan computes are not compared."""
    settings = comparison.settings
    check_stored(comparison, (*FREE, *SET_BY_PLANS.get(settings.budget, ()), *SET_BY_PLANS.get(settings.match, ())))


def failures(comparison: Comparison) -> list[Cell]:
    """Cells whose last try failed."""
    return [cell for cell in comparison.all_cells() if cell.state == "failed"]


def _reuse_grid(comparison: Comparison) -> None:
    """Copy the grid's run at the chosen learning rate as the first seed's cell, which has the same settings."""
    first = comparison.settings.seeds[0]
    for arm in comparison.arms:
        grid, chosen = comparison.grid(arm), comparison.chosen(arm)
        for cell in comparison.cells(arm):
            if cell.seed == first:
                copied(cell, grid[chosen[next(iter(cell.rows))].rate].path)


def preview(comparison: Comparison) -> list[dict[str, Any]]:
    """Return what the next call would do with each cell, without running anything."""
    comparison = planned(comparison)
    check_stored(comparison)
    listed: list[dict[str, Any]] = []
    for arm in comparison.arms:
        cells = [*comparison.grid(arm).values(), *comparison.cells(arm)]
        listed += [_line(cell.name, list(cell.rows), _next(cell), cell.config) for cell in cells]
        if comparison.settings.learning_rates and not comparison.chosen(arm):
            waits = _line("", list(arm.rows), "waits for its learning rate", to_config(arm.tables))
            listed += [
                {**waits, "cell": f"{arm.scenario}/{arm.name}-s{seed}", "learning_rate": None}
                for seed in comparison.settings.seeds
            ]
    return listed


def _line(cell: str, methods: list[str], does: str, config: Config) -> dict[str, Any]:
    size = " ".join(map(str, size_of(config)))
    rounds, rate = config.federation.rounds, config.training.learning_rate
    return {"cell": cell, "methods": methods, "does": does, "size": size, "rounds": rounds, "learning_rate": rate}


def outlook(comparison: Comparison) -> str:
    """Return one sentence: how many cells are finished, how many are left, and the estimated time for those."""
    cells = {cell.name: cell for cell in comparison.all_cells()}
    finished = [cell for cell in cells.values() if cell.state == "finished"]
    waiting = [arm for arm in comparison.arms if not comparison.cells(arm)]
    left = len(cells) - len(finished) + len(waiting) * len(comparison.settings.seeds)
    told = f"{len(finished)} cells are finished, {left} are to be run, and wider grids may add some"
    if not comparison.settings.learning_rates or not comparison.settings.widen:
        told = f"{len(finished)} cells are finished, {left} are to be run"
    if not finished or not left:
        return told
    summaries = [RunFolder(cell.path).read_json(SUMMARY) for cell in finished]
    seconds = sum(one["seconds_update"] + one["seconds_evaluate"] for one in summaries) / len(finished)
    minutes = left * seconds / comparison.settings.workers / 60
    return f"{told}; at {seconds:.0f} s each, the mean of the finished ones, that takes about {minutes:.0f} minutes"


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
