"""The runs of `fedamole demo`: three methods on the bundled task, each with one or more seeds."""

from pathlib import Path

from fedamole.cli.options import bundled_config
from fedamole.comparison.trials import LOCK, Cell
from fedamole.config import load_config
from fedamole.errors import RunError
from fedamole.reporting.runs import read_run

METHODS = ("local_only", "fedit", "fedamole")


def demo_runs(folder: Path, seeds: int) -> list[Cell]:
    """The demo's runs with the seeds 0 to `seeds` - 1, in the order in which they are made: seed by seed.

    A run lies in `folder`/METHOD for seed 0 and in `folder`/METHOD-s<seed> for the others. Raises RunError if `folder`
    holds something else, or a run of such a name with other settings.
    """
    runs = [_demo_run(folder, method, seed) for seed in range(seeds) for method in METHODS]
    if folder.exists():
        found = {child.name for child in folder.iterdir()} - {LOCK} if folder.is_dir() else {folder.name}
        if found and found.isdisjoint(run.path.name for run in runs):
            raise RunError(f"{folder} exists already and holds no run of the demo: choose --folder OTHER")
    for run in runs:
        run.refuse_other_config("`fedamole demo`")
        if run.state == "finished":
            read_run(run.path)  # a damaged one is found before hours of other runs, not after them
    return runs


def _demo_run(folder: Path, method: str, seed: int) -> Cell:
    config = load_config(bundled_config(method), [f"run.seed={seed}"])
    name = method if seed == 0 else f"{method}-s{seed}"
    return Cell(f"{method}, seed {seed}", folder / name, "demo", seed, {method: method}, config)
