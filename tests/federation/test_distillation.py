"""Trainings that follow a frozen teacher or a partner: the divergence by hand, and `fit` against a plain loop."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.federation.test_lockstep import HARD, alone, assert_equal, tasks, trained
from tests.training import lora_spec

from fedamole.experiment import prepare
from fedamole.federation import passes
from fedamole.federation.distillation import Distillation, partner_logits, token_divergences
from fedamole.federation.local import DivergedError, LocalTask, fit
from fedamole.federation.lock_step import ClientWork
from fedamole.federation.method import TrainingRequest, TrainingResult
from fedamole.federation.penalties import Proximal
from fedamole.federation.probe import ProbeCounts, count_tokens
from fedamole.federation.randomness import torch_generator
from fedamole.federation.settings import TrainingSettings
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.batch import collate, token_losses
from fedamole.model.mixer import InstanceWeights
from fedamole.model.params import REFERENCES, Adapter, as_expert, expert_keys, shared_keys
from fedamole.model.prompt import PROMPT, PromptSpec
from fedamole.model.segments import Segments

SETTINGS = TrainingSettings(local_steps=5, batch_size=2, learning_rate=1e-2, clip_norm=0.5)
MUTUAL = Distillation(0.3, 2.0)


@pytest.fixture(scope="module")
def bank(runs: Any) -> Bank:
    base = prepare(runs.load("local_only")).base
    base.model.double()
    return Bank(base)


# --- the divergence -------------------------------------------------------------------------------------------


def test_the_divergence_by_hand() -> None:
    """At T = 2 (2, 0) is (0.7311, 0.2689); from one half each KL is ln 2 - 0.5822 = 0.1109, times 4 it is 0.4438.

    At T = 1 (0, ln 3) is (1/4, 3/4), and KL from it to one half each is ln 2 - 0.5623 = 0.1308.
    """
    other = torch.tensor([[2.0, 0.0], [0.0, math.log(3)]])
    result = token_divergences(other, torch.zeros(2, 2), torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(result, torch.tensor([0.4438, 0.1308]), rtol=0, atol=5e-5)
    assert token_divergences(other, other + 5, torch.tensor([2.0, 1.0])).abs().max() < 1e-6
    back = token_divergences(torch.zeros(2, 2), other, torch.tensor([2.0, 1.0]))
    assert (back - result).abs().min() > 1e-3, "it is not symmetric: the first argument is the one that is followed"


def test_its_gradient_is_that_of_the_follower_alone() -> None:
    """T^2 KL has the gradient T (softmax(own / T) - softmax(other / T)): 3 * (0.5 - 0.7311) for a difference of 3."""
    other, own = (torch.tensor([logits], requires_grad=True) for logits in ([3.0, 0.0], [0.0, 0.0]))
    token_divergences(other, own, torch.tensor([3.0])).sum().backward()
    assert other.grad is None
    assert own.grad is not None
    torch.testing.assert_close(own.grad, torch.tensor([[-0.6932, 0.6932]]), rtol=0, atol=1e-4)


def test_half_precision_is_computed_in_float32() -> None:
    logits = torch.tensor([[9.0, 1.0]])
    result = token_divergences(logits.bfloat16(), torch.zeros(1, 2).bfloat16(), torch.ones(1))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, token_divergences(logits, torch.zeros(1, 2), torch.ones(1)))


def test_partners_exchange_their_logits() -> None:
    logits = torch.arange(6.0).unsqueeze(1)
    assert partner_logits(logits, Segments((2, 2, 1, 1))).flatten().tolist() == [2.0, 3.0, 0.0, 1.0, 5.0, 4.0]


@pytest.mark.parametrize(
    ("weight", "temperature"), [(-0.1, 1.0), (1.1, 1.0), (math.nan, 1.0), (0.5, 0.0), (0.5, math.inf)]
)
def test_values_out_of_range_are_refused(weight: float, temperature: float) -> None:
    with pytest.raises(ValueError, match="of a distillation must be"):
        Distillation(weight, temperature)


# --- fit against a plain loop ---------------------------------------------------------------------------------


def plain_logits(bank: Bank, adapter: Adapter, tensors: dict[str, torch.Tensor], batch: Any) -> torch.Tensor:
    """Logits of a plain LoRA, by hooks on the layers of the empty bank."""
    scaling = lora_spec(adapter.spec).scaling

    def added(module: str) -> Callable[..., torch.Tensor]:
        a, b = (tensors[key] for key in shared_keys(module))
        return lambda _, inputs, y: y + scaling * (inputs[0] @ a.T) @ b.T

    bank.load([])
    handles = [bank.layers[module].register_forward_hook(added(module)) for module in bank.layers]
    with bank.forward(batch) as logits:
        pass
    for handle in handles:
        handle.remove()
    return logits


def plainly(bank: Bank, task: LocalTask, steps: int) -> list[dict[str, torch.Tensor]]:
    """The same training by autograd on named tensors, of both adapters at once where there are two."""
    requests, generator, queue = task.fit.trainings, torch_generator(3, "order", task.client, 1), list[int]()
    named = [
        {name: t.clone().requires_grad_(name not in each.adapter.frozen) for name, t in each.adapter.tensors.items()}
        for each in requests
    ]
    adams = [
        torch.optim.Adam([t for t in tensors.values() if t.requires_grad], lr=task.learning_rate) for tensors in named
    ]
    for _ in range(steps):
        while len(queue) < SETTINGS.batch_size:
            queue += torch.randperm(len(task.rows), generator=generator).tolist()
        chosen, queue = queue[: SETTINGS.batch_size], queue[SETTINGS.batch_size :]
        batch = collate([[task.rows[i] for i in chosen]], bank.base.pad_id)
        logits = [plain_logits(bank, each.adapter, t, batch) for each, t in zip(requests, named, strict=True)]
        others = [each.detach() for each in logits[::-1]]
        if (teacher := task.fit.teacher) is not None:
            others = [plain_logits(bank, teacher, dict(teacher.tensors), batch).detach()]
        for request, own, other, tensors, adam in zip(requests, logits, others, named, adams, strict=True):
            distillation = request.distillation
            assert distillation is not None
            weight, t = distillation.weight, distillation.temperature
            p, q = (other / t).softmax(1), (own / t).softmax(1)
            divergence = (p * (p.log() - q.log())).sum(1).mean()
            adam.zero_grad()
            ((1 - weight) * token_losses(own, batch.labels).mean() + weight * t**2 * divergence).backward()
            torch.nn.utils.clip_grad_norm_([x for x in tensors.values() if x.requires_grad], SETTINGS.clip_norm)
            adam.step()
    return [{name: tensor.detach() for name, tensor in tensors.items()} for tensors in named]


def pairs(bank: Bank, kind: str = "lora", clients: int = 3, **fields: Any) -> list[LocalTask]:
    """Clients with other data and rates, whose adapter has a partner with other values, weight and temperature."""
    own, others = tasks(bank, kind, clients, **fields), tasks(bank, kind, clients, **fields)
    result = []
    for i, (task, other) in enumerate(zip(own, others, strict=True)):
        tensors = {name: 0.7 * tensor.flip(0) for name, tensor in other.fit.adapter.tensors.items()}
        partner = TrainingRequest(
            replace(other.fit.adapter, tensors=tensors), 0.5, distillation=Distillation(0.6, 1.5 + i)
        )
        result.append(replace(task, fit=replace(task.fit, step_fraction=0.5, partner=partner, distillation=MUTUAL)))
    return result


def taught(bank: Bank, kind: str = "lora", clients: int = 3, **fields: Any) -> list[LocalTask]:
    """Clients with a teacher that is a plain LoRA."""
    teachers = tasks(bank, "lora", clients + 1, **fields)[1:]
    return [
        replace(task, fit=replace(task.fit, teacher=teacher.fit.adapter, distillation=Distillation(0.6, 1.5 + i)))
        for i, (task, teacher) in enumerate(zip(tasks(bank, kind, clients, **fields), teachers, strict=True))
    ]


def flat(results: Sequence[TrainingResult]) -> list[TrainingResult]:
    return [training for result in results for training in result.trainings]


@pytest.mark.parametrize("make", [pairs, taught])
def test_equals_a_plain_loop(make: Callable[..., list[LocalTask]], bank: Bank) -> None:
    """Five steps for each adapter: of a pair, which shares its steps, ten are asked for."""
    group, settings = make(bank, dropout=0.0), replace(SETTINGS, local_steps=10 if make is pairs else 5)
    for task, result in zip(group, trained(bank, group, settings), strict=True):
        expected = plainly(bank, task, 5)
        assert len(result.trainings) == len(expected) == len(task.fit.trainings)
        for training, tensors in zip(result.trainings, expected, strict=True):
            for name, tensor in tensors.items():
                torch.testing.assert_close(training.adapter.tensors[name], tensor, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("tokens", "packed"), [(1, True), (10**9, False)])
@pytest.mark.parametrize(("make", "kind"), [(pairs, "lora"), (pairs, "mixture"), (taught, "mixture")])
def test_a_group_equals_separate_training_and_no_pass_cuts_a_pair(
    make: Any,
    kind: str,
    tokens: int,
    packed: bool,
    bank: Bank,
    monkeypatch: Any,
) -> None:
    """Passes of one client and of all; the batches of a pair are the same, with the same dropout."""
    group, windows, select = make(bank, kind), list[tuple[int, int]](), bank.select_clients
    expected = alone(bank, group)

    def selected(first: int, last: int) -> None:
        windows.append((first, last))
        select(first, last)

    monkeypatch.setattr(passes, "TOKENS_AT_ONCE", tokens)
    monkeypatch.setattr(bank, "packs", packed)
    monkeypatch.setattr(bank, "select_clients", selected)
    result = trained(bank, [group[i] for i in (2, 0, 1)])
    assert_equal(flat([result[i] for i in (1, 2, 0)]), flat(expected))
    places = len(group[0].fit.trainings)
    assert all(first % places == last % places == 0 for first, last in windows)
    sizes = {last - first for first, last in windows}
    assert (places in sizes, 3 * places in sizes) == (tokens < 10**9, True)


def test_memory_that_runs_out_halves_a_pass_between_pairs(bank: Bank, monkeypatch: Any) -> None:
    group = pairs(bank, "mixture")
    expected, widths, backward = trained(bank, group), list[int](), bank.backward

    def limited(loss: torch.Tensor) -> None:
        widths.append(len(bank.parameters()[0]))
        backward(loss)
        if widths[-1] > 4:
            raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(bank, "backward", limited)
    monkeypatch.setattr(bank, "at_once", bank.at_once)
    assert_equal(flat(trained(bank, group)), flat(expected))
    assert widths[:4] == [6, 4, 4, 2], "two batches a step"
    assert set(widths[1:]) == {4, 2}


@pytest.mark.parametrize("kind", ["lora", "mixture"])
def test_without_a_weight_partners_train_as_if_alone(kind: str, bank: Bank) -> None:
    """Twice as many steps are asked for, as a pair divides them."""
    group, settings = pairs(bank, kind, 2), replace(HARD, local_steps=10)
    nothing = Distillation(0.0, 2.0)
    free = []
    for task in group:
        first, second = (replace(training, distillation=nothing) for training in task.fit.trainings)
        free.append(replace(task, fit=replace(first, partner=second)))
    result = trained(bank, free, settings)
    lone = [replace(task, fit=TrainingRequest(training.adapter)) for task in group for training in task.fit.trainings]
    assert_equal(flat(result), alone(bank, lone, HARD))


def test_a_teacher_reads_without_dropout(bank: Bank) -> None:
    group = taught(bank, dropout=0.1)
    dropped = [replace(task, fit=replace(task.fit, teacher=_with_dropout(task.fit.teacher, 0.5))) for task in group]
    for plain, other in zip(trained(bank, group), trained(bank, dropped), strict=True):
        assert all(torch.equal(tensor, other.adapter.tensors[name]) for name, tensor in plain.adapter.tensors.items())


def _with_dropout(adapter: Adapter | None, dropout: float) -> Adapter:
    assert adapter is not None
    return replace(adapter, spec=replace(lora_spec(adapter.spec), dropout=dropout))


@pytest.mark.parametrize("sick", [0, 2])
def test_a_pair_that_diverges_changes_no_bit_of_the_others(sick: int, bank: Bank) -> None:
    group = pairs(bank, "mixture")
    healthy = trained(bank, group)
    partner = group[sick].fit.partner
    assert partner is not None
    tensors = {name: tensor.clone() for name, tensor in partner.adapter.tensors.items()}
    next(iter(tensors.values()))[0, 0] = math.nan
    spoiled = replace(partner, adapter=replace(partner.adapter, tensors=tensors))
    group[sick] = replace(group[sick], fit=replace(group[sick].fit, partner=spoiled))
    result = fit(bank, group, HARD, seed=3, round_=1)
    error = result[sick]
    assert isinstance(error, DivergedError)
    assert str(error).startswith(f"client client{sick}, round 1: ")
    for client in {0, 1, 2} - {sick}:
        outcome = result[client]
        assert isinstance(outcome, TrainingResult)
        for mine, theirs in zip(outcome.trainings, healthy[client].trainings, strict=True):
            assert mine.loss == theirs.loss
            assert all(
                torch.equal(tensor, theirs.adapter.tensors[name]) for name, tensor in mine.adapter.tensors.items()
            )


def test_a_partner_that_diverges_in_the_last_step_is_an_error(bank: Bank) -> None:
    """A penalty of the partner alone spoils its adapter in the one step that is taken; its client's stays finite."""
    (task,) = pairs(bank, clients=1)
    first, second = task.fit.trainings
    nan = {name: torch.full_like(tensor, math.nan) for name, tensor in second.adapter.tensors.items()}
    spoiled = replace(first, partner=replace(second, penalty=Proximal(nan, 1.0)))
    (error,) = fit(bank, [replace(task, fit=spoiled)], replace(HARD, local_steps=2), seed=3, round_=1)
    assert bank.store.weights.isfinite().all(1).tolist() == [True, False]
    assert isinstance(error, DivergedError)


# --- weights of experts in training ---------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_kind", ["exact", "rank"])
@pytest.mark.parametrize("packed", [True, False])
def test_an_expert_of_weight_1_trains_as_the_lora_alone(
    packed: bool,
    dropout_kind: str,
    bank: Bank,
    monkeypatch: Any,
) -> None:
    """The second expert at (0, 1) with the first one frozen: FedIT's training, dropout included."""
    monkeypatch.setattr(bank, "packs", packed)
    group = tasks(bank, "lora", 3, dropout_kind=dropout_kind)
    expected, weighed = trained(bank, group), list[LocalTask]()
    for task in group:
        spec = replace(lora_spec(task.fit.adapter.spec), router=InstanceWeights(0.5))
        first = as_expert({name: tensor + 1 for name, tensor in task.fit.adapter.tensors.items()}, 0)
        adapter = Adapter(spec, {**first, **as_expert(task.fit.adapter.tensors, 1)}, frozen=tuple(first))
        weighed.append(replace(task, fit=TrainingRequest(adapter, expert_weights=(0.0, 1.0))))
    for task, result, plain in zip(weighed, trained(bank, weighed), expected, strict=True):
        assert result.loss == pytest.approx(plain.loss, abs=1e-9)
        for module in bank.base.shapes:
            for key, name in zip(expert_keys(module, 1), shared_keys(module), strict=True):
                torch.testing.assert_close(result.adapter.tensors[key], plain.adapter.tensors[name], rtol=0, atol=1e-9)
            for key in expert_keys(module, 0):
                assert torch.equal(result.adapter.tensors[key], task.fit.adapter.tensors[key])


@pytest.mark.parametrize("packed", [True, False])
def test_each_client_of_a_group_has_weights_of_its_own(packed: bool, bank: Bank, monkeypatch: Any) -> None:
    group = list[LocalTask]()
    for task, weights in zip(tasks(bank, "lora", 3), ((0.0, 1.0), (0.9, 0.1), None), strict=True):
        spec = replace(lora_spec(task.fit.adapter.spec), router=InstanceWeights(0.3))
        tensors = {**as_expert(task.fit.adapter.tensors, 0), **as_expert(task.fit.adapter.tensors, 1)}
        group.append(replace(task, fit=TrainingRequest(Adapter(spec, tensors), expert_weights=weights)))
    expected = alone(bank, group)
    monkeypatch.setattr(bank, "packs", packed)
    assert_equal(trained(bank, group), expected)
    monkeypatch.setattr(passes, "TOKENS_AT_ONCE", 1)
    assert_equal(trained(bank, group), expected)


def test_other_experts_cannot_be_given_weights(bank: Bank) -> None:
    (task,) = tasks(bank, "mixture", 1)
    with pytest.raises(ValueError, match="only experts with instance weights"):
        fit(bank, [replace(task, fit=replace(task.fit, expert_weights=(0.0, 1.0)))], HARD, seed=0, round_=0)


# --- what is refused, and what is counted ---------------------------------------------------------------------

LORA = Adapter(AdapterSpec(rank=1), {"m/shared/A": torch.zeros(1, 2), "m/shared/B": torch.zeros(2, 1)})
WIDER = Adapter(AdapterSpec(rank=2), {"m/shared/A": torch.zeros(2, 2), "m/shared/B": torch.zeros(2, 2)})
PREFIX = Adapter(PromptSpec(3), {PROMPT: torch.zeros(3, 2)})
HALF = TrainingRequest(LORA, 0.5, distillation=MUTUAL)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"teacher": PREFIX, "distillation": MUTUAL}, "virtual tokens"),
    ({"teacher": replace(LORA, fixed={REFERENCES: torch.zeros(1, 2)}), "distillation": MUTUAL}, "weighted by prompt"),
    ({"teacher": LORA}, "by `distillation`"),
    ({"partner": HALF}, "by `distillation`"),
    ({"partner": TrainingRequest(LORA, 0.5), "distillation": MUTUAL}, "by `distillation`"),
    ({"partner": HALF, "teacher": LORA, "distillation": MUTUAL}, "a teacher or a partner"),
    ({"partner": replace(HALF, teacher=LORA), "distillation": MUTUAL}, "a teacher or a partner"),
    ({"partner": replace(HALF, partner=HALF), "distillation": MUTUAL}, "a teacher or a partner"),
    ({"partner": replace(HALF, adapter=WIDER), "distillation": MUTUAL}, "of one kind"),
    ({"partner": replace(HALF, step_fraction=0.4), "distillation": MUTUAL}, "must be equal"),
    ({"partner": replace(HALF, paper_step_fraction=1.0), "distillation": MUTUAL}, "must be equal"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_requests_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    assert TrainingRequest(LORA, 0.5, distillation=MUTUAL, partner=HALF).trainings[1] is HALF
    assert TrainingRequest(LORA, teacher=WIDER, distillation=MUTUAL).trainings[0].teacher is WIDER
    with pytest.raises(ValueError, match=message):
        TrainingRequest(LORA, 0.5, **fields)


def test_requests_of_different_kinds_are_no_group(bank: Bank) -> None:
    (free,), (pair,), (pupil,) = tasks(bank, "lora", 1), pairs(bank, clients=1), taught(bank, clients=1)
    for group in ([free, pair], [pupil, free], [pair, pupil]):
        with pytest.raises(ValueError, match="cannot be one group"):
            fit(bank, group, HARD, seed=0, round_=0)


@pytest.mark.parametrize(
    ("local_steps", "budget", "done", "steps"),
    [
        (10, "steps", 0.0, 5),
        (9, "steps", 0.0, 4),  # of nine, two trainings of four
        (1, "steps", 0.0, 1),
        (10, "paper", 0.0, 10),
        (10, "steps", 0.5, 5),
    ],
)
def test_partners_divide_the_steps_evenly(local_steps: int, budget: Any, done: float, steps: int) -> None:
    half = replace(HALF, paper_step_fraction=1.0)
    task = LocalTask("a", replace(half, partner=half), [], 1e-2, done)
    assert task.steps(TrainingSettings(local_steps=local_steps, budget=budget)) == steps


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_pass_is_counted(accumulation: int, bank: Bank) -> None:
    """A pair of half the steps each; a teacher that reads every batch of its pupil: rows of 7 tokens."""
    settings = replace(SETTINGS, local_steps=4, accumulation=accumulation)
    rows = [((5, 9, 3, 4), (7, 8, 0))] * 3
    (pair,), (pupil,) = pairs(bank, clients=1), taught(bank, clients=1)
    (result,) = trained(bank, [replace(pair, rows=rows)], settings)
    each = 2 * accumulation * 2 * count_tokens(rows[:1])
    assert [(t.steps, t.tokens, t.teacher_tokens, t.teacher_examples) for t in result.trainings] == [
        (2, each, 0, 0)
    ] * 2
    (result,) = trained(bank, [replace(pupil, rows=rows)], settings)
    assert (result.steps, result.tokens, result.teacher_tokens) == (4, 2 * each, 2 * each)
    assert result.teacher_examples == 4 * accumulation * 2


def test_a_client_counts_both_partners_and_what_a_teacher_reads() -> None:
    """Two trainings of a half: 3 steps each of a pair, then 6 steps with a teacher."""
    wide = replace(LORA, tensors={**LORA.tensors, "m/shared/A": torch.zeros(1, 9)}, frozen=("m/shared/B",))
    requests = [
        TrainingRequest(wide, 0.25, partner=TrainingRequest(LORA, 0.25, distillation=MUTUAL), distillation=MUTUAL),
        TrainingRequest(LORA, 0.5, teacher=WIDER, distillation=MUTUAL),
    ]

    def work() -> Any:
        yield requests[0]
        yield requests[1]
        return None, None, None

    client = ClientWork(None, None, ProbeCounts(), work(), 0.0)  # type: ignore[arg-type]
    client.advance(None)
    partner = TrainingResult(LORA, 3, 0.5, tokens=30)
    client.receive(TrainingResult(wide, 3, 0.5, tokens=30, partner=partner), "steps")
    assert (client.steps, client.tokens, client.counts.examples, client.step_fraction) == (6, 60, 0, 0.5)
    assert client.trained_sizes == {"m/shared/A": 2, "m/shared/B": 2}
    client.receive(TrainingResult(LORA, 6, 0.5, tokens=60, teacher_examples=12, teacher_tokens=60), "steps")
    assert (client.steps, client.tokens, client.step_fraction) == (12, 120, 1.0)
    assert (client.counts.examples, client.counts.tokens) == (12, 60)
