"""A run's folder: what lies where, written atomically and never overwritten.

run.json            format, version, run id, whose it is, method, identity of the base, its place if it has moved
config.toml         the resolved config; `fedamole resume` starts from it
manifest.json       the partition, with hashes
metrics.jsonl       one line per client and split and round        (docs/run-folder.md has the fields)
assignment.jsonl    who held which expert, in which module, with what relevance
summary.json        the headline numbers; written last, its presence means the run is finished
checkpoints/        server state and progress of the last two rounds
clients/<name>/     state/ (private, between rounds) and adapter/ (its model of the best validation round)
"""

import itertools
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
from fedamole.files import exclusive, naming, new_file, write_atomic
from fedamole.received.files import MOST_LINE, as_text, check_tree, inside, parse_json, read_json, read_toml
from fedamole.received.forms import check_form
from fedamole.received.names import checked_name
from fedamole.runs.adapter_folder import FILES
from fedamole.runs.identity import Identity
from fedamole.runs.run_files import (
    ASSIGNMENT,
    CLIENTS,
    CONFIG,
    FORMS,
    MANIFEST,
    METRICS,
    ROUTING,
    RUN,
    SUMMARY,
    config_form,
)

FORMAT = 1
__all__ = [
    "ASSIGNMENT",
    "CLIENTS",
    "CONFIG",
    "FORMAT",
    "MANIFEST",
    "METRICS",
    "ROUTING",
    "RUN",
    "SERVER",
    "SUMMARY",
    "Kind",
    "RunFolder",
    "write_atomic",
]

SERVER = "server"
"""Folder inside a run's where a deployment's server keeps its own things: made before the run."""

Json = dict[str, Any]
Kind = Literal["simulation", "server", "client"]
"""All clients in one process; the coordinator's part of a deployment; one organisation's part."""


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        """Name a folder; `create` or `open` make it usable."""
        self.path = path

    @classmethod
    def create(
        cls,
        path: Path,
        config: str,
        manifest: str,
        method: str,
        identity: Identity,
        kind: Kind = "simulation",
        run: str | None = None,
    ) -> "RunFolder":
        """Start a new run's folder, with the id `run` or a new one; a folder that holds a run is left alone (RunError).

        Of several processes that create the same folder at once, one succeeds.
        """
        folder = cls(path)
        folder.refuse_existing()
        about = {
            "format": FORMAT,
            "fedamole": __version__,
            "id": run or uuid.uuid4().hex,
            "kind": kind,
            "method": method,
            "base": asdict(identity),
        }
        with new_file(path / CONFIG):
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
        """Open an existing run's folder; anything else, and one that holds a link out of it, is a RunError."""
        folder = cls(path)
        for name in (RUN, CONFIG, MANIFEST):
            if not (path / name).exists():
                raise RunError(f"{path} is not a run folder: {name} is missing")
        check_tree(path)
        if (found := folder.about["format"]) != FORMAT:
            raise RunError(f"{path} has format {found}; this version of fedamole reads format {FORMAT}")
        return folder

    @property
    def about(self) -> Json:
        """Content of run.json."""
        return self.read_json(RUN)

    def place(self, *parts: str) -> Path:
        """A path below the folder; a RunError where, with its links followed, it lies outside."""
        return inside(self.path, self.path.joinpath(*parts))

    def read_json(self, name: str) -> Json:
        """Read one of the folder's JSON files; one that is damaged, too large or of another form is a RunError."""
        path = self.place(name)
        content: Json = read_json(path)
        if (form := FORMS.get(path.name)) is not None:
            check_form(content, form, path, RunError)
        elif not isinstance(content, dict):
            raise RunError(f"{path} is damaged: it holds no JSON object; put it back from a copy")
        return content

    def tables(self) -> Json:
        """Read config.toml as plain tables, for what only tells of a run; a damaged one is a RunError."""
        path = self.place(CONFIG)
        found = read_toml(path)
        check_form(found, config_form, path, RunError)
        return found

    @property
    def kind(self) -> Kind:
        """Whose run this is."""
        kind: Kind = self.about.get("kind", "simulation")
        return kind

    def move_base(self, model: str) -> None:
        """Record in run.json where the run's base is now, a folder or a hub id; config.toml stays as it was written."""
        about = self.about
        if model != about.get("base_model", self.tables()["base"]["model"]):
            write_atomic(self.path / RUN, json.dumps({**about, "base_model": model}, indent=2) + "\n")

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return (self.path / SUMMARY).exists()

    def client(self, name: str) -> Path:
        """Folder of one client; a RunError for a name that could lead anywhere else."""
        return self.place("clients", checked_name(name, f"client of {self.path}"))

    def adapter(self, name: str, method: str) -> Path:
        """A client's saved model; a second row of the same run (fedit_ft beside fedit) has a folder of its own."""
        own = method == self.about["method"]
        row = "adapter" if own else f"adapter-{checked_name(method, f'row of {self.path}')}"
        return inside(self.path, self.client(name) / row)

    def remove_adapter(self, path: Path) -> None:
        """Remove an adapter folder of this run, if it is there; a RunError for anything that is none.

        Only files that such a folder has are removed, one by one.
        """
        if not os.path.lexists(path):
            return
        inside(self.path, path)
        known = {*FILES, *(f".{name}.writing" for name in FILES)}
        if path.is_symlink() or not path.is_dir():
            raise RunError(f"{path} is no folder, and an adapter was to be written there: move it away")
        found = list(path.iterdir())
        for one in found:
            if one.name not in known or (one.is_dir() and not one.is_symlink()):
                raise RunError(
                    f"{path} was to be replaced by a better adapter, but it holds {one.name!a}, which no adapter "
                    "folder of fedamole does: move that away"
                )
        for one in found:
            one.unlink()
        path.rmdir()

    def append(self, name: str, records: Iterable[Json]) -> None:
        """Append lines to metrics.jsonl or assignment.jsonl."""
        path = self.place(name)
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())

    def lines(self, name: str) -> Iterator[Json]:
        """Read the whole lines of metrics.jsonl or assignment.jsonl; a torn last line is left out.

        Any other line that cannot be read, is too long or of another form is a RunError.
        """
        path = self.place(name)
        if not path.exists():
            return
        if not path.is_file():
            raise RunError(f"{path} is no file: put it back from a copy")
        with path.open("rb") as file:
            for number in itertools.count(1):
                line = file.readline(MOST_LINE + 1)
                where = f"{path}, line {number}"
                if len(line) > MOST_LINE:
                    raise RunError(f"{where} is longer than {MOST_LINE} bytes: put the file back from a copy")
                if not line.endswith(b"\n"):  # the end, or what a crash left of a line
                    return
                record = parse_json(as_text(line, where), where)
                check_form(record, FORMS[name], where, RunError)
                yield record

    def cut(self, name: str, keep: Callable[[Json], bool]) -> None:
        """Cut a lines file back to the records that `keep` approves of."""
        kept = [json.dumps(record) + "\n" for record in self.lines(name) if keep(record)]
        write_atomic(self.path / name, "".join(kept))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one process; a second one is refused (RunError)."""
        lock = self.place(".lock")
        if lock.is_dir():
            raise RunError(f"{lock} is a folder, and a file of that name is to be locked: remove it")
        with exclusive(lock, f"{self.path}: another process is running this run; wait for it or stop it"):
            yield
