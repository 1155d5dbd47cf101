"""An example moves the sum of a step by at most the clip, in every method; noise and sampling are as accounted for."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedamole.experiment import prepare, worker_of
from fedamole.federation.local import LocalTask, TrainingGroup, fit
from fedamole.federation.privacy.mechanism import Mechanism
from fedamole.federation.privacy.secret import SecretRandom
from fedamole.federation.privacy.training import PrivateGroup
from fedamole.federation.private_worker import PrivateWorker
from fedamole.federation.request import TrainingRequest, TrainingResult
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.params import Adapter, new_pool, new_shared

KEY = b"a key for tests of 32 bytes long"


class NoNoise(SecretRandom):
    """Samples by a fixed key, without noise."""

    def normal(self, count: int) -> np.ndarray:
        return np.zeros(count)


@pytest.fixture(scope="module")
def prepared(runs: Any) -> Any:
    return prepare(runs.load("fedit", "method.dropout=0.3"))


@pytest.fixture(scope="module")
def bank(prepared: Any) -> Bank:
    return Bank(prepared.base)


def adapters(bank: Bank) -> dict[str, Adapter]:
    """A LoRA, one with frozen A, and a mixture with a balance loss."""
    generator, shapes = torch.Generator().manual_seed(3), bank.base.shapes
    lora = {name: tensor + 0.1 for name, tensor in new_shared(shapes, 2, generator).items()}
    mixture = AdapterSpec(2, 4, dropout=0.3, top_k=1, balance_weight=0.5)
    frozen = tuple(name for name in lora if name.endswith("/A"))
    return {
        "lora": Adapter(AdapterSpec(2, 4, dropout=0.3), lora),
        "frozen": Adapter(AdapterSpec(2, 4), lora, frozen=frozen),
        "mixture": Adapter(mixture, {k: v + 0.1 for k, v in new_pool(shapes, 2, 3, generator).items()}),
    }


def tasks_of(prepared: Any, adapter: Adapter, mechanism: Callable[[int], Mechanism]) -> list[LocalTask]:
    rows = {name: data.train.pairs() for name, data in sorted(prepared.clients.items())}
    return [
        LocalTask(name, TrainingRequest(adapter), own, 0.01, mechanism=mechanism(len(own)))
        for name, own in rows.items()
    ]


def group_of(bank: Bank, prepared: Any, tasks: Sequence[LocalTask]) -> PrivateGroup:
    return PrivateGroup(bank, tasks, prepared.config.training, 0, 0, 0)


@pytest.mark.parametrize("kind", ["lora", "frozen", "mixture"])
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_example_moves_the_sum_by_at_most_the_clip(kind: str, data: Any, prepared: Any, bank: Bank) -> None:
    """The other examples' part stays the same, although dropout and balance loss are on."""
    clip = data.draw(st.sampled_from([1e-3, 0.5, 1e4]))
    tasks = tasks_of(prepared, adapters(bank)[kind], lambda n: Mechanism(clip, 1.0, 2, n))
    group = group_of(bank, prepared, tasks)
    samples = [data.draw(st.lists(st.integers(0, len(t.rows) - 1), unique=True, max_size=4)) for t in tasks]
    samples[0] = samples[0] or [0]
    removed = data.draw(st.sampled_from(samples[0]))
    group.add_clipped(samples, 0)
    both = group.sums.clone()
    group.add_clipped([[i for i in samples[0] if i != removed], *samples[1:]], 0)
    without = group.sums.clone()
    moved = (both - without).norm(dim=1)
    group.add_clipped([[removed], *([] for _ in samples[1:])], 0)
    alone = group.sums[0]
    assert 0 < float(alone.norm()) <= clip
    assert float(moved[0]) <= clip * (1 + 1e-6)
    assert float((both[0] - without[0] - alone).norm()) < 1e-3 * float(both[0].norm() + alone.norm())
    assert moved[1:].max() < 1e-4 * max(1.0, float(both.norm()))  # the rounding of sums over a pass


@pytest.mark.parametrize("kind", ["lora", "frozen", "mixture"])
def test_without_noise_and_clip_a_step_is_that_of_plain_training(kind: str, prepared: Any, bank: Bank) -> None:
    """All examples in every step, no dropout: the gradient is that of one large batch, for each client."""
    adapter = adapters(bank)[kind]
    assert isinstance(adapter.spec, AdapterSpec)
    adapter = replace(adapter, spec=replace(adapter.spec, dropout=0.0, balance_weight=0.0))
    name = "mood"
    rows = prepared.clients[name].train.pairs()
    settings_ = replace(prepared.config.training, batch_size=1, accumulation=len(rows), local_steps=1)
    task = LocalTask(name, TrainingRequest(adapter), rows, 0.01)
    mechanism = Mechanism(1e6, 1.0, len(rows), len(rows), NoNoise(KEY))
    gradients = []
    for kind_of_group in (TrainingGroup, PrivateGroup):
        group = kind_of_group(bank, [replace(task, mechanism=mechanism)], settings_, 0, 0, 0)
        group.step(0)
        (result,) = group.results()
        assert isinstance(result, TrainingResult)
        gradients.append((group.store.gradients.clone(), result.loss))
    (plain, plain_loss), (noised, noised_loss) = gradients
    assert plain.norm() > 0.01
    assert (plain - noised).norm() < 1e-4 * plain.norm()
    assert noised_loss == pytest.approx(plain_loss, rel=1e-4)


def test_the_noise_has_its_size_and_spares_frozen_values(prepared: Any, bank: Bank) -> None:
    """With a tiny clip, the gradient times the batch is noise of standard deviation noise * clip."""
    tasks = tasks_of(prepared, adapters(bank)["frozen"], lambda n: Mechanism(1e-3, 500.0, 2, n, SecretRandom(KEY)))
    group = group_of(bank, prepared, tasks)
    group.step(0)
    assert group.trainable is not None
    for client in range(len(tasks)):
        trained = group.store.gradients[client][group.trainable[client] > 0].double() * 2
        assert float(trained.std()) == pytest.approx(0.5, rel=0.1)
        assert not group.store.gradients[client][group.trainable[client] == 0].any()


def test_empty_samples_are_steps_of_noise_alone(prepared: Any, bank: Bank) -> None:
    class Empty(SecretRandom):
        def poisson_sample(self, count: int, probability: float) -> list[int]:
            return []

    tasks = tasks_of(prepared, adapters(bank)["lora"], lambda n: Mechanism(1.0, 1.0, 2, n, Empty(KEY)))
    results = fit(bank, tasks, prepared.config.training, seed=0, round_=0, group_class=PrivateGroup)
    for task, result in zip(tasks, results, strict=True):
        assert isinstance(result, TrainingResult)
        assert (result.loss, result.tokens, result.steps) == (0.0, 0, 3)
        assert any((t != task.fit.adapter.tensors[k]).any() for k, t in result.adapter.tensors.items())


def test_a_gradient_that_is_not_finite_contributes_nothing(prepared: Any, bank: Bank) -> None:
    task = tasks_of(prepared, adapters(bank)["lora"], lambda n: Mechanism(1.0, 1.0, 2, n))[0]
    broken = replace(task.fit.adapter, tensors={k: t * 1e30 for k, t in task.fit.adapter.tensors.items()})
    group = group_of(bank, prepared, [replace(task, fit=TrainingRequest(broken))])
    group.add_clipped([[0, 1]], 0)
    assert group.loss_sums.isnan().any()
    assert not group.sums.any()
    group.loss_sums.fill_(float("nan"))
    group.step(0)
    assert not group.check(0) or "adapter" in str(group.check(0)[0])


def test_two_trainings_never_share_noise_or_samples(prepared: Any, bank: Bank) -> None:
    first, second = (Mechanism(1.0, 1.0, 2, 40) for _ in range(2))
    assert not np.intersect1d(first.secret.normal(1000), second.secret.normal(1000)).size
    assert "secret" not in repr(first)


METHODS = ("fedit", "ffa_lora", "fedsvd", "fedprox", "ditto", "flora", "fedex_lora", "local_only", "fedamole")


@pytest.mark.parametrize("method", METHODS)
def test_a_reply_depends_on_the_examples_by_private_steps_alone(method: str, runs: Any, tmp_path: Any) -> None:
    """With nothing but noise of a fixed key in every step, other examples give the same reply, bit by bit."""
    from fedamole.federation.method import BaseInfo, Server
    from fedamole.federation.record import pack
    from fedamole.runs.run_folder import RunFolder

    more = ["method.assignment=static"] if method == "fedamole" else []
    config = prepare(runs.load(method, "privacy.epsilon=8", *more)).config
    prepared = prepare(config)
    infos = tuple(prepared.clients[name].info for name in sorted(prepared.clients))
    replies = []
    for case in range(2):
        RunFolder.create(tmp_path / str(case), "", "{}", method, prepared.base.identity)
        worker = worker_of(config, Bank(prepared.base), RunFolder(tmp_path / str(case)))
        assert isinstance(worker, PrivateWorker)
        worker.mechanism = lambda n: Mechanism(1e-30, 1e30, 2, n, SecretRandom(KEY))
        data = prepared.clients["mood"]
        if case == 1:  # every example is another one
            other = prepared.clients["entail"]
            train = replace(other.train, rows=other.train.rows[: len(data.train.rows)])
            data = replace(data, train=train, embedding=other.embedding, validation=other.validation)
        server = Server(BaseInfo.of(prepared.base), infos, 0, rounds=3)
        state = config.method.init(server)
        message = pack(config.method.message(state, data.info))
        result = worker.update([data], 0, {"mood": message})["mood"]
        assert result.payload is not None
        replies.append(result.payload)
    assert replies[0] == replies[1]
