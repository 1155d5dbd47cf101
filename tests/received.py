"""A run folder from elsewhere beside things that it must not touch, and the command as people call it."""

import contextlib
import hashlib
import io
import os
import shutil
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from fedamole.cli import main as cli

STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")


@dataclass(frozen=True)
class Said:
    """What a call of the command said, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error, or nothing where it went well."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == (self.code != 0), (self.code, self.err)
        return lines[0] if lines else ""


def call(*words: object) -> Said:
    """Call `fedamole` in this process; it works, or says one error and nothing that steers a terminal."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    threads = torch.get_num_threads()
    with (
        mock.patch.object(sys, "argv", ["fedamole", *map(str, words)]),
        mock.patch.dict(os.environ, COLUMNS="200"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        finally:
            torch.set_num_threads(threads)
    said = Said(code, out.getvalue(), err.getvalue())
    assert "Traceback" not in said.err, said.err
    assert code in (0, 1, 2, 3, 4, 5)
    # A library's progress bar goes back to the beginning of its line.
    told = said.out + "".join(line for line in said.err.split("\n") if "it/s]" not in line)
    steering = {sign for sign in told if unicodedata.category(sign) in STEERING} - {"\n", "\t"}
    assert not steering, steering
    assert said.error or code == 0
    return said


@dataclass(frozen=True)
class Arena:
    """A folder with the received run, and beside it somebody else's."""

    path: Path

    @property
    def run(self) -> Path:
        """The received run."""
        return self.path / "run"

    @property
    def outside(self) -> Path:
        """What must stay as it is: it looks as much like a client's folder as it can."""
        return self.path / "outside"

    def seen(self) -> dict[str, str]:
        """Everything beside the run: its kind, content and rights."""
        found = {}
        for path in sorted(self.path.rglob("*")):
            if self.run in (path, *path.parents) or self.path / "out" in (path, *path.parents):
                continue
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            found[str(path.relative_to(self.path))] = f"{content} {path.lstat().st_mode:o}"
        return found


def arena(path: Path, run: Path) -> Arena:
    """Lay out a copy of a run, and what lies outside of it."""
    made = Arena(path)
    shutil.copytree(run, made.run, ignore=shutil.ignore_patterns(".lock"))
    for folder in ("adapter", "state"):
        (made.outside / folder).mkdir(parents=True)
    (made.outside / "adapter" / "precious.safetensors").write_text("precious")
    (made.outside / "adapter" / "adapter_config.json").write_text("{}")
    (made.outside / "state" / "round-0009.safetensors").write_text("precious too")
    (made.outside / "secret.json").write_text('{"password": "hunter2"}')
    return made
