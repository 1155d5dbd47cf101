"""Exact changes of the base: the server's log, the messages, and their sum at a client.

A change of a module's frozen linear is a product of stacked factors, B (d_out, R) A (R, d_in). The server keeps every
change until all clients have merged it. A client is sent the changes that it has not merged yet and adds them to a
matrix of its own. The base itself is not changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from fedamole.federation.method import ClientInfo
from fedamole.merging.low_rank import product_svd
from fedamole.model.params import Shapes, delta_key

Change = Mapping[str, Mapping[str, Tensor]]
"""The factors "A" (R, d_in) and "B" (d_out, R) of a change, by module."""


@dataclass(frozen=True)
class Changes:
    """Changes of the base, one per round with replies; the last has the number `count` - 1."""

    factors: Mapping[str, Mapping[str, Mapping[str, Tensor]]]
    """A `Change` by its number."""
    count: int = 0

    def since(self, number: int) -> "Changes":
        """Return the changes from this number on."""
        return Changes({key: change for key, change in self.factors.items() if int(key) >= number}, self.count)


@dataclass(frozen=True)
class Log:
    """The changes that not all clients have merged yet, and how many each client has merged."""

    changes: Changes
    merged: dict[str, int] = field(default_factory=dict)

    def pending(self, client: str) -> Changes:
        """Return the changes that a client has not merged yet."""
        return self.changes.since(self.merged.get(client, 0))

    def add(self, change: Change, merged: Mapping[str, int], clients: tuple[ClientInfo, ...]) -> "Log":
        """Append a change, update the counts `merged` of some clients, and drop the changes that all have merged."""
        counts = {**self.merged, **merged}
        pending = self.changes.since(min(counts.get(client.name, 0) for client in clients))
        number = self.changes.count
        return Log(Changes({**pending.factors, str(number): change}, number + 1), counts)


@dataclass(frozen=True)
class Merged:
    """The sum of the first `count` changes at a client: <module>/delta, (d_out, d_in), by name."""

    deltas: Mapping[str, Tensor]
    count: int = 0

    @staticmethod
    def nothing(shapes: Shapes) -> "Merged":
        """Return the zeros before the first change."""
        return Merged({delta_key(name): torch.zeros(d_out, d_in) for name, (d_in, d_out) in shapes.items()})

    def merge(self, changes: Changes) -> "Merged":
        """Add the changes that are not merged yet."""
        deltas = dict(self.deltas)
        new = changes.since(self.count).factors
        for number in sorted(new, key=int):
            for module, factors in new[number].items():
                deltas[delta_key(module)] = deltas[delta_key(module)] + factors["B"] @ factors["A"]
        return Merged(deltas, max(self.count, changes.count))


def stacked(
    replies: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float], keys: tuple[str, str]
) -> tuple[Tensor, Tensor]:
    """Stack clients' A and B so that their product is the weighted mean of the clients' products.

    `keys` names A and B. Shapes (R, d_in), (d_out, R), R the sum of the ranks; the order is that of the clients' names.
    """
    names = sorted(replies)
    total = sum(weights[name] for name in names)
    a = torch.cat([replies[name][keys[0]] for name in names])
    b = torch.cat([replies[name][keys[1]] * (weights[name] / total) for name in names], dim=1)
    return a, b


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best factors of a rank for the product B A (d_out, d_in) of stacks: A = V^T, B = U S, float32.

    Computed in float64 without forming the product. If the product has fewer dimensions than `rank`, the other columns
    of B are 0 and the other rows of A orthonormal to the first.
    """
    u, s, vt = product_svd(a, b)
    right, missing = vt.T, max(0, rank - len(s))
    if missing:
        right = torch.cat([right, torch.linalg.qr(right, mode="complete").Q[:, right.shape[1] :]], dim=1)
    new_a = F.pad(right.T[:rank], (0, 0, 0, max(0, rank - right.shape[1])))
    new_b = F.pad((u * s)[:, :rank], (0, missing))
    return new_a.float(), new_b.float()
