"""Errors a user can cause and mend: each says what is wrong, where, and what to do about it."""


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


def how_to_install(extra: str) -> str:
    """How to add an extra of this package, which no package index has: from a clone, or from a wheel."""
    return f'in the clone: pip install -e ".[{extra}]"; from a wheel: pip install "PATH-TO-WHEEL[{extra}]"'
