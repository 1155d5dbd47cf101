"""Errors a user can cause and mend: each says what is wrong, where, and what to do about it."""

import errno
import os


class FedamoleError(Exception):
    """A mistake in what the user gave; the command line prints its text alone and exits with `exit_code`."""

    exit_code = 1


class ConfigError(FedamoleError):
    """A config file, an override or a combination of settings that cannot be run."""

    exit_code = 2


class DataError(FedamoleError):
    """Data that cannot be read, do not fit their template, or do not match their manifest."""

    exit_code = 3


class BaseModelError(FedamoleError):
    """A base model or tokenizer that cannot be used, or an adapter made for another base."""

    exit_code = 4


class RunError(FedamoleError):
    """A run folder that is in the way, incomplete, corrupt or foreign."""

    exit_code = 5


REMEDIES = {
    errno.EACCES: "choose another place, or ask for the right to write there",
    errno.EPERM: "choose another place, or ask for the right to write there",
    errno.EROFS: "choose a place on another file system",
    errno.ENOSPC: "free some space, or choose a place on another disk",
    errno.EDQUOT: "free some space of your quota, or choose a place on another disk",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "end other programs, or raise the machine's limit of open files",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file: choose another path",
    errno.EISDIR: "name a file, not a folder",
    errno.EEXIST: "remove it or choose another name",
    errno.ENOTEMPTY: "remove it or choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "a link leads back to itself: remove it",
    errno.ENOMEM: "end other programs, or lower run.group",
    errno.EADDRINUSE: "another program uses that port: choose another",
    errno.EIO: "the disk or its connection is faulty: look at the system's log",
    errno.ESTALE: "mount the network file system again",
}
"""What to do about an error of the operating system, by its number."""


def describe_os_error(error: OSError) -> str:
    """Return one line for an error of the operating system: path, reason, and a remedy where one is known."""
    names = (error.filename, error.filename2)
    where = " -> ".join(os.fsdecode(name) if isinstance(name, str | bytes) else str(name) for name in names if name)
    reason = error.strerror or str(error) or type(error).__name__
    remedy = REMEDIES.get(error.errno or 0)
    return f"{where + ': ' if where else ''}{reason}{'; ' + remedy if remedy else ''}"


def how_to_install(extra: str) -> str:
    """How to add an extra of this package, which no package index has: from a clone, or from a wheel."""
    return f'in the clone: pip install -e ".[{extra}]"; from a wheel: pip install "PATH-TO-WHEEL[{extra}]"'
