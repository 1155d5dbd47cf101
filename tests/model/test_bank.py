"""Adapters on a resident base, on every family of architectures that is supported (real tiny models)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedamole.errors import BaseModelError
from fedamole.federation.local import embed
from fedamole.federation.settings import TrainingSettings
from fedamole.model.amole import AdapterSpec, amole_linear, balance_loss
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.batch import collate, token_losses
from fedamole.model.dropout import row_keys
from fedamole.model.forward_context import ForwardContext
from fedamole.model.params import (
    Adapter,
    Shapes,
    expert_ids,
    expert_keys,
    new_pool,
    router_key,
    shared_keys,
    stack,
)
from tests.training import alone, lora_spec

from .conftest import ARCHITECTURES

every_architecture = pytest.mark.parametrize("kind", ARCHITECTURES)

TokenPair = tuple[Sequence[int], Sequence[int]]
ROWS: list[TokenPair] = [
    ((5, 9, 40, 33, 60, 12, 77, 8, 101, 14), (200, 31, 0)),
    ((5, 11), (90, 0)),
    ((5, 66, 67, 68, 69, 70, 71, 72), (19, 20, 21, 22, 23, 0)),
]
"""(prompt, answer), of 13, 4 and 14 tokens: padded together, and longer than Gemma 3's window of 8."""


@pytest.fixture
def open_bank(base: Callable[..., Base]) -> Callable[..., Bank]:
    """`open_bank("gpt2", dtype="bfloat16")`: a bank on a freshly loaded base."""
    return lambda *args, **settings: Bank(base(*args, **settings))


def random_adapter(shapes: Shapes, experts: int = 3, dtype: torch.dtype = torch.float32, **spec: Any) -> Adapter:
    """An adapter with nothing at zero; every module holds other experts than the one before it."""
    generator = torch.Generator().manual_seed(0)
    settings = AdapterSpec(**{"rank": 2, "alpha": 4.0, "dropout": 0.0, **spec})
    pool = new_pool(shapes, settings.rank, experts + 2, generator)
    names: list[str] = []
    for index, module in enumerate(sorted(shapes)):
        ids = sorted((index + step) % (experts + 2) for step in range(experts))
        names += [router_key(module)] if experts else []
        names += [key for pair in (shared_keys(module), *(expert_keys(module, i) for i in ids)) for key in pair]
    tensors = {name: pool[name] + 0.2 * torch.randn(pool[name].shape, generator=generator) for name in names}
    return Adapter(settings, {name: tensor.to(dtype) for name, tensor in tensors.items()})


def measure(bank: Bank, rows: Sequence[TokenPair], seed: int | None = None, pad: int = 1) -> dict[str, Any]:
    """Logits, answer losses, balance losses and the gradients of losses + balance of the loaded adapter."""
    batch = collate([rows], pad, seeds=None if seed is None else [seed])
    all_positions = replace(batch, logit_indices=torch.arange(batch.ids.numel()))
    results: list[Tensor] = []
    with bank.forward(all_positions, ForwardContext(balance_losses=results)) as flat:
        logits = flat.unflatten(0, batch.ids.shape)
        losses = token_losses(flat[batch.logit_indices], batch.labels)
        balance = torch.cat(results or [torch.zeros(1)])
        forwards = len(results)
        parameters = bank.parameters()
        gradients = torch.autograd.grad(losses.mean() + balance.sum(), parameters) if parameters else ()
        repeated = len(results) - forwards
    return {"logits": logits, "losses": losses, "balance": balance, "gradients": gradients, "repeated": repeated}


def close(mine: Any, theirs: Any, tolerance: float) -> None:
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@every_architecture
def test_default_targets_are_q_and_v(open_bank: Callable[..., Bank], kind: str) -> None:
    """Two layers of q (32 x 4 heads of 8) and v (32 x 2 heads of 8); GPT-2 has q, k and v in one Conv1D."""
    shapes = open_bank(kind).base.shapes
    if kind == "gpt2":
        assert shapes == {f"transformer.h.{layer}.attn.c_attn": (32, 96) for layer in (0, 1)}
        return
    q = {f"model.layers.{layer}.self_attn.q_proj": (32, 32) for layer in (0, 1)}
    assert shapes == q | {f"model.layers.{layer}.self_attn.v_proj": (32, 16) for layer in (0, 1)}


def test_named_targets(open_bank: Callable[..., Bank]) -> None:
    """An ending names it in every layer, a whole name just one; the output head is never one of them."""
    bank = open_bank("llama", targets=("down_proj", "model.layers.1.self_attn.o_proj"))
    down = {f"model.layers.{layer}.mlp.down_proj": (48, 32) for layer in (0, 1)}
    assert bank.base.shapes == down | {"model.layers.1.self_attn.o_proj": (32, 32)}
    with pytest.raises(BaseModelError, match="no linear is called 'lm_head'"):
        open_bank("llama", targets=("lm_head",))


@every_architecture
def test_an_empty_bank_is_the_untouched_base(
    open_bank: Callable[..., Bank], folder: Callable[[str], Path], kind: str
) -> None:
    from transformers import AutoModelForCausalLM

    bare = AutoModelForCausalLM.from_pretrained(folder(kind)).eval()
    bank, ids = open_bank(kind), torch.tensor([[5, 9, 40, 33, 60, 12, 77, 8, 101, 14]])
    with torch.no_grad():
        expected = bare(input_ids=ids).logits
        assert torch.equal(bank.base.model(input_ids=ids).logits, expected)
        bank.load([random_adapter(bank.base.shapes)])
        assert (bank.base.model(input_ids=ids).logits - expected).abs().max() > 0.1
        bank.load([])
        assert torch.equal(bank.base.model(input_ids=ids).logits, expected)
    assert bank.parameters() == []
    with pytest.raises(RuntimeError, match="empty"):
        bank.adapter()


@every_architecture
@pytest.mark.parametrize("experts", [0, 3])
def test_load_and_adapter_are_a_round_trip_of_copies(open_bank: Callable[..., Bank], kind: str, experts: int) -> None:
    bank = open_bank(kind)
    adapter = random_adapter(bank.base.shapes, experts)
    bank.load([adapter])
    back = bank.adapter()
    assert back.spec == adapter.spec
    assert back.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(back.tensors[key], adapter.tensors[key]) for key in back.tensors)
    before = {key: tensor.clone() for key, tensor in adapter.tensors.items()}
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter += 1
    for tensors in (adapter.tensors, back.tensors):
        assert all(torch.equal(tensors[key], before[key]) for key in before)
    assert sum(parameter.numel() for parameter in bank.parameters()) == adapter.parameters()


@every_architecture
def test_every_module_has_its_own_experts(open_bank: Callable[..., Bank], kind: str) -> None:
    """Each wrapped linear gives the frozen linear's output plus the mixture of its own named tensors."""
    bank = open_bank(kind)
    adapter = random_adapter(bank.base.shapes)
    held = expert_ids(adapter.tensors)
    assert len({tuple(ids) for ids in held.values()}) == len(held)
    bank.load([adapter])
    for name, layer in bank.layers.items():
        x = torch.randn(2, 3, bank.base.shapes[name][0], generator=torch.Generator().manual_seed(1))
        base_out = layer.base_layer(x)
        expected, _, _ = amole_linear(x, base_out, *stack(adapter.tensors, name, held[name]), lora_spec(adapter.spec))
        assert torch.equal(layer(x), expected)
        assert not torch.allclose(expected, base_out)


def test_an_adapter_may_leave_modules_out(open_bank: Callable[..., Bank]) -> None:
    bank = open_bank("llama")
    names = sorted(bank.base.shapes)
    part = random_adapter({name: bank.base.shapes[name] for name in names[:2]})
    bank.load([random_adapter(bank.base.shapes)])
    bank.load([part])
    assert bank.adapter().modules() == names[:2]
    x = torch.randn(1, 2, 32)
    layer = bank.layers[names[3]]
    assert torch.equal(layer(x), layer.base_layer(x))


def test_adapters_of_another_base_are_refused(open_bank: Callable[..., Bank]) -> None:
    bank = open_bank("llama")
    with pytest.raises(BaseModelError, match="it adapts 'elsewhere', which is not a target of this base"):
        bank.load([random_adapter({"elsewhere": (32, 32)})])
    name = next(iter(bank.base.shapes))
    with pytest.raises(BaseModelError, match=r"shared/B. is for 31 values, this base has 32"):
        bank.load([random_adapter({name: (32, 31)})])


@every_architecture
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_lowers_the_loss(open_bank: Callable[..., Bank], kind: str, dtype: str) -> None:
    """20 steps on three rows; the frozen weights stay as they are, the adapter is float32 on either base."""
    bank = open_bank(kind, dtype=dtype)
    frozen = {key: value.clone() for key, value in bank.base.model.state_dict().items()}
    adapter = random_adapter(bank.base.shapes, dropout=0.05)
    settings = TrainingSettings(local_steps=20, batch_size=3, learning_rate=1e-2)
    bank.load([adapter])
    before = measure(bank, ROWS)["losses"].mean().item()
    trained = alone(bank, adapter, ROWS, settings, seed=1, client="c", round_=0)
    bank.load([trained.adapter])
    assert measure(bank, ROWS)["losses"].mean().item() < 0.7 * before
    assert trained.adapter.tensors.keys() == adapter.tensors.keys()
    for key, tensor in trained.adapter.tensors.items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, adapter.tensors[key]), key
    bank.load([])
    assert all(torch.equal(value, frozen[key]) for key, value in bank.base.model.state_dict().items())


@every_architecture
def test_padding_on_the_right_changes_nothing(open_bank: Callable[..., Bank], kind: str) -> None:
    """In float64: a row's logits and losses alone and in a ragged batch; and whatever the padding token is, losses,
    balance losses and gradients stay (the router counts real tokens only)."""
    bank = open_bank(kind)
    bank.base.model.double()
    bank.load([random_adapter(bank.base.shapes, dtype=torch.float64)])
    together, start = measure(bank, ROWS), 0
    for index, row in enumerate(ROWS):
        alone, length = measure(bank, [row]), len(row[0]) + len(row[1])
        close(together["logits"][index, :length], alone["logits"][0], 1e-10)
        close(together["losses"][start : start + len(row[1])], alone["losses"], 1e-10)
        start += len(row[1])
    other = measure(bank, ROWS, pad=99)
    for key in ("losses", "balance", "gradients"):
        close(other[key], together[key], 1e-10)
    assert not torch.allclose(other["logits"], together["logits"]), "the padding token does differ"


@every_architecture
@pytest.mark.parametrize("seed", [None, 5])
def test_gradient_checkpointing_changes_nothing(open_bank: Callable[..., Bank], kind: str, seed: int | None) -> None:
    """Float64, with the balance loss, without and with dropout; the backward pass does repeat every module."""
    results = []
    for checkpointing in (False, True):
        bank = open_bank(kind, gradient_checkpointing=checkpointing)
        bank.base.model.double()
        bank.load([random_adapter(bank.base.shapes, dropout=0.3, dtype=torch.float64)])
        bank.base.training(True)
        results.append(measure(bank, ROWS, seed))
        assert results[-1]["repeated"] == (len(bank.layers) if checkpointing else 0)
        bank.base.training(False)
    plain, checkpointed = results
    for key in ("logits", "losses", "balance", "gradients"):
        close(checkpointed[key], plain[key], 1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("part", ["losses", "balance"])
def test_gradients_are_the_slopes_of_the_losses(open_bank: Callable[..., Bank], part: str, checkpointing: bool) -> None:
    """In float64, along the direction u of the gradient g of the losses' or the balance losses' sum,
    (f(w + h u) - f(w - h u)) / 2h is |g|. On GPT-2, whose norms too keep float64."""
    bank = open_bank("gpt2", gradient_checkpointing=checkpointing)
    bank.base.model.double()
    bank.load([random_adapter(bank.base.shapes, dtype=torch.float64)])
    bank.base.training(True)
    batch = collate([ROWS], 1)

    def value() -> Tensor:
        balance: list[Tensor] = []
        with bank.forward(batch, ForwardContext(balance_losses=balance)) as logits:
            losses = token_losses(logits, batch.labels)
            total = losses.sum() if part == "losses" else torch.cat(balance).sum()
            if torch.is_grad_enabled():
                total.backward()
            return total.detach()

    value()
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in bank.parameters()]
    squared = sum(float(g.square().sum()) for g in gradients)
    assert squared > 1e-6
    ends = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for weight, gradient in zip(bank.parameters(), gradients, strict=True):
                weight += step * gradient / squared**0.5
            ends.append(value())
    assert float(ends[0] - ends[1]) / 2e-5 == pytest.approx(squared**0.5, rel=1e-5)


def test_fit_is_the_same_with_gradient_checkpointing(open_bank: Callable[..., Bank]) -> None:
    """Three steps of Adam with dropout and a heavy balance loss, in float64; afterwards the base is in eval mode."""
    settings = TrainingSettings(local_steps=3, batch_size=2, accumulation=2, learning_rate=1e-2)
    results = []
    for checkpointing in (False, True):
        bank = open_bank("llama", gradient_checkpointing=checkpointing)
        bank.base.model.double()
        adapter = random_adapter(bank.base.shapes, dropout=0.2, balance_weight=1.0, dtype=torch.float64)
        results.append(alone(bank, adapter, ROWS, settings, seed=1, client="c", round_=0).adapter.tensors)
        assert not bank.base.model.training
    close(results[1], results[0], 1e-10)


def test_the_balance_loss_is_that_of_the_counted_tokens_of_each_module(open_bank: Callable[..., Bank]) -> None:
    """Each module's balance loss from the inputs it gets, in the order of the forward pass (q, v, q, v)."""
    bank = open_bank("llama")
    adapter = random_adapter(bank.base.shapes)
    bank.load([adapter])
    expected, batch = [], collate([ROWS], 1)

    def read(layer: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        tensors = stack(adapter.tensors, layer.name, layer.adapters.experts[0])
        rows = inputs[0].flatten(0, 1)[batch.not_padding]
        _out, routing, _weights = amole_linear(rows, layer.base_layer(rows), *tensors, lora_spec(adapter.spec))
        assert routing is not None
        expected.append(balance_loss(routing))

    hooks = [layer.register_forward_hook(read) for layer in bank.layers.values()]
    balance = measure(bank, ROWS)["balance"]
    for hook in hooks:
        hook.remove()
    assert len(expected) == 4
    close(balance, torch.cat(expected), 1e-5)


@pytest.mark.parametrize("kind", ["exact", "rank"])
def test_dropout_masks_come_from_the_seed_and_the_module_alone(open_bank: Callable[..., Bank], kind: str) -> None:
    bank = open_bank("llama")
    bank.load([random_adapter(bank.base.shapes, dropout=0.4, dropout_kind=kind)])
    masks = measure(bank, ROWS, seed=11)
    torch.rand(3)  # moves torch's global generator, which must not matter
    again, other, off = measure(bank, ROWS, seed=11), measure(bank, ROWS, seed=12), measure(bank, ROWS)
    assert torch.equal(masks["logits"], again["logits"])
    assert not torch.allclose(masks["logits"], other["logits"])
    assert not torch.allclose(masks["logits"], off["logits"])
    bank.load([random_adapter(bank.base.shapes, dropout=0.0)])
    assert torch.equal(measure(bank, ROWS, seed=11)["logits"], measure(bank, ROWS)["logits"])


def test_every_module_draws_its_own_dropout_mask(open_bank: Callable[..., Bank]) -> None:
    """Kept values stay as they are; about p of them are dropped, elsewhere in every module."""
    bank = open_bank("llama")
    bank.load([random_adapter(bank.base.shapes, dropout=0.25)])
    values = torch.ones(100, 32)
    positions, spec = np.arange(100), lora_spec(bank.adapter().spec)
    keys = row_keys(np.full(100, 3), positions * 0, positions)
    masks = [layer._drop(spec, keys)(values) for layer in bank.layers.values()]
    assert len(masks) == 4
    for mask in masks:
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert (mask == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    for index, mask in enumerate(masks):
        for other in masks[index + 1 :]:
            assert ((mask == 0) == (other == 0)).float().mean() < 0.7  # 0.625 if independent


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_mean_embeddings(open_bank: Callable[..., Bank], kind: str, tokens: int) -> None:
    """t_c = mean of W_t x and e_i = mean of A_i x over the 13 + 4 + 14 tokens, prompts and answers, no padding: by
    linearity W_t and A_i of the mean input, read here row by row in front of each module."""
    bank = open_bank(kind)
    adapter = random_adapter(bank.base.shapes)
    bank.load([adapter])
    inputs: dict[str, list[Tensor]] = {name: [] for name in bank.layers}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, values: inputs[layer.name].append(values[0][0].double()))
        for layer in bank.layers.values()
    ]
    with torch.no_grad():
        for prompt, answer in ROWS:
            bank.base.model(input_ids=torch.tensor([[*prompt, *answer]]))
    for hook in hooks:
        hook.remove()
    (means,) = embed(bank, [ROWS], tokens)
    held = expert_ids(adapter.tensors)
    assert means.keys() == held.keys()
    for name, mean in means.items():
        x = torch.cat(inputs[name])
        assert len(x) == 31
        close(mean.token.double(), adapter.tensors[router_key(name)].double() @ x.mean(0), 1e-5)
        assert sorted(mean.experts) == held[name]
        for expert, embedding in mean.experts.items():
            close(embedding.double(), adapter.tensors[expert_keys(name, expert)[0]].double() @ x.mean(0), 1e-5)
    assert bank.active.context.embedding_sums is None


def test_a_plain_lora_has_no_embeddings_and_no_balance_loss(open_bank: Callable[..., Bank]) -> None:
    bank = open_bank("llama")
    bank.load([random_adapter(bank.base.shapes, experts=0)])
    assert embed(bank, [ROWS], 20) == [{}]
    results: list[Tensor] = []
    with bank.forward(collate([ROWS], 1), ForwardContext(balance_losses=results)):
        assert results == []


def test_a_context_ends_with_its_block(open_bank: Callable[..., Bank]) -> None:
    bank = open_bank("llama")
    outer = ForwardContext(balance_losses=[])
    with bank.enter(outer):
        with pytest.raises(KeyError), bank.enter(ForwardContext(dropout_keys=torch.zeros(1))):
            raise KeyError
        assert bank.active.context is outer
    assert bank.active.context == ForwardContext()


def test_without_its_domain_experts_an_adapter_is_its_shared_expert(open_bank: Callable[..., Bank]) -> None:
    """Domain experts whose B is zero add nothing, so the model is the plain LoRA of the shared expert."""
    bank = open_bank("gpt2")
    mixture = random_adapter(bank.base.shapes)
    silent = {
        key: torch.zeros_like(tensor) if "/expert-" in key and key.endswith("/B") else tensor
        for key, tensor in mixture.tensors.items()
    }
    shared = {key: silent[key] for name in bank.base.shapes for key in shared_keys(name)}
    logits = []
    for tensors in (silent, shared):
        bank.load([replace(mixture, tensors=tensors)])
        logits.append(measure(bank, ROWS)["logits"])
    close(logits[0], logits[1], 1e-5)
