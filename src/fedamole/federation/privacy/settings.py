"""The `[privacy]` table of a config."""

from dataclasses import dataclass
from typing import Literal

from fedamole.errors import ConfigError


@dataclass(frozen=True)
class PrivacySettings:
    """`[privacy]`: differential privacy of what leaves a client; without this table there is none."""

    epsilon: float = 8.0
    """Privacy budget epsilon of each client over the run, above 0 and at most 1000. A client that has spent it no
    longer takes part. The smaller it is, the less can be learned about an example and the more noise is added."""
    delta: float = 1e-5
    """Probability delta by which the guarantee may fail, above 0 and below 1 / number of training examples."""
    clip: float = 1.0
    """Largest norm of the gradient of one example; a larger gradient is scaled down to it."""
    profile: Literal["none", "private"] = "none"
    """private: settings of other tables that keep the noise small, unless the config sets them: training.batch_size =
    64, method.rank = 4 with alpha = 8, and for fedamole assignment = "static" and min_holders = 3, which gives every
    expert three holders and each client two experts of the pool. none: the defaults."""
    unit: Literal["example", "client"] = "example"
    """What is protected: one training example of a client. The unit client is not available yet."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a budget or a clip outside its range, and for the unit client."""
        if not 0 < self.epsilon <= 1000:
            raise ConfigError(f"privacy.epsilon = {self.epsilon}: must be above 0 and at most 1000")
        if not 1e-15 <= self.delta <= 0.1:
            raise ConfigError(f"privacy.delta = {self.delta}: must be at least 1e-15 and at most 0.1")
        if not 1e-6 <= self.clip <= 1e6:
            raise ConfigError(f"privacy.clip = {self.clip}: must be at least 1e-6 and at most 1e6")
        if self.unit == "client":
            raise ConfigError('privacy.unit = "client" is not available yet: use "example"')
