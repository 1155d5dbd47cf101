"""The record of synthetic examples that a client sends.

A synthetic example is a prompt of L virtual tokens, which are vectors and no words, between the token ids of the
template's own text, with an answer of token ids. It is a function of the client's private examples and is not private
by itself: whoever has it can try to reconstruct what it was computed from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from fedamole.errors import FedamoleError
from fedamole.model.batch import Ids
from fedamole.synthesis.rows import ExtraRows, SoftLabels

VECTORS, PROBABILITIES = "vectors", "probabilities"
"""Names of the tensors of the record."""
NO_TOKEN = -1
"""Fills the answers up to one length."""


class SyntheticExamplesError(FedamoleError):
    """Synthetic examples are not well formed, or exceed what may be sent."""


@dataclass(frozen=True)
class SyntheticExamples:
    """N synthetic examples of one client, with one prompt of F tokens for all of them."""

    tensors: Mapping[str, Tensor]
    """`vectors` (N, L, d) of the virtual tokens; with soft labels `probabilities` (N, K, k) of `soft_ids`."""
    prompt: tuple[int, ...]
    """Token ids of the prompt: the template's own text, and -1 to -L, in this order, in place of the columns."""
    answers: tuple[int, ...]
    """Token ids of the answers, all of length A, one after the other; -1 fills shorter answers."""
    classes: tuple[int, ...]
    """Class of each example: the index of its answer option, or 0 for free text."""
    soft_ids: tuple[int, ...] = ()
    """Token ids of the soft labels, (N, K, k) in order."""

    @property
    def vectors(self) -> Tensor:
        """(N, L, d): vectors of the virtual tokens."""
        return self.tensors[VECTORS]

    def __len__(self) -> int:
        """Return the number N of examples."""
        return len(self.classes)

    def prompts(self) -> list[Ids]:
        """Return the prompt of each example, with virtual tokens of its own: row n has the ids -1 - nL to -(n + 1)L."""
        length = self.vectors.shape[1]
        return [tuple(it - n * length if it < 0 else it for it in self.prompt) for n in range(len(self))]

    def answer(self, index: int) -> Ids:
        """Return the token ids of one example's answer."""
        width = len(self.answers) // len(self)
        return tuple(it for it in self.answers[index * width : (index + 1) * width] if it != NO_TOKEN)

    def rows(self) -> ExtraRows:
        """Return the examples as rows to train on; ValueError if there are none."""
        rows = tuple(zip(self.prompts(), map(self.answer, range(len(self))), strict=True))
        soft = None
        if PROBABILITIES in self.tensors:
            probabilities = self.tensors[PROBABILITIES].float()
            soft = SoftLabels(torch.tensor(self.soft_ids).view(probabilities.shape), probabilities)
        return ExtraRows(rows, self.vectors.float().flatten(0, 1), soft)

    def answered(self, answers: Sequence[Ids]) -> "SyntheticExamples":
        """Return the examples with other answers, one for each."""
        width = max(map(len, answers), default=0)
        filled = [it for answer in answers for it in (*answer, *[NO_TOKEN] * (width - len(answer)))]
        return replace(self, answers=tuple(filled))

    def check_within(self, largest: "SyntheticExamples") -> None:
        """Check examples that came from elsewhere; SyntheticExamplesError names what is wrong, and contains no values.

        `largest` holds the most and longest of everything that may be sent, and its ids are the largest ones: those of
        the vocabulary's last token and of the last class. Vectors must have its L, d and dtype.
        """
        vectors, (count, length, width) = self.tensors.get(VECTORS), largest.vectors.shape
        require(vectors is not None, "they have no vectors")
        assert vectors is not None
        dtype = vectors.dtype == largest.vectors.dtype
        require(dtype and vectors.dim() == 3 and vectors.shape[1:] == (length, width), "vectors of an unexpected form")
        require(bool(vectors.isfinite().all()), "vectors that are not finite")
        n = vectors.shape[0]
        require(len(self.classes) == n <= count, "an unexpected number of examples")
        require(whole_numbers(self.classes, 0, max(largest.classes)), "an unknown class")
        last = max(largest.prompt)
        check_prompt(self.prompt, largest.prompt)
        require(len(self.answers) % n == 0 if n else not self.answers, "answers of different lengths")
        longest = len(largest.answers) // count
        require(not n or 0 < len(self.answers) // n <= longest, "answers that are too long")
        require(whole_numbers(self.answers, NO_TOKEN, last), "an answer with an id outside the vocabulary")
        require(all(self.answer(i) for i in range(n)), "an answer without tokens")
        self._check_soft(largest, last)

    def _check_soft(self, largest: "SyntheticExamples", last: int) -> None:
        probabilities, bound = self.tensors.get(PROBABILITIES), largest.tensors.get(PROBABILITIES)
        require((probabilities is None) == (bound is None), "soft labels that were not asked for, or none")
        if probabilities is None or bound is None:
            return require(not self.soft_ids, "ids of soft labels without probabilities")
        fits = probabilities.dim() == 3 and probabilities.dtype == bound.dtype and len(probabilities) == len(self)
        sizes = zip(probabilities.shape, bound.shape, strict=True)
        require(fits and all(size <= most for size, most in sizes), "soft labels of an unexpected form")
        valid = bool((probabilities >= 0).all() and (probabilities.float().sum(2) < 1.01).all())
        require(valid, "soft labels that are no probabilities")
        same = len(self.soft_ids) == probabilities.numel()
        require(same and whole_numbers(self.soft_ids, 0, last), "soft labels with ids outside the vocabulary")


E = TypeVar("E", bound=SyntheticExamples)


def expected_examples(template: SyntheticExamples, reply: E) -> E:
    """Return the record with which a reply is compared, for `Method.expected_reply`.

    `template` is the reply of a dry run, which holds the largest of everything (`LargestOutline`). How many examples
    there are, their ids and classes come from the reply, after they are checked. Raises SyntheticExamplesError.
    """
    reply.check_within(template)
    tensors = {}
    for name, tensor in template.tensors.items():
        tensors[name] = tensor[tuple(slice(size) for size in reply.tensors[name].shape)]
    return replace(reply, tensors=tensors)


def check_prompt(prompt: tuple[int, ...], largest: tuple[int, ...]) -> None:
    """Check a prompt that came from elsewhere, given the longest that may be sent; raise SyntheticExamplesError.

    The longest one has the ids of all virtual tokens, and the last id of the vocabulary.
    """
    length = sum(it < 0 for it in largest)
    require(len(prompt) <= len(largest), "a prompt that is too long")
    require(whole_numbers(prompt, -length, max(largest)), "a prompt with an id outside the vocabulary")
    virtual = [it for it in prompt if it < 0]
    require(virtual == [*range(-1, -1 - length, -1)], "a prompt without its virtual tokens in order")


def require(valid: bool, problem: str) -> None:
    """Raise SyntheticExamplesError with this problem unless `valid`."""
    if not valid:
        raise SyntheticExamplesError(f"synthetic examples: {problem}")


def whole_numbers(values: Sequence[object], least: int, most: int) -> bool:
    """Return whether all values are whole numbers in this range."""
    return all(type(value) is int and least <= value <= most for value in values)
