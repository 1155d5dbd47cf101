"""FedLEASE: clusters after warming up, an expert and mixers for each, the other experts frozen."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.by_hand import client, driven
from tests.training import lora_spec

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.methods.fedlease import FedLease, Lease, Returned
from fedamole.methods.local_only import OwnLora
from fedamole.model.amole import EmbeddingRouter
from fedamole.model.mixer import LearnedRouter
from fedamole.model.params import OWN, expert_keys, mixer_key

SHAPES = {"m": (2, 2)}
INFOS = tuple(ClientInfo(name, 10 * i + 10) for i, name in enumerate("abcde"))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)
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
    assert state.experts[expert_keys("m", 0)[0]].tolist() == [[3.0, 3.0]]
    assert state.experts[expert_keys("m", 1)[1]].flatten().tolist() == pytest.approx([0.05, 4.0])
    assert state.mixers["0"][MIXER].shape == (3, 2), "2 M - 1 logits"
    assert not torch.equal(state.mixers["0"][MIXER], state.mixers["1"][MIXER])


def test_everybody_gets_all_experts_and_the_mixers_of_its_cluster_and_trains_its_own() -> None:
    method = FedLease(rank=1)
    state = warmed(method)
    message = method.message(state, INFOS[2])
    assert message.cluster == 1
    assert torch.equal(message.tensors[MIXER], state.mixers["1"][MIXER])
    own, other = expert_keys("m", 1), expert_keys("m", 0)
    assert set(message.tensors) == {MIXER, *own, *other}
    trained = {own[0]: torch.full((1, 2), 6.0), MIXER: torch.ones(3, 2)}
    (request,), (client_state, reply, _) = driven(method.update(client(SHAPES, "c"), OwnLora({}), message), trained)
    assert lora_spec(request.adapter.spec).router == LearnedRouter(extra_own_logits=True)
    assert request.adapter.frozen == tuple(sorted(other))
    assert request.adapter.fixed[OWN].tolist() == [0.0, 1.0]
    assert set(reply.tensors) == {MIXER, *own}
    assert not client_state.tensors
    sent = {"c": reply, "d": Returned({**reply.tensors, own[0]: torch.full((1, 2), 8.0)}, 1)}
    after = method.aggregate(SERVER, state, sent)
    assert after.experts[own[0]].tolist() == [[7.0, 7.0]]
    assert torch.equal(after.mixers["1"][MIXER], torch.ones(3, 2))
    assert torch.equal(after.mixers["0"][MIXER], state.mixers["0"][MIXER])
    assert torch.equal(after.experts[other[0]], state.experts[other[0]])


def test_a_client_that_comes_late_warms_up_and_joins_the_nearest() -> None:
    method = FedLease(rank=1)
    state = warmed(method, "d")
    assert "d" not in state.cluster
    message = method.message(state, INFOS[3])
    assert message.cluster == -1
    (request,), (client_state, reply, _) = driven(
        method.update(client(SHAPES, "d"), OwnLora({}), message), {B: torch.tensor([[0.0], [5.0]])}
    )
    assert lora_spec(request.adapter.spec).router == EmbeddingRouter()
    assert set(client_state.tensors) == {A, B}
    model = method.personal(client(SHAPES, "d"), client_state, message, None)
    assert model is not None
    assert torch.equal(model.tensors[B], client_state.tensors[B]), "while warming up, its own LoRA"
    after = method.aggregate(SERVER, state, {"d": reply})
    assert after.cluster["d"] == state.cluster["c"]
    assert after.clusters == state.clusters
    assert torch.equal(after.experts[expert_keys("m", 0)[0]], state.experts[expert_keys("m", 0)[0]])


TEN = replace(SERVER, rounds=10)
"""A run of ten rounds, of which a fifth, two, warm up."""


@pytest.mark.parametrize(
    ("rounds", "share", "warm_rounds"),
    [(25, 0.2, 5), (30, 0.2, 6), (5, 0.2, 1), (4, 0.2, 1), (1, 0.2, 1), (10, 0.5, 5), (3, 1.0, 3)],
)
def test_a_share_of_the_rounds_warms_up(rounds: int, share: float, warm_rounds: int) -> None:
    """The paper's 5 of 25, and at least one."""
    method, server = FedLease(rank=1, warmup_share=share), replace(SERVER, rounds=rounds)
    state, count = method.init(server), 0
    while not state.clusters:
        state, count = method.aggregate(server, state, {info.name: warm(1.0, 0.0) for info in INFOS}), count + 1
    assert count == warm_rounds


def test_it_trains_with_weight_decay_always() -> None:
    method = FedLease(rank=1)
    for message in (method.message(method.init(SERVER), INFOS[0]), method.message(warmed(method), INFOS[0])):
        (request,), _ = driven(method.update(client(SHAPES), OwnLora({}), message), {})
        assert request.weight_decay == 0.05


def test_the_clients_go_on_warming_up_until_there_are_clusters() -> None:
    method = FedLease(rank=1)
    state = method.aggregate(TEN, method.init(TEN), {info.name: warm(1.0, 0.0) for info in INFOS})
    assert not state.cluster
    assert method.message(state, INFOS[0]).cluster == -1
    again = {"a": warm(2.0, 0.0), "b": warm(2.1, 0.0), "c": warm(0.0, 3.0), "d": warm(0.0, 3.1), "e": warm(2.2, 0.0)}
    assert method.aggregate(TEN, state, again).cluster == {"a": 0, "b": 0, "c": 1, "d": 1, "e": 0}


def test_two_clients_are_one_cluster_with_one_logit() -> None:
    method = FedLease(rank=1)
    state = method.aggregate(SERVER, method.init(SERVER), {"a": warm(1.0, 0.0), "b": warm(0.0, 1.0)})
    assert state.cluster == {"a": 0, "b": 0}
    assert state.mixers["0"][MIXER].shape == (1, 2)


@pytest.mark.parametrize(
    ("key", "wrong", "message"),
    [
        ("most_clusters", 0, "must be at least 1"),
        ("warmup_share", 0.0, "must be above 0 and at most 1"),
        ("warmup_share", 1.2, "must be above 0 and at most 1"),
        ("weight_decay", -0.1, "must be at least 0 and at most 1"),
        ("weight_decay", 100.0, "must be at least 0 and at most 1"),
    ],
)
def test_wrong_values_are_refused(key: str, wrong: float, message: str) -> None:
    with pytest.raises(ConfigError, match=f"method.{key} = {wrong}: {message}"):
        FedLease(**dict[str, Any]({key: wrong}))


def test_by_examples() -> None:
    """a, b, e have 10, 20 and 50: A (10 * 2 + 20 * 4 + 50 * 3) / 80 = 3.125. Then a sends 1, e 7: 360 / 60."""
    method = FedLease(rank=1, weighting="examples")
    state, own = warmed(method), expert_keys("m", 0)[0]
    assert state.experts[own].tolist() == [[3.125, 3.125]]
    sent = {
        name: Returned({own: torch.full((1, 2), size), MIXER: torch.full((3, 2), size)}, 0)
        for name, size in (("e", 7.0), ("a", 1.0))
    }
    after = method.aggregate(SERVER, state, sent)
    assert after.experts[own].tolist() == [[6.0, 6.0]]
    assert torch.equal(after.mixers["0"][MIXER], torch.full((3, 2), 6.0))
    assert torch.equal(after.mixers["1"][MIXER], state.mixers["1"][MIXER])


def test_a_client_that_warmed_up_earlier_continues_with_its_own_lora() -> None:
    method = FedLease(rank=1)
    first = {"a": warm(2.0, 0.1), "b": warm(4.0, 0.0), "c": warm(0.1, 3.0)}
    state = method.aggregate(TEN, method.init(TEN), first)
    client_state = OwnLora(first["a"].tensors)
    (request,), _ = driven(method.update(client(SHAPES), client_state, method.message(state, INFOS[0])), {})
    assert request.adapter.tensors[A].tolist() == [[2.0, 2.0]], "not the LoRA that everybody begins with"
    assert request.adapter.frozen == ()
    state = method.aggregate(TEN, state, {"a": warm(5.0, 0.1), "d": warm(0.0, 5.0)})
    assert state.cluster == {"a": 0, "b": 0, "c": 1, "d": 1}
    assert state.experts[expert_keys("m", 0)[0]].tolist() == [[4.5, 4.5]], "of a what it sent last"


def test_a_late_client_joins_the_nearest_cluster_and_changes_no_expert() -> None:
    """e warms up while c goes on; it joins the cluster whose B is nearest, though its A is like the other's."""
    method = FedLease(rank=1)
    state = warmed(method, "e")
    late = Returned({A: torch.full((1, 2), -9.0), B: torch.tensor([[0.2], [7.0]])}, -1)
    message = method.message(state, INFOS[2])
    onward = {name: tensor for name, tensor in message.tensors.items() if "expert-00" not in name}
    after = method.aggregate(SERVER, state, {"e": late, "c": Returned(onward, 1)})
    assert after.cluster == {"a": 0, "b": 0, "c": 1, "d": 1, "e": 1}
    assert not after.warm
    assert all(torch.allclose(after.experts[name], tensor) for name, tensor in state.experts.items())
    for cluster, mixers in state.mixers.items():
        assert all(torch.allclose(after.mixers[cluster][name], tensor) for name, tensor in mixers.items())


@pytest.mark.parametrize(("most", "clusters"), [(1, 1), (2, 2), (4, 3)])
def test_at_most_as_many_clusters_as_asked(most: int, clusters: int) -> None:
    """Right, down and left: three clusters where three may be."""
    sent = {"a": warm(1.0, 0.0), "b": warm(1.0, 0.1), "c": warm(0.0, 1.0), "d": warm(0.1, 1.0), "e": warm(-1.0, -0.1)}
    method = FedLease(rank=1, most_clusters=most)
    state = method.aggregate(SERVER, method.init(SERVER), sent)
    assert state.clusters == clusters
    message = method.message(state, INFOS[4])
    assert message.tensors[MIXER].shape == (2 * clusters - 1, 2)
    assert float(message.tensors[MIXER].abs().max()) <= 2**-0.5, "drawn like a linear of two inputs"
    adapter = method.adapter(client(SHAPES, "e"), OwnLora({}), message)
    assert adapter.fixed[OWN].tolist() == [float(k == message.cluster) for k in range(clusters)]


def test_the_model_that_is_scored_is_what_is_sent_next() -> None:
    method = FedLease(rank=1)
    message = method.message(warmed(method), INFOS[0])
    model = method.personal(client(SHAPES), OwnLora({}), message, None)
    assert model is not None
    assert method.evaluates == "post_aggregation"
    assert all(torch.equal(model.tensors[name], tensor) for name, tensor in message.tensors.items())
