"""The methods, as a table, and registration of a method from outside this package."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fedamole.methods import METHODS, describe, register

if TYPE_CHECKING:
    import pandas

M = TypeVar("M", bound=type[Any])


def list_methods() -> "pandas.DataFrame":
    """Return all methods as a table: paper, what travels, what stays at a client, when models are scored."""
    import pandas

    rows = [describe(name) for name in METHODS]
    columns = ["name", "paper", "communicates", "stays_local", "scored"]
    return pandas.DataFrame(rows, columns=columns).set_index("name")


def register_method(name: str) -> Callable[[M], M]:
    """Decorate a method class, so that `method.name = NAME` selects it in this process.

    A method that is scored after the aggregation is also registered as `NAME_ft`, scored before it. A package makes
    its methods known to every process, the command line included, by the entry point group `fedamole.methods`.

    Raises:
        ConfigError: The name is taken or no identifier, or the class is not a frozen dataclass derived from `Method`.
    """

    def decorate(method: M) -> M:
        register(name, method)
        return method

    return decorate
