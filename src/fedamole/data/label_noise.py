"""Wrong answers on purpose: `label_noise` of a source, for experiments with clients whose labels are bad."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedamole.data.examples import Example, Span
from fedamole.data.seeding import generator
from fedamole.errors import DataError

NOISY_SPLITS = ("train", "embedding")
"""Splits that get wrong answers. Validation and test stay as they are, so that scores mean the same."""

Splits = Mapping[str, tuple[Example, ...]]
"""A client's examples by split."""


def with_label_noise(splits: Splits, share: float, seed: int, client: str) -> Splits:
    """Return a client's examples, with a wrong answer for a share of those in the training and the embedding split.

    In each of the two splits, `share` times its size, rounded, examples are drawn. Their answer becomes another option,
    or in free text another answer of the two splits; each is equally likely. In a preference pair the two answers are
    exchanged. The result depends only on the seed, the
    client's name and its examples. Raises DataError if there is no other answer.
    """
    if share == 0:
        return splits
    clean = [example for split in NOISY_SPLITS for example in splits[split]]
    answers = {example.answer: example.literals.answer for example in clean}
    rng, noisy = generator(seed, "label noise", client), dict(splits)
    for split in NOISY_SPLITS:
        examples = list(splits[split])
        for i in sorted(rng.choice(len(examples), round(share * len(examples)), replace=False).tolist()):
            examples[i] = _wrong(examples[i], answers, client, rng)
        noisy[split] = tuple(examples)
    return noisy


def _wrong(example: Example, answers: Mapping[str, tuple[Span, ...]], client: str, rng: np.random.Generator) -> Example:
    """Return an example with another answer: one of its options, or of `answers`, which have their template text."""
    if example.rejected is not None:
        literals = replace(example.literals, answer=example.literals.rejected, rejected=example.literals.answer)
        return replace(example, answer=example.rejected, rejected=example.answer, literals=literals)
    others = [answer for answer in example.options or answers if answer != example.answer]
    if not others:
        raise DataError(
            f"client {client!r}: label_noise needs at least two different answers, and it has {len(answers)}; remove "
            "label_noise from its [[data.source]]"
        )
    answer = others[int(rng.integers(len(others)))]
    spans = answers.get(answer, ())
    if example.options:  # as `render` does: options of the template are its own text, those of the data are not
        spans = ((0, len(answer)),) if example.literals.options else ()
    return replace(example, answer=answer, literals=replace(example.literals, answer=spans))
