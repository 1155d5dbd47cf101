"""Atomic file writes, exclusive creation of files and folders, and file locks.

`new_file` and `new_folder` claim a name by creating it, which succeeds for one process only. Checking first whether the
name is free would let two processes take the same name.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fedamole.errors import RunError

NAME_TAKEN = "{} already exists and is not overwritten: remove it or choose another name"


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a run after a crash, sees the complete old or new content.

    Concurrent writers of the same file take turns. If writing fails (OSError, which names `path`), the old content
    stays and no temporary file is left behind. Text is written as UTF-8.
    """
    temporary = path.with_name(f".{path.name}.writing")
    _make_parents(path)
    for target in (path, temporary):
        if target.is_dir():
            raise RunError(f"{target} is a folder, but a file must be written there: move it away")
    with naming(path), _exclusive_writer(temporary) as file:
        try:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _make_parents(path: Path) -> None:
    """Create the parent folders of a path."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise RunError(f"{path} cannot be written: {path.parent} is not a folder; move it away") from error


@contextmanager
def _exclusive_writer(temporary: Path) -> Iterator[IO[bytes]]:
    """Open an empty temporary file for writing; other writers of it wait until it is closed."""
    while True:
        if temporary.is_symlink():  # writing would follow the link
            temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666), "wb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            # The previous lock holder may have renamed this file to its final name: then start over.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.lstat(temporary)):
                    file.truncate(0)
                    yield file
                    return


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Set the path of any OSError raised in the block; errors of an open file carry none."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def follow_umask(folder: Path) -> None:
    """Give the files of a new folder, and the folder, the modes that the umask asks for.

    Libraries write some files through temporary ones, which only their owner may read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextmanager
def new_file(path: Path) -> Iterator[None]:
    """Create an empty file, which the block replaces with `write_atomic`; RunError if it exists.

    Creating the file first reveals an unwritable path before the work starts. If the block fails, the file is removed.
    """
    _make_parents(path)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError as error:
        raise RunError(NAME_TAKEN.format(path)) from error
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(requested: Path, numbered: bool = False) -> Iterator[Path]:
    """Create a folder and yield its path; RunError if it exists.

    `numbered` creates the first free one of <path>, <path>-2, <path>-3, ... If the block fails before it writes
    anything, the folder and the parents created for it are removed.
    """
    created_parents = [folder for folder in requested.parents if not folder.exists()]
    _make_parents(requested)
    path, number = requested, 1
    while True:
        try:
            path.mkdir()
            break
        except FileExistsError as error:
            if not numbered:
                raise RunError(NAME_TAKEN.format(path)) from error
        number += 1
        path = requested.with_name(f"{requested.name}-{number}")
    try:
        yield path
    except BaseException:
        with contextlib.suppress(OSError):  # not empty: keep it
            for folder in (path, *created_parents):
                folder.rmdir()
        raise


@contextmanager
def exclusive(path: Path, refusal: str) -> Iterator[None]:
    """Lock a file for this process, creating it if needed; RunError(refusal) if another process holds the lock."""
    with path.open("a", encoding="utf-8") as file:
        try:
            with naming(path):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # PermissionError: some network file systems
            raise RunError(refusal) from error
        yield
