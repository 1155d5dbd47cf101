"""Run methods and comparisons from Python."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from fedamole.api.progress import Progress, shown_progress, shown_trials
from fedamole.api.results import ComparisonResult, Run
from fedamole.api.rows import sources_of
from fedamole.cli.options import bundled_config
from fedamole.comparison.file import load_comparison
from fedamole.comparison.run import run_comparison
from fedamole.config import Table, merged, read_tables, rebased, to_config
from fedamole.errors import ConfigError
from fedamole.experiment import new_run_folder, start
from fedamole.experiment import resume as resume_run
from fedamole.federation.progress import Listeners, ProgressListener
from fedamole.files import write_atomic

Source = str | Path | Mapping[str, Any] | None
DATA = "data"
"""Folder beside the runs for rows that were given in Python."""


def run(
    config: Source = None,
    *,
    data: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    callbacks: Sequence[ProgressListener] = (),
    progress: Progress = "auto",
) -> Run:
    """Train one method on one federation, evaluate it and save the clients' models.

    Args:
        config: Path of a TOML file, or its tables as a dictionary, such as `{"method": {"name": "fedit"}}`; relative
            paths in a dictionary start at the working folder. Default: the settings of the bundled task.
        data: The clients' rows by name; see docs/python.md. They replace the config's data sources.
        folder: The run's folder, which must be new; default: `run.folder`, or a new one in `runs`.
        callbacks: Receive the events of the run, and may end it.
        progress: `auto` shows progress, in a notebook as a table; `none` shows none.

    Returns:
        The finished run.

    Raises:
        FedamoleError: The config, the data or the base cannot be used.
    """
    tables = _tables(config, data, Path(folder).parent if folder is not None else Path("runs"))
    if folder is not None:
        tables = merged(tables, {"run": {"folder": str(Path(folder).resolve())}})
    settings = to_config(tables)
    with new_run_folder(settings) as path, shown_progress(progress, settings.run.name) as shown:
        start(settings, path, Listeners([shown, *callbacks]))
    return Run(path)


def resume(
    folder: str | Path,
    *,
    base: str | None = None,
    callbacks: Sequence[ProgressListener] = (),
    progress: Progress = "auto",
) -> Run:
    """Continue an interrupted run after its last finished round; the result is that of an uninterrupted run.

    Args:
        folder: The run's folder.
        base: New path of the base, if it has moved.
        callbacks: Receive the events of the run.
        progress: As for `run`.
    """
    opened = Run(folder)
    with shown_progress(progress, opened.path.name) as shown:
        resume_run(opened.path, Listeners([shown, *callbacks]), base)
    return Run(folder)


def compare(
    comparison: str | Path | Sequence[str],
    config: Source = None,
    *,
    data: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    progress: Progress = "auto",
    **settings: Any,
) -> ComparisonResult:
    """Compare methods over seeds and scenarios. Finished trials are not repeated, so the call can be repeated.

    Args:
        comparison: Path of a comparison file, and then nothing else; or names of methods.
        config: With names of methods: the scenario, as for `run`, without a method.
        data: The clients' rows, as for `run`.
        folder: Folder of the comparison; default: `runs/comparison`.
        progress: As for `run`.
        **settings: Further keys of a comparison file, such as `seeds=[0, 1, 2]`, `learning_rates=[1e-3, 1e-2]`,
            `reference="local_only"` or `workers=2`.

    Returns:
        The results; `failed` names trials that failed.

    Raises:
        FedamoleError: A setting is wrong, or a stored trial has other settings.
    """
    if isinstance(comparison, str | Path):
        if config is not None or data is not None or folder is not None or settings:
            raise ConfigError("compare: a comparison file has all settings; give the file alone, or names of methods")
        path = Path(comparison)
    else:
        path = _comparison_file(list(comparison), config, data, Path(folder or "runs/comparison"), settings)
    loaded = load_comparison(path)
    with shown_trials(progress) as listener:
        failed = run_comparison(loaded, listener)
    return ComparisonResult(loaded, {trial.name: trial.error for trial in failed})


def _tables(config: Source, data: Mapping[str, Any] | None, runs: Path) -> Table:
    """Return the tables of a config with the given rows as its sources."""
    if config is None:
        tables = {} if data is not None else read_tables(bundled_config("fedamole"))
    elif isinstance(config, Mapping):
        tables = rebased(copy.deepcopy(dict(config)), Path.cwd())
    else:
        tables = read_tables(Path(config))
    if data is None:
        return tables
    own = dict(tables.get("data", {}))
    own.pop("manifest", None)
    return tables | {"data": own | {"source": sources_of(data, runs / DATA)}}


def _comparison_file(
    methods: Sequence[str], config: Source, data: Mapping[str, Any] | None, folder: Path, settings: Mapping[str, Any]
) -> Path:
    """Write the files of a comparison that was described in Python; equal settings give the same files."""
    scenario = {key: table for key, table in _tables(config, data, folder).items() if key != "method"}
    tables = {
        "name": folder.name,
        "folder": str((folder / "trials").resolve()),
        "methods": list(methods),
        "scenarios": {"scenario": "scenario.toml"},
        **settings,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("scenario.toml", scenario), ("comparison.toml", tables)):
        try:
            write_atomic(folder / name, tomli_w.dumps(content))
        except TypeError as error:
            raise ConfigError(f"compare: a setting cannot be written as TOML: {error}") from error
    return folder / "comparison.toml"
