"""Read files of folders that come from elsewhere: inside their folder, of limited size, and well-formed."""

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
"""Maximum size in bytes of a JSON file."""
MOST_LINE = 4 * MIB
"""Maximum size in bytes of one line of a JSON Lines file."""
MOST_CONFIG = MIB
"""Maximum size in bytes of a config."""
MOST_FILES = 1_000_000
"""Maximum number of entries of a run folder."""


def inside(root: Path, path: Path) -> Path:
    """Return a path below `root`; RunError if it resolves to a location outside of it.

    Neither path needs to exist. Only links below `root` are checked: `root` itself may be a link.
    """
    top, real = os.path.realpath(root), os.path.realpath(path)
    if os.path.commonpath([top, real]) != top or real == top:
        raise RunError(f"{path} points outside {root}, to {real}: remove that link; nothing was changed")
    return path


def check_tree(root: Path) -> None:
    """Raise RunError if a folder holds a link that points outside of it, or a special file.

    A link out of a received folder would redirect reads, writes and deletions; opening a pipe would block.
    """
    pending, count = [str(root)], 0
    while pending:
        folder = pending.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise RunError(f"{folder} cannot be read: {error.strerror}; correct its permissions") from error
        count += len(entries)
        if count > MOST_FILES:
            raise RunError(
                f"{root} holds more than {MOST_FILES} files, so it is not a run folder; choose another folder"
            )
        for entry in entries:
            if entry.is_symlink():
                inside(root, Path(entry.path))
            elif entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
            elif not entry.is_file(follow_symlinks=False):
                raise RunError(f"{entry.path} is neither a file nor a folder: remove it")


def read_bytes(path: Path, most: int, error: type[FedamoleError] = RunError) -> bytes:
    """Return the content of a regular file of at most `most` bytes; raise `error` for anything else."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path} is not a file: restore it from a copy")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{path} cannot be read: {reason}; {_remedy(error, 'check the path')}") from problem
    if len(content) > most:
        raise error(f"{path} is larger than {most // MIB} MiB, the maximum for such a file")
    return content


def read_text(path: Path, most: int, error: type[FedamoleError] = RunError) -> str:
    """Return the text of a UTF-8 file of at most `most` bytes."""
    return as_text(read_bytes(path, most, error), path, error)


def as_text(content: bytes, where: object, error: type[FedamoleError] = RunError) -> str:
    """Decode UTF-8; raise `error`, which names the file, for other bytes."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(
            f"{where} is not UTF-8 text ({problem.reason} at byte {problem.start}): restore it from a copy"
        ) from problem


def parse_json(content: str, where: object, error: type[FedamoleError] = RunError) -> Any:
    """Parse JSON; raise `error`, which names the file, for invalid JSON, excessive nesting or a repeated key."""

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"the key {quoted(key)} is repeated")
            result[key] = value
        return result

    try:
        result = json.loads(content, object_pairs_hook=unique_keys)
        if "\\ud" in content.lower():  # a lone surrogate, which cannot be encoded
            json.dumps(result, ensure_ascii=False).encode()
    except RecursionError as problem:
        raise error(f"{where} is nested too deeply for a JSON file of fedamole: restore it from a copy") from problem
    except ValueError as problem:
        reason = "a lone surrogate" if isinstance(problem, UnicodeEncodeError) else problem
        raise error(f"{where} is not valid JSON: {reason}; restore it from a copy") from problem
    return result


def read_json(path: Path, most: int = MOST_JSON, error: type[FedamoleError] = RunError) -> Any:
    """Return the value of a JSON file of at most `most` bytes."""
    return parse_json(read_text(path, most, error), path, error)


def read_toml(path: Path, error: type[FedamoleError] = RunError) -> dict[str, Any]:
    """Return the tables of a TOML file of at most MOST_CONFIG bytes; a byte order mark at its start is skipped."""
    try:
        return tomllib.loads(read_text(path, MOST_CONFIG, error).removeprefix("\ufeff"))
    except RecursionError as problem:
        raise error(f"{path} is nested too deeply for a config: {_remedy(error, 'correct it')}") from problem
    except ValueError as problem:
        raise error(f"{path} is not TOML: {problem}; {_remedy(error, 'correct it')}") from problem


def _remedy(error: type[FedamoleError], own: str) -> str:
    """Return the remedy: `own` for a config, which the user wrote; otherwise to restore the file, which a run wrote."""
    return own if error is ConfigError else "restore it from a copy"
