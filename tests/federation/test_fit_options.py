"""What a `TrainingRequest` can ask for, in float64 against a plain loop with torch's Adam and AdamW written here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tests.model.conftest import base, folder  # noqa: F401 - fixtures
from tests.training import lora_spec

from fedamole.federation.local import LocalTask, fit
from fedamole.federation.method import TrainingRequest, TrainingResult
from fedamole.federation.penalties import LossFunction, ParameterLayout, Penalty, Proximal, TailNorm
from fedamole.federation.randomness import torch_generator
from fedamole.federation.settings import TrainingSettings
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.batch import TokenPair, collate, token_losses
from fedamole.model.params import Adapter, new_shared, shared_keys

ROWS: dict[str, list[TokenPair]] = {
    "a": [((5, 9, 30), (7, 0)), ((8, 2), (41, 12, 0)), ((3, 3, 3, 60), (1, 0))],
    "b": [((50, 19), (17, 22, 0)), ((80, 21, 4, 4), (4, 0))],
}
SETTINGS = TrainingSettings(local_steps=5, batch_size=2, learning_rate=1e-2, clip_norm=0.5)


@dataclass(frozen=True)
class FourthPower(Penalty):
    """A penalty that `fit` has never heard of: weight * sum of the fourth powers of all parameters."""

    weight: float

    @classmethod
    def loss(cls, penalties: Sequence["FourthPower"], layout: ParameterLayout) -> LossFunction:
        weights = torch.tensor([penalty.weight for penalty in penalties], dtype=torch.float64)
        return lambda parameters: weights * (parameters**4).sum(1)


@pytest.fixture
def bank(base: Callable[..., Base]) -> Bank:  # noqa: F811
    opened = Bank(base())
    opened.base.model.double()
    return opened


def lora(bank: Bank, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 whose B is not 0."""
    draw = torch.Generator().manual_seed(seed)
    tensors = new_shared(bank.base.shapes, 2, draw)
    return {
        name: (tensor if name.endswith("A") else torch.randn(tensor.shape, generator=draw) * 0.1).double()
        for name, tensor in tensors.items()
    }


def plainly(
    bank: Bank, client: str, request: TrainingRequest, steps: int, begun: int = 0, turn: int = 0
) -> dict[str, torch.Tensor]:
    """The same training by autograd on named tensors, with torch.optim.Adam over those that are not frozen."""
    tensors = {
        name: t.clone().requires_grad_(name not in request.adapter.frozen)
        for name, t in request.adapter.tensors.items()
    }
    learning = [tensor for tensor in tensors.values() if tensor.requires_grad]
    adam = torch.optim.AdamW(learning, lr=SETTINGS.learning_rate, weight_decay=request.weight_decay)
    rows, purpose = ROWS[client], f"order/{turn}" if turn else "order"
    generator, queue = torch_generator(3, purpose, client, 1), list[int]()
    for _ in range(steps):
        while len(queue) < SETTINGS.batch_size:
            queue += torch.randperm(len(rows), generator=generator).tolist()
        chosen, queue = queue[: SETTINGS.batch_size], queue[SETTINGS.batch_size :]
        batch = collate([[rows[i] for i in chosen]], bank.base.pad_id)
        handles = [
            bank.layers[module].register_forward_hook(added(lora_spec(request.adapter.spec).scaling, tensors, module))
            for module in bank.layers
        ]
        bank.load([])
        with bank.forward(batch) as logits:
            loss = token_losses(logits, batch.labels).mean()
        for handle in handles:
            handle.remove()
        if isinstance(request.penalty, Proximal):
            for name, centre in request.penalty.anchor.items():
                loss = loss + request.penalty.weight / 2 * ((tensors[name] - centre) ** 2).sum()
        if isinstance(request.penalty, TailNorm):
            first = request.penalty.first_rank
            pairs = [[tensors[key] for key in shared_keys(module)] for module in bank.layers]
            loss = loss + request.penalty.weight * sum(a[first:].norm() * b[:, first:].norm() for a, b in pairs)
        if isinstance(request.penalty, FourthPower):
            loss = loss + request.penalty.weight * sum((tensor**4).sum() for tensor in tensors.values())
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, SETTINGS.clip_norm)
        adam.step()
    return {name: tensor.detach() for name, tensor in tensors.items()}


def added(scaling: float, tensors: dict[str, torch.Tensor], module: str) -> Callable[..., torch.Tensor]:
    a, b = (tensors[key] for key in shared_keys(module))
    return lambda _, inputs, y: y + scaling * (inputs[0] @ a.T) @ b.T


def asked(bank: Bank, kind: str, seed: int, share: float = 1.0, decay: float = 0.0) -> TrainingRequest:
    tensors = lora(bank, seed)
    spec = AdapterSpec(rank=2, alpha=4.0, dropout=0.0, balance_weight=0.0)
    frozen = tuple(sorted(name for name in tensors if name.endswith("A"))) if kind == "frozen" else ()
    anchor = lora(bank, seed + 50) if kind in ("anchor", "anchor of B") else {}
    anchor = {name: t for name, t in anchor.items() if name.endswith("B") or kind == "anchor"}
    penalties: dict[str, Penalty] = {
        "anchor": Proximal(anchor, 0.7 + seed),
        "anchor of B": Proximal(anchor, 0.7 + seed),
        "tail": TailNorm(1, 0.3 + seed),
        "fourth power": FourthPower(20.0 + seed),
    }
    return TrainingRequest(
        Adapter(spec, tensors, frozen=frozen), share, penalty=penalties.get(kind), weight_decay=decay
    )


@pytest.mark.parametrize("kind", ["plain", "frozen", "anchor", "anchor of B", "tail", "fourth power"])
def test_equals_a_plain_loop_with_adam(kind: str, bank: Bank) -> None:
    fits = {name: asked(bank, kind, seed) for seed, name in enumerate(ROWS)}
    expected = {name: plainly(bank, name, request, 5) for name, request in fits.items()}
    tasks = [LocalTask(name, request, ROWS[name], SETTINGS.learning_rate) for name, request in fits.items()]
    together = fit(bank, tasks, SETTINGS, seed=3, round_=1)
    for task, result in zip(tasks, together, strict=True):
        (alone,) = fit(bank, [task], SETTINGS, seed=3, round_=1)
        for outcome in (result, alone):
            assert isinstance(outcome, TrainingResult)
            for name, tensor in expected[task.client].items():
                torch.testing.assert_close(outcome.adapter.tensors[name], tensor, rtol=0, atol=1e-9)
                if name in task.fit.adapter.frozen:
                    assert torch.equal(outcome.adapter.tensors[name], task.fit.adapter.tensors[name])


@pytest.mark.parametrize("decays", [(0.0, 0.0), (0.0, 0.9), (0.9, 0.5)])
def test_clients_of_a_group_may_ask_for_different_things(decays: tuple[float, float], bank: Bank) -> None:
    """One has frozen tensors, which do not decay; the other an anchor and two steps, after which it decays no more."""
    fits = {
        "a": asked(bank, "frozen", 0, decay=decays[0]),
        "b": asked(bank, "anchor", 1, share=0.4, decay=decays[1]),
    }
    expected = {"a": plainly(bank, "a", fits["a"], 5), "b": plainly(bank, "b", fits["b"], 2)}
    tasks = [LocalTask(name, request, ROWS[name], SETTINGS.learning_rate) for name, request in fits.items()]
    for task, result in zip(tasks, fit(bank, tasks, SETTINGS, seed=3, round_=1), strict=True):
        assert isinstance(result, TrainingResult)
        for name, tensor in expected[task.client].items():
            torch.testing.assert_close(result.adapter.tensors[name], tensor, rtol=0, atol=1e-9)


def test_clients_of_a_group_may_have_penalties_of_different_classes(bank: Bank) -> None:
    for kinds in (("tail", "anchor"), ("fourth power", "tail"), ("anchor", "plain")):
        fits = {name: asked(bank, kind, seed) for seed, (name, kind) in enumerate(zip("ab", kinds, strict=True))}
        tasks = [LocalTask(name, request, ROWS[name], SETTINGS.learning_rate) for name, request in fits.items()]
        for task, result in zip(tasks, fit(bank, tasks, SETTINGS, seed=3, round_=1), strict=True):
            assert isinstance(result, TrainingResult)
            for name, tensor in plainly(bank, task.client, task.fit, 5).items():
                torch.testing.assert_close(result.adapter.tensors[name], tensor, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["plain", "frozen"])
def test_weight_decay_is_adamws(kind: str, bank: Bank) -> None:
    request = asked(bank, kind, 0, decay=0.9)
    (result,) = fit(bank, [LocalTask("a", request, ROWS["a"], SETTINGS.learning_rate)], SETTINGS, seed=3, round_=1)
    assert isinstance(result, TrainingResult)
    expected, without = plainly(bank, "a", request, 5), plainly(bank, "a", replace(request, weight_decay=0.0), 5)
    for name, tensor in result.adapter.tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-9)
        if name in request.adapter.frozen:
            assert torch.equal(tensor, request.adapter.tensors[name])
        else:
            assert float((tensor - without[name]).abs().max()) > 1e-4, "the tolerance is far below what it does"


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ("steps", [5, 5]),  # 0.5 and 0.5 of 10
        ("paper", [10, 3]),  # 1 and 0.3 of 10, the second from step 10 on
    ],
)
def test_the_budget_says_which_shares_count(budget: Any, steps: list[int], bank: Bank) -> None:
    settings, done, step_counts = TrainingSettings(local_steps=10, budget=budget), 0.0, list[int]()
    for paper_step_fraction in (1.0, 0.3):
        request = replace(asked(bank, "plain", 0, 0.5), paper_step_fraction=paper_step_fraction)
        step_counts.append(LocalTask("a", request, ROWS["a"], 1e-2, done).steps(settings))
        done += request.fraction_for(budget)
    assert step_counts == steps
    assert LocalTask("a", asked(bank, "plain", 0, 0.5), ROWS["a"], 1e-2).steps(settings) == 5, (
        "paper_step_fraction is unset"
    )


@pytest.mark.parametrize("accumulation", [1, 3])
def test_tokens_are_those_of_the_batches(accumulation: int, bank: Bank) -> None:
    """Every row of a client is as long: 2 + 3 tokens and 4 + 1; 5 steps of 2 rows, so 5 x 2 x 5 = 50 for each."""
    settings = replace(SETTINGS, accumulation=accumulation)
    rows: dict[str, list[TokenPair]] = {
        "a": [((5, 9), (7, 8, 0)), ((8, 2), (41, 12, 0))],
        "b": [((50, 19, 3, 4), (0,))] * 3,
    }
    tasks = [
        LocalTask(name, asked(bank, "plain", 0, share), rows[name], 1e-2) for name, share in (("a", 0.4), ("b", 1.0))
    ]
    results = fit(bank, tasks, settings, seed=3, round_=1)
    assert [result.tokens for result in results if isinstance(result, TrainingResult)] == [
        20 * accumulation,
        50 * accumulation,
    ]


@pytest.mark.parametrize("steps", range(1, 8))
def test_shares_of_a_round_add_up(steps: int, bank: Bank) -> None:
    settings = TrainingSettings(local_steps=steps)
    for shares in ((0.5, 0.5), (0.25, 0.5, 0.25), (1.0,)):
        counts, done = [], 0.0
        for share in shares:
            task = LocalTask("a", asked(bank, "plain", 0, share), ROWS["a"], 1e-2, done)
            counts.append(task.steps(settings))
            done += share
        assert sum(counts) == steps or steps < 2 * len(shares), "a piece is at least one step"


def test_another_turn_sees_other_batches(bank: Bank) -> None:
    task = LocalTask("a", asked(bank, "plain", 0), ROWS["a"], SETTINGS.learning_rate)
    (first,) = fit(bank, [task], SETTINGS, seed=3, round_=1)
    (second,) = fit(bank, [task], SETTINGS, seed=3, round_=1, fit_index=1)
    assert isinstance(first, TrainingResult)
    assert isinstance(second, TrainingResult)
    expected = plainly(bank, "a", task.fit, 5, turn=1)
    for name, tensor in expected.items():
        torch.testing.assert_close(second.adapter.tensors[name], tensor, rtol=0, atol=1e-9)
    assert any(not torch.equal(first.adapter.tensors[name], tensor) for name, tensor in expected.items())
