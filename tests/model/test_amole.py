"""The fused mixture against the loop of the paper, PEFT's LoRA, and numbers worked out by hand."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from fedamole.errors import ConfigError
from fedamole.model.amole import AdapterSpec, amole_linear, balance_loss, mixture_weights, route

D_IN, D_OUT, RANK, TOKENS = 12, 10, 4, 30


def draw(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random float64 weights of a module with n domain experts; the last of A and B is the shared expert."""
    g = torch.Generator().manual_seed(seed)
    rand = partial(torch.randn, generator=g, dtype=torch.float64)
    return {
        "x": rand(TOKENS, D_IN), "base": rand(TOKENS, D_OUT), "W": rand(RANK, D_IN),
        "A": rand(n + 1, RANK, D_IN), "B": rand(n + 1, D_OUT, RANK), "out": rand(TOKENS, D_OUT),
    }


def stacked(w: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    router = [w["W"]] if len(w["A"]) > 1 else []
    return torch.cat([*router, *w["A"]]), torch.cat([b.T for b in w["B"]])


def expert_loop(w, spec, counted):
    """The module as the paper writes it: token by token, expert by expert."""
    n = len(w["A"]) - 1
    rows, probabilities, routed = [], [], torch.zeros(n, dtype=torch.float64)
    for j, x in enumerate(w["x"]):
        t = w["W"] @ x
        s = torch.stack([(w["A"][i] @ x) @ t for i in range(n)]) / math.sqrt(spec.rank)
        p = torch.softmax(s, dim=0)
        top = p.topk(spec.top_k).indices
        y = w["base"][j] + spec.scaling * w["B"][n] @ (w["A"][n] @ x)
        for i in top:
            y = y + spec.scaling * p[i] / p[top].sum() * (w["B"][i] @ (w["A"][i] @ x))
        rows.append(y)
        if counted[j]:
            probabilities.append(p)
            routed[top] += 1
    balance = n * ((routed / routed.sum()) * torch.stack(probabilities).mean(0)).sum()
    return torch.stack(rows), balance


@pytest.mark.parametrize(("n", "top_k"), [(2, 1), (2, 2), (5, 2), (8, 3)])
def test_equals_a_loop_over_experts(n, top_k):
    spec = AdapterSpec(rank=RANK, alpha=8, dropout=0, top_k=top_k)
    counted = torch.arange(TOKENS) % 5 != 4
    w = draw(n)
    leaves = {name: w[name].clone().requires_grad_() for name in ("x", "W", "A", "B")}
    y, balance = expert_loop({**w, **leaves}, spec, counted)
    ((y * w["out"]).sum() + 3 * balance).backward()

    x = w["x"].clone().requires_grad_()
    down, up = (part.requires_grad_() for part in stacked(w))
    fused, routing = amole_linear(x, w["base"], down, up, spec)
    fused_balance = balance_loss(routing, counted)
    ((fused * w["out"]).sum() + 3 * fused_balance).backward()

    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
    close(fused, y)
    close(fused_balance, balance)
    close(x.grad, leaves["x"].grad)
    close(down.grad, torch.cat([leaves["W"].grad, *leaves["A"].grad]))
    close(up.grad, torch.cat([b.T for b in leaves["B"].grad]))


def test_without_domain_experts_it_is_pefts_lora():
    from peft import LoraConfig, get_peft_model

    w, spec = draw(0), AdapterSpec(rank=RANK, alpha=8, dropout=0)
    linear = torch.nn.Sequential(torch.nn.Linear(D_IN, D_OUT, dtype=torch.float64))
    peft = get_peft_model(linear, LoraConfig(r=RANK, lora_alpha=8, target_modules=["0"]))
    layer = peft.base_model.model[0]
    layer.lora_A.default.weight.data = w["A"][0].clone()
    layer.lora_B.default.weight.data = w["B"][0].clone()
    expected = peft(w["x"])
    (expected * w["out"]).sum().backward()

    down, up = (part.requires_grad_() for part in stacked(w))
    y, routing = amole_linear(w["x"], layer.base_layer(w["x"]).detach(), down, up, spec)
    (y * w["out"]).sum().backward()
    assert routing is None
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(down.grad, layer.lora_A.default.weight.grad)
    torch.testing.assert_close(up.grad.T, layer.lora_B.default.weight.grad)


def test_routing_by_hand():
    """r = 1, t = 2, e = (0, ln 2 / 2, ln 4 / 2): scores 0, ln 2, ln 4, so p = (1, 2, 4) / 7.

    The two largest are experts 2 and 1 with weights 4/6 and 2/6; the shared expert has weight 1.
    """
    e = torch.tensor([[[0.0], [math.log(2) / 2], [math.log(4) / 2]]])
    routing = route(torch.tensor([[2.0]]), e, top_k=2)
    torch.testing.assert_close(routing.probabilities, torch.tensor([[1 / 7, 2 / 7, 4 / 7]]))
    assert routing.chosen.tolist() == [[2, 1]]
    torch.testing.assert_close(mixture_weights(routing), torch.tensor([[0.0, 1 / 3, 2 / 3, 1.0]]))


def test_balance_loss_by_hand():
    """p = (1, 2, 4)/7 for one token routed to experts 2 and 1: f = (0, 1/2, 1/2), so 3 (2/7 + 4/7) / 2 = 9/7."""
    e = torch.tensor([[[0.0], [math.log(2) / 2], [math.log(4) / 2]]])
    routing = route(torch.tensor([[2.0]]), e, top_k=2)
    assert balance_loss(routing, torch.tensor([True])).item() == pytest.approx(9 / 7)


def test_balance_loss_is_one_when_even():
    """Two tokens with opposite preferences: f = P = (1/2, 1/2), so 2 (1/4 + 1/4) = 1."""
    e = torch.tensor([[[1.0], [-1.0]], [[-1.0], [1.0]]])
    routing = route(torch.ones(2, 1), e, top_k=1)
    assert balance_loss(routing, torch.tensor([True, True])).item() == pytest.approx(1)


def test_padding_does_not_count():
    w, spec = draw(4), AdapterSpec(rank=RANK, top_k=2, dropout=0)
    counted = torch.arange(TOKENS) < 20
    _, routing = amole_linear(w["x"], w["base"], *stacked(w), spec)
    w["x"][20:] = 100.0
    _, changed = amole_linear(w["x"], w["base"], *stacked(w), spec)
    assert balance_loss(routing, counted) == balance_loss(changed, counted)
    assert balance_loss(changed, torch.ones(TOKENS, dtype=torch.bool)) != balance_loss(changed, counted)


def masked(keep: float, seed: int):
    g = torch.Generator().manual_seed(seed)
    return lambda v: v * torch.empty_like(v).bernoulli_(keep, generator=g) / keep


def test_exact_dropout_leaves_the_router_alone_and_drops_inputs():
    w = draw(3)
    spec = AdapterSpec(rank=RANK, alpha=8, dropout=0.5, top_k=2)
    clean, clean_routing = amole_linear(w["x"], w["base"], *stacked(w), spec)
    dropped, routing = amole_linear(w["x"], w["base"], *stacked(w), spec, masked(0.5, 0))
    torch.testing.assert_close(routing.probabilities, clean_routing.probabilities)
    assert not torch.allclose(dropped, clean)
    again, _ = amole_linear(w["x"], w["base"], *stacked(w), spec, masked(0.5, 0))
    assert torch.equal(again, dropped)
    # One shared mask on x: the same as giving the experts the dropped x, with the clean x's weights.
    x = masked(0.5, 0)(w["x"])
    values = torch.einsum("tnr,tn->tnr", torch.einsum("nrd,td->tnr", w["A"], x), mixture_weights(clean_routing))
    expected = w["base"] + spec.scaling * torch.einsum("tnr,nor->to", values, w["B"])
    torch.testing.assert_close(dropped, expected)


@pytest.mark.parametrize("kind", ["exact", "rank"])
def test_dropout_keeps_the_expected_value(kind):
    """The mean over many masks is the output without dropout."""
    w = draw(3)
    spec = AdapterSpec(rank=RANK, alpha=RANK, dropout=0.3, dropout_kind=kind, top_k=2)
    clean, _ = amole_linear(w["x"], w["base"], *stacked(w), spec)
    runs = [amole_linear(w["x"], w["base"], *stacked(w), spec, masked(0.7, s))[0] for s in range(3000)]
    error = (torch.stack(runs).mean(0) - clean).abs().max() / clean.abs().max()
    assert error < 0.05


def test_rank_dropout_drops_activations():
    """With everything but one activation dropped, only that row of A matters."""
    w = draw(0)
    spec = AdapterSpec(rank=RANK, alpha=RANK, dropout=0.5, dropout_kind="rank")
    only_first = lambda v: v * torch.eye(RANK, dtype=v.dtype)[0]  # noqa: E731
    y, _ = amole_linear(w["x"], w["base"], *stacked(w), spec, only_first)
    first = F.linear(w["x"], w["A"][0][:1]) @ w["B"][0][:, :1].T
    torch.testing.assert_close(y, w["base"] + first)


def test_bf16_inputs_keep_float32_adapters_and_gradients():
    w = {name: value.float() for name, value in draw(4).items()}
    spec = AdapterSpec(rank=RANK, alpha=8, dropout=0, top_k=4)
    grads = {}
    for dtype in (torch.float32, torch.bfloat16):
        down, up = (part.clone().requires_grad_() for part in stacked(w))
        y, routing = amole_linear(w["x"].to(dtype), w["base"].to(dtype), down, up, spec)
        assert y.dtype == dtype
        assert routing.probabilities.dtype == torch.float32
        (y.float() * w["out"]).sum().backward()
        assert down.grad.dtype == torch.float32
        grads[dtype] = torch.cat([down.grad.flatten(), up.grad.flatten()])
    cosine = F.cosine_similarity(grads[torch.float32], grads[torch.bfloat16], dim=0)
    assert cosine > 0.99


def test_leading_dimensions_are_free():
    w, spec = draw(3), AdapterSpec(rank=RANK, dropout=0, top_k=2)
    flat, _ = amole_linear(w["x"], w["base"], *stacked(w), spec)
    shaped, _ = amole_linear(w["x"].view(5, 6, -1), w["base"].view(5, 6, -1), *stacked(w), spec)
    assert torch.equal(shaped.view(TOKENS, -1), flat)


def test_fewer_experts_than_top_k_is_an_error():
    w = draw(2)
    with pytest.raises(ConfigError, match=r"top_k = 3 .* holds 2"):
        amole_linear(w["x"], w["base"], *stacked(w), AdapterSpec(rank=RANK, top_k=3))


@pytest.mark.parametrize(
    "bad", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"dropout": -0.1}, {"top_k": 0}, {"balance_weight": -1.0}]
)
def test_spec_refuses_what_no_layer_can_have(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        AdapterSpec(**bad)
