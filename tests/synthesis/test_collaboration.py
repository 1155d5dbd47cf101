"""Agreement of synthetic examples with the clients' mean logits, and what clients send by class, by hand."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedamole.synthesis.class_reply import (
    ClassReply,
    expected_logits,
    first_tokens,
    logits_for,
    options_hash,
    with_mean_labels,
    without_labels,
)
from fedamole.synthesis.collaboration import DIRECTIONS, Collaborative, sliced_wasserstein
from fedamole.synthesis.examples import PROBABILITIES, VECTORS, SyntheticExamplesError
from fedamole.synthesis.matching import DistributionMatching, Features


def column(*values: float) -> Tensor:
    return torch.tensor([[value] for value in values])


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ((0.0, 2.0), (1.0, 3.0), 1.0),
        ((2.0, 0.0), (1.0, 3.0), 1.0),  # a set has no order
        ((0.0, 2.0), (0.0, 2.0), 0.0),
        ((0.0, 2.0), (0.0, 1.0, 2.0), 0.0),  # {0, 2} becomes {0, 1, 2}
        ((0.0, 4.0), (1.0, 2.0, 9.0), 2.0),  # {0, 2, 4}: 1 + 0 + 5 over 3
        ((5.0,), (4.0, 8.0), 2.0),  # {5, 5}: 1 + 3 over 2
    ],
)
def test_distances_of_sets_of_numbers(first: tuple[float, ...], second: tuple[float, ...], distance: float) -> None:
    """In one dimension every direction is +1 or -1."""
    for a, b in ((first, second), (second, first)):
        assert float(sliced_wasserstein(column(*a), column(*b))) == pytest.approx(distance, abs=1e-6)


def test_a_shift_in_the_plane_is_the_mean_of_its_projections() -> None:
    """The mean of |cos| over all directions is 2 / pi; here over 50 of them, which are always the same."""
    points = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    shift = torch.tensor([3.0, 0.0])
    distance = sliced_wasserstein(points, points + shift)
    assert DIRECTIONS == 50
    assert float(distance) == pytest.approx(3 * 2 / torch.pi, rel=0.15)
    assert torch.equal(distance, sliced_wasserstein(points, points + shift))


def test_the_term_by_hand() -> None:
    """Class 0: the logits (2, 0) and (4, 0) of tokens 3 and 1 are (1, -1) and (2, -2) without their mean.

    Along (1, -1) / sqrt 2 they are sqrt 2 and 2 sqrt 2, the clients' (0, 0) is 0 and (2, -2) is 2 sqrt 2. So the sets
    are {1, 2} and {0, 2} times sqrt 2, at a distance of 0.5 sqrt 2, and each direction scales that by its cosine.
    """
    logits = torch.tensor([[9.0, 0.0, 9.0, 2.0], [9.0, 0.0, 9.0, 4.0], [0.0, 7.0, 0.0, 1.0]])
    synthetic, classes = Features(torch.zeros(3, 1), logits), torch.tensor([0, 0, 1])
    sent = {0: torch.tensor([[1.0, 1.0], [2.0, -2.0]]), 5: torch.ones(1, 2)}
    base = DistributionMatching()
    real: Mapping[int, Features] = {1: Features(torch.ones(1, 1), torch.zeros(1, 4))}
    without = base.loss(synthetic, classes, real)

    def term(weight: float) -> float:
        return float(Collaborative(base, weight, (3, 1), sent).loss(synthetic, classes, real) - without)

    along = torch.tensor([[1.0, -1.0]]) / 2**0.5
    unit = float(sliced_wasserstein(torch.zeros(1, 2), along))
    assert term(1.0) == pytest.approx(0.5 * 2**0.5 * unit, rel=1e-4)
    assert term(3.0) == pytest.approx(1.5 * 2**0.5 * unit, rel=1e-4)
    assert Collaborative(base, 0.0, (3, 1), sent).loss(synthetic, classes, real) == without
    assert Collaborative(base, 1.0, (3, 1), {}).loss(synthetic, classes, real) == without


def test_options_and_their_first_tokens() -> None:
    assert first_tokens(((7, 0), (8, 0), (7, 9, 0))) == (7, 8)
    assert options_hash([(7, 0), (8, 0)]) == options_hash([[7, 0], [8, 0]])
    assert options_hash([(7, 0), (8, 0)]) != options_hash([(8, 0), (7, 0)])
    assert options_hash([(7, 0), (8,)]) != options_hash([(7,), (0, 8)])


def measured(options: str, **logits: list[float]) -> ClassReply:
    return ClassReply({}, (), (), (), (), {name[1:]: torch.tensor(row) for name, row in logits.items()}, options)


def test_a_client_gets_the_logits_of_all_with_its_options() -> None:
    x, y = "a" * 64, "b" * 64
    replies = {
        "d": measured(x, c0=[4.0, 5.0]),
        "a": measured(x, c0=[1.0, 2.0], c1=[3.0, 0.0]),
        "b": measured(y, c0=[9.0, 9.0]),
        "c": measured(x, c0=[1.0, 2.0, 3.0]),  # another width under the same hash
        "e": measured(""),
    }
    sent = logits_for(replies["d"], replies)
    assert {label: rows.tolist() for label, rows in sent.items()} == {"0": [[1.0, 2.0], [4.0, 5.0]], "1": [[3.0, 0.0]]}
    assert logits_for(replies["b"], replies)["0"].tolist() == [[9.0, 9.0]]
    assert logits_for(replies["e"], replies) == {}


def test_mean_logits_are_checked() -> None:
    good = measured("a" * 64, c0=[1.0, 2.0], c2=[3.0, 0.0])
    expected = expected_logits(good, 3)
    assert set(expected.logits) == {"0", "2"}
    assert expected.logits["0"].tolist() == [10.0, 10.0]
    assert (expected.options, expected.tensors, expected.soft_ids) == ("a" * 64, {}, ())
    assert expected_logits(measured(""), 3).logits == {}
    bad = [
        measured("a" * 64, c3=[1.0, 2.0]),
        measured("a" * 64, cx=[1.0, 2.0]),
        measured("a" * 64, c00=[1.0, 2.0]),
        measured("a" * 64, c0=[1.0] * 4),
        measured("a" * 64, c0=[]),
        measured("a" * 64, c0=[1.0, 2.0], c1=[1.0]),
        measured("a" * 63, c0=[1.0]),
        measured("", c0=[1.0]),
        measured("a" * 64),
        replace(good, logits={"0": torch.zeros(1, 2)}),
    ]
    for reply in bad:
        with pytest.raises(SyntheticExamplesError, match="mean logits by class"):
            expected_logits(reply, 3)


def examples(labels: list[list[float]], answers: tuple[int, ...], ids: tuple[int, ...]) -> ClassReply:
    """Examples of one virtual token, with soft labels over two token ids each."""
    count = len(answers)
    tensors = {VECTORS: torch.zeros(count, 1, 2), PROBABILITIES: torch.tensor(labels).view(count, 1, 2)}
    return ClassReply(tensors, (-1,), answers, tuple(range(count)), ids * count)


def test_soft_labels_are_averaged_by_class() -> None:
    """Class 5 has labels at a and b, class 6 at b alone; c has none of its own, d other options, e free text."""
    replies = {
        "b": examples([[0.6, 0.4], [0.2, 0.8]], (5, 6), (5, 6)),
        "a": examples([[1.0, 0.0]], (5,), (5, 6)),
        "c": examples([[0.0, 0.0], [0.0, 0.0]], (5, 6), (5, 6)),
        "d": examples([[0.3, 0.7]], (5,), (5, 7)),
        "e": examples([[0.0, 0.0]], (9,), (0, 0)),
    }
    means = {name: each.tensors[PROBABILITIES][:, 0].tolist() for name, each in with_mean_labels(replies).items()}
    five, six = pytest.approx([0.8, 0.2]), pytest.approx([0.2, 0.8])
    assert means == {"a": [five], "b": [five, six], "c": [five, six], "d": [pytest.approx([0.3, 0.7])], "e": [[0, 0]]}
    kept = without_labels(replies)["b"]
    assert set(kept.tensors) == {VECTORS}
    assert kept.rows().soft is None
