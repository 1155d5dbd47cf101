"""FedALT: the rest of the world is everybody else; own LoRA and mixer are trained, it is not."""

import pytest
import torch
from tests.methods.by_hand import client, driven
from tests.training import lora_spec

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server, TrainingRequest
from fedamole.methods.fedalt import FedAlt, LatestLoras, OwnAndMixer, RestOfWorld, SentLora
from fedamole.methods.fedit import FedIT
from fedamole.model.mixer import LearnedRouter
from fedamole.model.params import expert_keys, mixer_key

SHAPES = {"m": (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30), ClientInfo("c", 20))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)
A, B = "m/shared/A", "m/shared/B"
OWN_A, OWN_B = expert_keys("m", 0)
REST_A, REST_B = expert_keys("m", 1)


def lora(value: float) -> SentLora:
    return SentLora({A: torch.full((1, 2), value), B: torch.full((2, 1), value)})


def rest(method: FedAlt, state: LatestLoras, name: str) -> float:
    return float(method.message(state, next(info for info in INFOS if info.name == name)).tensors[B][0, 0])


def test_the_rest_of_the_world_by_hand() -> None:
    """Of 1, 2, 6 the others' means are 4, 3.5 and 1.5; then b sends 8, and absent ones count with their last."""
    method = FedAlt(rank=1)
    state = method.init(SERVER)
    assert [rest(method, state, name) for name in "abc"] == [0.0, 0.0, 0.0], "nobody has answered: it does nothing"
    state = method.aggregate(SERVER, state, {"a": lora(1.0)})
    assert [rest(method, state, name) for name in "abc"] == [0.0, 1.0, 1.0]
    state = method.aggregate(SERVER, state, {"c": lora(6.0), "b": lora(2.0)})
    assert [rest(method, state, name) for name in "abc"] == [4.0, 3.5, 1.5]
    state = method.aggregate(SERVER, state, {"b": lora(8.0)})
    assert [rest(method, state, name) for name in "abc"] == [7.0, 3.5, 4.5]


def test_by_examples() -> None:
    """For a: b (30 examples) with 2, c (20) with 6: (60 + 120) / 50 = 3.6."""
    method = FedAlt(rank=1, weighting="examples")
    state = method.aggregate(SERVER, method.init(SERVER), {"b": lora(2.0), "c": lora(6.0), "a": lora(100.0)})
    assert abs(rest(method, state, "a") - 3.6) < 1e-6


def test_own_lora_and_mixer_are_trained_and_kept_the_lora_is_sent() -> None:
    method = FedAlt(rank=1)
    first = method.init_client_state(client(SHAPES))
    assert not first.tensors[mixer_key("m")].any(), "both weigh the same"
    trained = {OWN_A: torch.full((1, 2), 7.0), mixer_key("m"): torch.ones(2, 2)}
    work = method.update(client(SHAPES), first, RestOfWorld(lora(5.0).tensors))
    (request,), (client_state, reply, _) = driven(work, trained)
    assert lora_spec(request.adapter.spec).router == LearnedRouter()
    assert request.adapter.frozen == (REST_A, REST_B)
    assert float(request.adapter.tensors[REST_A][0, 0]) == 5.0
    assert set(client_state.tensors) == {OWN_A, OWN_B, mixer_key("m")}
    assert float(client_state.tensors[OWN_A][0, 0]) == 7.0
    assert reply.tensors.keys() == {A, B}
    assert float(reply.tensors[A][0, 0]) == 7.0


def test_the_model_is_the_own_lora_beside_the_new_rest() -> None:
    method = FedAlt(rank=1)
    client_state = method.init_client_state(client(SHAPES))
    model = method.personal(client(SHAPES), client_state, RestOfWorld(lora(9.0).tensors), None)
    assert model is not None
    assert float(model.tensors[REST_B][0, 0]) == 9.0
    assert torch.equal(model.tensors[OWN_A], client_state.tensors[OWN_A])


def test_a_second_round_continues_from_the_client_state() -> None:
    """Own LoRA 2 and mixer 3 beside the others' 5; a whole round's steps, and only the rest is frozen."""
    method, mixer = FedAlt(rank=1), mixer_key("m")
    client_state = OwnAndMixer(
        {OWN_A: torch.full((1, 2), 2.0), OWN_B: torch.full((2, 1), 2.0), mixer: torch.full((2, 2), 3.0)}
    )
    work = method.update(client(SHAPES), client_state, RestOfWorld(lora(5.0).tensors))
    (request,), (after, reply, _) = driven(work, {OWN_B: torch.full((2, 1), 4.0)})
    assert request == TrainingRequest(request.adapter, weight_decay=0.05)
    results = {name: float(tensor[0, 0]) for name, tensor in request.adapter.tensors.items()}
    assert results == {OWN_A: 2.0, OWN_B: 2.0, REST_A: 5.0, REST_B: 5.0, mixer: 3.0}
    assert {name: float(tensor[0, 0]) for name, tensor in after.tensors.items()} == {OWN_A: 2.0, OWN_B: 4.0, mixer: 3.0}
    assert {name: float(tensor[0, 0]) for name, tensor in reply.tensors.items()} == {A: 2.0, B: 4.0}


def test_all_begin_with_fedits_lora() -> None:
    first = FedIT(rank=2).init(SERVER).tensors
    for name in "ab":
        client_state = FedAlt(rank=2).init_client_state(client(SHAPES, name))
        assert torch.equal(client_state.tensors[OWN_A], first[A])
        assert not client_state.tensors[OWN_B].any()


@pytest.mark.parametrize("wrong", [-0.01, 1.01, float("nan")])
def test_a_decay_outside_0_to_1_is_refused(wrong: float) -> None:
    with pytest.raises(ConfigError, match=r"method.weight_decay = .*: must be at least 0 and at most 1"):
        FedAlt(weight_decay=wrong)


def test_no_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank = 0"):
        FedAlt(rank=0)
