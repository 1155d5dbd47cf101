"""Data of the runs in a report, read from their folders: finished or not, of simulations and of deployments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedamole.errors import RunError
from fedamole.federation.summary import costs
from fedamole.reporting.runs import Run, finished_run, label_noise, run_folders, run_with_summary
from fedamole.runs.adapter_folder import MOST_EXPERTS
from fedamole.runs.run_files import BASE, SPLITS
from fedamole.runs.run_folder import ASSIGNMENT, AUDIT, CLIENTS, MANIFEST, METRICS, ROUTING, RunFolder

Json = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """Content of one run's folder."""

    run: Run
    """For an unfinished run, its `summary` holds only the method."""
    kind: str
    """simulation, server or client."""
    lines: tuple[Json, ...]
    """Lines of metrics.jsonl."""
    assignment: tuple[Json, ...]
    """Lines of assignment.jsonl; empty for methods without assignment, and in a client's folder."""
    amounts: dict[str, dict[str, int]]
    """Number of examples by client and split, if known."""
    sources: dict[str, str]
    """Name of the data source by client, if known, with its label noise."""
    labels: dict[str, dict[str, int]]
    """Number of training examples by client and label, for clients of a deployment that share it."""
    routing: dict[str, dict[str, dict[str, float]]]
    """Share of the tokens by client, module and expert, if `fedamole explain` has computed it."""
    audits: Json
    """Results by client of `fedamole audit`, if it was done."""
    costs: Json
    """Traffic, seconds and memory; of an unfinished run, so far."""
    finished: bool

    @property
    def config(self) -> Json:
        """Content of config.toml."""
        return self.run.config

    @property
    def variants(self) -> list[str]:
        """The variants (scored models) of the run, that of its own method first."""
        own = self.run.summary["method"]
        scored = dict.fromkeys(line["method"] for line in self.lines if line["split"] == "validation")
        return sorted((name for name in {own: None, **scored} if name != BASE), key=lambda name: name != own)

    @property
    def label(self) -> str:
        """Name of the run's own model in tables."""
        return self.run.label(self.run.summary["method"])

    @property
    def rounds(self) -> int:
        """Configured number of rounds."""
        return int(self.config["federation"]["rounds"])

    @property
    def done(self) -> int:
        """Number of rounds that have been scored on validation so far."""
        return 1 + max((line["round"] for line in self.lines if line["split"] == "validation"), default=-1)

    @property
    def clients(self) -> set[str]:
        """All clients that occur in the folder."""
        logged = (line["client"] for line in (*self.lines, *self.assignment) if "client" in line)
        return {*logged, *self.amounts, *(self.config["deployment"]["clients"] if self.kind == "server" else ())}


def read_folders(paths: Sequence[Path]) -> list[RunData]:
    """Read the runs of a report.

    Args:
        paths: Run folders, or folders with run folders in them.

    Raises:
        RunError: A folder is damaged, or the runs have different data, splits or bases.
    """
    runs = [read_folder(path) for path in dict.fromkeys(folder for path in paths for folder in run_folders(path))]
    for data in runs:
        if data.run.partition != runs[0].run.partition:
            raise RunError(
                f"{data.run.path} and {runs[0].run.path} had different data, splits or base, but a report is on one "
                "federation: write a report for each"
            )
    return runs


def read_folder(path: Path) -> RunData:
    """Read one run's folder, finished or not; RunError if it is damaged."""
    folder = RunFolder.open(path)
    unfinished_summary = {"method": folder.about["method"]}
    run = finished_run(folder) if folder.finished else run_with_summary(folder, unfinished_summary)
    reported: Json = folder.read_json(CLIENTS) if (path / CLIENTS).exists() else {}
    noise = label_noise(run.config)
    # The manifest of a deployment's server has only the clients' names.
    drawn = [client for client in folder.read_json(MANIFEST)["clients"] if isinstance(client, dict)]
    amounts = {
        client["client"]: {split: len(client[split]["rows"]) for split in SPLITS if split in client} for client in drawn
    }
    return RunData(
        run=run,
        kind=folder.kind,
        lines=_lines(folder, METRICS, run.config),
        assignment=_lines(folder, ASSIGNMENT, run.config),
        amounts=amounts | {name: dict(about["examples"]) for name, about in reported.items() if "examples" in about},
        sources={client["client"]: _source_name(client["source"], noise) for client in drawn},
        labels={name: dict(about["labels"]) for name, about in reported.items() if about.get("labels")},
        routing=folder.read_json(ROUTING)["clients"] if (path / ROUTING).exists() else {},
        audits=folder.read_json(AUDIT)["clients"] if (path / AUDIT).exists() else {},
        costs=run.summary if folder.finished else costs(folder),
        finished=folder.finished,
    )


def _source_name(name: str, noise: Mapping[str, float]) -> str:
    return f"{name} ({noise[name]:.0%} wrong answers)" if name in noise else name


def _lines(folder: RunFolder, name: str, config: Json) -> tuple[Json, ...]:
    """Read the lines of a file; RunError for a round or an expert that a run with this config cannot have."""
    rounds, experts = config["federation"]["rounds"], config["method"].get("experts") or MOST_EXPERTS
    lines = tuple(folder.lines(name))
    for number, line in enumerate(lines, 1):
        unknown = [expert for expert in line.get("experts", ()) if expert >= experts]
        # A client that joined a finished run logs one round more.
        wrong = f"round {line['round']}" if line["round"] > rounds else f"expert {unknown[0]}" if unknown else ""
        if wrong:
            raise RunError(
                f"{folder.path / name}, line {number}: {wrong} does not exist in a run of {rounds} rounds"
                f"{f' and {experts} experts' if unknown else ''}; restore the file from a copy"
            )
    return lines
