"""Log files that do not grow for ever.

PATH is the log now, PATH.1 what came before it, and so on; the last one is removed when another is needed.
"""

import logging
import os
import shutil
from io import FileIO
from logging.handlers import RotatingFileHandler
from pathlib import Path

log = logging.getLogger(__name__)

MOST_BYTES = 10 * 2**20
"""Size beyond which a log is rotated."""
KEEP = 3
"""Older logs that are kept."""


def rotate(path: Path, most_bytes: int = MOST_BYTES, keep: int = KEEP) -> bool:
    """Move what a log holds to PATH.1 if it is larger than `most_bytes`; return whether that was done.

    The file is copied and then cut to nothing, so that a process that has it open goes on writing into it. That process
    must have opened it to append: otherwise it would go on at its old position, behind a hole. What such a process
    writes between the end of the copy and the cut (some microseconds) is lost. Where the copy fails, as on a full disk,
    the log stays as it is and a warning says so. ValueError for `keep` below 1.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: at least one older log is kept")
    try:
        with open(path, "r+b", buffering=0, opener=_no_link) as file:
            if os.fstat(file.fileno()).st_size <= most_bytes:
                return False
            _shift(path, keep)
            _copy(file, _older(path, 1))
            file.truncate(0)
    except FileNotFoundError:
        return False
    except OSError as error:
        log.warning("%s could not be rotated: %s", path, error.strerror)
        return False
    return True


def rotating(path: Path, most_bytes: int = MOST_BYTES, keep: int = KEEP) -> RotatingFileHandler:
    """A handler for a log that one process writes by itself, with the same names and limits; nothing is lost."""
    return RotatingFileHandler(path, maxBytes=most_bytes, backupCount=keep, encoding="utf-8")


def _older(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _shift(path: Path, keep: int) -> None:
    """Make PATH.1 free."""
    _older(path, keep).unlink(missing_ok=True)
    for number in range(keep - 1, 0, -1):
        if _older(path, number).exists():
            _older(path, number).replace(_older(path, number + 1))


def _copy(file: FileIO, target: Path) -> None:
    """Copy to a new file that only this user can read; on an error there is none."""
    try:
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0) as out:
            shutil.copyfileobj(file, out)
    except OSError:
        target.unlink(missing_ok=True)
        raise


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)
