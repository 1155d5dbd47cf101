"""Forward passes without training: examples that a client reads to choose between models or to weigh them."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedamole.federation.randomness import numpy_generator
from fedamole.model.batch import TokenPair


@dataclass
class Looks:
    """Counts of one client in one round; a row that is read under three adapters counts three times."""

    examples: int = 0
    tokens: int = 0
    """Tokens without padding."""

    def add(self, rows: Sequence[TokenPair], times: int = 1) -> None:
        """Count rows that are read in `times` forward passes each."""
        self.examples += len(rows) * times
        self.tokens += count_tokens(rows) * times


def count_tokens(rows: Sequence[TokenPair]) -> int:
    """Tokens of prompts and answers together, without padding."""
    return sum(len(prompt) + len(answer) for prompt, answer in rows)


def drawn(rows: Sequence[TokenPair], most: int, seed: int, purpose: str, client: str) -> list[TokenPair]:
    """At most `most` of a client's rows, in their order: a random draw, the same in every round of a run.

    The first rows of a file may all have one label.
    """
    order = numpy_generator(seed, f"look/{purpose}", client).permutation(len(rows)).tolist()
    return [rows[place] for place in sorted(order[:most])]
