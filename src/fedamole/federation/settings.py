"""The `[training]`, `[federation]` and `[deployment]` tables of a config."""

from dataclasses import dataclass
from typing import Literal

from fedamole.errors import ConfigError
from fedamole.received.names import checked_names
from fedamole.runs.run_files import MOST_ROUNDS

MOST_SECONDS = 1e8
"""Longest time that is waited for anything: about three years, which every clock of the system can count."""

Budget = Literal["steps", "paper"]


@dataclass(frozen=True)
class TrainingSettings:
    """`[training]`: the local training that all methods share."""

    local_steps: int = 200
    """Optimiser steps S a client takes in a round; not read where local_epochs is set."""
    local_epochs: int = 0
    """Passes over its own training split a client makes in a round; 0 = count steps instead."""
    budget: Budget = "steps"
    """Steps of a method that trains several times in a round. steps: all its trainings share the steps of one round,
    so that every method takes equally many. paper: each training takes as many as the method's paper gives it."""
    batch_size: int = 1
    """Examples in a forward pass."""
    accumulation: int = 1
    """Forward passes averaged into one optimiser step."""
    learning_rate: float = 5e-5
    """Adam's learning rate in round 0 (the paper's, for a base of 1 B parameters; a tiny base wants 1e-3 to 1e-2)."""
    lr_decay: float = 0.99
    """Factor on the learning rate per round."""
    clip_norm: float = 0.0
    """Largest norm of a step's gradient; 0 = no clipping."""
    max_length: int = 512
    """Most tokens of prompt and answer together; longer prompts lose the end of their context."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        for key in ("batch_size", "accumulation", "local_steps"):
            if getattr(self, key) < 1:
                raise ConfigError(f"training.{key} = {getattr(self, key)}: must be at least 1")
        if self.max_length < 8:
            raise ConfigError(f"training.max_length = {self.max_length}: must be at least 8 tokens")
        if self.local_epochs < 0 or self.clip_norm < 0:
            raise ConfigError("training.local_epochs and training.clip_norm must not be negative")
        if self.learning_rate <= 0 or not 0 < self.lr_decay <= 1:
            raise ConfigError(
                f"training.learning_rate = {self.learning_rate} must be above 0 "
                f"and training.lr_decay = {self.lr_decay} above 0 and at most 1"
            )

    def steps(self, examples: int) -> int:
        """Optimiser steps of one round for a client with this many training examples."""
        if self.local_epochs == 0:
            return self.local_steps
        return self.local_epochs * -(-examples // (self.batch_size * self.accumulation))


@dataclass(frozen=True)
class FederationSettings:
    """`[federation]`: how many rounds, and who takes part in each."""

    rounds: int = 30
    """Rounds R."""
    cohort: float = 1.0
    """Share of the clients that train in a round, drawn anew each round; at least one does."""
    aggregation: Literal["auto", "mean", "clipped", "median", "trimmed"] = "auto"
    """What happens to the replies before they are averaged. mean: nothing. clipped: a change much larger than the other
    clients' is scaled down. median, trimmed: each number becomes the median, or the mean without the lowest and highest
    fifth, of the clients that returned it. auto: mean in one process, clipped in a deployment."""
    clip_factor: float = 4.0
    """clipped: largest change of a client, as a multiple of the median change of the other clients."""

    def __post_init__(self) -> None:
        """Refuse a federation without rounds or clients."""
        if not 1 <= self.rounds <= MOST_ROUNDS:
            raise ConfigError(f"federation.rounds = {self.rounds}: must be at least 1, and at most {MOST_ROUNDS}")
        if not 0 < self.cohort <= 1:
            raise ConfigError(f"federation.cohort = {self.cohort}: a share of the clients, above 0 and at most 1")
        if not self.clip_factor >= 1:
            raise ConfigError(f"federation.clip_factor = {self.clip_factor}: must be at least 1")


@dataclass(frozen=True)
class DeploymentSettings:
    """`[deployment]`: a run across organisations (`fedamole server`); in one process nothing here is read."""

    clients: tuple[str, ...] = ()
    """Names of the organisations that may take part; each has a registered key of this name."""
    min_clients: int = 2
    """Fewest clients a round needs; with fewer the run waits."""
    deadline: float = 3600.0
    """Seconds a client has to answer; who is later is left out of the round."""
    patience: float = 3600.0
    """Seconds the run waits for `min_clients`; then it stops, and `fedamole server --resume` goes on."""
    gathering: float = 120.0
    """Seconds the first round waits for those of `clients` beyond `min_clients`; whoever comes later joins later."""
    max_norm: float | None = None
    """Largest norm of all numbers of a reply together; a larger one is refused. Unset: 10 times the norm of what was
    sent, or of as many numbers of size 0.1 where that is larger."""
    max_weight_share: float = 0.0
    """Largest share of one client in the weights of `weighting = "examples"`; 0 = 2 / clients."""

    def __post_init__(self) -> None:
        """Refuse names given twice and times that are none."""
        if len(set(self.clients)) < len(self.clients):
            raise ConfigError(f"deployment.clients = {list(self.clients)}: each name once")
        checked_names(self.clients, "deployment.clients", ConfigError)
        if self.min_clients < 1 or (self.clients and self.min_clients > len(self.clients)):
            raise ConfigError(
                f"deployment.min_clients = {self.min_clients}: at least 1, and at most the {len(self.clients)} clients"
            )
        for key in ("deadline", "patience", "max_norm"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ConfigError(f"deployment.{key} = {getattr(self, key)}: must be above 0")
        if self.gathering < 0:
            raise ConfigError(f"deployment.gathering = {self.gathering}: must not be negative")
        for key in ("deadline", "patience", "gathering"):
            if getattr(self, key) > MOST_SECONDS:
                raise ConfigError(f"deployment.{key} = {getattr(self, key)}: at most {MOST_SECONDS:.0f} seconds")
        least = 1 / max(1, len(self.clients))
        if self.max_weight_share != 0 and not least <= self.max_weight_share <= 1:
            raise ConfigError(
                f"deployment.max_weight_share = {self.max_weight_share}: 0, or from 1 / clients ({least:.3g} for "
                f"{len(self.clients)} clients) to 1"
            )

    @property
    def weight_share(self) -> float:
        """Largest share of one client in the weights by examples: `max_weight_share`, or its default."""
        return self.max_weight_share or min(1.0, 2 / max(1, len(self.clients)))
