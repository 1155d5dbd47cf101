"""Finished runs as their folders tell them; nothing but run files is read here."""

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
    """Hash of manifest and base: runs with the same hash had the same data in the same splits on the same base."""
    summary: dict[str, Any]
    labels: dict[str, str] = field(default_factory=dict)
    """What clients are called in tables, where that is not their name."""

    @property
    def untrained(self) -> bool:
        """Whether every update failed: its scores are those of models that were never trained."""
        return nothing_trained(self.summary)

    def label(self, row: str) -> str:
        """What a row of this run is called in a table: the run's name, where it has one, for its own method."""
        own = row == self.summary["method"]
        return self.name if own and self.name != "run" else row


def read_run(path: Path) -> Run:
    """Read a finished run; an unfinished one is a RunError that says how to go on."""
    folder = RunFolder.open(path)
    if not folder.finished:
        raise RunError(f"{path} is not finished: {SUMMARY} is missing; `fedamole resume {path}` continues it")
    config = folder.tables()
    summary = folder.read_json(SUMMARY)
    for row in (BASE, MAJORITY, summary["method"]):
        if row not in summary["rows"]:
            raise RunError(f"{path / SUMMARY} is damaged: it has no row {row!r}; put it back from a copy")
    if not summary["rows"][BASE]["clients"]:
        raise RunError(f"{path / SUMMARY} is damaged: it has no clients; put it back from a copy")
    return Run(path, config["run"]["name"], config["run"]["seed"], partition_of(folder), summary, labels_of(folder))


def untrained_warning(path: Path, summary: dict[str, Any]) -> str:
    """A sentence on a run in which every update failed, for the top of what shows it; empty for any other run."""
    if not nothing_trained(summary):
        return ""
    return f"{path}: all {summary['updates']} updates failed, so nothing was trained and its scores say nothing"


def refuse_untrained(path: Path) -> None:
    """Raise RunError for a finished run in which every update failed; it says why the first one did."""
    folder = RunFolder.open(path)
    if warning := untrained_warning(path, folder.read_json(SUMMARY)):
        first = next(line["failed"] for line in folder.lines(METRICS) if "failed" in line)
        raise RunError(f"{warning}; the first failed as follows: {first}")


def labels_of(folder: RunFolder) -> dict[str, str]:
    """What clients of a run are called in tables, where that is not their name; a server knows names only."""
    return client_labels(one for one in folder.read_json(MANIFEST)["clients"] if isinstance(one, dict))


def partition_of(folder: RunFolder) -> str:
    """Hash of what makes two runs comparable: who has which rows, not where the files lie, and which base."""
    ground = json.dumps([folder.read_json(MANIFEST)["clients"], folder.about["base"]], sort_keys=True)
    return hashlib.sha256(ground.encode()).hexdigest()


def folders_in(path: Path) -> list[Path]:
    """The run folders in a folder; RunError where there is none."""
    inside = sorted(child.parent for child in path.glob(f"*/{RUN}"))
    if not inside:
        raise RunError(f"{path} is neither a run folder nor a folder with runs in it")
    return inside


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs named one by one, or by a folder of them; there unfinished ones are left out, with a warning."""
    found: list[Run] = []
    for path in paths:
        if (path / RUN).exists() or not path.is_dir():
            found.append(read_run(path))
            continue
        inside = folders_in(path)
        finished = [child for child in inside if RunFolder.open(child).finished]
        for child in inside:
            if child not in finished:
                log.warning("%s is not finished and not shown; `fedamole resume %s` continues it", child, child)
        found += map(read_run, finished)
    if not found:
        raise RunError(f"no finished run in {', '.join(map(str, paths))}")
    return found
