"""What a client can do to let its training data grow: find its weak categories, and have new rows written for them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from typing_extensions import override

from fedamole.model.batch import TokenPair
from fedamole.model.params import Adapter

Measure = Literal["error", "loss"]


@dataclass(frozen=True)
class Review:
    """Errors of one model by category, and its bad cases."""

    errors: Mapping[str, float]
    """Share of wrong answers, or mean loss per answer token in nats; free text has no wrong answers, only a loss."""
    cases: Mapping[str, tuple[int, ...]]
    """Indices of the embedding examples that were answered wrongly, or of the half with the highest losses; two of each
    category at least, if it has two. The worst come first."""


@dataclass(frozen=True)
class WriteRequest:
    """New rows that a client asks a model for."""

    adapter: Adapter | None
    """Adapter of the model; None for the untuned base."""
    review: Review
    """Where the bad cases that the model is shown come from."""
    shares: Mapping[str, int]
    """Rows of each category."""
    known: Collection[TokenPair]
    """Rows that the client has already been given."""
    max_new_tokens: int
    """Tokens of a row at most."""
    temperature: float
    """Temperature of sampling; 0 writes greedily."""
    generator: torch.Generator
    """Draws the cases that are shown, and the tokens."""


class DataEngine(Protocol):
    """The review of a client's categories, and new rows for them."""

    def review(self, adapter: Adapter, measure: Measure, max_examples: int) -> Review:
        """Return the errors of a model on at most `max_examples` examples of the embedding split, by category."""

    def write(self, request: WriteRequest) -> list[TokenPair]:
        """Have a model write the rows that a request asks for; return those that can be used.

        A row is left out if it does not fit the template, if it is of another category, if its prompt is that of an
        example of the training or embedding split, of a known row or of another new row, or if it has more tokens than
        the longest training row.
        """


class DryDataEngine(DataEngine):
    """A data engine that reads and writes nothing, for dry runs and plans."""

    @override
    def review(self, adapter: Adapter, measure: Measure, max_examples: int) -> Review:
        return Review({}, {})

    @override
    def write(self, request: WriteRequest) -> list[TokenPair]:
        return []
