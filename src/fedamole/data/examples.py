"""What all data turn into: an example (prompt, answer, options) and a shard (one client's private splits)."""

from dataclasses import dataclass, field
from typing import Literal

from fedamole.errors import DataError
from fedamole.runs.run_files import SPLITS

Task = Literal["classification", "generation"]
Span = tuple[int, int]
"""Start and end of a part of a text, in characters."""


@dataclass(frozen=True)
class Literals:
    """Which parts of an example are the template's own text; the rest comes from data.

    Special tokens are parsed in the template's own text alone. Without a template all is data.
    """

    # Ascending positions in the text of the same name.
    before: tuple[Span, ...] = ()
    after: tuple[Span, ...] = ()
    answer: tuple[Span, ...] = ()
    # Whether the options stand in the template, and not in a column.
    options: bool = False


@dataclass(frozen=True)
class Example:
    """A prompt with its answer; the prompt is `before + context + after`, only `context` may be shortened."""

    before: str
    context: str
    after: str
    answer: str
    # All answers there are, for an answer chosen by likelihood; empty means free text.
    options: tuple[str, ...] = ()
    # Where these texts are from. Examples with the same texts are equal.
    literals: Literals = field(default=Literals(), compare=False)

    @property
    def prompt(self) -> str:
        """The whole prompt, uncut."""
        return self.before + self.context + self.after

    @property
    def task(self) -> Task:
        """Classification where there are options to choose from, else generation."""
        return "classification" if self.options else "generation"


@dataclass(frozen=True)
class Shard:
    """One client's private data; DataError if a split is empty or its examples are of two kinds of task."""

    client: str
    train: tuple[Example, ...]
    embedding: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    def __post_init__(self) -> None:
        splits = (self.train, self.embedding, self.validation, self.test)
        if not all(splits):
            sizes = ", ".join(f"{name} {len(rows)}" for name, rows in zip(SPLITS, splits, strict=True))
            raise DataError(f"client {self.client!r} has an empty split: {sizes}; give it more rows")
        if len({example.task for rows in splits for example in rows}) > 1:
            raise DataError(f"client {self.client!r} mixes examples with and without options; split them in two")

    @property
    def task(self) -> Task:
        """The one kind of task that all examples of the shard share."""
        return self.train[0].task
