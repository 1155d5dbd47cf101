"""The runs of `fedamole demo`: four methods on the bundled task, each with one or more seeds."""

from pathlib import Path

from fedamole.cli.options import bundled_config
from fedamole.comparison.trials import LOCK, Trial
from fedamole.config import load_config
from fedamole.errors import RunError
from fedamole.reporting.runs import read_run

METHODS = ("local_only", "fedit", "fedamole", "fedamole_peers")


def demo_runs(folder: Path, seeds: int) -> list[Trial]:
    """Return the demo's runs with the seeds 0 to `seeds` - 1, in the order in which they are run: seed by seed.

    A run is stored in `folder`/METHOD for seed 0 and in `folder`/METHOD-s<seed> for the others. Raises RunError if
    `folder` contains something else, or a run with other settings.
    """
    trials = [_demo_run(folder, method, seed) for seed in range(seeds) for method in METHODS]
    if folder.exists():
        names = {child.name for child in folder.iterdir()} - {LOCK} if folder.is_dir() else {folder.name}
        if names and names.isdisjoint(trial.path.name for trial in trials):
            raise RunError(f"{folder} exists already and contains no run of the demo: choose --folder OTHER")
    for trial in trials:
        trial.refuse_other_config("`fedamole demo`")
        if trial.state == "finished":
            read_run(trial.path)  # raises for a damaged run now, before hours of other runs
    return trials


def _demo_run(folder: Path, method: str, seed: int) -> Trial:
    config = load_config(bundled_config(method), [f"run.seed={seed}"])
    name = method if seed == 0 else f"{method}-s{seed}"
    return Trial(f"{method}, seed {seed}", folder / name, "demo", seed, {method: method}, config)
