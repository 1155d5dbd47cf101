"""The folder of a run. Its files are written atomically and never overwritten.

run.json            format, version, run id, kind, method, identity of the base, its path if it has moved; date,
                    versions, hardware, and command and duration of each session
config.toml         the resolved config; `fedamole resume` starts from it
manifest.json       the partition, with hashes
metrics.jsonl       one line per client, split and round (docs/run-folder.md explains the fields)
assignment.jsonl    experts of each client by round and module, with their relevance
summary.json        the main results; written last, so a run with this file is finished
checkpoints/        server state and progress of the last two rounds
clients/<name>/     state/ (private state between rounds) and adapter/ (its model at the best validation round)
"""

import itertools
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fedamole import __version__
from fedamole.errors import RunError
from fedamole.files import exclusive, naming, new_file, write_atomic
from fedamole.received.files import MOST_LINE, as_text, check_tree, inside, parse_json, read_json, read_toml
from fedamole.received.forms import check_form
from fedamole.received.names import checked_name, quoted
from fedamole.runs.adapter_folder import FILES
from fedamole.runs.identity import Identity
from fedamole.runs.provenance import command, environment, now
from fedamole.runs.run_files import (
    ASSIGNMENT,
    AUDIT,
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
    "AUDIT",
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
"""Subfolder with files of a deployment's server; it may exist before the run is created."""

Json = dict[str, Any]
Kind = Literal["simulation", "server", "client"]
"""simulation: all clients in one process. server: the coordinator of a deployment. client: one of its clients."""


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        """Refer to a folder without checking it; use `create` or `open` instead."""
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
        second: Identity | None = None,
    ) -> "RunFolder":
        """Create the folder of a new run. If several processes create the same folder, only one succeeds.

        Args:
            path: The folder, which must not exist or must be empty (apart from `server/`).
            config: Content of config.toml.
            manifest: Content of manifest.json.
            method: Name of the method.
            identity: Identity of the base.
            kind: Whether it is a simulation, or the server's or a client's part of a deployment.
            run: Id of the run; default: a new one.
            second: Identity of the server's second base, if it has one.

        Raises:
            RunError: The folder is in use.
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
            **({} if second is None else {"server_base": asdict(second)}),
            "started": now(),
            **environment(),
        }
        with new_file(path / CONFIG):
            write_atomic(path / CONFIG, config)
        write_atomic(path / MANIFEST, manifest)
        write_atomic(path / RUN, json.dumps(about, indent=2) + "\n")
        return folder

    def refuse_existing(self) -> None:
        """Raise RunError if the folder is in use: a run is never overwritten."""
        if self.path.exists() and (
            not self.path.is_dir() or any(child.name != SERVER for child in self.path.iterdir())
        ):
            raise RunError(
                f"{self.path} exists already, and no run is overwritten: `fedamole resume {self.path}` continues it, "
                "run.folder=OTHER starts another, or move it away"
            )

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open the folder of an existing run.

        Raises:
            RunError: It is not a run folder, has an unknown format, or contains a link that leads out of it.
        """
        folder = cls(path)
        for name in (RUN, CONFIG, MANIFEST):
            if not (path / name).exists():
                raise RunError(f"{path} is not a run folder: {name} is missing")
        check_tree(path)
        if (version := folder.about["format"]) != FORMAT:
            raise RunError(f"{path} has format {version}; this version of fedamole reads format {FORMAT}")
        return folder

    @cached_property
    def about(self) -> Json:
        """Content of run.json, read once."""
        return self.read_json(RUN)

    @property
    def second_base(self) -> Identity | None:
        """Identity of the server's second base; None if the run has none."""
        stored = self.about.get("server_base")
        return None if stored is None else Identity(**stored)

    def place(self, *parts: str) -> Path:
        """Return a path below the folder; RunError if it resolves, through links, to a path outside."""
        return inside(self.path, self.path.joinpath(*parts))

    def read_json(self, name: str) -> Json:
        """Read one of the folder's JSON files.

        Raises:
            RunError: The file is damaged, too large or has an invalid format.
        """
        path = self.place(name)
        content: Json = read_json(path)
        if (form := FORMS.get(path.name)) is not None:
            check_form(content, form, path, RunError)
        elif not isinstance(content, dict):
            raise RunError(f"{path} is damaged: it holds no JSON object; restore it from a copy")
        return content

    def tables(self) -> Json:
        """Read config.toml as plain tables, without loading the method; RunError if it is damaged or another run's."""
        path = self.place(CONFIG)
        tables = read_toml(path)
        check_form(tables, config_form, path, RunError)
        self.check_method(tables["method"]["name"])
        return tables

    def check_method(self, name: str) -> None:
        """Raise RunError if `name`, the method of config.toml, is not the one of run.json."""
        if name != self.about["method"]:
            raise RunError(
                f"{self.path}: {RUN} names the method {self.about['method']}, {CONFIG} {quoted(name)}: one of them "
                "belongs to another run; restore it from a copy"
            )

    @property
    def kind(self) -> Kind:
        """Whether the folder is of a simulation, or of the server or a client of a deployment."""
        kind: Kind = self.about.get("kind", "simulation")
        return kind

    def move_base(self, model: str) -> None:
        """Record in run.json where the run's base is now, a folder or a hub id; config.toml stays as it was written."""
        if model != self.about.get("base_model", self.tables()["base"]["model"]):
            self._record({"base_model": model})

    @contextmanager
    def session(self) -> Iterator[None]:
        """Record command, begin and duration of the block in run.json, however it ends; `kill -9` leaves no record."""
        started, clock = now(), time.perf_counter()
        try:
            yield
        finally:
            session = {"started": started, "seconds": round(time.perf_counter() - clock, 1), "command": command()}
            self._record({"sessions": [*self.about.get("sessions", []), session]})

    def _record(self, fields: Json) -> None:
        self.about = {**self.about, **fields}
        write_atomic(self.path / RUN, json.dumps(self.about, indent=2) + "\n")

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return (self.path / SUMMARY).exists()

    def client(self, name: str) -> Path:
        """Return the folder of a client; RunError for a name that is not a safe folder name."""
        return self.place("clients", checked_name(name, f"client of {self.path}"))

    def adapter(self, name: str, method: str) -> Path:
        """Return the adapter folder of a client. Another variant of the run, such as fedit_ft, has its own folder."""
        own = method == self.about["method"]
        folder = "adapter" if own else f"adapter-{checked_name(method, f'variant of {self.path}')}"
        return inside(self.path, self.client(name) / folder)

    def remove_adapter(self, path: Path) -> None:
        """Remove an adapter folder of this run if it exists.

        Raises:
            RunError: The path is not an adapter folder, or contains other files than those that fedamole writes.
        """
        if not os.path.lexists(path):
            return
        inside(self.path, path)
        known = {*FILES, *(f".{name}.writing" for name in FILES)}
        if path.is_symlink() or not path.is_dir():
            raise RunError(f"{path} is not a folder, but an adapter must be written there: move it away")
        children = list(path.iterdir())
        for child in children:
            if child.name not in known or (child.is_dir() and not child.is_symlink()):
                raise RunError(
                    f"{path} cannot be replaced by a better adapter: it contains {child.name!a}, which is not part of "
                    "an adapter: move it away"
                )
        for child in children:
            child.unlink()
        path.rmdir()

    def empty_new(self, *names: str) -> None:
        """Remove the files of `create`, the lock, and these files or folders from the folder of a run without rounds.

        Raises:
            RunError: The folder has values of a round.
        """
        if any((self.path / name).exists() for name in (METRICS, "checkpoints", SUMMARY)):
            raise RunError(f"{self.path} has values of a round, so it is not emptied: move it away")
        for name in (RUN, CONFIG, MANIFEST, ".lock", *names):
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def append(self, name: str, records: Iterable[Json]) -> None:
        """Append lines to metrics.jsonl or assignment.jsonl."""
        path = self.place(name)
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())

    def lines(self, name: str) -> Iterator[Json]:
        """Read the lines of metrics.jsonl or assignment.jsonl; an incomplete last line (after a crash) is left out.

        Raises:
            RunError: Another line cannot be parsed, is too long or has an invalid format.
        """
        path = self.place(name)
        if not path.exists():
            return
        if not path.is_file():
            raise RunError(f"{path} is not a file: restore it from a copy")
        with path.open("rb") as file:
            for number in itertools.count(1):
                line = file.readline(MOST_LINE + 1)
                where = f"{path}, line {number}"
                if len(line) > MOST_LINE:
                    raise RunError(f"{where} is longer than {MOST_LINE} bytes: restore the file from a copy")
                if not line.endswith(b"\n"):  # the end, or an incomplete last line
                    return
                record = parse_json(as_text(line, where), where)
                check_form(record, FORMS[name], where, RunError)
                yield record

    def cut(self, name: str, keep: Callable[[Json], bool]) -> None:
        """Rewrite a .jsonl file with only the records for which `keep` is true."""
        lines = [json.dumps(record) + "\n" for record in self.lines(name) if keep(record)]
        write_atomic(self.path / name, "".join(lines))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process; RunError if another process holds the lock."""
        lock = self.place(".lock")
        if lock.is_dir():
            raise RunError(f"{lock} is a folder, but must be a lock file: remove it")
        with exclusive(lock, f"{self.path}: another process is running this run; wait for it or stop it"):
            yield
