"""Files that are written whole or not at all, names that one process takes, and files that one process holds.

A name is claimed by creating it (`new_file`, `new_folder`), which succeeds for one process alone. Checking first
whether it is free would let two processes take the same name.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fedamole.errors import RunError

TAKEN = "{} exists already, and nothing is overwritten: remove it or choose another name"


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a run after a crash, sees the old content or the new, never a torn one.

    Two processes that write the same file take turns. Where writing fails (OSError, which names `path`), the old
    content stays and nothing else is left behind. Text is written as UTF-8.
    """
    temporary = path.with_name(f".{path.name}.writing")
    _make_parents(path)
    for place in (path, temporary):
        if place.is_dir():
            raise RunError(f"{place} is a folder, and a file of that name was to be written: move it away")
    with naming(path), _turn(temporary) as file:
        try:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _make_parents(path: Path) -> None:
    """Make the folder that a file or folder is written to, and those above it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise RunError(f"{path} cannot be written: {path.parent} is no folder; move it away") from error


@contextmanager
def _turn(temporary: Path) -> Iterator[IO[bytes]]:
    """Open an empty file for writing; other processes that want to write it wait until it is closed."""
    while True:
        if temporary.is_symlink():  # it would be written through
            temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666), "wb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            # Who held the lock before has moved this very file to its final name: then begin again.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.lstat(temporary)):
                    file.truncate(0)
                    yield file
                    return


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError of the block the path of the file that it is about; one of an open file names none."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def new_file(path: Path) -> Iterator[None]:
    """Create an empty file, which the block replaces by `write_atomic`; RunError where the name is taken.

    Creating it first means that a place which cannot be written is found before the work, not after it. Where the
    block fails, the file is removed again.
    """
    _make_parents(path)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError as error:
        raise RunError(TAKEN.format(path)) from error
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(wanted: Path, numbered: bool = False) -> Iterator[Path]:
    """Create a folder and yield its path; RunError where the name is taken.

    `numbered` takes the first of <wanted>, <wanted>-2, <wanted>-3, ... that nobody has. Where the block fails and has
    written nothing, the folder and the parents made for it are removed again.
    """
    made = [place for place in wanted.parents if not place.exists()]
    _make_parents(wanted)
    path, number = wanted, 1
    while True:
        try:
            path.mkdir()
            break
        except FileExistsError as error:
            if not numbered:
                raise RunError(TAKEN.format(path)) from error
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    try:
        yield path
    except BaseException:
        with contextlib.suppress(OSError):  # something is in it, and stays
            for place in (path, *made):
                place.rmdir()
        raise


@contextmanager
def exclusive(path: Path, refusal: str) -> Iterator[None]:
    """Hold a file for this process, which is made if it is not there; RunError(refusal) where another one holds it."""
    with path.open("a", encoding="utf-8") as file:
        try:
            with naming(path):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # the second on some network file systems
            raise RunError(refusal) from error
        yield
