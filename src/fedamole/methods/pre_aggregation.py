"""The "-FT" of a method: the very same training, each client's model looked at before the aggregation.

No extra steps are taken: the personal model is what the client has just trained, instead of what the server made of
all of them. It serves any method that is scored after the aggregation.
"""

import types
from dataclasses import dataclass
from typing import Any

from fedamole.federation.method import Method


def pre_aggregation(method: type[Method[Any, Any, Any, Any]]) -> type[Method[Any, Any, Any, Any]]:
    """Return the method class that trains like `method` and is scored right after local training."""
    doc = f"{method.__name__}, each client's model scored before the aggregation."
    variant = types.new_class(
        f"{method.__name__}FT", (method,), exec_body=lambda body: body.update(evaluates="pre_aggregation", __doc__=doc)
    )
    return dataclass(frozen=True)(variant)
