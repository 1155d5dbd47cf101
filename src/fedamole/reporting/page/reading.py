"""What the folders of a report tell: runs, finished or not, whole ones or one side's part of a deployment."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedamole.errors import RunError
from fedamole.federation.summary import costs
from fedamole.reporting.runs import Run, folders_in, labels_of, partition_of, read_run
from fedamole.runs.adapter_folder import MOST_EXPERTS
from fedamole.runs.run_files import BASE, SPLITS
from fedamole.runs.run_folder import (
    ASSIGNMENT,
    CLIENTS,
    MANIFEST,
    METRICS,
    ROUTING,
    RUN,
    RunFolder,
)

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
    config = folder.tables()
    if folder.finished:
        run = read_run(path)
    else:
        summary = {"method": folder.about["method"]}
        name, seed = config["run"]["name"], config["run"]["seed"]
        run = Run(path, name, seed, partition_of(folder), summary, labels_of(folder))
    told: Json = folder.read_json(CLIENTS) if (path / CLIENTS).exists() else {}
    drawn = [one for one in folder.read_json(MANIFEST)["clients"] if isinstance(one, dict)]  # a server knows names only
    amounts = {one["client"]: {split: len(one[split]["rows"]) for split in SPLITS if split in one} for one in drawn}
    return Told(
        run,
        folder.kind,
        config,
        _lines(folder, METRICS, config),
        _lines(folder, ASSIGNMENT, config),
        amounts | {name: dict(one["examples"]) for name, one in told.items() if "examples" in one},
        {one["client"]: one["source"] for one in drawn},
        {name: dict(one["labels"]) for name, one in told.items() if one.get("labels")},
        folder.read_json(ROUTING)["clients"] if (path / ROUTING).exists() else {},
        run.summary if folder.finished else costs(folder),
        folder.finished,
    )


def _lines(folder: RunFolder, name: str, config: Json) -> tuple[Json, ...]:
    """Lines of a file; RunError for a round or an expert that a run with this config does not have."""
    rounds, experts = config["federation"]["rounds"], config["method"].get("experts") or MOST_EXPERTS
    lines = tuple(folder.lines(name))
    for number, line in enumerate(lines, 1):
        beyond = [expert for expert in line.get("experts", ()) if expert >= experts]
        # A client that joined a finished run logs one round more.
        what = f"round {line['round']}" if line["round"] > rounds else f"expert {beyond[0]}" if beyond else ""
        if what:
            raise RunError(
                f"{folder.path / name}, line {number}, is of {what}, which a run of {rounds} rounds"
                f"{f' and {experts} experts' if beyond else ''} does not have; put the file back from a copy"
            )
    return lines
