"""Settings of a merge. This module imports no heavy library, because `fedamole merge --help` reads the defaults."""

from dataclasses import dataclass

from fedamole.errors import ConfigError
from fedamole.runs.adapter_folder import MOST_RANK

RECIPES = {
    "linear": "the mean of the factors A and B",
    "svd": "the mean of the changes B A",
    "ties": "the largest values of each change, where signs agree (TIES)",
    "dare": "random values of each change, scaled up, averaged (DARE)",
    "regmean": "least squares on the clients' own inputs (RegMean)",
    "selective": "one model after another, if that lowers the mean loss (Model-GLUE)",
}
"""What each recipe takes of the models."""
NEED_DATA = ("regmean", "selective")
"""Recipes that read the clients' embedding splits."""


@dataclass(frozen=True)
class MergeSettings:
    """How models are merged."""

    recipe: str = "regmean"
    """One of RECIPES."""
    rank: int | None = None
    """Rank of the merged LoRA. None: the largest rank of the models."""
    density: float = 0.5
    """Share of each change that ties and dare keep."""
    off_diagonal: float = 0.9
    """Factor of the off-diagonal moments of regmean."""
    examples: int = 64
    """Largest number of examples that regmean and selective read of each client's embedding split."""
    tokens: int = 32768
    """Maximum number of tokens on which a mixture of experts is turned into a LoRA."""

    def __post_init__(self) -> None:
        """Raise ConfigError for invalid values."""
        if self.recipe not in RECIPES:
            raise ConfigError(f"--recipe {self.recipe}: use one of {', '.join(RECIPES)}")
        for name, value in (("rank", self.rank), ("examples", self.examples), ("tokens", self.tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name} {value}: must be at least 1")
        if self.rank is not None and self.rank > MOST_RANK:
            raise ConfigError(f"--rank {self.rank}: must be at most {MOST_RANK}")
        if not 0 < self.density < 1:
            raise ConfigError(f"--density {self.density}: must be above 0 and below 1")
        if not 0 <= self.off_diagonal <= 1:
            raise ConfigError(f"--off-diagonal {self.off_diagonal}: must be at least 0 and at most 1")
