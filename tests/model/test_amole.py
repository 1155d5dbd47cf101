"""The fused layer against the definition in algorithm.md, written out token by token and expert by expert."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedamole.errors import ConfigError
from fedamole.model.amole import AdapterSpec, amole_linear, balance_loss, mixture_weights, route
from fedamole.model.params import expert_keys, router_key, shared_keys, stack

M = "m"
SHAPES = ((2, 5, 7), (3, 8, 4), (1, 2, 3), (4, 6, 6))
"""(rank, d_in, d_out)"""


def spec(**fields: Any) -> AdapterSpec:
    return AdapterSpec(**{"rank": 2, "alpha": 3.0, "dropout": 0.0, "top_k": 2, **fields})


def drawn(
    n: int, rank: int, d_in: int, d_out: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """One module's tensors by name, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {router_key(M): (rank, d_in)} if n else {}
    for a, b in (shared_keys(M), *(expert_keys(M, i) for i in range(n))):
        sizes |= {a: (rank, d_in), b: (d_out, rank)}
    return {
        name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, size in sizes.items()
    }


def inputs(d_in: int, d_out: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (2, 3, d_in), the frozen linear's outputs, and a direction to pull the outputs in."""
    generator = torch.Generator().manual_seed(seed)
    x, base_out, pull = (torch.randn(2, 3, d, generator=generator, dtype=torch.float64) for d in (d_in, d_out, d_out))
    return x.to(dtype).requires_grad_(), base_out.to(dtype), pull.to(dtype)


def by_definition(
    x: Tensor, base_out: Tensor, tensors: dict[str, Tensor], n: int, s: AdapterSpec, not_padding: Tensor
) -> tuple[Tensor, Tensor]:
    """y and the balance loss as algorithm.md has them, one token and one expert at a time."""
    shared_a, shared_b = (tensors[key] for key in shared_keys(M))
    experts = [tuple(tensors[key] for key in expert_keys(M, i)) for i in range(n)]
    ys, total, times = [], [torch.zeros((), dtype=x.dtype)] * n, [0] * n
    for token, out, counts in zip(x.flatten(0, 1), base_out.flatten(0, 1), not_padding, strict=True):
        y = out + s.alpha / s.rank * (shared_b @ (shared_a @ token))
        if n:
            t = tensors[router_key(M)] @ token
            raised = [torch.exp(torch.dot(t, a @ token) / math.sqrt(s.rank)) for a, _ in experts]
            p = [value / sum(raised) for value in raised]
            chosen = sorted(range(n), key=lambda i: -p[i].item())[: s.top_k]
            for i in chosen:
                a, b = experts[i]
                y = y + s.alpha / s.rank * (p[i] / sum(p[j] for j in chosen)) * (b @ (a @ token))
            if counts:
                total = [so_far + value for so_far, value in zip(total, p, strict=True)]
                times = [time + (i in chosen) for i, time in enumerate(times)]
        ys.append(y)
    tokens = int(not_padding.sum())
    balance = sum(n * (times[i] / (tokens * s.top_k)) * (total[i] / tokens) for i in range(n))
    return torch.stack(ys).view_as(base_out), torch.as_tensor(balance)


@pytest.mark.parametrize(
    ("n", "top_k", "shape"),
    [(n, k, SHAPES[(n + k) % 4]) for n in range(1, 9) for k in (1, 2, 3) if k <= n]
    + [(5, 2, shape) for shape in SHAPES],
)
def test_equals_the_definition(n: int, top_k: int, shape: tuple[int, int, int]) -> None:
    rank, d_in, d_out = shape
    s, tensors = spec(rank=rank, top_k=top_k), drawn(n, rank, d_in, d_out)
    x, base_out, pull = inputs(d_in, d_out)
    not_padding = torch.tensor([True, True, False, True, True, False])
    wanted_y, wanted_balance = by_definition(x, base_out, tensors, n, s, not_padding)
    y, routing, _ = amole_linear(x, base_out, *stack(tensors, M, list(range(n))), s)
    assert routing is not None
    balance = balance_loss(routing, not_padding).squeeze(0)
    torch.testing.assert_close(y, wanted_y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(balance, wanted_balance, rtol=1e-10, atol=1e-10)
    leaves = [x, *tensors.values()]
    # An expert that no token is routed to is no part of the loop's graph: its B has gradient zero.
    expected = torch.autograd.grad(
        (wanted_y * pull).sum() + 0.7 * wanted_balance, leaves, allow_unused=True, materialize_grads=True
    )
    gained = torch.autograd.grad((y * pull).sum() + 0.7 * balance, leaves)
    for name, mine, theirs in zip(["x", *tensors], gained, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10, msg=partial("{}: {}".format, name))


def test_without_domain_experts_it_is_peft_s_lora() -> None:
    from peft import LoraConfig, get_peft_model

    rank, d_in, d_out = 3, 6, 5
    tensors, (x, _, pull) = drawn(0, rank, d_in, d_out), inputs(d_in, d_out)
    model = nn.Sequential()
    model.add_module("lin", nn.Linear(d_in, d_out, dtype=torch.float64))
    config = LoraConfig(r=rank, lora_alpha=7, target_modules=["lin"])
    lora: Any = get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model.lin
    a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    a.data, b.data = (tensors[key].detach().clone() for key in shared_keys(M))

    theirs = lora(x)
    mine, routing, _ = amole_linear(x, lora.base_layer(x), *stack(tensors, M, []), spec(rank=rank, alpha=7.0))
    assert routing is None
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad((theirs * pull).sum(), [x, a, b])
    gained = torch.autograd.grad((mine * pull).sum(), [x, *(tensors[key] for key in shared_keys(M))])
    torch.testing.assert_close(gained, expected, rtol=1e-12, atol=1e-12)


def worked_example() -> tuple[Tensor, Tensor, Tensor, AdapterSpec]:
    """x, down and up of the example in `test_a_case_worked_by_hand`."""

    def first_row(*values: float) -> Tensor:
        return torch.cat([torch.tensor([values], dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)])

    ln = math.log
    rows = [first_row(2, 2), first_row(ln(4), 0), first_row(ln(2), ln(2)), first_row(0, ln(5)), first_row(1, 0)]
    up = torch.zeros(16, 1, dtype=torch.float64)
    up[0::4, 0] = torch.tensor([1.0, 10.0, 100.0, 5.0])
    return torch.eye(2, dtype=torch.float64), torch.cat(rows), up, AdapterSpec(4, 8.0, 0.0, "exact", 2)


def test_a_case_worked_by_hand() -> None:
    """Rank 4, alpha 8 (scaling 2), 3 experts, top 2, d_out = 1, tokens (1, 0) and (0, 1), frozen outputs 1000.

    W_t has the first row (2, 2) and zeros: t = (2, 0, 0, 0) for both tokens, so s_i = 2 * (first of A_i x) / sqrt(4)
    is the first of A_i x. With first rows (ln 4, 0), (ln 2, ln 2), (0, ln 5) the experts' exp(s) are
    4, 2, 1 for the first token:  p = 4/7, 2/7, 1/7;  chosen 1 and 2;  w = 2/3, 1/3, 0
    1, 2, 5 for the second:       p = 1/8, 2/8, 5/8;  chosen 3 and 2;  w = 0, 2/7, 5/7.
    B_i x-rows carry 1, 10, 100 and the shared expert gives 5 * (1, 0) x:
    y1 = 1000 + 2 (2/3 * ln 4 * 1 + 1/3 * ln 2 * 10 + 5) = 1010 + 28/3 ln 2
    y2 = 1000 + 2 (2/7 * ln 2 * 10 + 5/7 * ln 5 * 100)   = 1000 + 40/7 ln 2 + 1000/7 ln 5.
    Balance: P = (39, 30, 43) / 112, f = (1, 2, 1) / 4, 3 * sum f P = 3 * (39 + 60 + 43) / 448 = 213/224.
    """
    x, down, up, s = worked_example()
    y, routing, _ = amole_linear(x, torch.full((2, 1), 1000.0, dtype=torch.float64), down, up, s)
    assert routing is not None
    exact = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    wanted_p = torch.tensor([[4 / 7, 2 / 7, 1 / 7], [1 / 8, 2 / 8, 5 / 8]], dtype=torch.float64)
    wanted_w = torch.tensor([[2 / 3, 1 / 3, 0, 1], [0, 2 / 7, 5 / 7, 1]], dtype=torch.float64)
    exact(routing.probabilities, wanted_p)
    assert routing.chosen.tolist() == [[0, 1], [2, 1]]
    exact(mixture_weights(routing), wanted_w)
    ln2, ln5 = math.log(2), math.log(5)
    assert y.flatten().tolist() == pytest.approx([1010 + 28 / 3 * ln2, 1000 + 40 / 7 * ln2 + 1000 / 7 * ln5], abs=1e-9)
    both, only_first = torch.tensor([True, True]), torch.tensor([True, False])
    assert balance_loss(routing, both).item() == pytest.approx(213 / 224, abs=1e-12)
    # The first token alone: 3 * (1/2 * 4/7 + 1/2 * 2/7) = 9/7.
    assert balance_loss(routing, only_first).item() == pytest.approx(9 / 7, abs=1e-12)


def test_balance_loss_is_1_when_balanced_and_n_when_collapsed() -> None:
    """Token j scores expert j highest: P and f are both 1/n, n * n * 1/n^2 = 1. All to one expert, p = 1: n."""
    n = 4
    fits = 3 * torch.eye(n, dtype=torch.float64)
    ones = torch.ones(n, 1, dtype=torch.float64)
    not_padding = torch.ones(n, dtype=torch.bool)
    assert balance_loss(route(ones, fits.unsqueeze(2), 1), not_padding).item() == pytest.approx(1, abs=1e-12)
    fits = torch.zeros(n, n, dtype=torch.float64)
    fits[:, 2] = 800.0
    assert balance_loss(route(ones, fits.unsqueeze(2), 1), not_padding).item() == pytest.approx(n, abs=1e-12)


def test_no_gradient_flows_through_the_share_of_routed_tokens() -> None:
    """d/dp of n * sum f_i mean(p_i) is n f_i / T where f is a constant: for 2 experts, 1 token, top 1: (2, 0)."""
    p = torch.tensor([[0.75, 0.25]], requires_grad=True)
    routing = route(torch.ones(1, 1), torch.tensor([[[1.0], [0.0]]]), 1)._replace(probabilities=p)
    balance_loss(routing, torch.tensor([True])).backward()
    assert p.grad is not None
    assert p.grad.tolist() == [[2.0, 0.0]]


def test_padded_tokens_change_nothing() -> None:
    n, s, tensors = 4, spec(), drawn(4, 2, 5, 7)
    x, base_out, _ = inputs(5, 7)
    not_padding = torch.tensor([True, True, False, True, False, False])
    other = x.detach().clone()
    other.view(6, 5)[~not_padding] = 9.0

    def measured(rows: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        y, routing, _ = amole_linear(rows, base_out, *stack(tensors, M, list(range(n))), s)
        assert routing is not None
        balance = balance_loss(routing, not_padding)
        routed = [tensors[router_key(M)], *(tensors[expert_keys(M, i)[0]] for i in range(n))]
        return y.flatten(0, 1)[not_padding], balance, torch.autograd.grad(balance, routed)

    torch.testing.assert_close(measured(x), measured(other), rtol=0, atol=1e-14)
    assert measured(x)[2][0].abs().max() > 0


def test_balance_loss_without_a_counted_token_is_zero() -> None:
    routing = route(torch.ones(2, 1), torch.randn(2, 3, 1), 2)
    assert balance_loss(routing, torch.zeros(2, dtype=torch.bool)).item() == 0


def halves(width: int) -> list[Callable[[Tensor], Tensor]]:
    """Every mask of a row of this width; the layer scales what is kept (all are equally likely)."""
    masks = itertools.product((0.0, 1.0), repeat=width)

    def kept(mask: tuple[float, ...], values: Tensor) -> Tensor:
        return values * torch.tensor(mask, dtype=values.dtype)

    return [partial(kept, mask) for mask in masks]


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("kind", ["exact", "rank"])
def test_dropout_spares_the_router_and_is_right_on_average(n: int, kind: str) -> None:
    """Routing comes from the clean input, so the output is linear in the dropped values: its mean over all masks
    (of d_in = 3 inputs, or of (n + 1) * 2 activations) is the output without dropout, exactly."""
    s, tensors = spec(dropout=0.5, dropout_kind=kind), drawn(n, 2, 3, 4)
    down, up = stack(tensors, M, list(range(n)))
    x, base_out, _ = (tensor[:1, :1] for tensor in inputs(3, 4))
    clean, routing, _ = amole_linear(x, base_out, down, up, s)
    outputs = []
    for drop in halves(3 if kind == "exact" else (n + 1) * 2):
        y, dropped, _ = amole_linear(x, base_out, down, up, s, drop)
        outputs.append(y)
        for mine, theirs in zip(dropped or (), routing or (), strict=True):
            assert torch.equal(mine, theirs)
    torch.testing.assert_close(torch.stack(outputs).mean(0), clean, rtol=1e-12, atol=1e-12)
    assert torch.equal(outputs[0], base_out), "everything dropped leaves the frozen output"
    assert not torch.allclose(outputs[1], clean)


def test_where_each_kind_of_dropout_drops() -> None:
    """`exact` masks the module's input (6, d_in); `rank` the activations (6, (n+1) r) of the experts, shared last."""
    seen = []

    def drop(values: Tensor) -> Tensor:
        seen.append(values)
        return values

    n, rank, d_in, d_out = 3, 2, 5, 4
    tensors, (x, base_out, _) = drawn(n, rank, d_in, d_out), inputs(d_in, d_out)
    for kind in ("exact", "rank"):
        amole_linear(x, base_out, *stack(tensors, M, [0, 1, 2]), spec(dropout=0.5, dropout_kind=kind), drop)
    flat = x.flatten(0, 1)
    assert torch.equal(seen[0], flat)
    activations = [flat @ tensors[a].T for a, _ in (*(expert_keys(M, i) for i in range(n)), shared_keys(M))]
    torch.testing.assert_close(seen[1], torch.cat(activations, dim=1))
    assert len(seen) == 2


def test_bfloat16_inputs_with_float32_adapters() -> None:
    """bfloat16 keeps 8 bits: outputs and gradients agree with float32 to a few per cent of their size."""
    n, rank, d_in, d_out = 4, 4, 32, 16
    s = spec(rank=rank)
    tensors = drawn(n, rank, d_in, d_out, dtype=torch.float32)
    x, base_out, pull = inputs(d_in, d_out, dtype=torch.float32)
    x, base_out = (x.detach().bfloat16().float() / 8).requires_grad_(), base_out.bfloat16().float()

    def measured(dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, routing, _ = amole_linear(x.to(dtype), base_out.to(dtype), *stack(tensors, M, list(range(n))), s)
        assert routing is not None
        assert y.dtype == dtype
        assert routing.probabilities.dtype == torch.float32
        loss = (y.float() * pull).sum() + balance_loss(routing, torch.ones(6, dtype=torch.bool))
        return y.float(), torch.autograd.grad(loss, list(tensors.values()))

    (wanted_y, expected), (y, gained) = measured(torch.float32), measured(torch.bfloat16)
    assert (y - wanted_y).norm() < 0.02 * wanted_y.norm()
    for mine, theirs in zip(gained, expected, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() <= 0.03 * theirs.norm()


def test_experts_that_are_not_held_are_never_chosen() -> None:
    """A score 100 * 2 / sqrt(2) above the other leaves it a probability of exactly 0 in float32, like room for experts
    that the client does not hold; the held one is chosen all the same, and the balance loss is that without the room.
    """
    token = torch.tensor([[100.0, 0.0]])
    held = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
    room = torch.cat([held, torch.zeros(1, 3, 2)], dim=1)
    hidden = torch.tensor([[False, False, True, True, True]])
    alone, beside = route(token, held, 2), route(token, room, 2, hidden)
    assert alone.probabilities.tolist() == [[1.0, 0.0]]
    assert beside.chosen.tolist() == alone.chosen.tolist() == [[0, 1]]
    assert balance_loss(beside, num_experts=torch.tensor([2.0])).item() == balance_loss(alone).item() == 1.0


def test_too_few_experts_for_top_k() -> None:
    x, base_out, _ = inputs(5, 7)
    with pytest.raises(ConfigError, match=r"top_k = 3 .* holds 2; lower top_k to 2 .* at least 3"):
        amole_linear(x, base_out, *stack(drawn(2, 2, 5, 7), M, [0, 1]), spec(top_k=3))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", 0),
        ("top_k", 0),
        ("alpha", 0.0),
        ("alpha", -1.0),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("balance_weight", -1e-3),
    ],
)
def test_spec_refuses(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{key} = {value}"):
        spec(**{key: value})


def test_spec_accepts_its_borders() -> None:
    s = spec(rank=1, top_k=1, dropout=0.0, balance_weight=0.0, alpha=0.5)
    assert s.scaling == 0.5
    assert AdapterSpec().scaling == 2.0
