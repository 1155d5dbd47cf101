"""Errors with a cause that the user can fix. Each text names the problem, its location and the remedy."""

import errno
import importlib.util
import os


class FedamoleError(Exception):
    """Base class of all errors in user input. The command line prints the text alone and exits with `exit_code`."""

    exit_code = 1


class ConfigError(FedamoleError):
    """A config file, an override or a combination of settings is invalid."""

    exit_code = 2


class DataError(FedamoleError):
    """Data cannot be read, do not match their template, or do not match their manifest."""

    exit_code = 3


class BaseModelError(FedamoleError):
    """A base model or tokenizer cannot be used, or an adapter belongs to another base."""

    exit_code = 4


class RunError(FedamoleError):
    """A run folder already exists, is incomplete or corrupt, or is not a run folder."""

    exit_code = 5


REMEDIES = {
    errno.EACCES: "choose another folder, or ask for write permission",
    errno.EPERM: "choose another folder, or ask for write permission",
    errno.EROFS: "choose a folder on another file system",
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "free some space of your quota, or choose a folder on another disk",
    errno.EFBIG: "raise the file size limit (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "stop other programs, or raise the system's limit of open files",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "part of the path is a file: choose another path",
    errno.EISDIR: "name a file, not a folder",
    errno.EEXIST: "remove it or choose another name",
    errno.ENOTEMPTY: "remove it or choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "a symbolic link points back to itself: remove it",
    errno.ENOMEM: "stop other programs, or lower run.group",
    errno.EADDRINUSE: "another program uses that port: choose another",
    errno.EIO: "the disk or its connection is faulty: see the system log",
    errno.ESTALE: "mount the network file system again",
}
"""Remedies for operating system errors, by error number."""


def describe_os_error(error: OSError) -> str:
    """Return one line for an operating system error: path, reason, and the remedy if one is known."""
    names = (error.filename, error.filename2)
    where = " -> ".join(os.fsdecode(name) if isinstance(name, str | bytes) else str(name) for name in names if name)
    reason = error.strerror or str(error) or type(error).__name__
    remedy = REMEDIES.get(error.errno or 0)
    return f"{where + ': ' if where else ''}{reason}{'; ' + remedy if remedy else ''}"


def how_to_install(extra: str) -> str:
    """Return how to install an optional extra of this package, from a clone or from a wheel."""
    return f'in the clone: pip install -e ".[{extra}]"; from a wheel: pip install "PATH-TO-WHEEL[{extra}]"'


def require_extra(extra: str, *packages: str) -> None:
    """Raise FedamoleError with the command to install `extra` if one of its packages is missing; imports nothing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise FedamoleError(f"this command needs {package}, which is not installed; {how_to_install(extra)}")
