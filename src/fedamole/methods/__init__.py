"""One readable file per published method. METHODS is the only registry: a method is added by one line here."""

from typing import Any

from fedamole.federation.method import Method
from fedamole.methods.before_aggregation import before_aggregation
from fedamole.methods.fedamole import FedAmole
from fedamole.methods.fedit import FedIT
from fedamole.methods.local_only import LocalOnly

METHODS: dict[str, type[Method[Any, Any, Any, Any]]] = {
    "fedamole": FedAmole,
    "fedit": FedIT,
    "fedit_ft": before_aggregation(FedIT),
    "local_only": LocalOnly,
}
