"""Checks of hyper-parameters that many methods have in common."""

import math
from typing import Any

from fedamole.errors import ConfigError
from fedamole.federation.method import Method


def check_at_least(method: Method[Any, Any, Any, Any], **smallest: int) -> None:
    """Raise ConfigError for a hyper-parameter below its smallest value; one that is None is unset and passes."""
    for key, least in smallest.items():
        value = getattr(method, key)
        if value is not None and value < least:
            raise ConfigError(f"method.{key} = {value}: must be at least {least}")


def check_positive(method: Method[Any, Any, Any, Any], *keys: str) -> None:
    """Raise ConfigError for a hyper-parameter that is not above 0 and finite."""
    for key in keys:
        if not 0 < getattr(method, key) < math.inf:
            raise ConfigError(f"method.{key} = {getattr(method, key)}: must be above 0")


def check_not_negative(method: Method[Any, Any, Any, Any], *keys: str) -> None:
    """Raise ConfigError for a hyper-parameter that is below 0 or not finite."""
    for key in keys:
        if not 0 <= getattr(method, key) < math.inf:
            raise ConfigError(f"method.{key} = {getattr(method, key)}: must be at least 0")


def check_between_0_and_1(method: Method[Any, Any, Any, Any], *keys: str) -> None:
    """Raise ConfigError for a hyper-parameter that is not above 0 and below 1."""
    for key in keys:
        if not 0 < getattr(method, key) < 1:
            raise ConfigError(f"method.{key} = {getattr(method, key)}: must be above 0 and below 1")
