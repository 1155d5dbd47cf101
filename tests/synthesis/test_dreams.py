"""Dreams by hand: their loss and its gradient, their labels, and what is averaged over clients."""

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedamole.federation.record import pack, unpack
from fedamole.synthesis.dream_exchange import DreamReply, DreamState, averaged, expected_dreams, labelled_rows
from fedamole.synthesis.dreams import Dreaming, entropies, jensen_shannon, mean_labels, states_distance, top_labels
from fedamole.synthesis.examples import PROBABILITIES, VECTORS, SyntheticExamplesError
from fedamole.synthesis.matching import Features
from fedamole.synthesis.rows import SoftLabels

SEEN = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]])
"""Mean (1, 2), variance (1, 4)."""
CERTAIN = [50.0, -50.0]


def logs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).log_softmax(1)


def test_entropy_and_divergence() -> None:
    assert entropies(logs([0.0, 0.0], CERTAIN)).tolist() == pytest.approx([math.log(2), 0.0])
    first, second = logs([0.0, 0.0], CERTAIN), logs([0.0, 0.0], [-50.0, 50.0])
    assert jensen_shannon(first, second).tolist() == pytest.approx([0.0, math.log(2)], abs=1e-6)
    assert jensen_shannon(second, first).tolist() == pytest.approx([0.0, math.log(2)], abs=1e-6)


def test_distance_of_states() -> None:
    """Variance 0 where (1, 4) is right: 17 / 17. A mean of (2, 2): 1 / 5 more. The real states themselves: 0."""
    assert float(states_distance(torch.tensor([[1.0, 2.0]]), SEEN)) == pytest.approx(1.0)
    assert float(states_distance(torch.tensor([[2.0, 2.0]] * 2), SEEN)) == pytest.approx(1.2)
    assert float(states_distance(SEEN, SEEN)) == 0
    assert float(states_distance(100 * torch.tensor([[2.0, 2.0]]), 100 * SEEN)) == pytest.approx(1.2), "no unit"
    assert math.isfinite(float(states_distance(SEEN, SEEN[:1])))


def test_the_loss_by_hand() -> None:
    """Entropies log 2 and 0; a layer at distance 1.2 and one at 0; divergences 0 and log 2."""
    logits, other = torch.tensor([[0.0, 0.0], CERTAIN]), torch.tensor([[0.0, 0.0], [-50.0, 50.0]])
    dreams = Features(torch.zeros(2, 2), logits, (torch.tensor([[2.0, 2.0]] * 2), SEEN[:2]), other)
    real = {0: Features(torch.zeros(4, 2), torch.zeros(4, 2), (SEEN, SEEN[:2]))}
    half, classes = math.log(2) / 2, torch.zeros(2)
    assert float(Dreaming(0.0, 0.0).loss(dreams, classes, real)) == pytest.approx(half)
    assert float(Dreaming(3.0, 0.0).loss(dreams, classes, real)) == pytest.approx(half + 3 * 1.2)
    assert float(Dreaming(3.0, 2.0).loss(dreams, classes, real)) == pytest.approx(half + 3 * 1.2 - 2 * half)
    alone = replace_other(dreams, None)
    assert float(Dreaming(3.0, 2.0).loss(alone, classes, real)) == pytest.approx(half + 3 * 1.2)


def replace_other(features: Features, other: Tensor | None) -> Features:
    return features._replace(other=other)


def test_options_alone_count() -> None:
    """Of three tokens, the second has nearly all of the probability, and the other two are equal."""
    dreams = Features(torch.zeros(1, 2), torch.tensor([[0.0, 99.0, 0.0]]))
    assert float(Dreaming(3.0, 2.0).loss(dreams, torch.zeros(1), {})) == pytest.approx(0.0, abs=1e-6)
    assert float(Dreaming(3.0, 2.0, (0, 2)).loss(dreams, torch.zeros(1), {})) == pytest.approx(math.log(2))


def test_the_gradient_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    own, student, layer, real = draw(3, 4), draw(3, 4), draw(3, 2), draw(5, 2)

    def loss(vectors: Tensor) -> Tensor:
        hidden = (vectors @ layer).tanh()
        dreams = Features(hidden, vectors @ own, (hidden, hidden.square()), vectors @ student)
        objective = Dreaming(3.0, 6.0, (0, 1, 3))
        return objective.loss(dreams, torch.zeros(4), {0: Features(real, real, (real, real.square()))})

    assert torch.autograd.gradcheck(loss, draw(4, 3).requires_grad_())


def test_labels_are_the_most_likely_tokens() -> None:
    logits = torch.tensor([[0.3, 0.5, 0.2], [0.1, 0.1, 0.8]]).log()
    two = top_labels(logits, (7, 8, 9), 2)
    assert two.ids.tolist() == [[[8, 7]], [[9, 7]]]
    torch.testing.assert_close(two.probabilities, torch.tensor([[[0.625, 0.375]], [[8 / 9, 1 / 9]]]))
    padded = top_labels(logits[:1], (7, 8, 9), 4)
    assert padded.ids.tolist() == [[[8, 7, 9, 0]]]
    torch.testing.assert_close(padded.probabilities, torch.tensor([[[0.5, 0.3, 0.2, 0.0]]]))


def labels(ids: list[int], probabilities: list[float]) -> SoftLabels:
    return SoftLabels(torch.tensor([[ids]]), torch.tensor([[probabilities]]))


def test_mean_labels_cover_the_ids_of_all_clients() -> None:
    """(0.9 + 0.3) / 2 = 0.6, 0.7 / 2 = 0.35 and 0.1 / 2 = 0.05, of which the two largest remain."""
    same = mean_labels([labels([5, 6, 0], [0.8, 0.2, 0.0]), labels([6, 5, 0], [0.6, 0.4, 0.0])])
    assert same.ids.tolist() == [[[5, 6, 0]]]
    torch.testing.assert_close(same.probabilities, torch.tensor([[[0.6, 0.4, 0.0]]]))
    union = mean_labels([labels([1, 2], [0.9, 0.1]), labels([3, 1], [0.7, 0.3])])
    assert union.ids.tolist() == [[[1, 3]]]
    torch.testing.assert_close(union.probabilities, torch.tensor([[[0.6 / 0.95, 0.35 / 0.95]]]))


# --- what travels ---------------------------------------------------------------------------------------------

PROMPT = (40, -1, -2, 41)


def moved(value: float, prompt: tuple[int, ...] = PROMPT) -> DreamReply:
    return DreamReply({VECTORS: torch.full((2, 2, 5), value)}, prompt, "")


def labelled(*first: float) -> DreamReply:
    probabilities = torch.tensor([[[it, 1 - it]] for it in first])
    return DreamReply({PROBABILITIES: probabilities}, PROMPT, "", (7, 8) * len(first))


def test_clients_of_one_task_are_averaged() -> None:
    """Client c has another template; d takes no part. Its task is known for the next round, and that of all others."""
    state = DreamState({}, {}, {})
    replies = {"a": moved(1.0), "b": moved(3.0), "c": moved(9.0, (42, -1, -2)), "d": DreamReply({}, (), "")}
    after, any_labels = averaged(state, replies)
    assert not any_labels
    tasks = after.tasks
    assert (set(tasks), tasks["a"] == tasks["b"], tasks["a"] == tasks["c"]) == ({"a", "b", "c"}, True, False)
    assert after.dreams[tasks["a"]][VECTORS].unique().tolist() == [2.0]
    assert after.dreams[tasks["c"]][VECTORS].unique().tolist() == [9.0]
    assert after.known("a") == {}, "they have no labels yet"
    known, any_labels = averaged(after, {"a": labelled(0.2, 1.0), "b": labelled(0.6, 1.0)})
    assert any_labels
    torch.testing.assert_close(known.known("b")[PROBABILITIES], torch.tensor([[[0.6, 0.4]], [[1.0, 0.0]]]))
    assert known.known("b")["ids"].tolist() == [[[8, 7]], [[7, 0]]]
    rows = known.rows()
    assert rows.rows == (((40, -1, -2, 41), (8,)), ((40, -3, -4, 41), (7,)))
    assert rows.soft is not None
    own = labelled_rows(known.known("b"), (50, -1, -2)).rows
    assert own == (((50, -1, -2), (8,)), ((50, -3, -4), (7,))), "a client reads them in its own prompt"
    assert unpack(DreamState, pack(known)).tasks == known.tasks
    assert known.known("c") == known.known("nobody") == {}


def test_labels_of_dreams_that_are_not_known_are_left_out() -> None:
    state = DreamState({}, {}, {})
    assert averaged(state, {"a": labelled(0.2)}) == (state, False)


MOVED = DreamReply({VECTORS: torch.zeros(2, 2, 5)}, (-1, -2, 49, 49), "")
LABELLED = DreamReply({PROBABILITIES: torch.full((2, 1, 2), 0.5)}, (-1, -2, 49, 49), "", (0, 0, 0, 0))


def test_honest_replies_are_compared_with_themselves() -> None:
    for template, reply in ((MOVED, moved(1.0)), (LABELLED, labelled(0.2, 1.0))):
        named = replace(reply, options="a" * 64)
        expected = expected_dreams(template, named)
        assert (expected.prompt, expected.options, expected.soft_ids) == (named.prompt, named.options, named.soft_ids)
        assert {name: it.shape for name, it in expected.tensors.items()} == {
            name: it.shape for name, it in reply.tensors.items()
        }
    assert float(expected_dreams(LABELLED, labelled(0.2, 1.0)).tensors[PROBABILITIES].norm()) == pytest.approx(2**0.5)
    nothing = DreamReply({}, (), "")
    assert expected_dreams(nothing, moved(1.0)) is nothing


BAD: Mapping[str, tuple[DreamReply, str]] = {
    "virtual": (moved(1.0, (40, -2, -1)), "virtual tokens in order"),
    "long": (moved(1.0, (40, 40, 40, -1, -2)), "too long"),
    "id": (moved(1.0, (50, -1, -2)), "outside the vocabulary"),
    "hash": (replace(moved(1.0), options="g" * 64), "hash"),
    "short hash": (replace(moved(1.0), options="a" * 63), "hash"),
    "negative": (labelled(1.2, 0.5), "no probabilities"),
    "sum": (DreamReply({PROBABILITIES: torch.ones(2, 1, 2)}, PROMPT, "", (7, 8, 7, 8)), "no probabilities"),
    "few": (labelled(0.2), "unexpected form"),
    "missing": (replace(labelled(0.2, 0.3), tensors={}), "unexpected form"),
    "soft id": (replace(labelled(0.2, 0.3), soft_ids=(7, 8, 7, 50)), "outside the vocabulary"),
    "float id": (replace(labelled(0.2, 0.3), soft_ids=(7, 8, 7, 8.0)), "outside the vocabulary"),  # type: ignore[arg-type]
    "count": (replace(labelled(0.2, 0.3), soft_ids=(7, 8)), "outside the vocabulary"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_replies_are_refused(name: str) -> None:
    reply, problem = BAD[name]
    template = LABELLED if PROBABILITIES in reply.tensors or reply.soft_ids else MOVED
    with pytest.raises(SyntheticExamplesError, match=problem):
        expected_dreams(template, reply)
