"""A second base, which only the server of a run loads and which has the tokenizer of the first."""

from dataclasses import asdict, replace
from pathlib import Path

from fedamole.errors import BaseModelError, ConfigError
from fedamole.model.base import Base, BaseSettings, load_base
from fedamole.runs.identity import Identity

KEY = "method.server_base"
"""The setting that names it, for errors."""


def load_second_base(
    model: str, settings: BaseSettings, first: Base, folder: Path, max_length: int, stored: Identity | None = None
) -> Base:
    """Load the base `model` with the other `settings` on the device of the federation's base `first`.

    Relative paths start at `folder`. Raises BaseModelError if it cannot be used, if its tokenizer is not that of
    `first`, or if it is not `stored`, the one that the run was started with; ConfigError if it has fewer than
    `max_length` positions.
    """
    try:
        base = load_base(replace(settings, model=model), first.device, folder)
    except BaseModelError as error:
        reason = str(error).removeprefix(f"base.model = {model!r}").lstrip(": ")
        raise BaseModelError(f"{KEY} = {model!r}: {reason}") from error
    if base.identity.tokenizer != first.identity.tokenizer:
        raise BaseModelError(
            f"{KEY} = {model!r}: its tokenizer is not that of base.model = {settings.model!r} (hashes "
            f"{base.identity.tokenizer} and {first.identity.tokenizer}); name a base with the same tokenizer"
        )
    if max_length > base.max_positions:
        raise ConfigError(
            f"training.max_length = {max_length}: {KEY} = {model!r} has {base.max_positions} positions; lower it"
        )
    for part, stored_hash in ({} if stored is None else asdict(stored)).items():
        if getattr(base.identity, part) != stored_hash:
            raise BaseModelError(
                f"{KEY} = {model!r} is not the base that the run was started with: its {part} hash is "
                f"{getattr(base.identity, part)}, the run had {stored_hash}; restore it, or start a new run"
            )
    return base
