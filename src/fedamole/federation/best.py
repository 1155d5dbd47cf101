"""The best round of a run by validation: one for all clients, or one for each client."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

BestRound = Literal["mean", "client"]
"""How the best round is chosen. mean: one for all clients, by the mean over them. client: one for each, by its own."""


@dataclass
class VariantProgress:
    """Validation results of one variant, a scored model of a run such as fedit or fedit_ft.

    The values that choose the best round are losses, or scores with the sign changed: lower is better.
    """

    latest: dict[str, dict[str, float]]
    """Last validation scores by client; those of an absent client stay, a client that never joined has none."""
    best_round: int = -1
    """Best round by the mean over the clients; -1 for none."""
    best: float = math.inf
    """The mean value of that round."""
    own_rounds: dict[str, int] = field(default_factory=dict)
    """Best round by client, where each has its own."""
    own_best: dict[str, float] = field(default_factory=dict)
    """The values of those rounds."""

    def add_clients(self, base_scores: Mapping[str, dict[str, float]], values: Mapping[str, float]) -> None:
        """Add clients that joined, with the scores and values of the untuned base, which was their model so far."""
        if self.best_round >= 0:
            total = self.best * len(self.latest) + sum(values.values())
            self.best = total / (len(self.latest) + len(values))
        self.latest.update(base_scores)

    def update_mean(self, round_: int, value: float) -> bool:
        """Record the mean value of a round over all clients; return whether it is the best round so far."""
        if self.best_round >= 0 and not value < self.best:
            return False
        self.best_round, self.best = round_, value
        return True

    def update_clients(self, round_: int, values: Mapping[str, float]) -> list[str]:
        """Record the values of the clients scored in a round; return those for whom it is the best round so far."""
        names = [name for name in sorted(values) if name not in self.own_rounds or values[name] < self.own_best[name]]
        self.own_rounds |= dict.fromkeys(names, round_)
        self.own_best |= {name: values[name] for name in names}
        return names

    @property
    def latest_best(self) -> int:
        """The latest round that was the best so far, for all clients or for one with its own; -1 for none."""
        return max((self.best_round, *self.own_rounds.values()))

    def best_rounds(self, clients: Iterable[str]) -> dict[str, int]:
        """Return the best round of each of these clients that has one."""
        if self.best_round >= 0:
            return dict.fromkeys(clients, self.best_round)
        return {name: self.own_rounds[name] for name in clients if name in self.own_rounds}


def best_round_of(row: Mapping[str, Any], client: str) -> int | None:
    """Return a client's best round from a row of summary.json; None if its model is the untuned base."""
    best_round: int | Mapping[str, int] | None = row["best_round"]
    return best_round.get(client) if isinstance(best_round, Mapping) else best_round


def mean_best_round(row: Mapping[str, Any]) -> float:
    """Return the best round of a row of summary.json, averaged if each client has its own; -1 if no client has one."""
    best_round: int | Mapping[str, int] = row["best_round"]
    if isinstance(best_round, Mapping):
        return sum(best_round.values()) / len(best_round) if best_round else -1.0
    return float(best_round)
