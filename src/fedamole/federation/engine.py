"""The interface of engines: how the round loop reaches the clients, in this process or on other machines."""

from collections.abc import Collection, Mapping
from typing import Protocol

from fedamole.federation.evaluator import Scores
from fedamole.federation.method import ClientInfo
from fedamole.federation.worker import UpdateResult

Answered = Mapping[str, tuple[int, int]]
"""By client: round and exchange of its last update that counted."""


class Engine(Protocol):
    """Runs clients. A variant is one scored model of a run, such as fedit or fedit_ft."""

    deployed: bool
    """Whether clients run on other machines, so that their replies and reports are not trusted."""

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        """All clients of the run, sorted by name."""

    def wait_for_clients(self) -> Collection[str]:
        """Return the names of the available clients; block until there are enough of them."""

    def update(self, round_: int, messages: Mapping[str, bytes], exchange: int = 0) -> Mapping[str, UpdateResult]:
        """Send a packed message to each client and return the results of their training.

        `exchange` is the index of the exchange within its round. Clients that do not answer in time are missing.
        """

    def evaluate(self, round_: int, variant: str, messages: Mapping[str, bytes | None]) -> Mapping[str, Scores]:
        """Score the current models of some clients on validation."""

    def save_best(self, variant: str, round_: int, names: Collection[str]) -> None:
        """Save the current models of these clients, those of round `round_`, as their best so far."""

    def restore(self, best: Mapping[str, Mapping[str, int]], answered: Answered, examples: Mapping[str, int]) -> None:
        """Restore engine state on resume.

        `best` holds the best round by client and variant, `examples` the number of training examples by client.
        """

    def score_base(self, split: str, names: Collection[str]) -> Mapping[str, Scores]:
        """Score the untuned base on a split of these clients."""

    def majority(self) -> Mapping[str, Scores]:
        """Score the most frequent training answer on the clients' test splits."""

    def test(self, variant: str, best: bool) -> Mapping[str, Scores]:
        """Score the models of the best round, or of the last round, on the clients' test splits."""
