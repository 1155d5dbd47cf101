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


class DataEngine(Protocol):
    """The review of a client's categories, and new rows for them."""

    def review(self, adapter: Adapter, measure: Measure, max_examples: int) -> Review:
        """Return the errors of a model on at most `max_examples` examples of the embedding split, by category."""

    def write(
        self,
        adapter: Adapter | None,
        review: Review,
        shares: Mapping[str, int],
        known: Collection[TokenPair],
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
    ) -> list[TokenPair]:
        """Have a model write as many rows of each category as `shares` says; return those that can be used.

        A row is left out if it does not fit the template, if it is of another category, if its prompt is that of an
        example of the training or embedding split, of a row of `known` or of another new row, or if it has more tokens
        than the longest training row. `adapter` is None for the untuned base. A `temperature` of 0
        writes greedily.
        """


class DryDataEngine(DataEngine):
    """A data engine that reads and writes nothing, for dry runs and plans."""

    @override
    def review(self, adapter: Adapter, measure: Measure, max_examples: int) -> Review:
        return Review({}, {})

    @override
    def write(
        self,
        adapter: Adapter | None,
        review: Review,
        shares: Mapping[str, int],
        known: Collection[TokenPair],
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
    ) -> list[TokenPair]:
        return []
