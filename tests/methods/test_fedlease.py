"""FedLEASE: clusters after warming up, an expert and mixers for each, the other experts frozen."""

import pytest
import torch
from tests.methods.by_hand import client, driven

from fedamole.errors import ConfigError
from fedamole.federation.method import ClientInfo, Server
from fedamole.methods.fedlease import FedLease, Lease, Returned
from fedamole.methods.local_only import OwnLora
from fedamole.model.params import OWN, expert_keys, mixer_key

SHAPES = {"m": (2, 2)}
INFOS = tuple(ClientInfo(name, 10 * place + 10) for place, name in enumerate("abcde"))
SERVER = Server(SHAPES, INFOS, seed=0)
A, B, MIXER = "m/shared/A", "m/shared/B", mixer_key("m")


def warm(across: float, down: float) -> Returned:
    """A LoRA that was warmed up: its B tells what the client has learned."""
    return Returned({A: torch.full((1, 2), across), B: torch.tensor([[across], [down]])}, -1)


def warmed(method: FedLease, *without: str) -> Lease:
    """a, b and e are alike, c and d are; their B's point to the right and down."""
    sent = {"a": warm(2.0, 0.1), "b": warm(4.0, 0.0), "c": warm(0.1, 3.0), "d": warm(0.0, 5.0), "e": warm(3.0, 0.2)}
    return method.aggregate(SERVER, method.init(SERVER), {n: r for n, r in sent.items() if n not in without})


def test_clusters_and_their_experts_by_hand() -> None:
    """The expert of a, b, e is their mean: A (2 + 4 + 3) / 3 = 3."""
    state = warmed(FedLease(rank=1))
    assert state.cluster == {"a": 0, "b": 0, "c": 1, "d": 1, "e": 0}
    assert state.clusters == 2
    assert not state.warm
    assert state.tensors[expert_keys("m", 0)[0]].tolist() == [[3.0, 3.0]]
    assert state.tensors[expert_keys("m", 1)[1]].flatten().tolist() == pytest.approx([0.05, 4.0])
    assert state.tensors[f"cluster-0/{MIXER}"].shape == (3, 2), "2 M - 1 logits"
    assert not torch.equal(state.tensors[f"cluster-0/{MIXER}"], state.tensors[f"cluster-1/{MIXER}"])


def test_everybody_gets_all_experts_and_the_mixers_of_its_cluster_and_trains_its_own() -> None:
    method = FedLease(rank=1)
    state = warmed(method)
    message = method.message(state, INFOS[2])
    assert message.cluster == 1
    assert torch.equal(message.tensors[MIXER], state.tensors[f"cluster-1/{MIXER}"])
    own, other = expert_keys("m", 1), expert_keys("m", 0)
    assert set(message.tensors) == {MIXER, *own, *other}
    trained = {own[0]: torch.full((1, 2), 6.0), MIXER: torch.ones(3, 2)}
    (asked,), (kept, reply, _) = driven(method.update(client(SHAPES, "c"), OwnLora({}), message), trained)
    assert asked.adapter.spec.router == "mixer"
    assert asked.adapter.frozen == tuple(sorted(other))
    assert asked.adapter.fixed[OWN].tolist() == [0.0, 1.0]
    assert set(reply.tensors) == {MIXER, *own}
    assert not kept.tensors
    sent = {"c": reply, "d": Returned({**reply.tensors, own[0]: torch.full((1, 2), 8.0)}, 1)}
    after = method.aggregate(SERVER, state, sent)
    assert after.tensors[own[0]].tolist() == [[7.0, 7.0]]
    assert torch.equal(after.tensors[f"cluster-1/{MIXER}"], torch.ones(3, 2))
    assert torch.equal(after.tensors[f"cluster-0/{MIXER}"], state.tensors[f"cluster-0/{MIXER}"])
    assert torch.equal(after.tensors[other[0]], state.tensors[other[0]])


def test_a_client_that_comes_late_warms_up_and_joins_the_nearest() -> None:
    method = FedLease(rank=1)
    state = warmed(method, "d")
    assert "d" not in state.cluster
    message = method.message(state, INFOS[3])
    assert message.cluster == -1
    (asked,), (kept, reply, _) = driven(
        method.update(client(SHAPES, "d"), OwnLora({}), message), {B: torch.tensor([[0.0], [5.0]])}
    )
    assert asked.adapter.spec.router == "embedding"
    assert set(kept.tensors) == {A, B}
    model = method.personal(client(SHAPES, "d"), kept, message, None)
    assert model is not None
    assert torch.equal(model.tensors[B], kept.tensors[B]), "while warming up, its own LoRA"
    after = method.aggregate(SERVER, state, {"d": reply})
    assert after.cluster["d"] == state.cluster["c"]
    assert after.clusters == state.clusters
    assert torch.equal(after.tensors[expert_keys("m", 0)[0]], state.tensors[expert_keys("m", 0)[0]])


def test_warming_up_takes_as_many_rounds_as_asked() -> None:
    method = FedLease(rank=1, warmup_rounds=2)
    state = method.aggregate(SERVER, method.init(SERVER), {info.name: warm(1.0, 0.0) for info in INFOS})
    assert not state.cluster
    assert method.message(state, INFOS[0]).cluster == -1
    again = {"a": warm(2.0, 0.0), "b": warm(2.1, 0.0), "c": warm(0.0, 3.0), "d": warm(0.0, 3.1), "e": warm(2.2, 0.0)}
    assert method.aggregate(SERVER, state, again).cluster == {"a": 0, "b": 0, "c": 1, "d": 1, "e": 0}


def test_two_clients_are_one_cluster_with_one_logit() -> None:
    method = FedLease(rank=1)
    state = method.aggregate(SERVER, method.init(SERVER), {"a": warm(1.0, 0.0), "b": warm(0.0, 1.0)})
    assert state.cluster == {"a": 0, "b": 0}
    assert state.tensors[f"cluster-0/{MIXER}"].shape == (1, 2)


@pytest.mark.parametrize("wrong", ["warmup_rounds", "most_clusters"])
def test_wrong_values_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=f"method.{wrong} = 0: must be at least 1"):
        FedLease(**{wrong: 0})
