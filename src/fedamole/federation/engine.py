"""The interface of engines: where clients run, in this process or on other machines."""

from collections.abc import Collection, Mapping
from typing import Protocol

from fedamole.federation.method import ClientInfo
from fedamole.federation.worker import Scores, UpdateResult


class Engine(Protocol):
    """Where clients run."""

    deployed: bool
    """Whether clients are elsewhere, so that what they send and say is not trusted."""

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        """All clients that may take part, in the order of their names."""

    def wait_for_clients(self) -> Collection[str]:
        """Names of the clients that can be asked now; where too few are there, wait for them."""

    def update(self, round_: int, messages: Mapping[str, bytes]) -> Mapping[str, UpdateResult]:
        """Train a cohort, each on its own message; whoever does not answer is missing."""

    def evaluate(self, round_: int, row: str, messages: Mapping[str, bytes | None]) -> Mapping[str, Scores]:
        """Score the present models of some clients on validation."""

    def save_best(self, row: str, round_: int, names: Collection[str]) -> None:
        """Let these clients save their present model as their best so far, that of a round."""

    def restore(
        self, best: Mapping[str, Mapping[str, int]], answered: Mapping[str, int], examples: Mapping[str, int]
    ) -> None:
        """Told, when a run goes on, of each client: its best rounds by row, last answered round, number of examples."""

    def score_base(self, split: str, names: Collection[str]) -> Mapping[str, Scores]:
        """Scores of the untuned base on these clients' split."""

    def majority(self) -> Mapping[str, Scores]:
        """Scores of a constant answer on the clients' test splits."""

    def test(self, row: str, best: bool) -> Mapping[str, Scores]:
        """Scores on the clients' test splits of the best round's models, or of the last round's."""
