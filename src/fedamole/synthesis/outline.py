"""What a client's synthetic examples look like before they are optimised: prompt, classes, random vectors.

The prompt is the template's own text, whose tokens stay real, with virtual tokens in place of the columns. Values of
columns never enter it.
"""

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from typing_extensions import override

from fedamole.data.chat import chat_template
from fedamole.data.examples import Example
from fedamole.data.text_encoder import Ids, text_encoder
from fedamole.data.tokens import TokenRow
from fedamole.synthesis.examples import VECTORS, SyntheticExamples


@dataclass(frozen=True)
class ExampleSizes:
    """How many synthetic examples a client has, and how long they are."""

    per_class: int
    """Examples of each class."""
    virtual_tokens: int
    """Virtual tokens L of a prompt."""
    max_classes: int
    """Classes at most: those with the most training examples."""
    max_prompt_tokens: int
    """Tokens of the template's own text in a prompt, at most; of a longer text the last ones."""
    max_answer_tokens: int
    """Tokens of an answer; a class with a longer answer is left out."""
    min_class_examples: int
    """Training examples that a class must have; a class with fewer is left out."""


class Outline(Protocol):
    """A client's prompt and classes, from which its first synthetic examples are made."""

    def new_examples(self, sizes: ExampleSizes, generator: torch.Generator) -> SyntheticExamples:
        """Return examples with vectors from N(0, s^2), where s is the standard deviation of the token embeddings.

        An example has the answer of its class; for free text, which is one class, the end-of-sequence token alone.
        """

    def class_answers(self) -> tuple[Ids, ...]:
        """Return the answer of every class in the order of the options; empty for free text."""

    def class_prompts(self) -> dict[int, list[Ids]]:
        """Return the prompts of the training examples of each class; empty for free text."""


@dataclass(frozen=True)
class ClientOutline(Outline):
    """The outline of a client whose data are in this process."""

    train: Sequence[TokenRow]
    examples: Sequence[Example]
    """The training examples that the rows were made from."""
    tokenizer: Any
    width: int
    """Width d of the token embeddings."""
    embedding_std: float

    @override
    def new_examples(self, sizes: ExampleSizes, generator: torch.Generator) -> SyntheticExamples:
        options = self.class_answers()
        end = int(self.tokenizer.eos_token_id)
        counts = Counter(options.index(row.answer) if options else 0 for row in self.train)
        fitting = [
            label
            for label, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            if count >= sizes.min_class_examples and (not options or len(options[label]) <= sizes.max_answer_tokens)
        ]
        classes = tuple(label for label in sorted(fitting[: sizes.max_classes]) for _ in range(sizes.per_class))
        shape = (len(classes), sizes.virtual_tokens, self.width)
        vectors = self.embedding_std * torch.randn(shape, generator=generator)
        blank = SyntheticExamples({VECTORS: vectors}, self.prompt(sizes), (), classes)
        return blank.answered([options[label] if options else (end,) for label in classes])

    @override
    def class_answers(self) -> tuple[Ids, ...]:
        return self.train[0].options

    @override
    def class_prompts(self) -> dict[int, list[Ids]]:
        options, prompts = self.class_answers(), dict[int, list[Ids]]()
        for row in self.train if options else ():
            prompts.setdefault(options.index(row.answer), []).append(row.prompt)
        return prompts

    def prompt(self, sizes: ExampleSizes) -> Ids:
        """Return the token ids of the template's text, with virtual tokens shared evenly among its columns."""
        lead, pieces = self._literal_ids()
        kept, room = list[Ids]([()] * len(pieces)), sizes.max_prompt_tokens - len(lead)
        for i in reversed(range(len(pieces))):
            kept[i] = pieces[i][max(len(pieces[i]) - room, 0) :] if room > 0 else ()
            room -= len(kept[i])
        columns = max(len(pieces) - 1, 1)
        ends = [round((i + 1) * sizes.virtual_tokens / columns) for i in range(columns)]
        ids, used = [*lead, *kept[0]], 0
        for end, piece in zip(ends, [*kept[1:], ()], strict=False):
            ids += [*range(-1 - used, -1 - end, -1), *piece]
            used = end
        return tuple(ids)

    def _literal_ids(self) -> tuple[Ids, list[Ids]]:
        """Return leading special tokens, and the ids of the most frequent sequence of literal pieces."""
        encoder = text_encoder(self.tokenizer)
        shapes = Counter((it.turns is not None, literal_pieces(it)) for it in self.examples)
        (chat, pieces), _ = max(shapes.items(), key=lambda item: (item[1], item[0]))
        marked = [encoder.marked(piece, ((0, len(piece)),)) for piece in pieces]
        lead = encoder.leading_specials
        if chat:
            gap = secrets.token_hex(16)  # random, so that the chat template cannot contain it
            frame = chat_template(self.tokenizer).frame([("user", gap.join(marked))])
            marked, lead = frame.prompt.split(gap), ()
        ids = encoder.encode(marked)
        if lead and ids[0][: len(lead)] == lead:  # the template writes them itself
            ids[0] = ids[0][len(lead) :]
        return lead, ids


@dataclass(frozen=True)
class LargestOutline(Outline):
    """The outline of a dry run: its examples are the most, the longest, and of the largest ids that may be sent."""

    width: int
    vocabulary: int
    """Token ids are below this."""
    embedding_std: float

    @override
    def new_examples(self, sizes: ExampleSizes, generator: torch.Generator) -> SyntheticExamples:
        count, last = sizes.per_class * sizes.max_classes, self.vocabulary - 1
        prompt = (*range(-1, -1 - sizes.virtual_tokens, -1), *[last] * sizes.max_prompt_tokens)
        vectors = torch.full((count, sizes.virtual_tokens, self.width), self.embedding_std)
        answers = tuple([last] * (count * sizes.max_answer_tokens))
        return SyntheticExamples({VECTORS: vectors}, prompt, answers, tuple([MOST_CLASSES - 1] * count))

    @override
    def class_answers(self) -> tuple[Ids, ...]:
        return ()

    @override
    def class_prompts(self) -> dict[int, list[Ids]]:
        return {}


MOST_CLASSES = 100_000
"""Classes are numbered below this."""


def literal_pieces(example: Example) -> tuple[str, ...]:
    """Return the template's own text before, between and after the values of columns in an example's prompt.

    A prompt without any is all data: two empty pieces, around one value.
    """
    text, shift = example.prompt, len(example.before) + len(example.context)
    after = [(start + shift, end + shift) for start, end in example.literals.after]
    pieces, position = [""], 0
    for start, end in (*example.literals.before, *after, (len(text), len(text))):
        if start > position:
            pieces.append("")
        pieces[-1] += text[start:end]
        position = end
    return tuple(pieces)
