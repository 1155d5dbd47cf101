"""Where a run comes from: date, command, versions and hardware, without names of users and absolute paths."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fedamole

PACKAGES = ("torch", "transformers", "peft", "datasets", "numpy")
"""Packages whose versions can change the result of a run."""
PROGRAM = "fedamole"
"""Name of the program, and of the package whose `__main__.py` is the program too."""
LONGEST_COMMAND = 1000
"""Maximum number of characters of a command; the rest is cut off."""
GIT_SECONDS = 5
_LEADING_FOLDERS = re.compile(
    r"""(^|[=:,\s"'\[{(])            # the beginning of a word, or of a value in it
    (?:~[^/\\\s]*|\.\.|[A-Za-z]:)?   # of a user's home, the folder above, or a drive
    [/\\](?:[^"',\]}]*[/\\])?        # the folders
    """,
    re.VERBOSE,
)
_CREDENTIALS = re.compile(r"//[^/@\s]+@")


def now() -> str:
    """Return the time in UTC, such as 2026-03-01T12:00:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def environment() -> dict[str, Any]:
    """Return the versions, the commit and the hardware of this process, as run.json stores them.

    GPUs are listed if PyTorch is imported.
    """
    return {**_versions(), "hardware": _hardware()}


def command(words: Sequence[str] | None = None) -> str:
    """Return the command of this process as it was typed, without absolute paths.

    Of an absolute path, and one that begins with `~` or `..`, only the last part is kept, after `.../`; the same for
    paths in the value of an override. Names and passwords in URLs are removed. Started otherwise, for example from a
    notebook, the command is `python`: the arguments of another program may contain secrets.

    Args:
        words: Name of the program and its arguments; default: those of this process.
    """
    program, *arguments = sys.argv if words is None else words
    if PROGRAM not in (Path(program).stem, Path(program).parent.name):
        return "python"
    shown = [without_folders(_CREDENTIALS.sub("//...@", argument)) for argument in arguments]
    return " ".join(["fedamole", *shown])[:LONGEST_COMMAND].encode("utf-8", "replace").decode()


def without_folders(word: str) -> str:
    """Return a word of a command in which `.../` stands for the folders of each path that leaves the working folder."""
    return _LEADING_FOLDERS.sub(r"\1.../", word)


@cache
def _versions() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"versions": versions, **_commit(Path(fedamole.__file__).parent)}


def _commit(folder: Path) -> dict[str, Any]:
    """Return the commit of the package in `folder` and whether its files differ; empty if git does not track them."""

    def git(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=GIT_SECONDS, check=False
        )

    try:
        # A package in the environment of another project is inside that project's checkout, but not tracked by it.
        if git("ls-files", "--error-unmatch", "__init__.py").returncode != 0:
            return {}
        commit = git("rev-parse", "HEAD").stdout.strip()
        modified = git("diff", "--quiet", "HEAD", "--", ".").returncode != 0
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "modified": modified} if re.fullmatch("[0-9a-f]{40,64}", commit) else {}


def _hardware() -> dict[str, Any]:
    import psutil

    torch = sys.modules.get("torch")
    count = torch.cuda.device_count() if torch is not None and torch.cuda.is_available() else 0
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [] if torch is None else [torch.cuda.get_device_name(index) for index in range(count)],
    }
