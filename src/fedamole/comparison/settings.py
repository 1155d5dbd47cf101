"""Settings of a comparison file."""

from dataclasses import dataclass
from typing import Literal

from fedamole.errors import ConfigError


@dataclass(frozen=True)
class ComparisonSettings:
    """A comparison file without its [variants]."""

    name: str
    """Name of the comparison, and of its default folder runs/<name>."""
    methods: tuple[str, ...]
    """Names of the registry or of [variants], in the order of the tables."""
    scenarios: dict[str, str]
    """Configs without a [method] by the scenario's name; relative to the comparison file."""
    reference: str = ""
    """The method whose gain over every other is tested; unset: the first."""
    seeds: tuple[int, ...] = (0,)
    """Values of run.seed; the partition has its own seed and stays."""
    budget: Literal["steps", "paper", "both", "bytes"] = "steps"
    """What is the same for all methods. steps: local steps and rounds. paper: rounds, with the local steps that each
    method's paper takes (training.budget = "paper"). both: the first, and an arm X-paper of each method X whose paper
    takes other steps. bytes: the bytes sent to clients in all rounds together."""
    bytes_of: str = ""
    """The method whose traffic is the budget "bytes"; unset: the reference."""
    match: Literal["nothing", "parameters"] = "nothing"
    """parameters: each method's rank, or number of virtual tokens, is set so that a client trains about as many numbers
    as one of the reference does in round 0. nothing: sizes are those of the methods' settings."""
    workers: int = 1
    """Cells at once."""
    overrides: tuple[str, ...] = ()
    """Settings for every cell, as on the command line; a variant's own win."""
    learning_rates: tuple[float, ...] = ()
    """Rates to choose from, by scenario and method, on validation with the first seed; unset: the scenario's."""
    widen: int = 4
    """Most rates that are added on each side of learning_rates while the best rate is at an edge; 0: none."""
    folder: str = ""
    """Where the cells are written; unset: runs/<name>."""

    def __post_init__(self) -> None:
        """Raise ConfigError for settings that make no table."""
        for key in ("methods", "seeds", "scenarios"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty: name at least one")
        for key in ("methods", "seeds", "learning_rates"):
            values = getattr(self, key)
            if double := [value for value in values if values.count(value) > 1]:
                raise ConfigError(f"{key}: {double[0]!r} stands there twice; remove one")
        if self.workers < 1:
            raise ConfigError(f"workers = {self.workers}: at least 1")
        if self.bytes_of and self.budget != "bytes":
            raise ConfigError(f'bytes_of = {self.bytes_of!r} is read with budget = "bytes" only; set that or remove it')
        if wrong := [rate for rate in self.learning_rates if rate <= 0]:
            raise ConfigError(f"learning_rates: {wrong[0]:g} must be above 0")
        if self.widen < 0:
            raise ConfigError(f"widen = {self.widen}: the number of rates to add on each side, at least 0")
