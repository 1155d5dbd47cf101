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
    """Methods to compare, from the registry or from [variants], in the order of the tables."""
    scenarios: dict[str, str]
    """Config file of each scenario, without a [method]; relative to the comparison file."""
    reference: str = ""
    """Method whose gain over every other method is tested; default: the first."""
    target: str = "local_only"
    """Method whose lowest validation loss is the target of the costs to target, and which stands for training alone
    with --choose. If it is not compared, the tables have no costs to target."""
    seeds: tuple[int, ...] = (0,)
    """Values of run.seed. The partition has its own seed and does not change."""
    budget: Literal["steps", "paper", "both", "bytes"] = "steps"
    """What is equal for all methods. steps: local steps and rounds. paper: rounds, with the local steps of each
    method's paper (training.budget = "paper"). both: as steps, and an arm X-paper for each method X whose paper takes
    other steps. bytes: the bytes sent to clients in all rounds together."""
    bytes_of: str = ""
    """Method whose traffic is the budget of budget = "bytes"; default: the reference."""
    match: Literal["nothing", "parameters"] = "nothing"
    """parameters: set the rank, or number of virtual tokens, of each method so that a client trains about as many
    parameters as with the reference in round 0. nothing: keep the sizes of the methods' settings."""
    workers: int = 1
    """Number of trials that run at the same time."""
    overrides: tuple[str, ...] = ()
    """Settings for every trial, as on the command line; settings of a variant take precedence."""
    learning_rates: tuple[float, ...] = ()
    """Learning rates to choose from, for each scenario and method, on validation; default: the rate of the scenario."""
    search_seeds: int = 1
    """Number of seeds, the first ones, with which each learning rate is tried. The rate with the lowest mean loss is
    chosen; with several seeds, a rate at which one of them fails is not."""
    widen: int = 4
    """Maximum number of rates added on each side of learning_rates while the best rate is at an edge; 0: none."""
    folder: str = ""
    """Folder for the trials; default: runs/<name>."""

    def __post_init__(self) -> None:
        """Raise ConfigError for invalid settings."""
        for key in ("methods", "seeds", "scenarios"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty: give at least one")
        for key in ("methods", "seeds", "learning_rates"):
            values = getattr(self, key)
            if repeated := [value for value in values if values.count(value) > 1]:
                raise ConfigError(f"{key}: {repeated[0]!r} occurs twice; remove one")
        if self.workers < 1:
            raise ConfigError(f"workers = {self.workers}: must be at least 1")
        if self.bytes_of and self.budget != "bytes":
            raise ConfigError(f'bytes_of = {self.bytes_of!r} needs budget = "bytes"; set it or remove bytes_of')
        if wrong := [rate for rate in self.learning_rates if rate <= 0]:
            raise ConfigError(f"learning_rates: {wrong[0]:g} must be above 0")
        if not 1 <= self.search_seeds <= len(self.seeds):
            raise ConfigError(
                f"search_seeds = {self.search_seeds}: must be from 1 to the number of seeds, which is {len(self.seeds)}"
            )
        if self.widen < 0:
            raise ConfigError(f"widen = {self.widen}: must be at least 0 (rates to add on each side)")
