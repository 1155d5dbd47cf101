"""FedDAT: a dual teacher and the shared LoRA learn from each other; what is kept, sent and scored, by hand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.by_hand import client, full
from tests.training import lora_spec

from fedamole.cli.options import bundled_config
from fedamole.config import load_config
from fedamole.deployment.security.policy import PolicyError, refuse_small_update, row_checks
from fedamole.deployment.security.policy import PolicySettings as Policy
from fedamole.errors import ConfigError
from fedamole.experiment import Prepared, prepare
from fedamole.federation.distillation import Distillation, token_divergences
from fedamole.federation.local import LocalTask, fit
from fedamole.federation.method import BaseInfo, ClientInfo, Server, TrainingRequest, TrainingResult
from fedamole.federation.randomness import torch_generator
from fedamole.methods.feddat import FedDat
from fedamole.methods.local_only import OwnLora
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.model.bank import Bank
from fedamole.model.batch import collate
from fedamole.model.mixer import InstanceWeights
from fedamole.model.params import Adapter, expert_keys, new_shared
from fedamole.planning import chosen_group, planned

SHAPES = {"m": (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)
A, B = "m/shared/A", "m/shared/B"
OWN_A, OWN_B = expert_keys("m", 0)
SHARED_A, SHARED_B = expert_keys("m", 1)


def both(value: float) -> dict[str, torch.Tensor]:
    return {A: full(value, 1, 2), B: full(-value, 2, 1)}


def values(tensors: Any) -> dict[str, float]:
    """The one value of each tensor."""
    assert all(tensor.min() == tensor.max() for tensor in tensors.values())
    return {name: float(tensor.flatten()[0]) for name, tensor in tensors.items()}


def asked(method: FedDat, own: float, shared: float) -> tuple[TrainingRequest, Any]:
    work = method.update(client(SHAPES), OwnLora(both(own)), SharedTensors(both(shared)))
    return next(work), work


def test_the_teacher_and_the_shared_lora_are_partners() -> None:
    """Own 3, sent 2: the teacher trains 3 beside a frozen 2, at half each; the student trains 2 alone."""
    request, _ = asked(FedDat(rank=1, kl_weight=0.4, temperature=2.0), 3.0, 2.0)
    student = request.partner
    assert student is not None
    start = {OWN_A: 3.0, OWN_B: -3.0, SHARED_A: 2.0, SHARED_B: -2.0}
    assert values(request.adapter.tensors) == values(student.adapter.tensors) == start
    assert set(request.adapter.frozen) == {SHARED_A, SHARED_B}
    assert set(student.adapter.frozen) == {OWN_A, OWN_B}
    assert lora_spec(request.adapter.spec).router == InstanceWeights(0.5)
    assert (request.expert_weights, student.expert_weights) == (None, (0.0, 1.0))
    assert request.distillation == student.distillation == Distillation(0.4, 2.0)
    assert [each.fraction_for("steps") for each in request.trainings] == [0.5, 0.5]
    assert [each.fraction_for("paper") for each in request.trainings] == [1.0, 1.0]


def test_the_own_lora_is_kept_and_the_student_is_sent() -> None:
    """The teacher ends with 7 beside its frozen 2, the student with 5 beside a 3 that it does not use."""
    request, work = asked(FedDat(rank=1), 3.0, 2.0)
    assert request.partner is not None
    taught = {**request.adapter.tensors, OWN_A: full(7.0, 1, 2), OWN_B: full(-7.0, 2, 1)}
    learned = {**request.adapter.tensors, SHARED_A: full(5.0, 1, 2), SHARED_B: full(-5.0, 2, 1)}
    partner = TrainingResult(Adapter(request.adapter.spec, learned), 3, 0.5)
    with pytest.raises(StopIteration) as end:
        work.send(TrainingResult(Adapter(request.adapter.spec, taught), 3, 0.5, partner=partner))
    client_state, reply, trained = end.value.value
    assert values(client_state.tensors) == {A: 7.0, B: -7.0}
    assert values(reply.tensors) == {A: 5.0, B: -5.0}
    assert torch.equal(trained.adapter.tensors[A], torch.tensor([[7.0, 7.0], [2.0, 2.0]])), "its teacher, as one LoRA"
    assert torch.equal(trained.adapter.tensors[B], torch.tensor([[-3.5, -1.0], [-3.5, -1.0]]))
    again = FedDat(rank=1).reply(client(SHAPES), OwnLora({}), SharedTensors({}), trained)
    assert values(again[0].tensors) == {A: 7.0, B: -7.0}


def test_the_model_is_the_mean_of_both_as_one_lora() -> None:
    """Own B A is [[-3], [-3]] [3, 3], shared [[-2], [-2]] [2, 2]: -9 and -4, in the mean -6.5, times alpha / rank 4."""
    method, me = FedDat(rank=1, alpha=4.0), client(SHAPES)
    model = method.personal(me, OwnLora(both(3.0)), SharedTensors(both(2.0)), None)
    assert model is not None
    assert set(model.tensors) == {A, B}
    spec = lora_spec(model.spec)
    assert (spec.rank, spec.scaling, spec.router) == (2, 4.0, lora_spec(method.spec()).router)
    torch.testing.assert_close(model.tensors[B] @ model.tensors[A], full(-6.5, 2, 2))
    assert method.personal(me, OwnLora(both(3.0)), None, None) is None
    assert method.personal(me, OwnLora(both(3.0)), None, model) is model


def test_the_shared_lora_is_averaged() -> None:
    """(1 + 4) / 2, and (10 * 1 + 30 * 4) / 40."""
    replies = {"a": SharedTensors(both(1.0)), "b": SharedTensors(both(4.0))}
    for weighting, mean in (("uniform", 2.5), ("examples", 3.25)):
        after = FedDat(rank=1, weighting=weighting).aggregate(SERVER, SharedTensors(both(9.0)), replies)  # type: ignore[arg-type]
        assert values(after.tensors) == {A: mean, B: -mean}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kl_weight", -0.1),
        ("kl_weight", 1.1),
        ("temperature", 0.0),
        ("temperature", 101.0),
        ("temperature", float("nan")),
    ],
)
def test_wrong_values_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^method\.{key} = {value}: must be at least "):
        FedDat(**{key: value})  # type: ignore[arg-type]


# --- what its rounds read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "steps", "different"), [("steps", 6, 6), ("paper", 14, 14)])
def test_a_policy_counts_rows_that_both_partners_read_once(budget: str, steps: int, different: int, runs: Any) -> None:
    """Seven steps of two rows: three for each partner, which read the same six rows; or seven each and fourteen."""
    config = runs.load("feddat", "training.local_steps=7", f"training.budget={budget}")
    rows = {"train": 100, "embedding": 9, "validation": 9, "test": 9}
    requested = {check.setting: check.requested for check in row_checks(config, rows, Policy())}
    assert requested["steps of a round"] == str(steps)
    assert requested["different training rows that a round reads"] == str(different)
    assert requested["training rows that a round reads"] == str(2 * different)
    policy = replace(Policy(), min_steps=1, min_examples_per_update=different)
    refuse_small_update(config, steps, 100, policy)
    with pytest.raises(PolicyError, match=f"read at most {different - 2} different rows"):
        refuse_small_update(config, steps - 2, 100, policy)


def test_a_plan_counts_two_models_in_memory(runs: Any, monkeypatch: Any) -> None:
    """Half as many clients fit as with FedIT, whose adapters have the size of one of the two."""
    plain, pair = (runs.load(name, "training.local_steps=7") for name in ("feddpa", "feddat"))
    prepared = prepare(plain)
    assert planned(pair, prepared.base, prepared.clients).steps == 6
    sizes: dict[str, list[int]] = {}
    for name, config in (("feddpa", plain), ("feddat", pair)):
        seen = sizes[name] = []

        def group_bytes(base: Any, clients: int, *_: Any, seen: list[int] = seen) -> int:
            seen.append(clients)
            return 1

        monkeypatch.setattr("fedamole.planning.group_bytes", group_bytes)
        chosen_group(config, prepared.base, prepared.clients)
    assert sizes["feddat"] == [2 * clients for clients in sizes["feddpa"]]


# --- on the bundled base --------------------------------------------------------------------------------------

CLIENTS = ("hospital_north", "shop_house")


@pytest.fixture(scope="module")
def bundled() -> tuple[Prepared, Bank]:
    overrides = ["run.device=cpu", "base.dtype=float32", "training.local_steps=20", "training.learning_rate=3e-3"]
    prepared = prepare(load_config(bundled_config("fedit"), overrides))
    return prepared, Bank(prepared.base)


def pairs_after(bundled: tuple[Prepared, Bank], method: FedDat) -> list[TrainingResult]:
    """Each client's first round from the start."""
    prepared, bank = bundled
    base = BaseInfo.of(prepared.base)
    shared = SharedTensors(new_shared(base.shapes, method.rank, torch_generator(0, "lora")))
    settings, tasks = prepared.config.training, []
    for name in CLIENTS:
        me = client(base.shapes, name)
        request = next(method.update(me, method.init_client_state(me), shared))
        tasks.append(LocalTask(name, request, prepared.clients[name].train.pairs(), settings.learning_rate))
    results = fit(bank, tasks, settings, seed=0, round_=0)
    assert all(isinstance(result, TrainingResult) for result in results)
    return results  # type: ignore[return-value]


def divergence(bundled: tuple[Prepared, Bank], results: Sequence[TrainingResult], method: FedDat) -> float:
    """Mean KL(teacher || student) per answer token over the validation splits, at temperature 1."""
    prepared, bank = bundled
    shapes, total, tokens = prepared.base.shapes, 0.0, 0
    for name, result in zip(CLIENTS, results, strict=True):
        me = client(shapes, name)
        model = method._model(result.adapter, shapes)
        _, sent = method.reply(me, OwnLora({}), SharedTensors({}), replace(result, adapter=model))
        batch = collate([prepared.clients[name].validation.pairs()[:40]], bank.base.pad_id, bank.packs)
        logits = []
        for scored in (model, Adapter(method.spec(), sent.tensors)):
            bank.load([scored])
            with torch.no_grad(), bank.forward(batch) as values_at_answers:
                logits.append(values_at_answers.clone())
        divergences = token_divergences(logits[0], logits[1], torch.ones(len(logits[0])))
        total, tokens = total + float(divergences.sum()), tokens + len(divergences)
    return total / tokens


def test_mutual_distillation_draws_teacher_and_student_together(bundled: tuple[Prepared, Bank]) -> None:
    """What the mechanism is for: knowledge flows both ways, so that the two agree far more than without it."""
    mutual, apart = FedDat(), FedDat(kl_weight=0.0)
    with_it, without = (divergence(bundled, pairs_after(bundled, method), method) for method in (mutual, apart))
    print(f"divergence of student from teacher: {with_it:.4f}, without distillation {without:.4f}")
    assert 0 < with_it < 0.7 * without
