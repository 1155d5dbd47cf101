"""Log files of limited size.

PATH is the current log, PATH.1 the previous one, and so on; the oldest is deleted when a new one is needed.
"""

import logging
import os
import shutil
from io import FileIO
from logging.handlers import RotatingFileHandler
from pathlib import Path

log = logging.getLogger(__name__)

MAX_BYTES = 10 * 2**20
"""Size in bytes above which a log is rotated."""
MAX_OLD_LOGS = 3
"""Number of older logs that are kept."""


def rotate(path: Path, max_bytes: int = MAX_BYTES, keep: int = MAX_OLD_LOGS) -> bool:
    """Move a log's content to PATH.1 if it is larger than `max_bytes`; return whether it was moved.

    The file is copied and truncated, so a process that has it open keeps writing to it. The process must have opened it
    in append mode: otherwise it would continue at its old position, after a hole. Anything written between the copy and
    the truncation (some microseconds) is lost. If the copy fails, for example on a full disk, the log is unchanged and
    a warning is logged. ValueError for `keep` below 1.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: must be at least 1")
    try:
        with open(path, "r+b", buffering=0, opener=_no_link) as file:
            if os.fstat(file.fileno()).st_size <= max_bytes:
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


def rotating(path: Path, max_bytes: int = MAX_BYTES, keep: int = MAX_OLD_LOGS) -> RotatingFileHandler:
    """Return a handler with the same names and limits for a log that one process writes; it loses nothing."""
    return RotatingFileHandler(path, maxBytes=max_bytes, backupCount=keep, encoding="utf-8")


def _older(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _shift(path: Path, keep: int) -> None:
    """Free the name PATH.1."""
    _older(path, keep).unlink(missing_ok=True)
    for number in range(keep - 1, 0, -1):
        if _older(path, number).exists():
            _older(path, number).replace(_older(path, number + 1))


def _copy(file: FileIO, target: Path) -> None:
    """Copy to a new file that only this user can read; it is deleted if copying fails."""
    try:
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0) as out:
            shutil.copyfileobj(file, out)
    except OSError:
        target.unlink(missing_ok=True)
        raise


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)
