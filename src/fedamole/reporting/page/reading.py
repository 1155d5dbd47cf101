"""What the folders of a report tell: runs, finished or not, whole ones or one side's part of a deployment."""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedamole.data.examples import SPLITS
from fedamole.errors import RunError
from fedamole.federation.loop import BASE
from fedamole.federation.run_folder import (
    ASSIGNMENT,
    CLIENTS,
    CONFIG,
    MANIFEST,
    METRICS,
    ROUTING,
    RUN,
    SUMMARY,
    RunFolder,
)
from fedamole.federation.summary import costs
from fedamole.reporting.runs import Run, folders_in, partition_of

Json = dict[str, Any]


@dataclass(frozen=True)
class Told:
    """One run's folder, read once."""

    run: Run
    """Its `summary` holds the method alone while the run is not finished."""
    kind: str
    """simulation, server or client."""
    config: Json
    lines: tuple[Json, ...]
    """metrics.jsonl."""
    assignment: tuple[Json, ...]
    """assignment.jsonl; empty for most methods, and at a client."""
    amounts: dict[str, dict[str, int]]
    """Examples of each client by split, where the folder tells."""
    sources: dict[str, str]
    labels: dict[str, dict[str, int]]
    """How often each answer occurs, of clients of a deployment that share it."""
    routing: dict[str, dict[str, dict[str, float]]]
    """Share of the tokens by client, module and expert, where it has been worked out."""
    costs: Json
    """Traffic, seconds and memory; of an unfinished run, so far."""
    finished: bool

    @property
    def rows(self) -> list[str]:
        """The run's models, its own method's first."""
        own = self.run.summary["method"]
        seen = dict.fromkeys(line["method"] for line in self.lines if line["split"] == "validation")
        return sorted((row for row in {own: None, **seen} if row != BASE), key=lambda row: row != own)

    @property
    def label(self) -> str:
        """What the run's own model is called in tables."""
        return self.run.label(self.run.summary["method"])

    @property
    def rounds(self) -> int:
        """Rounds the run is to have."""
        return int(self.config["federation"]["rounds"])

    @property
    def done(self) -> int:
        """Rounds that have been scored on validation so far."""
        return 1 + max((line["round"] for line in self.lines if line["split"] == "validation"), default=-1)

    @property
    def clients(self) -> set[str]:
        """Everybody whom the folder names."""
        logged = (line["client"] for line in (*self.lines, *self.assignment) if "client" in line)
        return {*logged, *self.amounts, *(self.config["deployment"]["clients"] if self.kind == "server" else ())}


def read_folders(paths: Sequence[Path]) -> list[Told]:
    """Read runs named one by one, or by a folder of them. Runs of different data or bases are a RunError."""
    folders: list[Path] = []
    for path in paths:
        folders += [path] if (path / RUN).exists() or not path.is_dir() else folders_in(path)
    found = [read_folder(path) for path in dict.fromkeys(folders)]
    for one in found:
        if one.run.partition != found[0].run.partition:
            raise RunError(
                f"{one.run.path} and {found[0].run.path} had different data, splits or base, and a report is on one "
                "federation: write a report for each"
            )
    return found


def read_folder(path: Path) -> Told:
    """Read one run's folder, whatever state it is in; a damaged one is a RunError."""
    folder = RunFolder.open(path)
    config = tomllib.loads((path / CONFIG).read_text())
    summary = folder.read_json(SUMMARY) if folder.finished else {"method": folder.about["method"]}
    run = Run(path, config["run"]["name"], config["run"]["seed"], partition_of(folder), summary)
    told: Json = folder.read_json(CLIENTS) if (path / CLIENTS).exists() else {}
    drawn = [one for one in folder.read_json(MANIFEST)["clients"] if isinstance(one, dict)]  # a server knows names only
    amounts = {one["client"]: {split: len(one[split]["rows"]) for split in SPLITS if split in one} for one in drawn}
    return Told(
        run, folder.kind, config, tuple(folder.lines(METRICS)), tuple(folder.lines(ASSIGNMENT)),
        amounts | {name: dict(one["examples"]) for name, one in told.items() if "examples" in one},
        {one["client"]: one["source"] for one in drawn},
        {name: dict(one["labels"]) for name, one in told.items() if one.get("labels")},
        _routing(path / ROUTING), summary if folder.finished else costs(folder), folder.finished,
    )


def _routing(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    if not path.exists():
        return {}
    try:
        return {
            str(client): {
                str(module): {str(expert): float(share) for expert, share in shares.items()}
                for module, shares in modules.items()
            }
            for client, modules in json.loads(path.read_text())["clients"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} cannot be read ({error!r}): remove it, or write it anew") from error
