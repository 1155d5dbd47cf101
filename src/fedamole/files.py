"""Files that are written whole or not at all, and files that one process holds."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedamole.errors import RunError


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a run after a crash, sees the old content or the new, never a torn one."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise RunError(f"{path} cannot be written: {path.parent} is no folder; move it away") from error
    for place in (path, temporary):
        if place.is_dir():
            raise RunError(f"{place} is a folder, and a file of that name was to be written: move it away")
    if temporary.is_symlink():  # it would be written through
        temporary.unlink()
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666), "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def exclusive(path: Path, refusal: str) -> Iterator[None]:
    """Hold a file for this process, which is made if it is not there; RunError(refusal) where another one holds it."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(refusal) from error
        yield
