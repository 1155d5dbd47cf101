"""The `[training]`, `[federation]` and `[deployment]` tables of a config."""

from dataclasses import dataclass
from typing import Literal

from fedamole.errors import ConfigError
from fedamole.received.names import checked_names
from fedamole.runs.run_files import MOST_ROUNDS

MAX_SECONDS = 1e8
"""Largest time setting, about three years; larger ones overflow some timers of the operating system."""

Budget = Literal["steps", "paper"]
Objective = Literal["answer", "preference"]


@dataclass(frozen=True)
class TrainingSettings:
    """`[training]`: the local training that all methods share."""

    local_steps: int = 200
    """Optimiser steps S of a client in a round; ignored if local_epochs is set."""
    local_epochs: int = 0
    """Passes of a client over its training split in a round; 0: use local_steps."""
    budget: Budget = "steps"
    """Steps of a method that trains several times in a round. steps: its trainings share the steps of the round, so
    all methods take the same number. paper: each training takes as many as in the method's paper."""
    batch_size: int = 1
    """Examples in a forward pass."""
    accumulation: int = 1
    """Forward passes averaged into one optimiser step."""
    learning_rate: float = 5e-5
    """Adam's learning rate in round 0. The default is the paper's, for a base of 1 B parameters; a tiny base needs 1e-3
    to 1e-2."""
    lr_decay: float = 0.99
    """Factor on the learning rate per round."""
    clip_norm: float = 0.0
    """Maximum norm of the gradient of a step; 0: no clipping."""
    max_length: int = 512
    """Maximum number of tokens of prompt and answer together; longer prompts lose the end of their context."""
    objective: Objective = "answer"
    """What local training minimises. answer: the mean loss of the answer's tokens. preference: the DPO loss of pairs of
    a preferred and a rejected answer, which every client's rows must then be (`rejected` of a template)."""
    beta: float = 0.1
    """DPO's factor on the log-probabilities relative to the untuned base, above 0; ignored unless `objective` is
    "preference". The larger it is, the closer the model stays to the base."""

    def __post_init__(self) -> None:
        """Raise ConfigError for settings that cannot train."""
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
        if not 0 < self.beta <= 1000:
            raise ConfigError(f"training.beta = {self.beta}: must be above 0 and at most 1000")

    @property
    def answers_per_example(self) -> int:
        """Sequences of prompt and answer that a training example consists of: two for a preference pair."""
        return 2 if self.objective == "preference" else 1

    def rate(self, round_: int) -> float:
        """Return the learning rate of a round."""
        return self.learning_rate * self.lr_decay**round_

    def steps(self, examples: int) -> int:
        """Return the optimiser steps of one round for a client with this number of training examples."""
        if self.local_epochs == 0:
            return self.local_steps
        return self.local_epochs * -(-examples // (self.batch_size * self.accumulation))


@dataclass(frozen=True)
class FederationSettings:
    """`[federation]`: number of rounds, participation and aggregation."""

    rounds: int = 30
    """Rounds R. With `patience`, the most rounds."""
    cohort: float = 1.0
    """Fraction of the clients that train in a round, drawn anew each round; at least one client."""
    aggregation: Literal["auto", "mean", "clipped", "median", "trimmed"] = "auto"
    """What happens to replies before they are averaged. mean: nothing. clipped: a change much larger than those of the
    other clients is scaled down. median, trimmed: each value becomes the median, or the mean without the lowest and
    highest fifth, over the clients that returned it. auto: mean in one process, clipped in a deployment."""
    clip_factor: float = 4.0
    """clipped: maximum change of a client, as a multiple of the median change of the other clients."""
    patience: int = 0
    """Stop after this number of rounds in a row without a new best round, for every scored model of the run; if each
    client has its own best round, without one for any client. 0: never stop before `rounds`."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a federation without rounds or clients."""
        if not 1 <= self.rounds <= MOST_ROUNDS:
            raise ConfigError(f"federation.rounds = {self.rounds}: must be at least 1, and at most {MOST_ROUNDS}")
        if not 0 <= self.patience <= MOST_ROUNDS:
            raise ConfigError(
                f"federation.patience = {self.patience}: a number of rounds from 1 to {MOST_ROUNDS}, or 0 for none"
            )
        if not 0 < self.cohort <= 1:
            raise ConfigError(f"federation.cohort = {self.cohort}: a fraction of the clients, above 0 and at most 1")
        if not self.clip_factor >= 1:
            raise ConfigError(f"federation.clip_factor = {self.clip_factor}: must be at least 1")

    def stopped(self, done: int) -> dict[str, int] | None:
        """Return what summary.json says of a run that ended after `done` rounds; None if those were all rounds.

        The entry `patience` is 0 if a listener ended the run (`ProgressListener.should_stop`).
        """
        return {"rounds": self.rounds, "patience": self.patience} if done < self.rounds else None


@dataclass(frozen=True)
class DeploymentSettings:
    """`[deployment]`: a run across organisations (`fedamole server`); ignored by runs in one process."""

    clients: tuple[str, ...] = ()
    """Names of the organisations that may take part; each has a registered key of this name."""
    min_clients: int = 2
    """Minimum number of clients of a round; with fewer the run waits."""
    deadline: float = 3600.0
    """Seconds that a client has to answer; later answers are left out of the round."""
    max_wait: float = 3600.0
    """Longest wait for `min_clients`, in seconds; then the run stops, and `fedamole server --resume` continues it."""
    gathering: float = 120.0
    """Seconds that the first round waits for all `clients`, beyond `min_clients`; others can join later."""
    max_norm: float | None = None
    """Maximum norm of all values of a reply together; a larger one is refused. Unset: 10 times the norm of what was
    sent, or of the same number of values of 0.1 if that is larger."""
    max_weight_share: float = 0.0
    """Maximum share of one client in the weights of `weighting = "examples"`; 0: 2 / number of clients."""

    def __post_init__(self) -> None:
        """Raise ConfigError for duplicate names and for times and shares outside their range."""
        if len(set(self.clients)) < len(self.clients):
            raise ConfigError(f"deployment.clients = {list(self.clients)}: each name once")
        checked_names(self.clients, "deployment.clients", ConfigError)
        if self.min_clients < 1 or (self.clients and self.min_clients > len(self.clients)):
            raise ConfigError(
                f"deployment.min_clients = {self.min_clients}: at least 1, and at most the {len(self.clients)} clients"
            )
        for key in ("deadline", "max_wait", "max_norm"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ConfigError(f"deployment.{key} = {getattr(self, key)}: must be above 0")
        if self.gathering < 0:
            raise ConfigError(f"deployment.gathering = {self.gathering}: must not be negative")
        for key in ("deadline", "max_wait", "gathering"):
            if getattr(self, key) > MAX_SECONDS:
                raise ConfigError(f"deployment.{key} = {getattr(self, key)}: at most {MAX_SECONDS:.0f} seconds")
        least = 1 / max(1, len(self.clients))
        if self.max_weight_share != 0 and not least <= self.max_weight_share <= 1:
            raise ConfigError(
                f"deployment.max_weight_share = {self.max_weight_share}: 0, or from 1 / clients ({least:.3g} for "
                f"{len(self.clients)} clients) to 1"
            )

    @property
    def weight_share(self) -> float:
        """Return the maximum share of one client in the weights by examples: `max_weight_share` or its default."""
        return self.max_weight_share or min(1.0, 2 / max(1, len(self.clients)))
