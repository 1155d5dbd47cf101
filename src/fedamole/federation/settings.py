"""The `[training]`, `[federation]` and `[deployment]` tables of a config."""

from dataclasses import dataclass

from fedamole.errors import ConfigError


@dataclass(frozen=True)
class TrainingSettings:
    """`[training]`: the local training that all methods share."""

    local_steps: int = 200
    """Optimiser steps S a client takes in a round; not read where local_epochs is set."""
    local_epochs: int = 0
    """Passes over its own training split a client makes in a round; 0 = count steps instead."""
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

    def __post_init__(self) -> None:
        """Refuse a federation without rounds or clients."""
        if self.rounds < 1:
            raise ConfigError(f"federation.rounds = {self.rounds}: must be at least 1")
        if not 0 < self.cohort <= 1:
            raise ConfigError(f"federation.cohort = {self.cohort}: a share of the clients, above 0 and at most 1")


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
    max_norm: float = 1e4
    """Largest norm of all numbers of a reply together; a larger one is refused."""

    def __post_init__(self) -> None:
        """Refuse names given twice and times that are none."""
        if len(set(self.clients)) < len(self.clients):
            raise ConfigError(f"deployment.clients = {list(self.clients)}: each name once")
        if self.min_clients < 1 or (self.clients and self.min_clients > len(self.clients)):
            raise ConfigError(
                f"deployment.min_clients = {self.min_clients}: at least 1, and at most the {len(self.clients)} clients"
            )
        for key in ("deadline", "patience", "max_norm"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"deployment.{key} = {getattr(self, key)}: must be above 0")
        if self.gathering < 0:
            raise ConfigError(f"deployment.gathering = {self.gathering}: must not be negative")
