"""Training on extra rows: which rows are read, tables of several clients, and soft labels by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.training import alone, random_lora

from fedamole.experiment import Prepared, prepare
from fedamole.federation.distillation import Distillation
from fedamole.federation.local import LocalTask, fit
from fedamole.federation.method import TrainingRequest, TrainingResult
from fedamole.federation.settings import TrainingSettings
from fedamole.federation.soft_labels import soft_divergences
from fedamole.model.bank import Bank
from fedamole.model.batch import TokenPair
from fedamole.model.params import VECTORS, Adapter
from fedamole.model.prompt import PromptSpec, new_prompt
from fedamole.synthesis.rows import ExtraRows, SoftLabels

OWN: list[TokenPair] = [((5, 9, 40), (20, 31, 0)), ((5, 66), (19, 0))]
MORE: tuple[TokenPair, ...] = (((7, -1, -2), (25, 0)), ((8, -3), (26, 27, 0)))
SETTINGS = TrainingSettings(local_steps=4, batch_size=2, learning_rate=0.01)


@pytest.fixture(scope="module")
def prepared(runs: Any) -> Prepared:
    return prepare(runs.load("fedit"))


@pytest.fixture(scope="module")
def bank(prepared: Prepared) -> Bank:
    return Bank(prepared.base)


def table(bank: Bank, rows: int = 3, seed: int = 1) -> torch.Tensor:
    return 0.2 * torch.randn(rows, bank.base.width, generator=torch.Generator().manual_seed(seed))


def trained(bank: Bank, *requests: TrainingRequest, rows: Any = OWN) -> list[TrainingResult]:
    tasks = [LocalTask(f"client-{i}", request, rows, 0.01) for i, request in enumerate(requests)]
    results = fit(bank, tasks, SETTINGS, seed=0, round_=0)
    assert all(isinstance(result, TrainingResult) for result in results)
    return results  # type: ignore[return-value]


def close(first: Adapter, second: Adapter) -> bool:
    return all(torch.allclose(first.tensors[key], second.tensors[key], atol=1e-5) for key in first.tensors)


def test_extra_rows_are_read_beside_or_in_place_of_the_own_ones(bank: Bank) -> None:
    """The result is that of a training whose own rows are these."""
    vectors, start = table(bank), random_lora(bank)
    extra = ExtraRows(MORE, vectors)
    with_table = replace(start, fixed={VECTORS: vectors})
    for own_rows, rows in ((True, [*OWN, *MORE]), (False, [*MORE])):
        (result,) = trained(bank, TrainingRequest(start, extra=extra, own_rows=own_rows))
        expected = alone(bank, with_table, rows, SETTINGS, client="client-0")
        assert all(torch.equal(result.adapter.tensors[k], t) for k, t in expected.adapter.tensors.items())
        assert (result.loss, result.tokens, result.steps) == (expected.loss, expected.tokens, 4)
        assert result.adapter.fixed == {}


def test_clients_of_a_group_read_their_own_extra_rows(bank: Bank) -> None:
    """Tables of three and of two vectors, one client without its own rows: as each of them alone."""
    short = ExtraRows((((7, -2, -1), (25, 0)),), table(bank, 2, 5))
    requests = [
        TrainingRequest(random_lora(bank), extra=ExtraRows(MORE, table(bank))),
        TrainingRequest(random_lora(bank, 1), extra=short, own_rows=False),
    ]
    together = trained(bank, *requests)
    for i, request in enumerate(requests):
        (result,) = fit(bank, [LocalTask(f"client-{i}", request, OWN, 0.01)], SETTINGS, seed=0, round_=0)
        assert isinstance(result, TrainingResult)
        assert close(result.adapter, together[i].adapter)
    assert not close(together[0].adapter, trained(bank, TrainingRequest(random_lora(bank)))[0].adapter)


def test_steps_are_those_of_the_own_examples(bank: Bank) -> None:
    """An epoch of the round is one over the client's own examples, whatever is added."""
    task = LocalTask("a", TrainingRequest(random_lora(bank), extra=ExtraRows(MORE, table(bank))), OWN, 0.01)
    assert task.steps(replace(SETTINGS, local_epochs=3)) == 3


# --- soft labels ----------------------------------------------------------------------------------------------


def test_the_divergence_by_hand() -> None:
    """Logits (ln 3, 0): q = (3/4, 1/4). p = (1/2, 1/2): KL = ln(2/3)/2 + ln(2)/2. At T = 2: q = (sqrt 3, 1) / sum."""
    logits = torch.tensor([[math.log(3.0), 0.0], [math.log(3.0), 0.0], [math.log(3.0), 0.0]])
    ids = torch.tensor([[0, 1], [1, 0], [0, 1]])
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]])
    result = soft_divergences(logits, ids, p, torch.tensor([1.0, 1.0, 2.0]))
    root = math.sqrt(3) / (1 + math.sqrt(3))
    at_two = 4 * (0.5 * math.log(0.5 / root) + 0.5 * math.log(0.5 / (1 - root)))
    assert result.tolist() == pytest.approx([0.5 * math.log(2 / 3) + 0.5 * math.log(2), 0.0, at_two], abs=1e-6)


def soft_request(bank: Bank, soft: SoftLabels, **term: float) -> TrainingRequest:
    extra = ExtraRows(MORE, table(bank), soft)
    return TrainingRequest(random_lora(bank), extra=extra, own_rows=False, distillation=Distillation(**term))


def certain(bank: Bank, first: int, second: int) -> SoftLabels:
    """All probability on one id at the last answer token of each row; the other tokens keep their hard labels."""
    ids, probabilities = torch.zeros(2, 3, 2, dtype=torch.long), torch.zeros(2, 3, 2)
    for row, position, token in ((0, 1, first), (1, 2, second)):
        ids[row, position, 0], probabilities[row, position, 0] = token, 1.0
    return SoftLabels(ids, probabilities)


def test_certain_soft_labels_are_hard_labels(bank: Bank) -> None:
    """With the weight 1, a distribution that is certain of an id trains as this token does; 0 ignores it."""
    other = (((7, -1, -2), (25, 30)), ((8, -3), (26, 27, 33)))
    plain = TrainingRequest(random_lora(bank), extra=ExtraRows(other, table(bank)), own_rows=False)
    hard = TrainingRequest(random_lora(bank), extra=ExtraRows(MORE, table(bank)), own_rows=False)
    soft = certain(bank, 30, 33)
    assert close(trained(bank, soft_request(bank, soft, weight=1.0))[0].adapter, trained(bank, plain)[0].adapter)
    assert close(trained(bank, soft_request(bank, soft, weight=0.0))[0].adapter, trained(bank, hard)[0].adapter)
    assert not close(trained(bank, soft_request(bank, soft, weight=0.5))[0].adapter, trained(bank, hard)[0].adapter)


def test_without_probabilities_a_token_keeps_its_hard_label(bank: Bank) -> None:
    none = SoftLabels(torch.zeros(2, 2, 3, dtype=torch.long), torch.zeros(2, 2, 3))
    hard = TrainingRequest(random_lora(bank), extra=ExtraRows(MORE, table(bank)), own_rows=False)
    assert close(trained(bank, soft_request(bank, none, weight=1.0))[0].adapter, trained(bank, hard)[0].adapter)


def test_soft_labels_of_different_sizes_share_a_group_and_a_padded_base_gives_the_same(bank: Bank) -> None:
    wide = SoftLabels(torch.tensor([[[30, 31, 32]], [[33, 34, 35]]]), torch.tensor([[[0.5, 0.25, 0.25]]] * 2))
    requests = [soft_request(bank, certain(bank, 30, 33), weight=1.0), soft_request(bank, wide, weight=0.7)]
    together = trained(bank, *requests)
    packs, bank.packs = bank.packs, False
    try:
        padded = trained(bank, *requests)
    finally:
        bank.packs = packs
    for i, request in enumerate(requests):
        (result,) = fit(bank, [LocalTask(f"client-{i}", request, OWN, 0.01)], SETTINGS, seed=0, round_=0)
        assert isinstance(result, TrainingResult)
        assert close(result.adapter, together[i].adapter)
        assert close(padded[i].adapter, together[i].adapter)


def test_a_teacher_reads_extra_rows_too(bank: Bank) -> None:
    start, extra = random_lora(bank), ExtraRows(MORE, table(bank))
    taught = TrainingRequest(
        start, extra=extra, own_rows=False, teacher=random_lora(bank, 4), distillation=Distillation(1.0)
    )
    (result,) = trained(bank, taught)
    assert result.teacher_tokens == result.tokens
    assert not close(result.adapter, trained(bank, TrainingRequest(start, extra=extra, own_rows=False))[0].adapter)


def test_requests_that_make_no_sense_are_refused(bank: Bank) -> None:
    start, extra = random_lora(bank), ExtraRows(MORE, table(bank))
    soft = ExtraRows(MORE, table(bank), certain(bank, 30, 33))
    spec = PromptSpec(2)
    prompt = Adapter(spec, new_prompt(spec, bank.base.width, 0.1, torch.Generator()))
    term = Distillation()
    partner = TrainingRequest(start, distillation=term)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"adapter": start, "own_rows": False}, "needs extra rows"),
        ({"adapter": start, "extra": soft}, "must say by `distillation`"),
        ({"adapter": start, "extra": soft, "teacher": start, "distillation": term}, "not both"),
        ({"adapter": start, "extra": extra, "partner": partner, "distillation": term}, "own rows alone"),
        ({"adapter": prompt, "extra": extra}, "soft prompt cannot read"),
    ]
    for arguments, problem in cases:
        with pytest.raises(ValueError, match=problem):
            TrainingRequest(**arguments)
    for ids, probabilities in ((torch.zeros(2, 1, 2), torch.zeros(2, 1, 3)), (torch.zeros(2, 1), torch.zeros(2, 1))):
        with pytest.raises(ValueError, match="of one shape"):
            SoftLabels(ids, probabilities)
    with pytest.raises(ValueError, match="soft labels for 1 extra rows"):
        ExtraRows(MORE[:1], table(bank), certain(bank, 1, 2))
    with pytest.raises(ValueError, match="different prompts"):
        ExtraRows((MORE[0], MORE[0]), table(bank), certain(bank, 1, 2))
