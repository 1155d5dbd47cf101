"""Identity of a base model: hashes that runs and adapters store, and that are compared at every load."""

from dataclasses import asdict, dataclass

from fedamole.errors import BaseModelError

BUNDLED = "bundled"
"""Value of base.model for the tiny base that comes with this package."""


@dataclass(frozen=True)
class Identity:
    """Hashes of a base model; equal base models have equal hashes."""

    weights: str
    """Hash of all weights as stored."""
    tokenizer: str
    """Hash of vocabulary, merges and special tokens."""
    targets: str
    """Hash of the names and shapes of the adapted modules."""

    def check(self, other: "Identity", what: str) -> None:
        """Raise BaseModelError if `what`, which was made on the base `other`, does not fit this base."""
        for part, other_hash in asdict(other).items():
            own_hash = getattr(self, part)
            if own_hash != other_hash:
                raise BaseModelError(
                    f"{what} was made on another base: its {part} hash is {other_hash}, this base has {own_hash}. "
                    "Name a copy of the base it was trained on by --base (see [base] in its run's config.toml)"
                )
