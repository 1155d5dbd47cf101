"""A group of clients in lock-step against each of them trained alone, in float64 to 1e-9."""

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedamole.experiment import prepare
from fedamole.federation import local, passes
from fedamole.federation.local import DivergedError, LocalTask, embed, fit
from fedamole.federation.method import TrainingRequest, TrainingResult
from fedamole.federation.settings import TrainingSettings
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.batch import TokenPair
from fedamole.model.params import Adapter, new_pool, new_shared

Tensors = dict[str, torch.Tensor]
HARD = TrainingSettings(local_steps=5, batch_size=2, accumulation=2, clip_norm=0.5)
"""Everything at once: two batches of two rows a step, clipped."""


@pytest.fixture(scope="module")
def bank(runs: Any) -> Bank:
    base = prepare(runs.load("local_only")).base
    base.model.double()
    return Bank(base)


def texts(bank: Bank, client: int, rows: int = 7) -> list[TokenPair]:
    """Rows of 4 to 40 tokens."""
    rng = np.random.default_rng(client)

    def draw(low: int, high: int) -> Any:
        return rng.integers(2, bank.base.model.config.vocab_size, rng.integers(low, high)).tolist()

    return [(draw(3, 35), draw(1, 6)) for _ in range(rows)]


def tasks(bank: Bank, kind: str, clients: int = 5, **fields: Any) -> list[LocalTask]:
    """Clients with other data and other rates; mixtures hold 2 to 8 experts, others in every module."""
    spec = AdapterSpec(**{"rank": 2, "alpha": 4.0, "dropout": 0.1, "balance_weight": 0.05, **fields})
    tasks_ = []
    for client in range(clients):
        draw = torch.Generator().manual_seed(client)
        pool = new_shared(bank.base.shapes, 2, draw) if kind == "lora" else new_pool(bank.base.shapes, 2, 9, draw)
        held = {
            module: set(torch.randperm(9, generator=draw)[: 2 + (3 * client + index) % 7].tolist())
            for index, module in enumerate(sorted(bank.base.shapes))
        }
        tensors = {
            name: (0.1 * torch.randn(tensor.shape, generator=draw) if name.endswith("/B") else tensor).double()
            for name, tensor in pool.items()
            if "/expert-" not in name or int(name.split("/expert-")[1][:2]) in held[name.split("/")[0]]
        }
        fit_ = TrainingRequest(Adapter(spec, tensors))
        tasks_.append(LocalTask(f"client{client}", fit_, texts(bank, client), 1e-2 * (1 + client % 2)))
    return tasks_


def trained(bank: Bank, group: Sequence[LocalTask], settings: TrainingSettings = HARD) -> list[TrainingResult]:
    outcomes = fit(bank, group, settings, seed=3, round_=1)
    assert all(isinstance(outcome, TrainingResult) for outcome in outcomes)
    return outcomes  # type: ignore[return-value]


def alone(bank: Bank, group: Sequence[LocalTask], settings: TrainingSettings = HARD) -> list[TrainingResult]:
    return [trained(bank, [task], settings)[0] for task in group]


STEPS = (2, 5, 14, 3, 7)


def of_uneven_steps(bank: Bank) -> list[LocalTask]:
    """Clients with as many rows as STEPS says."""
    return [
        replace(task, rows=(list(task.rows) * 2)[:steps])
        for task, steps in zip(tasks(bank, "mixture"), STEPS, strict=True)
    ]


def assert_equal(result: Sequence[TrainingResult], expected: Sequence[TrainingResult], tolerance: float = 1e-9) -> None:
    for mine, theirs in zip(result, expected, strict=True):
        assert mine.steps == theirs.steps
        assert mine.loss == pytest.approx(theirs.loss, abs=tolerance)
        assert mine.adapter.tensors.keys() == theirs.adapter.tensors.keys()
        for name, tensor in mine.adapter.tensors.items():
            torch.testing.assert_close(tensor, theirs.adapter.tensors[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dropout_kind", ["exact", "rank"])
@pytest.mark.parametrize("kind", ["mixture", "lora"])
def test_a_group_equals_separate_training(
    bank: Bank, kind: str, dropout_kind: str, packed: bool, monkeypatch: Any
) -> None:
    """fedamole's mixtures, and the LoRAs of fedit and local_only; the group packed or padded, one alone packed."""
    group = tasks(bank, kind, dropout_kind=dropout_kind)
    expected = alone(bank, group)
    monkeypatch.setattr(bank, "packs", packed)
    result = trained(bank, group)
    assert_equal(result, expected)
    for task, outcome in zip(group, result, strict=True):
        moved = max(float((outcome.adapter.tensors[k] - t).abs().max()) for k, t in task.fit.adapter.tensors.items())
        assert moved > 1e-3, "the tolerance is far below what training does"


@pytest.mark.parametrize("tokens", [1, 120, 10**9])
def test_neither_order_nor_windows_matter(bank: Bank, tokens: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(passes, "TOKENS_AT_ONCE", tokens)
    group = tasks(bank, "mixture")
    shuffled = [group[i] for i in (3, 0, 4, 2, 1)]
    result = trained(bank, shuffled)
    assert_equal([result[i] for i in (1, 4, 3, 0, 2)], alone(bank, group))


def test_a_finished_client_leaves_the_group_and_does_not_change(bank: Bank) -> None:
    """Epochs of 2, 5, 14, 3 and 7 rows are as many steps; momentum would go on for those that are done."""
    group, settings = of_uneven_steps(bank), TrainingSettings(local_epochs=1, batch_size=1)
    result = trained(bank, group, settings)
    assert [outcome.steps for outcome in result] == list(STEPS)
    assert_equal(result, alone(bank, group, settings))


def test_a_finished_client_keeps_every_bit(bank: Bank) -> None:
    """The bank after each step: a client's row changes with each of its own steps, and after the last no more."""
    seen: dict[int, torch.Tensor] = {}
    settings = TrainingSettings(local_epochs=1, batch_size=1)
    outcomes = fit(
        bank,
        of_uneven_steps(bank),
        settings,
        seed=3,
        round_=1,
        on_step=lambda done, _: seen.update({done: bank.store.weights.clone()}),
    )
    assert list(seen) == list(range(1, 15))
    for index, client in enumerate((2, 4, 1, 3, 0)):  # those with the most steps first
        last = seen[STEPS[client]][index]
        assert not torch.equal(last, seen[STEPS[client] - 1][index])
        assert all(torch.equal(seen[step][index], last) for step in range(STEPS[client], 15))
        outcome, held = outcomes[client], bank.adapter(index).tensors
        assert isinstance(outcome, TrainingResult)
        assert all(torch.equal(tensor, held[name]) for name, tensor in outcome.adapter.tensors.items())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["mixture", "lora"])
def test_rows_of_one_length(bank: Bank, kind: str, packed: bool, monkeypatch: Any) -> None:
    """Where all clients have as many tokens, products are batched; that must be the same training."""
    group = [
        replace(task, rows=[([*prompt, *range(2, 36)][:15], [answer[0]] * 3) for prompt, answer in task.rows])
        for task in tasks(bank, kind)
    ]
    expected = alone(bank, group)
    monkeypatch.setattr(bank, "packs", packed)
    assert_equal(trained(bank, group), expected)


def test_seed_client_and_round_alone_decide(bank: Bank) -> None:
    """The same client beside others, and the others beside another one."""
    group = tasks(bank, "mixture")
    assert_equal(trained(bank, group)[:2], trained(bank, group[:2]))
    other = fit(bank, group[:2], HARD, seed=3, round_=2)
    assert isinstance(other[0], TrainingResult)
    assert abs(other[0].loss - trained(bank, group[:2])[0].loss) > 1e-6


def test_embeddings_of_a_group_equal_each_alone(bank: Bank) -> None:
    group = tasks(bank, "mixture")
    rows = [texts(bank, 50 + client, 2 + client) for client in range(5)]
    bank.load([task.fit.adapter for task in group])
    result = embed(bank, rows, 100)
    for task, part, means in zip(group, rows, result, strict=True):
        bank.load([task.fit.adapter])
        (expected,) = embed(bank, [part], 10_000)
        assert means.keys() == expected.keys() == bank.base.shapes.keys()
        for module, mean in means.items():
            torch.testing.assert_close(mean.token, expected[module].token)
            assert mean.experts.keys() == expected[module].experts.keys()
            for expert, row in mean.experts.items():
                torch.testing.assert_close(row, expected[module].experts[expert])


# --- one that diverges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "packed", "sick", "rate"),
    [
        ("mixture", True, 2, None),
        ("mixture", False, 0, None),
        ("lora", True, 4, None),
        ("lora", False, 2, None),
        ("mixture", True, 2, 1e300),
        ("mixture", False, 2, math.inf),
        ("lora", True, 0, math.inf),
    ],
)
def test_one_clients_nan_changes_no_bit_of_the_others(
    bank: Bank, kind: str, packed: bool, sick: int, rate: float | None, monkeypatch: Any
) -> None:
    """A client starts from a NaN, or an absurd rate brings it there; the others end, bit for bit, where they end
    beside the same client in good health.
    """
    monkeypatch.setattr(bank, "packs", packed)
    monkeypatch.setattr(local, "NAN_EVERY", 2)
    group = tasks(bank, kind)
    healthy = trained(bank, group)
    tensors = {name: tensor.clone() for name, tensor in group[sick].fit.adapter.tensors.items()}
    for tensor in tensors.values():
        tensor[0, 0] = math.nan if rate is None else tensor[0, 0]
    adapter = replace(group[sick].fit.adapter, tensors=tensors)
    group[sick] = replace(group[sick], fit=TrainingRequest(adapter), learning_rate=rate or group[sick].learning_rate)
    result = fit(bank, group, HARD, seed=3, round_=1)
    assert isinstance(result[sick], DivergedError)
    message = rf"client client{sick}, round 1: its loss became (nan|inf) within steps 1 to 2 of local training; lower"
    assert re.match(message, str(result[sick]))
    for client in {0, 1, 2, 3, 4} - {sick}:
        outcome = result[client]
        assert isinstance(outcome, TrainingResult)
        assert outcome.loss == healthy[client].loss
        for name, tensor in outcome.adapter.tensors.items():
            assert torch.equal(tensor, healthy[client].adapter.tensors[name])


def test_a_group_that_diverges_as_a_whole_stops_early(bank: Bank) -> None:
    group = [replace(task, learning_rate=1e300) for task in tasks(bank, "lora", 2)]
    steps: list[int] = []
    outcomes = fit(
        bank, group, TrainingSettings(local_steps=100), seed=0, round_=0, on_step=lambda done, _: steps.append(done)
    )
    assert all(isinstance(outcome, DivergedError) for outcome in outcomes)
    assert len(steps) == local.NAN_EVERY


# --- out of memory --------------------------------------------------------------------------------------------


@pytest.fixture
def small_device(bank: Bank, monkeypatch: Any) -> Iterator[Callable[..., list[int]]]:
    """`small_device(2, error)`: a device on which a pass of more than 2 clients fails.

    `where` is "backward" (after its gradients were added), "forward" (in the last module), or "later" (in the
    backward pass of the second batch of a step, when the first batch has left gradients and a loss).
    """
    hooks: list[Any] = []

    def limit(most: int, error: RuntimeError, where: str = "backward") -> list[int]:
        passes: list[int] = []
        original, last = bank.backward, bank.layers[max(bank.layers)]

        def begun(*_: Any) -> None:
            clients = len(bank.parameters()[0])
            passes.append(clients)
            if where == "forward" and clients > most:
                raise error

        def backward(loss: torch.Tensor) -> None:
            clients = passes[-1]
            original(loss)
            if clients > most and (where == "backward" or passes.count(clients) == 2):
                raise error

        hooks.append(last.register_forward_pre_hook(begun))
        monkeypatch.setattr(bank, "backward", backward)
        monkeypatch.setattr(bank, "at_once", bank.at_once)
        return passes

    yield limit
    for hook in hooks:
        hook.remove()


NO_MEMORY = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


@pytest.mark.parametrize("where", ["backward", "forward", "later"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), NO_MEMORY], ids=["gpu", "cpu"])
def test_out_of_memory_halves_the_pass_and_loses_nothing(
    bank: Bank, small_device: Any, error: RuntimeError, where: str, caplog: Any
) -> None:
    group = tasks(bank, "mixture")
    expected = trained(bank, group)
    passes = small_device(2, error, where)
    with caplog.at_level(logging.WARNING):
        result = trained(bank, group)
    assert_equal(result, expected)
    tried = [5, 5, 3, 3, 2] if where == "later" else [5, 3, 2]
    assert passes[: len(tried)] == tried
    assert max(passes[len(tried) :]) == 2, "the smaller pass is kept"
    assert bank.at_once == 2
    assert caplog.text.count("out of memory") == 2


def test_out_of_memory_with_one_client_is_an_error(bank: Bank, small_device: Any) -> None:
    small_device(0, torch.OutOfMemoryError("no"))
    with pytest.raises(torch.OutOfMemoryError):
        fit(bank, tasks(bank, "lora", 2), HARD, seed=0, round_=0)
    bank.base.training(False)


def test_other_errors_are_not_taken_for_it(bank: Bank, small_device: Any) -> None:
    small_device(1, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        fit(bank, tasks(bank, "lora", 2), HARD, seed=0, round_=0)
