"""Training of steered LoRAs: against autograd on named tensors, in groups, and what is counted."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.federation.test_distillation import plain_logits
from tests.federation.test_preferences import assert_close, log_probability
from tests.pairs import double_bank, training_pairs

from fedamole.evaluation.preferences import AnswerPair
from fedamole.federation.local import LocalTask, fit
from fedamole.federation.method import TrainingResult
from fedamole.federation.objective import objective_of
from fedamole.federation.randomness import torch_generator
from fedamole.federation.settings import TrainingSettings
from fedamole.federation.steering import Peekable, SteeredRequest
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.batch import collate
from fedamole.model.params import Adapter, new_shared
from fedamole.model.steering import SteeredAdapter, example_states, new_encoder, rank_scales, steered

SETTINGS = TrainingSettings(local_steps=5, batch_size=2, learning_rate=1e-2, objective="preference", beta=0.3)
OBJECTIVE = objective_of(SETTINGS)


@pytest.fixture(scope="module")
def bank(runs: Any) -> Bank:
    return double_bank(runs)


@pytest.fixture(scope="module")
def pairs(runs: Any) -> dict[str, list[AnswerPair]]:
    return training_pairs(runs)


def adapter(bank: Bank, context_examples: int = 3) -> SteeredAdapter:
    g, base = torch.Generator().manual_seed(0), bank.base
    lora = {key: (t if t.any() else t + 0.01).double() for key, t in new_shared(base.shapes, 2, g).items()}
    encoder = {key: tensor.double() for key, tensor in new_encoder(base.shapes, base.width, 2, 8, g).items()}
    spec = AdapterSpec(2, 4.0, 0.0)
    return SteeredAdapter(spec, lora, encoder=encoder, heads=2, context_examples=context_examples)


def task(bank: Bank, name: str, rows: Any) -> LocalTask:
    return LocalTask(name, SteeredRequest(adapter(bank)), rows, 1e-2)


def trained(results: Any) -> list[TrainingResult]:
    assert all(isinstance(result.adapter, SteeredAdapter) for result in results)
    return list(results)


def plainly(bank: Bank, start: LocalTask, preference: bool) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The same training by autograd on the tensors of LoRA and encoder together."""
    model = start.fit.adapter
    assert isinstance(model, SteeredAdapter)
    named = {name: t.clone().requires_grad_() for name, t in {**model.tensors, **model.encoder}.items()}
    adam = torch.optim.Adam(named.values(), lr=1e-2)
    order, draws = (torch_generator(3, purpose, start.client, 1) for purpose in ("order", "context"))
    queue, sizes = list[int](), list[int]()
    for _ in range(SETTINGS.local_steps):
        while len(queue) < 2:
            queue += torch.randperm(len(start.rows), generator=order).tolist()
        targets, queue = queue[:2], queue[2:]
        free = [i for i in range(len(start.rows)) if i not in targets]
        sizes.append(int(torch.randint(4, (), generator=draws)))
        context = [free[i] for i in torch.randperm(len(free), generator=draws).tolist()[: sizes[-1]]]
        states = torch.empty(0, 2, bank.base.width)
        if context:
            states = example_states(bank, [start.rows[i] for i in context])[0]
        encoder = {name: tensor for name, tensor in named.items() if name in model.encoder}
        lora = {name: tensor for name, tensor in named.items() if name in model.tensors}
        scaled = steered(lora, rank_scales(encoder, states, 2, 2))
        adam.zero_grad()
        sum(loss_of(bank, model, scaled, start.rows[i], preference) / 2 for i in targets).backward()  # type: ignore[union-attr]
        if not context:
            for name in encoder:
                named[name].grad = None
        adam.step()
    return {name: tensor.detach() for name, tensor in named.items()}, sizes


def loss_of(bank: Bank, model: Adapter, lora: dict[str, torch.Tensor], row: Any, preference: bool) -> torch.Tensor:
    prompt, answers = row
    ratios = []
    for answer in answers if preference else [answers]:
        batch = collate([[(prompt, answer)]], bank.base.pad_id)
        own = log_probability(plain_logits(bank, model, lora, batch), batch.labels)
        with torch.no_grad(), bank.forward(batch) as logits:
            reference = log_probability(logits, batch.labels)
        ratios.append(own - reference)
    if preference:
        return -torch.log(torch.sigmoid(0.3 * (ratios[0] - ratios[1])))
    return -own / len(answers)


def all_tensors(result: TrainingResult) -> Mapping[str, torch.Tensor]:
    assert isinstance(result.adapter, SteeredAdapter)
    return {**result.adapter.tensors, **result.adapter.encoder}


def test_preferences_are_trained_as_by_autograd(bank: Bank, pairs: dict[str, list[AnswerPair]]) -> None:
    tasks = [task(bank, name, rows) for name, rows in pairs.items()]
    results = trained(OBJECTIVE.fit(bank, tasks, SETTINGS, seed=3, round_=1))
    for start, result in zip(tasks, results, strict=True):
        expected, sizes = plainly(bank, start, preference=True)
        assert len(set(sizes)) > 1, "the number of examples differs between steps"
        assert_close(all_tensors(result), expected)


def test_answers_are_trained_as_by_autograd(bank: Bank, pairs: dict[str, list[AnswerPair]]) -> None:
    """Batches of one answer each: the loss is a mean over tokens, not over answers."""
    rows = [(prompt, answers[0]) for prompt, answers in pairs["pairs-fond"]]
    rows = [(prompt, answer) for prompt, answer in rows if len(answer) == len(rows[0][1])]
    start = task(bank, "pairs-fond", rows)
    (result,) = trained(fit(bank, [start], replace(SETTINGS, objective="answer"), seed=3, round_=1))
    assert_close(all_tensors(result), plainly(bank, start, preference=False)[0])


def test_a_group_trains_as_each_client_alone(bank: Bank, pairs: dict[str, list[AnswerPair]]) -> None:
    """Also where one client takes fewer steps; and clipping bounds both gradients."""
    settings = replace(SETTINGS, local_epochs=1, accumulation=2, clip_norm=0.01)
    tasks = [task(bank, name, rows[: 8 + 4 * i]) for i, (name, rows) in enumerate(pairs.items())]
    together = trained(OBJECTIVE.fit(bank, tasks, settings, seed=3, round_=1))
    assert together[0].steps < together[1].steps
    for start, result in zip(tasks, together, strict=True):
        (single,) = trained(OBJECTIVE.fit(bank, [start], settings, seed=3, round_=1))
        assert_close(all_tensors(single), all_tensors(result))
        assert (single.teacher_tokens, single.teacher_examples) == (result.teacher_tokens, result.teacher_examples)


def test_a_row_is_read_once_as_an_example(bank: Bank, pairs: dict[str, list[AnswerPair]]) -> None:
    """The reference reads 10 pairs in 5 steps; of 4 rows at most 4 more are read, and never those of the batch."""
    (result,) = trained(
        OBJECTIVE.fit(bank, [task(bank, "pairs-fond", pairs["pairs-fond"][:4])], SETTINGS, seed=3, round_=1)
    )
    assert 10 < result.teacher_examples <= 14


def test_batches_can_be_read_before_they_are_taken() -> None:
    batches = Peekable(iter([[((1,), (2,))], [((3,), (4,))], [((5,), (6,))]]))
    assert batches.peek(2) == [((1,), (2,)), ((3,), (4,))] == batches.peek(2)
    assert [next(batches), next(batches), next(batches)] == [[((1,), (2,))], [((3,), (4,))], [((5,), (6,))]]
