"""The identity of a base model: runs and adapters store it, and every load compares it."""

from dataclasses import asdict, dataclass

from fedamole.errors import BaseModelError


@dataclass(frozen=True)
class Identity:
    """Hashes that are equal for equal base models. Adapters and runs store them, and every load compares them."""

    weights: str
    """Hash of all weights as stored."""
    tokenizer: str
    """Hash of vocabulary, merges and special tokens."""
    targets: str
    """Hash of the adapted modules' names and shapes."""

    def check(self, other: "Identity", what: str) -> None:
        """Raise BaseModelError naming the part that differs when `what` was made on another base."""
        for part, theirs in asdict(other).items():
            mine = getattr(self, part)
            if mine != theirs:
                raise BaseModelError(
                    f"{what} was made on another base: its {part} hash is {theirs}, this base has {mine}. "
                    "Name a copy of the base it was trained on by --base (see [base] in its run's config.toml)"
                )
