"""fit(): against Adam written out by hand, and what becomes of a client whose training diverges."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training import alone
from torch import Tensor

from fedamole.experiment import prepare, resume
from fedamole.federation.client_state import PrivateState
from fedamole.federation.local import DivergedError, LocalTask, TrainingGroup, _batches, embed
from fedamole.federation.method import TrainingRequest
from fedamole.federation.progress import ProgressListener
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import pack, unpack
from fedamole.federation.settings import TrainingSettings
from fedamole.methods.fedamole import FedAmole
from fedamole.methods.fedit import FedIT
from fedamole.methods.local_only import OwnLora
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.model.bank import Bank
from fedamole.model.batch import TokenPair, collate, token_losses
from fedamole.model.params import Adapter, new_pool, new_shared

PLAIN = FedIT(rank=2, alpha=4.0, dropout=0.0).spec()


@pytest.fixture(scope="module")
def bank(runs: Any) -> Bank:
    return Bank(prepare(runs.load("local_only")).base)


@pytest.fixture(scope="module")
def rows(runs: Any) -> list[TokenPair]:
    return prepare(runs.load("local_only")).clients["mood"].train.pairs()


def lora(bank: Bank, spec: Any = PLAIN) -> Adapter:
    tensors = new_shared(bank.base.shapes, spec.rank, torch.Generator().manual_seed(0))
    filled = {key: tensor if tensor.any() else torch.full_like(tensor, 0.01) for key, tensor in tensors.items()}
    return Adapter(spec, filled)


def mixture(bank: Bank, **parameters: Any) -> Adapter:
    tensors = new_pool(bank.base.shapes, 2, 3, torch.Generator().manual_seed(0))
    return Adapter(FedAmole(rank=2, alpha=4.0, dropout=0.0, **parameters).spec(), tensors)


def train(bank: Bank, adapter: Adapter, rows: Sequence[TokenPair], round_: int = 0, **settings: Any) -> Any:
    chosen = TrainingSettings(**{"local_steps": 3, "learning_rate": 1e-2, **settings})
    return alone(bank, adapter, rows, chosen, seed=0, client="mood", round_=round_)


def gradients(bank: Bank, adapter: Adapter, batch: Sequence[TokenPair]) -> list[Tensor]:
    bank.load([adapter])
    parts = collate([batch], bank.base.pad_id)
    with bank.forward(parts) as logits:
        return list(torch.autograd.grad(token_losses(logits, parts.labels).mean(), bank.parameters()))


def adam_by_hand(
    bank: Bank, adapter: Adapter, rows: Sequence[TokenPair], settings: TrainingSettings, round_: int
) -> dict[str, Tensor]:
    """Kingma & Ba, algorithm 1, from zero moments: m = .9 m + .1 g, v = .999 v + .001 g^2, both divided by
    1 - beta^t, step = lr_decay^round * lr * m / (sqrt(v) + 1e-8). The gradient of a step is the mean over the
    gradients of its `accumulation` batches. The order of the rows is a permutation per pass.
    """
    generator = torch_generator(0, "order", "mood", round_)
    order: list[int] = []
    need = settings.steps(len(rows)) * settings.accumulation * settings.batch_size
    while len(order) < need:
        order += torch.randperm(len(rows), generator=generator).tolist()
    taken = iter(order)
    bank.load([adapter])
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in bank.parameters()]
    for step in range(1, settings.steps(len(rows)) + 1):
        batches = [[rows[next(taken)] for _ in range(settings.batch_size)] for _ in range(settings.accumulation)]
        gradient_lists = [gradients(bank, adapter, batch) for batch in batches]
        means = [sum(parts) / len(parts) for parts in zip(*gradient_lists, strict=True)]
        bank.load([adapter])
        with torch.no_grad():
            for index, (parameter, g) in enumerate(zip(bank.parameters(), means, strict=True)):
                m, v = moments[index]
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                moments[index] = m, v
                rate = settings.learning_rate * settings.lr_decay**round_
                parameter -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        adapter = bank.adapter()
    return dict(adapter.tensors)


def close(first: Any, other: Any, tolerance: float = 2e-5) -> bool:
    return all(torch.allclose(first[key], other[key], atol=tolerance, rtol=1e-3) for key in first)


@pytest.mark.parametrize(
    ("settings", "round_"),
    [
        ({"batch_size": 2}, 0),
        ({"batch_size": 1, "accumulation": 2}, 0),  # the mean of the gradients of two batches
        ({"batch_size": 2, "lr_decay": 0.5}, 3),  # an eighth of the rate; moments are zero again
        ({"batch_size": 16, "local_steps": 4}, 0),  # passes joined: 64 rows of 31
    ],
)
def test_fit_is_adam_on_the_mean_gradient(
    bank: Bank, rows: list[TokenPair], settings: dict[str, Any], round_: int
) -> None:
    chosen = TrainingSettings(**{"local_steps": 3, "learning_rate": 1e-2, **settings})
    start = lora(bank)
    expected = adam_by_hand(bank, start, rows, chosen, round_)
    trained = alone(bank, start, rows, chosen, seed=0, client="mood", round_=round_)
    assert trained.steps == chosen.local_steps
    assert close(trained.adapter.tensors, expected)
    # The tolerance is far below what training does.
    assert not close(trained.adapter.tensors, start.tensors, 1e-3)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_steps_gradient_is_the_mean_over_its_batches(bank: Bank, rows: list[TokenPair], accumulation: int) -> None:
    """Read before Adam forgets its scale; each client of a group has its own, whatever the other learns from."""
    settings = TrainingSettings(local_steps=1, batch_size=2, accumulation=accumulation)
    parts = {"mood": rows[:9], "other": rows[9:20]}
    tasks = [LocalTask(name, TrainingRequest(lora(bank)), part, 1e-2) for name, part in parts.items()]
    group = TrainingGroup(bank, tasks, settings, 0, 0, 0)
    group.step(0)
    gradient_of_step = bank.store.gradients.clone()
    for mine, (name, part) in zip(gradient_of_step, parts.items(), strict=True):
        drawn = _batches(part, settings.batch_size, torch_generator(0, "order", name, 0))
        apart = [gradients(bank, lora(bank), next(drawn)) for _ in range(accumulation)]
        expected = torch.stack([torch.cat([tensor.flatten() for tensor in gradient]) for gradient in apart]).mean(0)
        assert float(expected.abs().max()) > 1e-3
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def test_adam_is_new_each_round(bank: Bank, rows: list[TokenPair]) -> None:
    """A first step of Adam moves every number by the rate (m / sqrt(v) = +-1), whatever was trained before."""
    for _ in range(2):
        first = train(bank, lora(bank), rows, local_steps=1)
        moved = torch.cat([(first.adapter.tensors[k] - t).abs().flatten() for k, t in lora(bank).tensors.items()])
        assert moved.max() <= 1e-2 * 1.01
        assert moved.median() == pytest.approx(1e-2, rel=1e-2)


def test_the_learning_rate_decays_by_the_round(bank: Bank, rows: list[TokenPair]) -> None:
    """A first step moves by lr * decay^round: 0.01 * 0.5^2."""
    done = train(bank, lora(bank), rows, 2, local_steps=1, lr_decay=0.5)
    moved = torch.cat([(done.adapter.tensors[key] - t).abs().flatten() for key, t in lora(bank).tensors.items()])
    assert moved.median() == pytest.approx(0.0025, rel=1e-2)


def test_clipping(bank: Bank, rows: list[TokenPair]) -> None:
    """Adam forgets the scale of a gradient, but not beside its epsilon of 1e-8: clipped to a norm of 1e-9, no number
    moves by more than lr * 1e-9 / (1e-9 + 1e-8) = lr / 11. A bound that is never reached changes nothing.
    """
    free = train(bank, lora(bank), rows, local_steps=1).adapter.tensors
    tight = train(bank, lora(bank), rows, local_steps=1, clip_norm=1e-9).adapter.tensors
    moved = max(float((tight[key] - tensor).abs().max()) for key, tensor in lora(bank).tensors.items())
    assert 0 < moved <= 1e-2 / 11 * 1.01
    wide = train(bank, lora(bank), rows, local_steps=1, clip_norm=1e9).adapter.tensors
    assert all(torch.equal(free[key], wide[key]) for key in free)


@pytest.mark.parametrize(
    ("settings", "examples", "steps"),
    [
        ({"local_steps": 7}, 10, 7),
        ({"local_epochs": 1}, 10, 10),
        ({"local_epochs": 2, "batch_size": 3}, 10, 8),  # 2 x ceil(10 / 3)
        ({"local_epochs": 1, "batch_size": 2, "accumulation": 2}, 10, 3),  # ceil(10 / 4)
        ({"local_epochs": 3, "batch_size": 64, "local_steps": 9}, 10, 3),  # epochs win
    ],
)
def test_steps_and_epochs(
    settings: dict[str, int], examples: int, steps: int, bank: Bank, rows: list[TokenPair]
) -> None:
    assert TrainingSettings(**dict[str, Any](settings)).steps(examples) == steps
    assert train(bank, lora(bank), rows[:examples], **{"local_steps": 3, **settings}).steps == steps


def test_an_epoch_is_every_row_once(bank: Bank) -> None:
    rows: list[TokenPair] = [((2, index), (3,)) for index in range(10, 30)]
    batches = _batches(rows, 5, torch_generator(0, "order"))
    passes = [[prompt[1] for _ in range(4) for prompt, _ in next(batches)] for _ in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(10, 30))
    assert passes[0] != passes[1]
    assert passes[0] != list(range(10, 30))


def test_the_reported_loss_is_the_mean_over_the_steps(bank: Bank, rows: list[TokenPair]) -> None:
    """With a rate next to nothing the adapter stays, so the mean is that of the batches' losses."""
    chosen = TrainingSettings(local_steps=3, batch_size=2, learning_rate=1e-12)
    batches = _batches(rows, chosen.batch_size, torch_generator(0, "order", "mood", 0))
    bank.load([lora(bank)])
    losses = []
    for _ in range(3):
        batch = collate([next(batches)], bank.base.pad_id)
        with torch.no_grad(), bank.forward(batch) as logits:
            losses.append(float(token_losses(logits, batch.labels).mean()))
    loss = alone(bank, lora(bank), rows, chosen, seed=0, client="mood", round_=0).loss
    assert loss == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_steps_are_reported(bank: Bank, rows: list[TokenPair]) -> None:
    steps: list[tuple[int, int]] = []
    settings = TrainingSettings(local_steps=3)
    alone(bank, lora(bank), rows, settings, seed=0, client="a", round_=0, on_step=lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("change", [{"seed": 1}, {"client": "other"}, {"round_": 1}])
def test_order_and_dropout_come_from_seed_client_and_round(
    bank: Bank, rows: list[TokenPair], change: dict[str, Any]
) -> None:
    identity = {"seed": 0, "client": "mood", "round_": 0}
    settings = TrainingSettings(local_steps=2, learning_rate=1e-2, lr_decay=1.0)
    spec = replace(PLAIN, dropout=0.5)

    def run(rows: list[TokenPair], **where: Any) -> Any:
        return alone(bank, lora(bank, spec), rows, settings, **where).adapter.tensors

    assert all(
        torch.equal(a, b) for a, b in zip(run(rows, **identity).values(), run(rows, **identity).values(), strict=True)
    )
    assert not close(run(rows, **identity), run(rows, **{**identity, **change}))
    # With one row there is no order: what differs is the dropout alone.
    assert not close(run(rows[:1], **identity), run(rows[:1], **{**identity, **change}), 1e-6)


def test_the_balance_loss_is_trained_too(bank: Bank, rows: list[TokenPair]) -> None:
    """While B is zero the answers depend on no router: only the balance loss can move W_t in the first step."""
    key = next(key for key in mixture(bank).tensors if key.endswith("router/W"))
    for weight, moves in ((0.0, False), (1.0, True)):
        start = mixture(bank, balance_weight=weight)
        done = train(bank, start, rows, local_steps=1)
        assert torch.equal(done.adapter.tensors[key], start.tensors[key]) != moves
        assert done.loss == pytest.approx(train(bank, mixture(bank), rows, local_steps=1).loss)


def test_embeddings_are_means_over_all_tokens_whatever_the_batch(bank: Bank, rows: list[TokenPair]) -> None:
    bank.load([mixture(bank)])
    (single,), (together,) = embed(bank, [rows], 1), embed(bank, [rows], 400)
    assert set(single) == set(bank.base.shapes)
    for module, means in single.items():
        torch.testing.assert_close(means.token, together[module].token)
        assert sorted(means.experts) == [0, 1, 2]
        for expert in means.experts:
            torch.testing.assert_close(means.experts[expert], together[module].experts[expert])


def test_local_training_leaves_the_base_and_the_adapter_given_alone(bank: Bank, rows: list[TokenPair]) -> None:
    start = lora(bank)
    before = {key: tensor.clone() for key, tensor in start.tensors.items()}
    bank.load([])
    weights = {key: tensor.clone() for key, tensor in bank.base.model.state_dict().items()}
    train(bank, start, rows)
    assert all(torch.equal(before[key], tensor) for key, tensor in start.tensors.items())
    bank.load([])
    assert all(torch.equal(weights[key], tensor) for key, tensor in bank.base.model.state_dict().items())


# --- divergence -----------------------------------------------------------------------------------------------


def test_an_absurd_rate_diverges(bank: Bank, rows: list[TokenPair]) -> None:
    with pytest.raises(DivergedError, match=r"client mood, round 0: .*loss became .* within steps 1 to 3 .*lower"):
        train(bank, lora(bank), rows, learning_rate=1e30)


def test_a_last_step_that_ends_in_nan_is_seen(bank: Bank, rows: list[TokenPair]) -> None:
    """The only loss is finite, the adapter after it is not."""
    with pytest.raises(DivergedError, match="its adapter is no longer finite"):
        train(bank, lora(bank), rows, learning_rate=3e38 * 10, local_steps=1)


def test_an_adapter_with_nan_diverges(bank: Bank, rows: list[TokenPair]) -> None:
    start = lora(bank)
    next(iter(start.tensors.values()))[0, 0] = math.nan
    with pytest.raises(DivergedError, match="client mood, round 4: its loss became nan"):
        train(bank, start, rows, 4)


def test_training_continues_after_a_divergence(bank: Bank, rows: list[TokenPair]) -> None:
    expected = train(bank, lora(bank), rows).adapter.tensors
    with pytest.raises(DivergedError):
        train(bank, lora(bank), rows, learning_rate=1e30)
    result = train(bank, lora(bank), rows).adapter.tensors
    assert all(torch.equal(result[key], expected[key]) for key in expected)


@pytest.fixture
def poisoned(crash: Any) -> Callable[[], Path]:
    """A run of local_only killed after round 0, in whose folder the state of "mood" was given a NaN."""

    def make() -> Path:
        folder: Path = crash("group_started", 3, "local_only")
        path = folder / "clients/mood/state/round-0000.safetensors"
        private = unpack(PrivateState, path.read_bytes())
        kept = unpack(OwnLora, private.client_state["record"].numpy().tobytes())
        next(iter(kept.tensors.values()))[0, 0] = math.nan
        packed = torch.frombuffer(bytearray(pack(kept)), dtype=torch.uint8)
        path.write_bytes(pack(PrivateState({"record": packed}, private.trained)))
        commit = folder / "checkpoints/round-0000.json"
        content = json.loads(commit.read_text())
        content["clients"][str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        commit.write_text(json.dumps(content))
        return folder

    return make


def test_a_diverged_client_is_left_out_and_keeps_its_state(poisoned: Any, caplog: Any, facts: Any, runs: Any) -> None:
    """Local only: from round 1 on "mood" trains from a NaN. It stays where it was; nobody else notices, not even
    "plain", which trains in one group with it.
    """
    folder = poisoned()
    summary = resume(folder, ProgressListener())
    lines = [line for line in facts(folder) if line["split"] == "train" and line["client"] == "mood"]
    assert "failed" not in lines[0]
    for round_ in (1, 2):
        assert "client mood" in lines[round_]["failed"]
        assert lines[round_]["bytes_up"] == 0
        assert "loss" not in lines[round_]
    assert "client mood, round 1: its loss became nan" in caplog.text
    assert "left out of this round and keeps its state" in caplog.text
    assert summary["left_out"] == 2
    assert [path.name for path in folder.glob("clients/mood/state/*")] == ["round-0000.safetensors"]
    validated = [line["round"] for line in facts(folder) if line["split"] == "validation" and line["client"] == "mood"]
    assert validated == [-1, 0]
    assert set(summary["rows"]["local_only"]["clients"]) == {"chat", "entail", "mood", "plain"}
    healthy = runs("local_only")
    for client in ("chat", "entail", "plain"):
        state = f"clients/{client}/state/round-0002.safetensors"
        assert (folder / state).read_bytes() == (healthy / state).read_bytes()
        losses = [
            [line["loss"] for line in facts(run) if line.get("client") == client and line["split"] == "validation"]
            for run in (folder, healthy)
        ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("method", ["fedit", "fedamole"])
def test_if_all_diverge_the_server_state_is_unchanged(method: str, runs: Any, crash: Any, facts: Any) -> None:
    """A rate of 1e30 from the first round on: nobody answers, every round; the run ends and stays resumable."""
    overrides = ("training.learning_rate=1e30", "federation.rounds=3")
    run = runs(method, *overrides)
    states = {path.read_bytes() for path in run.glob("checkpoints/*.safetensors")}
    assert len(states) == 1
    train = [line for line in facts(run) if line["split"] == "train"]
    assert len(train) == 12
    assert all("failed" in line for line in train)
    rows = json.loads((run / "summary.json").read_text())["rows"]
    bare = {client: scores["loss"] for client, scores in rows["base"]["clients"].items()}
    for client, scores in rows[method]["clients"].items():
        assert scores["loss"] == pytest.approx(bare[client], rel=1e-5), "B is zero still"
    folder = crash("client_done", 6, method, *overrides)
    resume(folder, ProgressListener())
    assert facts(folder) == facts(run)


def test_the_aggregate_is_over_those_that_did_not_diverge(runs: Any, facts: Any) -> None:
    """A first step of Adam at a rate of 1e25 leaves numbers of 1e25, still finite; the products of a second overflow.
    An epoch in batches of 36 is one step for mood and plain, and two for chat and entail."""
    overrides = (
        "training.learning_rate=1e25",
        "training.local_epochs=1",
        "training.batch_size=36",
        "federation.rounds=1",
    )
    folder = runs("fedit_ft", *overrides)
    train = {line["client"]: line for line in facts(folder) if line["split"] == "train"}
    assert {client for client, line in train.items() if "failed" in line} == {"chat", "entail"}
    survivors = ["mood", "plain"]
    assert sorted(path.parent.parent.name for path in folder.glob("clients/*/state/*")) == survivors
    trained = []
    for client in survivors:
        private = unpack(PrivateState, (folder / f"clients/{client}/state/round-0000.safetensors").read_bytes())
        assert private.trained is not None
        trained.append(private.trained.tensors)
    state = unpack(SharedTensors, (folder / "checkpoints/round-0000.safetensors").read_bytes())
    for key, mean in state.tensors.items():
        torch.testing.assert_close(mean, sum(tensors[key] for tensors in trained) / len(trained))
