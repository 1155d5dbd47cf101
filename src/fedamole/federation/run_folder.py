"""A run's folder: what lies where, written atomically and never overwritten.

    run.json            format, version, run id, whose it is, method, identity of the base
    config.toml         the resolved config; `fedamole resume` starts from it
    manifest.json       the partition, with hashes
    metrics.jsonl       one line per client and split and round        (docs/run-folder.md has the fields)
    assignment.jsonl    who held which expert, in which module, with what relevance
    summary.json        the headline numbers; written last, its presence means the run is finished
    checkpoints/        server state and progress of the last two rounds
    clients/<name>/     state/ (private, between rounds) and adapter/ (its model of the best validation round)
"""

import fcntl
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from fedamole import __version__
from fedamole.errors import RunError
from fedamole.model.base import Identity

FORMAT = 1
RUN, CONFIG, MANIFEST = "run.json", "config.toml", "manifest.json"
METRICS, ASSIGNMENT, SUMMARY = "metrics.jsonl", "assignment.jsonl", "summary.json"
CLIENTS = "clients.json"
"""What the clients of a deployment told of themselves: amounts, device, and labels where they share them."""
ROUTING = "routing.json"
"""How the tokens of each client's data are routed, where it has been worked out."""

SERVER = "server"
"""Folder inside a run's where a deployment's server keeps its own things: made before the run."""

Json = dict[str, Any]
Kind = Literal["simulation", "server", "client"]
"""All clients in one process; the coordinator's part of a deployment; one organisation's part."""


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a run after a crash, sees the old content or the new, never a torn one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        """Name a folder; `create` or `open` make it usable."""
        self.path = path

    @classmethod
    def create(
        cls, path: Path, config: str, manifest: str, method: str, identity: Identity,
        kind: Kind = "simulation", run: str | None = None,
    ) -> "RunFolder":
        """Start a new run's folder, with the id `run` or a new one; one that exists is left alone (RunError)."""
        folder = cls(path)
        folder.refuse_existing()
        about = {
            "format": FORMAT, "fedamole": __version__, "id": run or uuid.uuid4().hex, "kind": kind, "method": method,
            "base": asdict(identity),
        }
        write_atomic(path / CONFIG, config)
        write_atomic(path / MANIFEST, manifest)
        write_atomic(path / RUN, json.dumps(about, indent=2) + "\n")
        return folder

    def refuse_existing(self) -> None:
        """Raise RunError where there is something already: no run is ever overwritten."""
        if self.path.exists() and (not self.path.is_dir() or any(one.name != SERVER for one in self.path.iterdir())):
            raise RunError(
                f"{self.path} exists already, and no run is overwritten: `fedamole resume {self.path}` continues it, "
                "run.folder=OTHER starts another, or move it away"
            )

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open an existing run's folder; anything else is a RunError."""
        folder = cls(path)
        for name in (RUN, CONFIG, MANIFEST):
            if not (path / name).exists():
                raise RunError(f"{path} is not a run folder: {name} is missing")
        if (found := folder.about["format"]) != FORMAT:
            raise RunError(f"{path} has format {found}; this version of fedamole reads format {FORMAT}")
        return folder

    @property
    def about(self) -> Json:
        """Content of run.json."""
        return self.read_json(RUN)

    def read_json(self, name: str) -> Json:
        """Read one of the folder's JSON files; a damaged one is a RunError."""
        try:
            content: Json = json.loads((self.path / name).read_text())
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / name} cannot be read: {error}") from error
        return content

    @property
    def kind(self) -> Kind:
        """Whose run this is."""
        kind: Kind = self.about.get("kind", "simulation")
        return kind

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return (self.path / SUMMARY).exists()

    def client(self, name: str) -> Path:
        """Folder of one client."""
        return self.path / "clients" / name

    def adapter(self, name: str, method: str) -> Path:
        """A client's saved model; a second row of the same run (fedit_ft beside fedit) has a folder of its own."""
        own = method == self.about["method"]
        return self.client(name) / ("adapter" if own else f"adapter-{method}")

    def append(self, name: str, records: Iterable[Json]) -> None:
        """Append lines to metrics.jsonl or assignment.jsonl."""
        with (self.path / name).open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())

    def lines(self, name: str) -> Iterator[Json]:
        """Read the whole lines of metrics.jsonl or assignment.jsonl; a torn last line is left out."""
        path = self.path / name
        if not path.exists():
            return
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                return
            yield record

    def cut(self, name: str, keep: Callable[[Json], bool]) -> None:
        """Cut a lines file back to the records that `keep` approves of."""
        kept = [json.dumps(record) + "\n" for record in self.lines(name) if keep(record)]
        write_atomic(self.path / name, "".join(kept))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one process; a second one is refused (RunError)."""
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(f"{self.path}: another process is running this run; wait for it or stop it") from error
            yield
