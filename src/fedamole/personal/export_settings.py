"""Settings of an export. This module imports no heavy library, because `fedamole export --help` reads the defaults."""

from dataclasses import dataclass

from fedamole.errors import ConfigError
from fedamole.runs.adapter_folder import MOST_RANK

MAX_DEFAULT_RANK = 64
"""Largest rank that is chosen automatically. Inference servers reserve memory for the largest rank of their LoRAs."""


@dataclass(frozen=True)
class ExportSettings:
    """What to export, and how close it must be to the personal model."""

    to: str = "lora"
    """lora: a PEFT LoRA adapter; merged: the same LoRA merged into the base, as a whole model."""
    rank: int | None = None
    """Rank of the LoRA. None: the total rank of a module's experts, at most MAX_DEFAULT_RANK; the rank of the personal
    model if that is a LoRA."""
    ridge: float = 1e-4
    """Ridge penalty on the LoRA, relative to the mean square of a module's inputs."""
    tokens: int = 32768
    """Maximum number of tokens of calibration text."""
    tolerance: float = 0.05
    """Maximum increase of the validation loss over the personal model's, in nats per answer token."""
    force: bool = False
    """Write the export even if its loss exceeds the tolerance."""

    def __post_init__(self) -> None:
        """Raise ConfigError for invalid values."""
        if self.to not in ("lora", "merged"):
            raise ConfigError(f"--to {self.to}: use lora or merged")
        for name, value in (("rank", self.rank), ("tokens", self.tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name} {value}: must be at least 1")
        if self.rank is not None and self.rank > MOST_RANK:
            raise ConfigError(f"--rank {self.rank}: must be at most {MOST_RANK}")
        if self.ridge <= 0:
            raise ConfigError(f"--ridge {self.ridge}: must be above 0")
        if self.tolerance < 0:
            raise ConfigError(f"--tolerance {self.tolerance}: must not be negative")
