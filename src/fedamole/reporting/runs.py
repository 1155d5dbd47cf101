"""Finished runs read from their folders."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedamole.data.client_labels import client_labels
from fedamole.errors import RunError
from fedamole.federation.summary import nothing_trained
from fedamole.runs.run_files import BASE, MAJORITY
from fedamole.runs.run_folder import MANIFEST, METRICS, RUN, SUMMARY, RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One finished run."""

    path: Path
    name: str
    seed: int
    partition: str
    """Hash of manifest and base. Runs with the same hash had the same data in the same splits on the same base."""
    summary: dict[str, Any]
    """Content of summary.json."""
    labels: dict[str, str] = field(default_factory=dict)
    """Labels of clients in tables, for those whose label is not their name."""

    @property
    def untrained(self) -> bool:
        """Whether every update failed, so that the scores are those of untrained models."""
        return nothing_trained(self.summary)

    def label(self, variant: str) -> str:
        """Return the name of a variant of this run in tables: the run's name, if set, for the run's own method."""
        own = variant == self.summary["method"]
        return self.name if own and self.name != "run" else variant


def read_run(path: Path) -> Run:
    """Read a finished run.

    Raises:
        RunError: The run is not finished, or its folder is damaged.
    """
    folder = RunFolder.open(path)
    if not folder.finished:
        raise RunError(f"{path} is not finished: {SUMMARY} is missing; `fedamole resume {path}` continues it")
    config = folder.tables()
    summary = folder.read_json(SUMMARY)
    for variant in (BASE, MAJORITY, summary["method"]):
        if variant not in summary["rows"]:
            raise RunError(f"{path / SUMMARY} is damaged: {variant!r} is missing in `rows`; restore it from a copy")
    if not summary["rows"][BASE]["clients"]:
        raise RunError(f"{path / SUMMARY} is damaged: it has no clients; restore it from a copy")
    return Run(path, config["run"]["name"], config["run"]["seed"], partition_of(folder), summary, labels_of(folder))


def untrained_warning(path: Path, summary: dict[str, Any]) -> str:
    """Return a warning for a run in which every update failed; empty for any other run."""
    if not nothing_trained(summary):
        return ""
    return f"{path}: all {summary['updates']} updates failed, so nothing was trained and the scores are meaningless"


def refuse_untrained(path: Path) -> None:
    """Raise RunError for a finished run in which every update failed, with the reason of the first failure."""
    folder = RunFolder.open(path)
    if warning := untrained_warning(path, folder.read_json(SUMMARY)):
        first = next(line["failed"] for line in folder.lines(METRICS) if "failed" in line)
        raise RunError(f"{warning}; reason of the first failure: {first}")


def labels_of(folder: RunFolder) -> dict[str, str]:
    """What clients of a run are called in tables, where that is not their name; a server knows names only."""
    return client_labels(one for one in folder.read_json(MANIFEST)["clients"] if isinstance(one, dict))


def partition_of(folder: RunFolder) -> str:
    """Return the hash of what makes two runs comparable: the rows of each client and the base, not file paths."""
    content = json.dumps([folder.read_json(MANIFEST)["clients"], folder.about["base"]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def folders_in(path: Path) -> list[Path]:
    """Return the run folders directly inside a folder; RunError if there are none."""
    folders = sorted(child.parent for child in path.glob(f"*/{RUN}"))
    if not folders:
        raise RunError(f"{path} is neither a run folder nor a folder with runs in it")
    return folders


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read finished runs.

    Args:
        paths: Run folders, or folders with run folders in them. Unfinished runs in the latter are skipped with a
            warning; an unfinished run that is named itself is a RunError.
    """
    runs: list[Run] = []
    for path in paths:
        if (path / RUN).exists() or not path.is_dir():
            runs.append(read_run(path))
            continue
        folders = folders_in(path)
        finished = [folder for folder in folders if RunFolder.open(folder).finished]
        for folder in folders:
            if folder not in finished:
                log.warning("%s is not finished and not shown; `fedamole resume %s` continues it", folder, folder)
        runs += map(read_run, finished)
    if not runs:
        raise RunError(f"no finished run in {', '.join(map(str, paths))}")
    return runs
