"""What clients of a partition by value are called where people read: by the value, not by the name of a folder."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fedamole.received.names import cut
from fedamole.terminal import printable

LONGEST_LABEL = 60
"""Characters of a label; longer ones would push the numbers out of a table."""
_HASHED = re.compile(r".*--[0-9a-f]{12}")
"""Names of clients that do not hold the value, see `joined_name`; no other word of a report looks like that."""


def client_labels(clients: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return labels by client name, for those clients of a manifest (as JSON) whose name does not hold their value.

    A label is SOURCE-VALUE in one printable line, as a client's name is where the value can be a part of it. A client
    whose label would be that of another client, or its name, has none.
    """
    listed = list(clients)
    found = {
        client["client"]: cut(" ".join(printable(f"{client['source']}-{client['value']}").split()), LONGEST_LABEL)
        for client in listed
        if client.get("value") is not None and _HASHED.fullmatch(client["client"])
    }
    taken = [client["client"] for client in listed] + list(found.values())
    return {name: label for name, label in found.items() if taken.count(label) == 1}
