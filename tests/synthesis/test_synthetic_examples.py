"""The record of synthetic examples: its rows by hand, and what is refused on receipt."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedamole.federation.record import pack, unpack
from fedamole.synthesis.examples import (
    PROBABILITIES,
    VECTORS,
    SyntheticExamples,
    SyntheticExamplesError,
    expected_examples,
)
from fedamole.synthesis.outline import ExampleSizes, LargestOutline
from fedamole.synthesis.rows import ExtraRows, joined

SIZES = ExampleSizes(2, 2, 3, 4, 3, 1)
LARGEST = LargestOutline(5, 50, 0.1).new_examples(SIZES, torch.Generator())
"""At most 6 examples of 2 virtual tokens, 4 tokens of text and 3 of an answer, with ids below 50."""


def examples(soft: bool = False) -> SyntheticExamples:
    """Two of class 0 and one of class 2."""
    tensors = {VECTORS: torch.arange(30.0).view(3, 2, 5)}
    ids: tuple[int, ...] = ()
    if soft:
        tensors[PROBABILITIES], ids = torch.tensor([0.75, 0.25]).expand(3, 1, 2).contiguous(), (7, 8) * 3
    return SyntheticExamples(tensors, (40, -1, -2, 41), (7, 0, 7, 0, 9, -1), (0, 0, 2), ids)


def test_each_example_is_a_row_with_virtual_tokens_of_its_own() -> None:
    rows = examples().rows()
    assert rows.rows == (((40, -1, -2, 41), (7, 0)), ((40, -3, -4, 41), (7, 0)), ((40, -5, -6, 41), (9,)))
    assert rows.vectors is not None
    assert torch.equal(rows.vectors, torch.arange(30.0).view(6, 5)), "row i is the vector of id -1 - i"
    both = joined([rows, ExtraRows((((5, 6), (3,)),)), rows])
    assert both.rows[3:5] == (((5, 6), (3,)), ((40, -7, -8, 41), (7, 0)))
    assert both.vectors is not None
    assert torch.equal(both.vectors[6:], rows.vectors)


def test_soft_labels_are_joined_and_padded() -> None:
    narrow = examples(soft=True)
    more = replace(
        narrow, tensors={**narrow.tensors, PROBABILITIES: torch.full((3, 2, 3), 1 / 3)}, soft_ids=tuple(range(18))
    )
    soft = joined([narrow.rows(), more.rows()]).soft
    assert soft is not None
    assert soft.ids.shape == (6, 2, 3)
    assert soft.ids[0].tolist() == [[7, 8, 0], [0, 0, 0]]
    assert soft.probabilities[0].tolist() == [[0.75, 0.25, 0.0], [0.0, 0.0, 0.0]]
    assert soft.ids[3].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert joined([narrow.rows(), examples().rows()]).soft is None


def test_answers_of_different_lengths_are_filled() -> None:
    answered = examples().answered([(1,), (2, 3, 4), (5, 6)])
    assert answered.answers == (1, -1, -1, 2, 3, 4, 5, 6, -1)
    assert [answered.answer(i) for i in range(3)] == [(1,), (2, 3, 4), (5, 6)]


def test_it_survives_the_wire_and_is_what_is_expected() -> None:
    again = unpack(SyntheticExamples, pack(examples()))
    assert pack(again) == pack(examples())
    expected = expected_examples(LARGEST, again)
    assert expected.vectors.shape == (3, 2, 5)
    assert (expected.prompt, expected.answers, expected.classes) == (again.prompt, again.answers, again.classes)
    assert float(expected.vectors.max()) == pytest.approx(0.1), "the values are not taken from the reply"
    none = replace(examples(), tensors={VECTORS: torch.zeros(0, 2, 5)}, answers=(), classes=())
    assert len(expected_examples(LARGEST, none)) == 0


def vectors(values: Any) -> Callable[[SyntheticExamples], SyntheticExamples]:
    return lambda it: replace(it, tensors={VECTORS: values})


WRONG: dict[str, tuple[Callable[[SyntheticExamples], SyntheticExamples], str]] = {
    "no vectors": (lambda it: replace(it, tensors={}), "no vectors"),
    "width": (vectors(torch.zeros(3, 2, 6)), "vectors of an unexpected form"),
    "virtual tokens": (vectors(torch.zeros(3, 3, 5)), "vectors of an unexpected form"),
    "dtype": (vectors(torch.zeros(3, 2, 5, dtype=torch.float64)), "vectors of an unexpected form"),
    "NaN": (vectors(torch.full((3, 2, 5), torch.nan)), "not finite"),
    "count": (vectors(torch.zeros(4, 2, 5)), "number of examples"),
    "too many": (lambda it: replace(vectors(torch.zeros(7, 2, 5))(it), classes=(0,) * 7), "number of examples"),
    "class": (lambda it: replace(it, classes=(0, 0, -1)), "unknown class"),
    "boolean class": (lambda it: replace(it, classes=(0, 0, True)), "unknown class"),
    "long prompt": (lambda it: replace(it, prompt=(1, 1, 1, 1, 1, -1, -2)), "prompt that is too long"),
    "vocabulary": (lambda it: replace(it, prompt=(50, -1, -2)), "outside the vocabulary"),
    "text": (lambda it: replace(it, prompt=("a", -1, -2)), "outside the vocabulary"),  # type: ignore[arg-type]
    "order": (lambda it: replace(it, prompt=(40, -2, -1)), "virtual tokens in order"),
    "missing virtual token": (lambda it: replace(it, prompt=(40, -1)), "virtual tokens in order"),
    "uneven answers": (lambda it: replace(it, answers=(7, 0, 7, 0, 9)), "different lengths"),
    "long answers": (lambda it: replace(it, answers=(1,) * 12), "answers that are too long"),
    "no answers": (lambda it: replace(it, answers=()), "answers that are too long"),
    "answer id": (lambda it: replace(it, answers=(7, 0, 7, 0, 99, 0)), "answer with an id outside"),
    "empty answer": (lambda it: replace(it, answers=(7, 0, 7, 0, -1, -1)), "answer without tokens"),
    "soft labels": (lambda it: examples(soft=True), "soft labels that were not asked for"),
    "soft ids": (lambda it: replace(it, soft_ids=(1,)), "ids of soft labels without probabilities"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_malformed_examples_are_refused(kind: str) -> None:
    change, problem = WRONG[kind]
    examples().check_within(LARGEST)
    with pytest.raises(SyntheticExamplesError, match=problem):
        change(examples()).check_within(LARGEST)


def test_malformed_soft_labels_are_refused() -> None:
    probabilities = torch.ones(6, 1, 2)
    largest = replace(LARGEST, tensors={**LARGEST.tensors, PROBABILITIES: probabilities})
    good = examples(soft=True)
    good.check_within(largest)
    for values, ids, problem in (
        (torch.full((3, 1, 2), -0.5), good.soft_ids, "no probabilities"),
        (torch.full((3, 1, 2), 0.9), good.soft_ids, "no probabilities"),
        (torch.full((3, 1, 3), 0.1), good.soft_ids, "unexpected form"),
        (torch.full((3, 2), 0.1), good.soft_ids, "unexpected form"),
        (good.tensors[PROBABILITIES], (7, 50) * 3, "outside the vocabulary"),
        (good.tensors[PROBABILITIES], (7,), "outside the vocabulary"),
    ):
        bad = replace(good, tensors={**good.tensors, PROBABILITIES: values}, soft_ids=ids)
        with pytest.raises(SyntheticExamplesError, match=problem):
            bad.check_within(largest)
    with pytest.raises(SyntheticExamplesError, match="not asked for, or none"):
        examples().check_within(largest)


def test_rows_that_cannot_be_read_are_refused() -> None:
    for arguments, problem in (
        (((),), "at least one row"),
        (((((1, -1), (2,)),),), "virtual token -1 of the extra rows has no vector"),
        (((((1, -3), (2,)),), torch.zeros(2, 5)), "virtual token -3"),
    ):
        with pytest.raises(ValueError, match=problem):
            ExtraRows(*arguments)
