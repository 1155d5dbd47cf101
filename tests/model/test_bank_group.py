"""A bank that holds the adapters of several clients, each of which must be as if it were alone, in float64."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.batch import TokenPair, collate, token_losses
from fedamole.model.forward_context import ForwardContext
from fedamole.model.params import Adapter, expert_ids, new_pool, new_shared, router_key, shared_keys, unstack
from fedamole.model.segments import segment_sum

RANK = 2
CLIENTS = 4


def spec(**fields: Any) -> AdapterSpec:
    return AdapterSpec(**{"rank": RANK, "alpha": 4.0, "dropout": 0.0, "balance_weight": 0.5, **fields})


def adapters(base: Base, kind: str = "mixture", **fields: object) -> list[Adapter]:
    """One per client, nothing at zero; mixtures hold 2 to 8 of 9 experts, other ones in every module and client."""
    created = []
    for client in range(CLIENTS):
        draw = torch.Generator().manual_seed(client)
        pool = new_shared(base.shapes, RANK, draw) if kind == "lora" else new_pool(base.shapes, RANK, 9, draw)
        held = {
            module: set(torch.randperm(9, generator=draw)[: 2 + (3 * client + 2 * index) % 7].tolist())
            for index, module in enumerate(sorted(base.shapes))
        }
        created.append(
            Adapter(
                spec(**fields),
                {
                    name: (tensor + 0.2 * torch.randn(tensor.shape, generator=draw)).double()
                    for name, tensor in pool.items()
                    if "/expert-" not in name or int(name.split("/expert-")[1][:2]) in held[name.split("/")[0]]
                },
            )
        )
    return created


def texts(even: bool) -> list[list[TokenPair]]:
    """Rows of each client; even ones are packed as many tokens for each."""
    draw, result = torch.Generator().manual_seed(9), list[list[TokenPair]]()
    for client in range(CLIENTS):
        sizes = [(7, 3)] * 2 if even else [(2 + 5 * index + client, 1 + index) for index in range(1 + client % 3)]
        ids = [torch.randint(2, 300, (sum(size),), generator=draw).tolist() for size in sizes]
        result.append([(row[:prompt], row[prompt:]) for row, (prompt, _) in zip(ids, sizes, strict=True)])
    return result


@pytest.fixture
def open_bank(base: Callable[..., Base]) -> Callable[[str], Bank]:
    def load(architecture: str = "llama") -> Bank:
        bank = Bank(base(architecture))
        bank.base.model.double()
        return bank

    return load


Found = tuple[Tensor, Tensor, dict[str, Tensor]]
"""A client's answer logits, balance losses by module, and gradients by name."""


def measured(
    bank: Bank, rows: Sequence[Sequence[TokenPair]], seeds: Sequence[int], first: int, packed: bool
) -> list[Found]:
    """What the clients `first` .. of a loaded bank compute on their rows, and the gradients of their losses."""
    last = first + len(rows)
    bank.select_clients(first, last)
    batch, balance = collate(rows, 1, packed, seeds), list[Tensor]()
    with bank.forward(batch, ForwardContext(balance_losses=balance)) as logits:
        losses = segment_sum(token_losses(logits, batch.labels), batch.answers) / batch.answers.counts
        by_module = torch.stack(balance or [torch.zeros(len(rows), dtype=torch.float64)])
        gradients = torch.autograd.grad((losses + by_module.sum(0)).sum(), bank.parameters())
    by_client = logits.detach().split(batch.answers.lengths)
    results = []
    for client in range(len(rows)):
        held, named = expert_ids(bank.adapter(first + client).tensors), dict[str, Tensor]()
        for (module, ids), down, up in zip(loaded(bank, held), gradients[::2], gradients[1::2], strict=True):
            named |= unstack(down[client], up[client], module, ids, RANK)
            room = up[client, len(ids) * RANK : -RANK], down[client, (len(ids) + 1) * RANK : -RANK]
            finite = bool(up[client].isfinite().all())
            assert not finite or not (room[0].any() or room[1].any()), "room that is not held takes part in nothing"
        results.append((by_client[client], by_module[:, client].detach(), named))
    return results


def loaded(bank: Bank, held: dict[str, list[int]]) -> list[tuple[str, list[int]]]:
    """Modules in the order of `bank.parameters()`, with what a client holds in them."""
    return [(name, held[name]) for name in bank.layers if name in held]


def assert_close(mine: Found, theirs: Found) -> None:
    for item, other in zip(mine[:2], theirs[:2], strict=True):
        torch.testing.assert_close(item, other, rtol=0, atol=1e-9)
    assert mine[2].keys() == theirs[2].keys()
    for name, gradient in mine[2].items():
        torch.testing.assert_close(gradient, theirs[2][name], rtol=0, atol=1e-9)
    assert max(float(gradient.abs().max()) for gradient in mine[2].values()) > 1e-3, "far above the tolerance"


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("dropout", ["exact", "rank", None])
@pytest.mark.parametrize("kind", ["mixture", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
def test_every_client_is_as_if_alone(
    open_bank: Callable[..., Bank], architecture: str, kind: str, dropout: str | None, even: bool
) -> None:
    """Packed and padded, in windows and as a whole, against each adapter as the only one of its bank, packed."""
    bank = open_bank(architecture)
    fields = {} if dropout is None else {"dropout": 0.3, "dropout_kind": dropout}
    group, rows, seeds = adapters(bank.base, kind, **fields), texts(even), [11, 12, 13, 14]
    held = [len(ids) for adapter in group for ids in expert_ids(adapter.tensors).values()]
    assert kind == "lora" or (min(held) <= 3 and max(held) >= 7)
    expected = []
    for client, adapter in enumerate(group):
        bank.load([adapter])
        expected += measured(bank, rows[client : client + 1], seeds[client : client + 1], 0, packed=True)
    assert not torch.allclose(expected[0][0][0], expected[1][0][0]), "clients differ"
    bank.load(group)
    for first, last in ((0, 4), (1, 3), (3, 4)):
        for packed in (True, False):
            result = measured(bank, rows[first:last], seeds[first:last], first, packed)
            for mine, theirs in zip(result, expected[first:last], strict=True):
                assert_close(mine, theirs)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("kind", ["mixture", "lora"])
def test_a_nan_stays_with_its_client(open_bank: Callable[..., Bank], kind: str, even: bool, packed: bool) -> None:
    """Bit for bit, in the forward and in the backward pass."""
    bank, rows = open_bank(), texts(even)
    group, result = adapters(bank.base, kind, dropout=0.2), []
    for sick in (False, True):
        if sick:
            tensors = {name: torch.full_like(tensor, math.nan) for name, tensor in group[1].tensors.items()}
            group[1] = replace(group[1], tensors=tensors)
        bank.load(group)
        result.append(measured(bank, rows, [1, 2, 3, 4], 0, packed))
    assert result[1][1][0].isnan().all()
    for client in (0, 2, 3):
        healthy, beside = result[0][client], result[1][client]
        assert torch.equal(healthy[0], beside[0])
        assert torch.equal(healthy[1], beside[1])
        assert all(torch.equal(gradient, beside[2][name]) for name, gradient in healthy[2].items())


def test_backward_adds_to_the_gradients_of_the_clients_at_work(open_bank: Callable[..., Bank]) -> None:
    """Two passes over the clients 1 and 2 leave twice the gradient of one there, and none at 0 and 3."""
    bank, rows = open_bank(), texts(False)
    bank.load(adapters(bank.base))
    flat = bank.trainable()
    assert [row.shape for row in flat] == [bank.store.weights.shape[1:]] * CLIENTS
    assert all(row.grad is not None and not row.grad.any() for row in flat)
    bank.select_clients(1, 3)
    batch, after = collate(rows[1:3], 1, packed=True), []
    for _ in range(2):
        with bank.forward(batch) as logits:
            losses = token_losses(logits, batch.labels)
            reference = torch.autograd.grad(losses.sum(), bank.parameters(), retain_graph=True)
            bank.backward(losses.sum())
        after.append(bank.store.gradients.clone())
    assert torch.equal(after[1], 2 * after[0])
    for client in (1, 2):
        # A row holds down and up of one module after the other.
        expected = torch.cat([gradient[client - 1].flatten() for gradient in by_name(bank, reference)])
        assert torch.equal(after[0][client], expected)
        assert torch.equal(flat[client].grad, after[1][client])  # type: ignore[arg-type]
    assert not after[1][[0, 3]].any()


def by_name(bank: Bank, gradients: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of `bank.parameters()` in the order of the modules' names."""
    pairs = dict(zip(bank.layers, zip(gradients[::2], gradients[1::2], strict=True), strict=True))
    return [gradient for name in sorted(pairs) for gradient in pairs[name]]


def test_what_an_optimiser_does_to_a_row_is_what_the_client_becomes(open_bank: Callable[..., Bank]) -> None:
    """Rows are views: adding 1 to the held numbers of row 2 adds 1 to each tensor of client 2 and to no other."""
    bank = open_bank()
    group = adapters(bank.base)
    bank.load(group)
    flat = bank.trainable()
    with torch.no_grad():
        flat[2] += 1
    for client, adapter in enumerate(group):
        back = bank.adapter(client).tensors
        assert back.keys() == adapter.tensors.keys()
        assert all(torch.equal(back[name], tensor + (client == 2)) for name, tensor in adapter.tensors.items())
    layer = next(iter(bank.layers.values()))
    assert layer.adapters is not None
    assert torch.equal(layer.adapters.parts[0][2, :RANK], group[2].tensors[router_key(layer.name)] + 1)


@pytest.mark.parametrize("kind", ["mixture", "lora"])
def test_every_row_is_a_round_trip(open_bank: Callable[..., Bank], kind: str) -> None:
    """Room is left as zeros: a row is as long as the largest client would need in every module."""
    bank = open_bank()
    group = adapters(bank.base, kind)
    bank.load(group)
    assert bank.clients == CLIENTS
    for client, adapter in enumerate(group):
        back = bank.adapter(client)
        assert back.spec == adapter.spec
        assert back.tensors.keys() == adapter.tensors.keys()
        assert all(torch.equal(back.tensors[name], tensor) for name, tensor in adapter.tensors.items())
        assert int(bank.store.weights[client].count_nonzero()) == adapter.parameters()
    counts = {module: max(len(expert_ids(adapter.tensors)[module]) for adapter in group) for module in bank.base.shapes}
    sizes = (
        RANK * ((n + (2 if n else 1)) * bank.base.shapes[name][0] + (n + 1) * bank.base.shapes[name][1])
        for name, n in counts.items()
    )
    assert bank.store.weights.shape == (CLIENTS, sum(sizes))
    bank.load(group[:1])
    assert bank.store.weights.shape == (1, group[0].parameters())
    bank.load([])
    assert bank.clients == 0


def test_adapters_of_different_kinds_are_refused(open_bank: Callable[..., Bank]) -> None:
    """Another spec, no router, a module less."""
    bank = open_bank()
    first, other = adapters(bank.base)[:2]
    module = min(bank.base.shapes)
    less = {name: tensor for name, tensor in other.tensors.items() if not name.startswith(f"{module}/")}
    plain = {key: other.tensors[key] for name in bank.base.shapes for key in shared_keys(name)}
    for wrong in (replace(other, spec=spec(alpha=5.0)), replace(other, tensors=less), replace(other, tensors=plain)):
        with pytest.raises(ValueError, match="different kinds"):
            bank.load([first, wrong])
        bank.load([wrong])


def test_a_client_with_too_few_experts_is_refused_even_beside_one_with_enough(open_bank: Callable[..., Bank]) -> None:
    """Its neighbours' room must not be taken for experts of its own."""
    bank = open_bank()
    first, other = adapters(bank.base, top_k=2)[:2]
    module, ids = next(iter(expert_ids(other.tensors).items()))
    removed = tuple(f"{module}/expert-{i:02d}/" for i in ids[1:])
    few = {name: tensor for name, tensor in other.tensors.items() if not name.startswith(removed)}
    with pytest.raises(ConfigError, match=rf"{module}: 1 experts, but top_k = 2 .* raise min_experts"):
        bank.load([first, replace(other, tensors=few)])
