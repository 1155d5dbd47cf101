"""Files of folders from elsewhere: they stay inside their folder, are of a bounded size, and hold what they should."""

import json
import os
import stat
import tomllib
from pathlib import Path
from typing import Any

from fedamole.errors import ConfigError, FedamoleError, RunError
from fedamole.received.names import quoted

MIB = 2**20
MOST_JSON = 64 * MIB
"""Bytes of a JSON file that is read as a whole."""
MOST_LINE = 4 * MIB
"""Bytes of one line of a file of JSON lines."""
MOST_CONFIG = MIB
"""Bytes of a config."""
MOST_FILES = 1_000_000
"""Entries of a run folder."""


def inside(root: Path, path: Path) -> Path:
    """Return a path below `root`; a RunError where it, with its links followed, lies elsewhere.

    Neither needs to exist. Only the links of `path` below `root` are judged: the root itself may be one.
    """
    top, real = os.path.realpath(root), os.path.realpath(path)
    if os.path.commonpath([top, real]) != top or real == top:
        raise RunError(f"{path} leads out of {root}, to {real}: remove that link; nothing of it was touched")
    return path


def check_tree(root: Path) -> None:
    """Raise RunError where a folder holds what leads out of it, or what is neither a file nor a folder.

    A link out of a received folder would be read, written or deleted through; opening a pipe would wait for ever.
    """
    left, seen = [str(root)], 0
    while left:
        folder = left.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise RunError(f"{folder} cannot be read: {error.strerror}; correct its permissions") from error
        seen += len(entries)
        if seen > MOST_FILES:
            raise RunError(f"{root} holds more than {MOST_FILES} files: a run's folder does not; name another folder")
        for entry in entries:
            if entry.is_symlink():
                inside(root, Path(entry.path))
            elif entry.is_dir(follow_symlinks=False):
                left.append(entry.path)
            elif not entry.is_file(follow_symlinks=False):
                raise RunError(f"{entry.path} is neither a file nor a folder: remove it")


def read_bytes(path: Path, most: int, error: type[FedamoleError] = RunError) -> bytes:
    """Content of a file of at most so many bytes; a folder, a pipe or a larger file is an error that names it."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise error(f"{path} is no file: put the file back from a copy")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{path} cannot be read: {reason}; {_remedy(error, 'check the path')}") from problem
    if len(content) > most:
        raise error(f"{path} has more than {most // MIB} MiB, which is the most that is read of such a file")
    return content


def read_text(path: Path, most: int, error: type[FedamoleError] = RunError) -> str:
    """Content of a UTF-8 file of at most so many bytes."""
    return as_text(read_bytes(path, most, error), path, error)


def as_text(content: bytes, where: object, error: type[FedamoleError] = RunError) -> str:
    """Decode UTF-8; other bytes are an error that names their file."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(
            f"{where} is not UTF-8 text ({problem.reason} at byte {problem.start}): put it back from a copy"
        ) from problem


def parse_json(content: str, where: object, error: type[FedamoleError] = RunError) -> Any:
    """Turn JSON into values; what is no JSON, nested too deeply or has a key twice is an error that names its file."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {quoted(key)} stands there twice")
            found[key] = value
        return found

    try:
        found = json.loads(content, object_pairs_hook=once)
        if "\\ud" in content.lower():  # half of a character, which no file or terminal can be given
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError as problem:
        raise error(f"{where} is nested too deeply for JSON of fedamole: put it back from a copy") from problem
    except ValueError as problem:
        reason = "half a character" if isinstance(problem, UnicodeEncodeError) else problem
        raise error(f"{where} is not the JSON that it should be: {reason}; put it back from a copy") from problem
    return found


def read_json(path: Path, most: int = MOST_JSON, error: type[FedamoleError] = RunError) -> Any:
    """Values of a JSON file of at most so many bytes."""
    return parse_json(read_text(path, most, error), path, error)


def read_toml(path: Path, error: type[FedamoleError] = RunError) -> dict[str, Any]:
    """Tables of a TOML file of at most MOST_CONFIG bytes; a byte order mark at its start is skipped."""
    try:
        return tomllib.loads(read_text(path, MOST_CONFIG, error).removeprefix("\ufeff"))
    except RecursionError as problem:
        raise error(f"{path} is nested too deeply for a config: {_remedy(error, 'correct it')}") from problem
    except ValueError as problem:
        raise error(f"{path} is not TOML: {problem}; {_remedy(error, 'correct it')}") from problem


def _remedy(error: type[FedamoleError], own: str) -> str:
    """What to do about a file that the user wrote (`own`), or that a run wrote."""
    return own if error is ConfigError else "put it back from a copy"
