"""The prior of FedMAP's second version: its value by hand, convexity, gradients, the network's steps and its checks."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.methods.by_hand import client
from tests.model.conftest import base, folder  # noqa: F401 - fixtures
from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.penalties import ParameterLayout, Proximal
from fedamole.federation.record import PayloadError
from fedamole.methods.fedmap import Estimate, FedMap, Prior, squared_distance
from fedamole.methods.local_only import OwnLora
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.methods.shared.convex_prior import (
    SHAPES,
    ConvexPrior,
    check_net,
    directions,
    fitted_net,
    net_values,
    new_net,
    tensor_inputs,
)
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.params import Adapter, Shapes, new_shared

MODULES = {"first": (5, 4), "second": (3, 6)}
SERVER = Server(BaseInfo(MODULES), (ClientInfo("a", 10), ClientInfo("b", 30)), seed=0)


def raw(value: float) -> float:
    """The number whose softplus is `value`."""
    return math.log(math.expm1(value))


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def drawn_lora(seed: int, scale: float = 1.0, shapes: Shapes = MODULES) -> dict[str, Tensor]:
    """A LoRA of rank 2 of normally distributed values."""
    generator = torch.Generator().manual_seed(seed)
    like = new_shared(shapes, 2, torch.Generator().manual_seed(0))
    return {name: scale * torch.randn(t.shape, generator=generator, dtype=torch.float64) for name, t in like.items()}


def drawn_net(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """A net of normally distributed numbers, far from that of the start."""
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def prior(
    seed: int,
    *,
    net: Mapping[str, Tensor] | None = None,
    weights: tuple[float, float, float] = (1.0, 0.1, 0.01),
    shapes: Shapes = MODULES,
) -> ConvexPrior:
    return ConvexPrior(drawn_lora(seed + 500, shapes=shapes), drawn_net(seed) if net is None else net, *weights, seed=3)


# --- values ---------------------------------------------------------------------------------------------------


def test_the_inputs_by_hand() -> None:
    """theta = (3, 4) and mu = (0, 2): lengths 5, |(3, 2)| and 2, component 4; then (3, 2) along four directions."""
    across = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, -0.6]])
    inputs = tensor_inputs(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]), across)
    assert inputs.tolist() == [pytest.approx([5, math.sqrt(13), 2, 4, 3, 2, 3.4, 1.2])]


def test_a_mean_of_zero_has_no_component() -> None:
    inputs = tensor_inputs(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), torch.zeros(4, 2))
    assert inputs.tolist() == [[5, 5, 0, 0, 0, 0, 0, 0]]


def test_the_value_of_a_tiny_net_by_hand() -> None:
    """One unit in the first layer and two in the second, for the inputs 1 to 8."""
    net = {
        "first/norms": torch.tensor([[raw(0.5), raw(0.25)]]),
        "first/others": torch.tensor([[-1.0, 0.5, 0.0, 0.0, 0.0, 0.125]]),
        "first/bias": torch.tensor([0.75]),
        "second/weight": torch.tensor([[raw(2.0)], [raw(0.1)]]),
        "second/bias": torch.tensor([-1.0, 3.0]),
        "third/weight": torch.tensor([raw(1.5), raw(0.2)]),
    }
    first = softplus(0.5 * 1 + 0.25 * 2 - 1.0 * 3 + 0.5 * 4 + 0.125 * 8 + 0.75)
    value = 1.5 * softplus(2.0 * first - 1) + 0.2 * softplus(0.1 * first + 3)
    given = {name: tensor.double() for name, tensor in net.items()}
    assert float(net_values(given, torch.arange(1.0, 9.0).double()[None, None])) == pytest.approx(value, abs=1e-6)


def test_the_terms_of_the_prior_by_hand() -> None:
    """A net whose last weights are 0 leaves 0.1 |theta - mu|^2 + 0.01 (|theta|^2 + |mu|^2)."""
    nothing = {**drawn_net(0), "third/weight": torch.full(SHAPES["third/weight"], -1e3)}
    given, theta = prior(1, net=nothing), drawn_lora(7)
    zero = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
    expected = 0.1 * squared_distance(theta, given.mean)
    expected += 0.01 * (squared_distance(theta, zero) + squared_distance(given.mean, zero))
    assert float(given.energies([theta])) == pytest.approx(expected)


def test_the_net_adds_its_outputs_over_all_tensors() -> None:
    given, theta = prior(1, weights=(2.0, 0.0, 0.0)), drawn_lora(7)
    outputs = net_values({name: t.double() for name, t in given.net.items()}, given.inputs([theta]))
    assert outputs.shape == (1, 4)
    assert float(given.energies([theta])) == pytest.approx(2 * float(outputs.sum()))


def test_the_directions_are_those_of_the_seed() -> None:
    first, again, other = (directions(drawn_lora(0), seed) for seed in (3, 3, 4))
    assert len(first) == 4
    for name in first[0]:
        assert all(float(named[name].norm()) == pytest.approx(1) for named in first)
        assert torch.equal(first[2][name], again[2][name])
        assert not torch.equal(first[2][name], other[2][name])
        assert not torch.equal(first[2][name], first[3][name])


# --- convexity and gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_it_is_convex_along_random_segments(scale: float) -> None:
    """Without the quadratic terms: no point of a segment is above the chord of its ends, for many nets and segments."""
    shares, least = torch.linspace(0, 1, 21, dtype=torch.float64), math.inf
    for seed in range(60):
        given = prior(seed, net=drawn_net(seed, scale), weights=(1.0, 0.0, 0.0))
        length = (0.1, 1.0, 10.0)[seed % 3]
        start = drawn_lora(seed + 1000, length) if seed % 2 else given.mean
        end = drawn_lora(seed + 2000, length)
        points = [{name: (1 - s) * start[name] + s * end[name] for name in start} for s in shares.tolist()]
        values = given.energies(points)
        chords = (1 - shares) * values[0] + shares * values[-1]
        tolerance = 1e-9 * float(values.abs().max())
        assert bool((values <= chords + tolerance).all())
        least = min(least, float((values - chords).min()) / float(values.abs().max()))
    assert least < -1e-3, "some segments are bent"


@pytest.fixture
def layout(base: Callable[..., Base]) -> tuple[ParameterLayout, Bank]:  # noqa: F811
    """Two clients in a bank of float64."""
    bank = Bank(base())
    bank.base.model.double()
    adapters = [Adapter(AdapterSpec(rank=2), drawn_lora(seed, 0.3, bank.base.shapes)) for seed in (1, 2)]
    bank.load(adapters)
    return ParameterLayout(bank, adapters, [0, 1]), bank


def test_the_term_of_training_is_the_energy_of_the_server(layout: tuple[ParameterLayout, Bank]) -> None:
    """Two clients with priors of their own, in one call."""
    given, bank = layout
    priors = [prior(seed, shapes=bank.base.shapes) for seed in (5, 6)]
    terms = ConvexPrior.loss(priors, given)(bank.store.weights)
    for term, own, adapter in zip(terms.tolist(), priors, given.adapters, strict=True):
        assert term == pytest.approx(float(own.energies([adapter.tensors])), rel=1e-9)


def test_gradients_are_those_of_finite_differences(layout: tuple[ParameterLayout, Bank]) -> None:
    given, bank = layout
    loss = ConvexPrior.loss([prior(seed, shapes=bank.base.shapes) for seed in (5, 6)], given)
    rows = bank.store.weights.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(rows).sum(), rows)
    assert bool((gradient != 0).all())
    step, generator = 1e-5, torch.Generator().manual_seed(0)
    for _ in range(20):
        way = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            expected = (loss(rows + step * way) - loss(rows - step * way)) / (2 * step)
        torch.testing.assert_close((gradient * way).sum(1), expected, rtol=1e-6, atol=1e-7)


def test_at_the_mean_and_at_zero_gradients_are_finite(layout: tuple[ParameterLayout, Bank]) -> None:
    """Where the first training starts: theta is mu, and every B is 0, so that norms have no derivative."""
    given, bank = layout
    mean = new_shared(bank.base.shapes, 2, torch.Generator().manual_seed(0))
    own = ConvexPrior(mean, drawn_net(1), 1.0, 0.1, 0.01, seed=3)
    rows = given.rows([mean, mean]).requires_grad_()
    (gradient,) = torch.autograd.grad(ConvexPrior.loss([own, own], given)(rows).sum(), rows)
    assert bool(gradient.isfinite().all())


def test_clients_with_different_seeds_are_refused(layout: tuple[ParameterLayout, Bank]) -> None:
    given, bank = layout
    mean = drawn_lora(1, shapes=bank.base.shapes)
    with pytest.raises(ValueError, match="one seed"):
        ConvexPrior.loss([ConvexPrior(mean, drawn_net(1), 1.0, 0.1, 0.0, seed) for seed in (3, 4)], given)


# --- the Gaussian case ----------------------------------------------------------------------------------------


def test_without_its_net_the_term_is_the_gaussian_one(layout: tuple[ParameterLayout, Bank]) -> None:
    given, bank = layout
    own = [prior(seed, weights=(0.0, 0.25, 0.0), shapes=bank.base.shapes) for seed in (5, 6)]
    gaussian = [Proximal(each.mean, 0.5) for each in own]
    rows = bank.store.weights.clone().requires_grad_()
    terms, expected = ConvexPrior.loss(own, given)(rows), Proximal.loss(gaussian, given)(rows)
    torch.testing.assert_close(terms, expected)
    torch.testing.assert_close(*(torch.autograd.grad(term.sum(), rows)[0] for term in (terms, expected)))


def test_without_its_net_a_run_is_the_gaussian_one(runs: Any) -> None:
    """The same up to rounding; with the network it is another."""
    none = ("method.net_weight=0", "method.norm_weight=0")
    first = runs("fedmap")
    paths = [path.relative_to(first) for path in first.glob("clients/*/adapter/adapter_model.safetensors")]
    assert len(paths) == 4

    def difference(*settings: str) -> float:
        other = runs("fedmap", "method.prior=icnn", *settings)
        pairs = [(load_file(first / path), load_file(other / path)) for path in paths]
        return max(
            float((first_lora[key] - second_lora[key]).abs().max())
            for first_lora, second_lora in pairs
            for key in first_lora
        )

    assert difference(*none) < 1e-4 < 1e-2 < difference("method.net_weight=5")


def test_without_its_net_the_weights_are_the_gaussian_ones() -> None:
    replies = {name: estimate(drawn_lora(seed), 0.5) for seed, name in enumerate("ab")}
    state = Prior(drawn_lora(9), {"variance": torch.tensor(4.0, dtype=torch.float64)}, drawn_net(1))
    convex = FedMap(rank=2, prior="icnn", net_weight=0.0, norm_weight=0.0)
    expected = FedMap(rank=2).weights(SERVER, state, replies)
    assert convex.weights(SERVER, state, replies) == pytest.approx(expected)


# --- the server -----------------------------------------------------------------------------------------------


def estimate(tensors: Mapping[str, Tensor], loss: float) -> Estimate:
    return Estimate(tensors, {"likelihood": torch.tensor(math.exp(-loss), dtype=torch.float64)})


def test_the_weights_are_likelihood_times_density() -> None:
    method, losses = FedMap(rank=2, prior="icnn", variance=4.0, norm_weight=0.02), (0.5, 0.9)
    state = Prior(drawn_lora(9), {"variance": torch.tensor(4.0, dtype=torch.float64)}, drawn_net(1, 0.3))
    loras = [drawn_lora(seed, 0.3) for seed in (1, 2)]
    replies = {"a": estimate(loras[0], losses[0]), "b": estimate(loras[1], losses[1])}
    weights = method.weights(SERVER, state, replies)
    own = ConvexPrior(state.tensors, state.net, 1.0, 1 / 8, 0.02, SERVER.seed)
    (first, second) = own.energies(loras).tolist()
    assert weights["a"] / weights["b"] == pytest.approx(math.exp(second - first + 0.9 - 0.5))


def test_the_server_moves_the_net_down_the_weighted_mean_of_the_energies() -> None:
    """At the new mean, with the weights of the average, against a step worked out by automatic differentiation here."""
    method = FedMap(rank=2, prior="icnn", net_steps=1, net_learning_rate=0.1, weighting="examples")
    state = Prior(drawn_lora(9), {"variance": torch.tensor(4.0, dtype=torch.float64)}, drawn_net(1, 0.3))
    trained = {name: drawn_lora(seed, 0.3) for seed, name in enumerate("ab")}
    after = method.aggregate(SERVER, state, {name: estimate(lora, 0.5) for name, lora in trained.items()})
    mean = mean_by_key(trained, {"a": 0.25, "b": 0.75}, {})
    net = {name: tensor.double().requires_grad_() for name, tensor in state.net.items()}
    energies = [ConvexPrior(mean, net, 1.0, 0.0, 0.0, 0).energies([trained[name]]) for name in "ab"]
    (0.25 * energies[0] + 0.75 * energies[1]).sum().backward()
    gradients = {name: tensor.grad for name, tensor in net.items() if tensor.grad is not None}
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    assert norm > 1, "so that its length is limited"
    for name, tensor in after.net.items():
        assert tensor.dtype == torch.float32
        expected = state.net[name] - (0.1 * gradients[name] / norm).float()
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-7)


def test_no_lora_moves_the_net_further_than_the_learning_rate() -> None:
    net, far = new_net(torch.Generator().manual_seed(0)), prior(1).inputs([drawn_lora(1, 1e18), drawn_lora(2)])
    shares = torch.tensor([0.5, 0.5], dtype=torch.float64)
    after = fitted_net(net, far, shares, steps=3, rate=0.01)
    moved = math.sqrt(sum(float((after[name] - net[name]).double().square().sum()) for name in net))
    assert 0.001 < moved < 0.0301
    check_net(after)


def test_the_energy_of_the_loras_goes_down() -> None:
    net, inputs = new_net(torch.Generator().manual_seed(0)), prior(1).inputs([drawn_lora(1), drawn_lora(2)])
    shares = torch.tensor([0.2, 0.8], dtype=torch.float64)

    def energy(tensors: Mapping[str, Tensor]) -> float:
        return float(shares @ net_values({name: t.double() for name, t in tensors.items()}, inputs).sum(1))

    assert energy(fitted_net(net, inputs, shares, 20, 0.05)) < energy(fitted_net(net, inputs, shares, 5, 0.05))
    assert energy(fitted_net(net, inputs, shares, 5, 0.05)) < energy(net)
    unchanged = fitted_net(net, inputs, shares, 0, 0.05)
    assert all(torch.equal(unchanged[name], net[name]) for name in net)


def test_a_net_is_drawn_from_the_seed_and_small() -> None:
    first, other = (FedMap(prior="icnn").init(Server(BaseInfo(MODULES), (), seed)) for seed in (0, 1))
    check_net(first.net)
    assert not torch.equal(first.net["second/weight"], other.net["second/weight"])
    assert sum(tensor.numel() for tensor in first.net.values()) == 2688
    assert FedMap().init(SERVER).net == {}


# --- what a client accepts ------------------------------------------------------------------------------------

WRONG: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "NaN": lambda net: net["second/weight"].view(-1)[5].fill_(math.nan),
    "infinity": lambda net: net["first/bias"].fill_(-math.inf),
    "shape": lambda net: net.update({"third/weight": torch.zeros(33)}),
    "type": lambda net: net.update({"first/norms": net["first/norms"].double()}),
    "missing": lambda net: net.pop("first/others"),
    "foreign": lambda net: net.update(extra=torch.zeros(1)),
    "empty": lambda net: net.clear(),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_client_refuses_a_net_that_is_not_one(wrong: str) -> None:
    net = drawn_net(0)
    check_net(net)
    WRONG[wrong](net)
    method, mean = FedMap(rank=2, prior="icnn"), drawn_lora(0)
    message = Prior(mean, {"variance": torch.tensor(4.0, dtype=torch.float64)}, net)
    with pytest.raises(PayloadError, match="the net of the prior"):
        next(method.update(client(MODULES), OwnLora({}), message))


@pytest.mark.parametrize(
    ("field", "wrong", "message"),
    [
        ("net_weight", -1.0, "must be from 0 to 1e30"),
        ("norm_weight", float("nan"), "must be from 0 to 1e30"),
        ("net_learning_rate", 0.0, "must be above 0 and at most 10"),
        ("net_learning_rate", float("inf"), "must be above 0 and at most 10"),
        ("net_steps", -1, "must be from 0 to 10000"),
    ],
)
def test_invalid_values_are_refused(field: str, wrong: float, message: str) -> None:
    with pytest.raises(ConfigError, match=f"method.{field} = {wrong}: {message}"):
        FedMap(**dict[str, Any]({field: wrong}))
