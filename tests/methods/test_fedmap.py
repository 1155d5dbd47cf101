"""FedMAP: the prior's term, the posterior weights and the fitted variance by hand; both ends of the prior."""

from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.bundled_rounds import BundledRounds
from tests.methods.by_hand import client, driven, full
from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.penalties import Proximal
from fedamole.methods.fedmap import Estimate, FedMap, Prior, squared_distance
from fedamole.methods.local_only import OwnLora
from fedamole.model.params import Adapter

SHAPES = {"m": (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30), ClientInfo("c", 20))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)
A, B = "m/shared/A", "m/shared/B"


def lora(value: float) -> dict[str, Tensor]:
    """Four values: the squared distance to another such LoRA is four times the square of the difference."""
    return {A: full(value, 1, 2), B: full(-value, 2, 1)}


def prior(mean: float, variance: float) -> Prior:
    return Prior(lora(mean), {"variance": torch.tensor(variance, dtype=torch.float64)})


def estimate(value: float, loss: float) -> Estimate:
    return Estimate(lora(value), {"likelihood": torch.tensor(exp(-loss), dtype=torch.float64)})


def test_the_weights_follow_the_losses() -> None:
    """Without any distance, losses of 0.5 and 1 give 1 / (1 + exp(-0.5)) = 0.6225 and 0.3775."""
    weights = FedMap().weights(SERVER, prior(2.0, 15.0), {"b": estimate(2.0, 1.0), "a": estimate(2.0, 0.5)})
    assert weights == pytest.approx({"a": 0.622459, "b": 0.377541}, abs=1e-6)


def test_the_weights_follow_the_distances() -> None:
    """a is at the mean, each of four values of b is 1 from it: 4 / (2 * 4) = 0.5 with variance 4, 2 with variance 1."""
    replies = {"a": estimate(2.0, 0.7), "b": estimate(3.0, 0.7)}
    for variance, exponent in ((4.0, 0.5), (1.0, 2.0)):
        weights = FedMap().weights(SERVER, prior(2.0, variance), replies)
        assert weights["a"] == pytest.approx(1 / (1 + exp(-exponent)))


@pytest.mark.parametrize(
    ("weighting", "mean"),
    [
        ("posterior", 2 + 0.5 / (1 + exp(0.5))),  # log densities 0 and -(4 * 0.25) / 2 = -0.5
        ("examples", 2 + 0.5 * 30 / 40),
        ("uniform", 2.25),
    ],
)
def test_the_mean_by_hand(weighting: Any, mean: float) -> None:
    replies = {"a": estimate(2.0, 0.7), "b": estimate(2.5, 0.7)}
    after = FedMap(weighting=weighting).aggregate(SERVER, prior(2.0, 1.0), replies)
    torch.testing.assert_close(after.tensors[A], full(mean, 1, 2))
    torch.testing.assert_close(after.tensors[B], full(-mean, 2, 1))
    assert after.variance == 1.0


def test_a_likelihood_is_at_most_1_whatever_a_client_claims() -> None:
    replies = {"a": estimate(2.0, -100.0), "b": estimate(2.0, 0.5)}
    weights = FedMap().weights(SERVER, prior(2.0, 15.0), replies)
    assert weights["a"] == pytest.approx(1 / (1 + exp(-0.5)))


def test_likelihoods_of_0_leave_even_weights() -> None:
    replies = {name: estimate(2.0, 1e5) for name in "ab"}
    assert FedMap().weights(SERVER, prior(2.0, 15.0), replies) == pytest.approx({"a": 0.5, "b": 0.5})


def test_no_client_exceeds_the_largest_share_of_a_deployment() -> None:
    replies = {"a": estimate(2.0, 0.0), "b": estimate(2.0, 9.0), "c": estimate(2.0, 9.0)}
    weights = FedMap().weights(replace(SERVER, max_weight_share=0.5), prior(2.0, 15.0), replies)
    assert weights["a"] / sum(weights.values()) == pytest.approx(0.5)


def test_the_fitted_variance_by_hand() -> None:
    """The mean by examples of a = 0 and b = 4 is 3: (10 * 4 * 9 + 30 * 4 * 1) / (4 * 40) = 3."""
    method = FedMap(weighting="examples", variance_estimate="fitted")
    replies = {"a": estimate(0.0, 0.7), "b": estimate(4.0, 0.7)}
    after = method.aggregate(SERVER, prior(0.0, 15.0), replies)
    assert after.tensors[A].tolist() == [[3.0, 3.0]]
    assert after.variance == pytest.approx(3.0)
    again = method.aggregate(SERVER, after, {"b": estimate(5.0, 0.7)})
    assert again.variance == after.variance, "a single client has no variance"


def test_a_client_trains_its_own_lora_near_the_mean() -> None:
    """Sent a mean of 2 and a variance of 4, own LoRA 3, trained to 5: kept and returned, with its likelihood."""
    work = FedMap(rank=1).update(client(SHAPES, losses=(0.25,)), OwnLora(lora(3.0)), prior(2.0, 4.0))
    (request,), (client_state, reply, trained) = driven(work, lora(5.0))
    assert request.adapter.tensors[A].tolist() == [[3.0, 3.0]]
    assert (request.step_fraction, request.adapter.frozen) == (1.0, ())
    assert isinstance(request.penalty, Proximal)
    assert request.penalty.weight == 0.25
    assert request.penalty.anchor[A].tolist() == [[2.0, 2.0]]
    for tensors in (client_state.tensors, reply.tensors, trained.adapter.tensors):
        assert tensors[A].tolist() == [[5.0, 5.0]]
    assert float(reply.numbers["likelihood"]) == pytest.approx(exp(-0.25))


def test_a_client_starts_from_the_mean() -> None:
    method = FedMap(rank=1)
    first = method.init_client_state(client(SHAPES))
    assert method.adapter(client(SHAPES), first, prior(2.0, 4.0)).tensors[A].tolist() == [[2.0, 2.0]]


def test_the_personal_model_is_the_own_lora() -> None:
    method = FedMap(rank=1)
    mine = Adapter(method.spec(), lora(7.0))
    assert method.personal(client(SHAPES), OwnLora(lora(7.0)), prior(2.0, 4.0), mine) is mine
    assert method.evaluates == "pre_aggregation"


def test_without_a_prior_it_is_local_training(runs: Any) -> None:
    """A variance of 1e30 leaves nothing of the term in float32."""
    first, other = runs("fedmap", "method.variance=1e30"), runs("local_only")
    paths = list(first.glob("clients/*/adapter/adapter_model.safetensors"))
    assert len(paths) == 4
    for path in paths:
        assert path.read_bytes() == (other / path.relative_to(first)).read_bytes()


def test_a_narrow_prior_keeps_every_client_at_its_mean(runs: Any) -> None:
    from safetensors.torch import load_file

    def apart(variance: str) -> float:
        folder = runs("fedmap", f"method.variance={variance}")
        adapters = [load_file(path) for path in sorted(folder.glob("clients/*/adapter/adapter_model.safetensors"))]
        drift = [(adapters[0][key] - tensors[key]).norm() for tensors in adapters[1:] for key in tensors]
        return float(torch.stack(drift).norm())

    assert apart("1e-6") < 0.6 * apart("1e30")


@pytest.mark.parametrize(
    ("field", "wrong", "message"),
    [
        ("variance", 0.0, "must be from 1e-12 to 1e30"),
        ("variance", float("inf"), "must be from 1e-12 to 1e30"),
        ("variance", float("nan"), "must be from 1e-12 to 1e30"),
        ("probe_examples", 0, "must be at least 1"),
    ],
)
def test_invalid_values_are_refused(field: str, wrong: float, message: str) -> None:
    with pytest.raises(ConfigError, match=f"method.{field} = {wrong}: {message}"):
        FedMap(**dict[str, Any]({field: wrong}))


def test_the_prior_shares_and_lets_clients_differ(tmp_path: Path) -> None:
    """Two shops and two weather stations: a narrow prior, whose mean hardly moves, is worse at the worst client by more
    than 1 nat; with the default prior the clients' LoRAs are closer to each other than without any.
    """
    rounds = BundledRounds(tmp_path, ("shop_garden", "shop_house", "weather_coast", "weather_hills"))
    distances = dict[str, float]()

    def run(variance: str) -> float:
        def record(replies: dict[str, Estimate]) -> dict[str, Estimate]:
            first, *others = (replies[name].tensors for name in sorted(replies))
            distances[variance] = sum(squared_distance(first, tensors) for tensors in others)
            return replies

        few = ("training.local_steps=6", "method.rank=4", f"method.variance={variance}")
        return max(rounds("fedmap", *few, rounds=3, changed=record).values())

    _, default, narrow = run("1e30"), run("15.0"), run("1e-9")
    assert default < narrow - 1
    assert distances["15.0"] < 0.9 * distances["1e30"]
