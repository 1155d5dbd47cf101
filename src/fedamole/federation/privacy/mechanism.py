"""How the training of one client is noised."""

from dataclasses import dataclass, field

from fedamole.federation.privacy.secret import SecretRandom


@dataclass(frozen=True)
class Mechanism:
    """Sampling, clip and noise of one private training, with the secret random numbers for it."""

    clip: float
    """Largest norm of an example's gradient."""
    noise: float
    """Standard deviation of the noise as a multiple of `clip`."""
    batch: int
    """Expected number of examples in a step."""
    examples: int
    """Number of training examples n; it counts as public."""
    secret: SecretRandom = field(default_factory=SecretRandom, repr=False)

    @property
    def sampling(self) -> float:
        """Probability of an example to be in a step."""
        return min(1.0, self.batch / self.examples)
