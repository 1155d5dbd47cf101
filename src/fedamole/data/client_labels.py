"""Labels for tables and plots: clients of a partition by value are shown by their value."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fedamole.received.names import cut
from fedamole.terminal import printable

LONGEST_LABEL = 60
"""Maximum length of a label, so that tables stay readable."""
_HASHED = re.compile(r".*--[0-9a-f]{12}")
"""Client names that end in a hash of the value instead of the value itself, see `joined_name`."""


def client_labels(clients: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return labels by client name, for the clients of a manifest (as JSON) whose name does not contain their value.

    A label is SOURCE-VALUE as one printable line. A client has no label if it would equal another client's label or
    name.
    """
    records = list(clients)
    labels = {
        client["client"]: cut(" ".join(printable(f"{client['source']}-{client['value']}").split()), LONGEST_LABEL)
        for client in records
        if client.get("value") is not None and _HASHED.fullmatch(client["client"])
    }
    taken = [client["client"] for client in records] + list(labels.values())
    return {name: label for name, label in labels.items() if taken.count(label) == 1}
