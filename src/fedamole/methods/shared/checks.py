"""Checks of hyper-parameters that many methods have in common."""

from typing import Any

from fedamole.errors import ConfigError
from fedamole.federation.method import Method


def check_at_least(method: Method[Any, Any, Any, Any], **smallest: int) -> None:
    """Raise ConfigError for a hyper-parameter below its smallest value; one that is None is unset and passes."""
    for key, least in smallest.items():
        value = getattr(method, key)
        if value is not None and value < least:
            raise ConfigError(f"method.{key} = {value}: must be at least {least}")
