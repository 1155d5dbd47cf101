"""Ditto: two trainings a round, the second held near what was sent; the average of the first by hand."""

from typing import Any

import pytest
import torch
from tests.methods.by_hand import client, driven, full

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.penalties import Proximal
from fedamole.methods.ditto import Ditto
from fedamole.methods.fedit import FedIT
from fedamole.methods.local_only import OwnLora
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.model.params import Adapter

SHAPES = {"m": (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30), ClientInfo("c", 20))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)
A, B = "m/shared/A", "m/shared/B"


def both(value: float) -> dict[str, torch.Tensor]:
    return {A: full(value, 1, 2), B: full(-value, 2, 1)}


def values(tensors: Any) -> dict[str, float]:
    """The one value of each tensor."""
    assert all(tensor.min() == tensor.max() for tensor in tensors.values())
    return {name: float(tensor.flatten()[0]) for name, tensor in tensors.items()}


def test_global_and_own_lora_begin_as_one() -> None:
    method, first = Ditto(rank=2), FedIT(rank=2).init(SERVER).tensors
    client_state, state = method.init_client_state(client(SHAPES, "b")), method.init(SERVER)
    for tensors in (client_state.tensors, state.tensors):
        assert tensors.keys() == first.keys()
        assert all(torch.equal(tensors[key], first[key]) for key in first)
    assert all(method.message(state, info) is state for info in INFOS)


def test_the_global_lora_trains_freely_then_the_own_one_near_what_was_sent() -> None:
    """Sent 2, own 3. The first training turns 2 into 5: that goes up. The second turns 3 into 7: that is kept, and it
    is held near 2, not near 5.
    """
    work = Ditto(rank=1, proximal=0.4).update(client(SHAPES), OwnLora(both(3.0)), SharedTensors(both(2.0)))
    (first, second), (client_state, reply, trained) = driven(work, both(5.0), both(7.0))
    assert values(first.adapter.tensors) == {A: 2.0, B: -2.0}
    assert (first.step_fraction, first.adapter.frozen, first.penalty) == (0.5, (), None)
    assert values(second.adapter.tensors) == {A: 3.0, B: -3.0}
    assert (second.step_fraction, second.adapter.frozen) == (0.5, ())
    assert isinstance(second.penalty, Proximal)
    assert second.penalty.weight == 0.4
    assert values(second.penalty.anchor) == {A: 2.0, B: -2.0}
    assert values(client_state.tensors) == {A: 7.0, B: -7.0}
    assert values(reply.tensors) == {A: 5.0, B: -5.0}
    assert values(trained.adapter.tensors) == {A: 7.0, B: -7.0}


@pytest.mark.parametrize(
    ("weighting", "answered", "mean"),
    [
        ("uniform", "abc", 2.0),  # (1 + 5 + 0) / 3
        ("uniform", "ab", 3.0),  # (1 + 5) / 2
        ("examples", "abc", 8 / 3),  # (10 * 1 + 30 * 5 + 20 * 0) / 60
        ("examples", "ab", 4.0),  # (10 * 1 + 30 * 5) / 40
    ],
)
def test_the_average_by_hand(weighting: Any, answered: str, mean: float) -> None:
    replies = {name: SharedTensors(both(v)) for name, v in (("a", 1.0), ("b", 5.0), ("c", 0.0)) if name in answered}
    after = Ditto(weighting=weighting).aggregate(SERVER, SharedTensors(both(100.0)), replies)
    torch.testing.assert_close(after.tensors[A], full(mean, 1, 2))
    torch.testing.assert_close(after.tensors[B], full(-mean, 2, 1))


def test_the_personal_model_is_the_own_lora_whatever_is_sent() -> None:
    method = Ditto(rank=1)
    mine = Adapter(method.spec(), both(7.0))
    for message in (None, SharedTensors(both(2.0))):
        assert method.personal(client(SHAPES), OwnLora(both(7.0)), message, mine) is mine
    assert method.evaluates == "pre_aggregation"


def test_the_two_trainings_share_the_rounds_steps(runs: Any, facts: Any) -> None:
    steps = {line["steps"] for line in facts(runs("ditto")) if line["split"] == "train"}
    assert steps == {3}  # training.local_steps


def test_a_strong_term_keeps_the_own_lora_by_the_global_one(runs: Any) -> None:
    """The clients' own LoRAs are closer to one another where all are held near the one global LoRA."""
    from safetensors.torch import load_file

    def apart(*arguments: str) -> float:
        adapters = [
            load_file(path) for path in sorted(runs("ditto", *arguments).glob("clients/*/adapter/*.safetensors"))
        ]
        assert len(adapters) == 4
        drift = [(adapters[0][key] - tensors[key]).norm() for tensors in adapters[1:] for key in tensors]
        return float(torch.stack(drift).norm())

    assert apart("method.proximal=1e6") < 0.6 * apart("method.proximal=0")


@pytest.mark.parametrize(("field", "message"), [({"proximal": -1.0}, "method.proximal = -1.0"), ({"rank": 0}, "rank")])
def test_invalid_values_are_refused(field: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ditto(**field)
    assert Ditto(proximal=0.0).proximal == 0.0
