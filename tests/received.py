"""A received run folder next to files that must not change, and checked calls of the command line."""

import hashlib
import shutil
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import CommandResult, call_command

STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")


def call(*arguments: object) -> CommandResult:
    """Call `fedamole` in this process; asserts that it succeeds or prints one error, without control characters."""
    result = call_command(*arguments)
    assert result.code in (0, 1, 2, 3, 4, 5)
    # A library's progress bar goes back to the beginning of its line.
    text = result.out + "".join(line for line in result.err.split("\n") if "it/s]" not in line)
    steering = {sign for sign in text if unicodedata.category(sign) in STEERING} - {"\n", "\t"}
    assert not steering, steering
    assert result.error or result.code == 0
    return result


@dataclass(frozen=True)
class ReceivedRun:
    """A folder with the received run, and next to it another client's."""

    path: Path

    @property
    def run(self) -> Path:
        """The received run."""
        return self.path / "run"

    @property
    def outside(self) -> Path:
        """Files that must not change; they resemble a client's folder."""
        return self.path / "outside"

    def seen(self) -> dict[str, str]:
        """All files next to the run: type, content and mode."""
        results = {}
        for path in sorted(self.path.rglob("*")):
            if self.run in (path, *path.parents) or self.path / "out" in (path, *path.parents):
                continue
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            results[str(path.relative_to(self.path))] = f"{content} {path.lstat().st_mode:o}"
        return results


def received_run(path: Path, run: Path) -> ReceivedRun:
    """Create a copy of a run, and files outside of it."""
    created = ReceivedRun(path)
    shutil.copytree(run, created.run, ignore=shutil.ignore_patterns(".lock"))
    for folder in ("adapter", "state"):
        (created.outside / folder).mkdir(parents=True)
    (created.outside / "adapter" / "precious.safetensors").write_text("precious")
    (created.outside / "adapter" / "adapter_config.json").write_text("{}")
    (created.outside / "state" / "round-0009.safetensors").write_text("precious too")
    (created.outside / "secret.json").write_text('{"password": "hunter2"}')
    return created
