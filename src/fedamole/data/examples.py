"""`Example`: a prompt with its answer and options. `Shard`: the examples of one client, by split."""

from dataclasses import dataclass, field
from typing import Literal

from fedamole.data.layouts import Turn
from fedamole.errors import DataError
from fedamole.runs.run_files import SPLITS

Task = Literal["classification", "generation", "preference"]
Span = tuple[int, int]
"""Start and end of a substring, in characters."""


@dataclass(frozen=True)
class Literals:
    """Spans of an example's texts that come from the template, not from data.

    Special tokens are recognised only in these spans. Without a template all text is data.
    """

    before: tuple[Span, ...] = ()
    """Spans of `Example.before`, ascending."""
    after: tuple[Span, ...] = ()
    """Spans of `Example.after`, ascending."""
    answer: tuple[Span, ...] = ()
    """Spans of `Example.answer`, ascending."""
    options: bool = False
    """Whether the template lists the options, in place of a column of the data."""
    rejected: tuple[Span, ...] = ()
    """Spans of `Example.rejected`, ascending."""


@dataclass(frozen=True)
class RowImage:
    """The image of a row, not decoded."""

    content: bytes = field(repr=False, compare=False)
    """Content of the image file."""
    sha256: str
    """Hash of the content."""
    where: str = field(compare=False)
    """Name of file and row for errors."""


@dataclass(frozen=True)
class Example:
    """A prompt with its answer. The prompt is `before + context + after`; `context` is truncated first."""

    before: str
    context: str
    after: str
    answer: str
    options: tuple[str, ...] = ()
    """Answers to choose from by likelihood; empty for free text."""
    literals: Literals = field(default=Literals(), compare=False)
    """Template text in this example; not compared."""
    turns: tuple[Turn, ...] | None = None
    """Earlier turns of a conversation. The prompt is then the user's last message, and the chat template of the base's
    tokenizer renders both. None: the prompt is used as it is."""
    category: str | None = field(default=None, compare=False)
    """Text of the template's `category`; None if it has none. Not compared."""
    rejected: str | None = None
    """The answer that is not preferred, in a preference pair whose preferred answer is `answer`; None: no pair."""
    image: RowImage | None = None
    """An image that belongs to the prompt."""

    @property
    def prompt(self) -> str:
        """The complete prompt."""
        return self.before + self.context + self.after

    @property
    def conversation(self) -> str:
        """The prompt after its earlier turns, without a chat template."""
        return "".join(f"{role}: {text}\n" for role, text in self.turns or ()) + self.prompt

    @property
    def identity(self) -> tuple[str, ...]:
        """Conversation, answer, and hash of an image; equal in duplicates, also in pairs with different rejections."""
        image = () if self.image is None else (self.image.sha256,)
        return self.conversation, self.answer, *image

    @property
    def group(self) -> str:
        """The category; without one the answer option, and for free text an empty string."""
        if self.category is not None:
            return self.category
        return self.answer if self.options else ""

    def with_earlier_answers(self) -> "list[Example]":
        """Return an example for each assistant turn of the conversation that answers the user, the last one as it is.

        The prompt of each consists of the turns before it. Empty turns have no example.
        """
        turns = self.turns or ()
        return [
            *(
                Example(question, "", "", answer, turns=turns[: index - 1], category=self.category)
                for index, (role, answer) in enumerate(turns)
                if role == "assistant" and answer.strip() and index
                for asker, question in [turns[index - 1]]
                if asker == "user"
            ),
            self,
        ]

    @property
    def task(self) -> Task:
        """`preference` for a pair of answers, `classification` if there are options, else `generation`."""
        if self.rejected is not None:
            return "preference"
        return "classification" if self.options else "generation"


@dataclass(frozen=True)
class Shard:
    """One client's private data; DataError if a split is empty, or if the examples are of different tasks."""

    client: str
    train: tuple[Example, ...]
    embedding: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    def __post_init__(self) -> None:
        splits = (self.train, self.embedding, self.validation, self.test)
        if not all(splits):
            sizes = ", ".join(f"{name} {len(rows)}" for name, rows in zip(SPLITS, splits, strict=True))
            raise DataError(f"client {self.client!r} has an empty split: {sizes}; it needs more rows")
        if len({example.task for rows in splits for example in rows}) > 1:
            raise DataError(
                f"client {self.client!r} has examples with options and examples without; make two clients of them"
            )

    @property
    def task(self) -> Task:
        """Task of all examples."""
        return self.train[0].task
