"""The variant `<method>_ft` of a method: the same training, each client's model scored before the aggregation.

No extra steps are taken. The model of a client is the one that it has just trained, instead of the aggregate. The
variant exists for every method that is scored after the aggregation.
"""

import types
from dataclasses import dataclass
from typing import Any

from fedamole.federation.method import Method


def pre_aggregation(method: type[Method[Any, Any, Any, Any]]) -> type[Method[Any, Any, Any, Any]]:
    """Return a method class that trains like `method` and is scored before the aggregation."""
    doc = f"{method.__name__}, each client's model scored before the aggregation."
    variant = types.new_class(
        f"{method.__name__}FT",
        (method,),
        exec_body=lambda body: body.update(evaluates="pre_aggregation", releases=method.releases, __doc__=doc),
    )
    return dataclass(frozen=True)(variant)
