"""Finished runs read from their folders."""

import functools
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
from fedamole.reporting.learning import RoundState, learning_curve
from fedamole.reporting.work import work_of
from fedamole.runs.run_files import BASE, MAJORITY
from fedamole.runs.run_folder import MANIFEST, METRICS, RUN, SUMMARY, RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One finished run."""

    path: Path
    config: dict[str, Any]
    """Content of config.toml."""
    partition: str
    """Hash of manifest and base. Runs with the same hash had the same data in the same splits on the same base."""
    summary: dict[str, Any]
    """Content of summary.json."""
    labels: dict[str, str] = field(default_factory=dict)
    """Labels of clients in tables, for those whose label is not their name."""

    @property
    def name(self) -> str:
        """Name of the run in its config."""
        return str(self.config["run"]["name"])

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.config["run"]["seed"])

    @property
    def untrained(self) -> bool:
        """Whether every update failed, so that the scores are those of untrained models."""
        return nothing_trained(self.summary)

    def label(self, variant: str) -> str:
        """Return the name of a variant of this run in tables: the run's name, if set, for the run's own method."""
        own = variant == self.summary["method"]
        return self.name if own and self.name != "run" else variant

    @functools.cached_property
    def _history(self) -> dict[str, tuple[dict[str, float], list[RoundState]]]:
        """Work and learning curve by trained variant. metrics.jsonl is read once and not kept in memory."""
        rows, rounds = self.summary["rows"], self.summary["rounds"]
        lines = list(RunFolder(self.path).lines(METRICS))
        clients = {name: len(row["clients"]) for name, row in rows.items() if name not in (BASE, MAJORITY)}
        return {
            variant: (work_of(lines, variant, count, rounds), learning_curve(lines, variant, count))
            for variant, count in clients.items()
        }

    @functools.cached_property
    def work(self) -> dict[str, dict[str, float]]:
        """Work by trained variant, see `work_of`."""
        return {variant: work for variant, (work, _) in self._history.items()}

    @functools.cached_property
    def curves(self) -> dict[str, list[RoundState]]:
        """Learning curve by trained variant, see `learning_curve`."""
        return {variant: curve for variant, (_, curve) in self._history.items()}


def read_run(path: Path) -> Run:
    """Read a finished run.

    Raises:
        RunError: The run is not finished, or its folder is damaged.
    """
    return finished_run(RunFolder.open(path))


def finished_run(folder: RunFolder) -> Run:
    """Return the finished run in an open folder; see `read_run`."""
    path = folder.path
    if not folder.finished:
        raise RunError(f"{path} is not finished: {SUMMARY} is missing; `fedamole resume {path}` continues it")
    summary = folder.read_json(SUMMARY)
    for variant in (BASE, MAJORITY, summary["method"]):
        if variant not in summary["rows"]:
            raise RunError(f"{path / SUMMARY} is damaged: {variant!r} is missing in `rows`; restore it from a copy")
    if not summary["rows"][BASE]["clients"]:
        raise RunError(f"{path / SUMMARY} is damaged: it has no clients; restore it from a copy")
    return run_with_summary(folder, summary)


def run_with_summary(folder: RunFolder, summary: dict[str, Any]) -> Run:
    """Return the run in an open folder, with a summary that the caller has read or, for an unfinished run, created."""
    clients = folder.read_json(MANIFEST)["clients"]
    # What makes two runs comparable: the rows of each client and the base, not file paths.
    content = json.dumps([clients, folder.about["base"]], sort_keys=True)
    partition = hashlib.sha256(content.encode()).hexdigest()
    # The manifest of a deployment's server has only the clients' names.
    labels = client_labels(client for client in clients if isinstance(client, dict))
    return Run(folder.path, folder.tables(), partition, summary, labels)


def label_noise(config: dict[str, Any]) -> dict[str, float]:
    """Return the fraction of wrong answers on purpose by source of a run's config, without sources that have none."""
    sources = config.get("data", {}).get("source", [])
    return {source["name"]: source["label_noise"] for source in sources if source.get("label_noise")}


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


def run_folders(path: Path) -> list[Path]:
    """Return the path itself if it is a run folder or not a folder, else the run folders directly inside it.

    Raises RunError if there are none.
    """
    if (path / RUN).exists() or not path.is_dir():
        return [path]
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
        for folder in map(RunFolder.open, run_folders(path)):
            if folder.path == path or folder.finished:
                runs.append(finished_run(folder))
            else:
                warning = "%s is not finished and is left out; `fedamole resume %s` continues it"
                log.warning(warning, folder.path, folder.path)
    if not runs:
        raise RunError(f"no finished run in {', '.join(map(str, paths))}")
    return runs
