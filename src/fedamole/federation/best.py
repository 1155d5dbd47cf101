"""The best round of a run: one for all clients, or each client's own."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

BestRound = Literal["mean", "client"]
"""Whose validation chooses: the mean over the clients, one round for all; or each client's own."""


@dataclass
class Row:
    """Progress of one scored model of a run, such as fedit and fedit_ft; the lowest value is the best."""

    latest: dict[str, dict[str, float]]
    """Validation of each client's present model; an absent client's stays, one that has never come has none."""
    best_round: int = -1
    """Best round of all by the mean; -1 where there is none."""
    best: float = math.inf
    """Its value."""
    own_rounds: dict[str, int] = field(default_factory=dict)
    """Best round of each client that has one of its own."""
    own_best: dict[str, float] = field(default_factory=dict)
    """Its value."""

    def welcome(self, bare: Mapping[str, dict[str, float]], values: Mapping[str, float]) -> None:
        """Count clients that come for the first time, and the values of the bare base, which was their model so far."""
        if self.best_round >= 0:
            total = self.best * len(self.latest) + sum(values.values())
            self.best = total / (len(self.latest) + len(values))
        self.latest.update(bare)

    def best_of_all(self, round_: int, value: float) -> bool:
        """Take in the mean over all clients of a round; return whether the round is the best so far."""
        if self.best_round >= 0 and not value < self.best:
            return False
        self.best_round, self.best = round_, value
        return True

    def best_of_clients(self, round_: int, values: Mapping[str, float]) -> list[str]:
        """Take in the values of the clients that were scored in a round; return whose best round so far it is."""
        names = [name for name in sorted(values) if name not in self.own_rounds or values[name] < self.own_best[name]]
        self.own_rounds |= dict.fromkeys(names, round_)
        self.own_best |= {name: values[name] for name in names}
        return names

    def best_rounds(self, clients: Iterable[str]) -> dict[str, int]:
        """Best round of each of these clients that has one."""
        if self.best_round >= 0:
            return dict.fromkeys(clients, self.best_round)
        return {name: self.own_rounds[name] for name in clients if name in self.own_rounds}


def best_round_of(row: Mapping[str, Any], client: str) -> int | None:
    """Best round of a client in a row of summary.json; None where its model is the bare base."""
    found: int | Mapping[str, int] | None = row["best_round"]
    return found.get(client) if isinstance(found, Mapping) else found


def mean_best_round(row: Mapping[str, Any]) -> float:
    """Best round of a row of summary.json, the mean where each client has its own; -1 where nobody has one."""
    found: int | Mapping[str, int] = row["best_round"]
    if isinstance(found, Mapping):
        return sum(found.values()) / len(found) if found else -1.0
    return float(found)
