"""IFCA: the draw at the start, the choice by loss, and the averages within the clusters by hand."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.by_hand import CallProbe, client, driven, full

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, Client, ClientInfo, Server
from fedamole.methods.ifca_lora import Choice, IfcaLora
from fedamole.methods.shared.cluster_loras import ClusterLora, Clusters
from fedamole.model.params import Adapter

SHAPES = {"m": (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30), ClientInfo("c", 20))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)
A, B = "m/shared/A", "m/shared/B"


def lora(value: float) -> dict[str, torch.Tensor]:
    return {A: full(value, 1, 2), B: full(-value, 2, 1)}


def clusters(*loras: float) -> Clusters:
    return Clusters({str(k): lora(value) for k, value in enumerate(loras)})


def values(state: Clusters) -> list[float]:
    """The value of each cluster's A."""
    count = len(state.loras)
    for k in range(count):
        assert torch.equal(state.loras[str(k)][B].flatten(), -state.loras[str(k)][A].flatten())
    return [float(state.loras[str(k)][A][0, 0]) for k in range(count)]


def test_the_clusters_begin_as_different_loras_that_are_all_the_bare_base() -> None:
    method = IfcaLora(rank=2, clusters=4)
    state = method.init(SERVER)
    assert {cluster: set(lora_) for cluster, lora_ in state.loras.items()} == {str(k): {A, B} for k in range(4)}
    assert not any(lora_[B].any() for lora_ in state.loras.values())
    assert len({tuple(state.loras[str(k)][A].flatten().tolist()) for k in range(4)}) == 4
    assert all(method.message(state, info) is state for info in INFOS)


def test_while_all_are_0_a_client_draws_without_a_look_and_stays_with_it() -> None:
    """`client` would fail at any look: it knows no losses. The draw is the same in later rounds, and for its model."""
    method = IfcaLora(rank=1)
    state = method.init(SERVER)
    counts = Counter(method.choose(client(SHAPES, f"client {index}"), state) for index in range(90))
    assert set(counts) == {0, 1, 2}
    assert min(counts.values()) >= 18  # 30 +- 4.5: within 2.7 deviations
    for name in "abcdef":
        chosen = method.choose(client(SHAPES, name), state)
        assert chosen == method.choose(client(SHAPES, name, round_=7), state)
        result = method.personal(client(SHAPES, name), Choice(-1), state, None)
        assert result is not None
        assert torch.equal(result.tensors[A], state.loras[str(chosen)][A])


def test_another_seed_draws_anew() -> None:
    method, names = IfcaLora(rank=1), [f"client {index}" for index in range(30)]
    state = method.init(SERVER)
    drawn = [[method.choose(replace(client(SHAPES, name), seed=seed), state) for name in names] for seed in (0, 1)]
    assert drawn[0] != drawn[1]


def test_one_b_that_is_not_0_is_enough_to_look() -> None:
    """The others' losses are those of the bare base, here 0.5: a client for whom cluster 2 is worse takes the first."""
    method = IfcaLora(rank=1)
    tensors = {
        cluster: {name: tensor * 0 if name.endswith("/B") else tensor for name, tensor in lora_.items()}
        for cluster, lora_ in clusters(1, 2, 3).loras.items()
    }
    tensors["2"][B] = torch.tensor([[0.0], [1e-6]])
    assert method.choose(client(SHAPES, losses=(0.5, 0.5, 0.4)), Clusters(tensors)) == 2
    assert method.choose(client(SHAPES, losses=(0.5, 0.5, 0.6)), Clusters(tensors)) == 0


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [((0.7, 0.2, 0.9), 1), ((0.1, 0.2, 0.9), 0), ((3.0, 2.0, 1.0), 2), ((0.7, 0.2, 0.2), 1), ((0.2, 0.2, 0.2), 0)],
)
def test_the_lowest_loss_is_chosen_the_first_among_equals(losses: tuple[float, ...], chosen: int) -> None:
    method, sent = IfcaLora(rank=1), clusters(1.0, 2.0, 3.0)
    work = method.update(client(SHAPES, losses=losses), Choice(-1), sent)
    (request,), (client_state, reply, trained) = driven(work, lora(9.0))
    assert torch.equal(request.adapter.tensors[A], full(chosen + 1.0, 1, 2))
    assert set(request.adapter.tensors) == {A, B}
    assert (request.step_fraction, request.adapter.frozen, request.penalty) == (1.0, (), None)
    assert client_state == Choice(chosen)
    assert reply.cluster == chosen
    assert {name: tensor.tolist() for name, tensor in reply.tensors.items()} == {
        A: [[9.0, 9.0]],
        B: [[-9.0], [-9.0]],
    }
    assert torch.equal(trained.adapter.tensors[A], full(9.0, 1, 2))


def test_a_client_may_change_its_cluster_in_every_round() -> None:
    """A client that trained cluster 0 last goes where its loss is lowest now."""
    work = IfcaLora(rank=1).update(client(SHAPES, losses=(0.7, 0.2, 0.9)), Choice(0), clusters(1.0, 2.0, 3.0))
    _, (client_state, reply, _) = driven(work, lora(9.0))
    assert (client_state.cluster, reply.cluster) == (1, 1)


def test_the_look_is_at_every_cluster_and_as_many_examples_as_allowed() -> None:
    looks: list[tuple[list[float], int]] = []

    def look(adapters: Sequence[Adapter], most: int) -> list[float]:
        looks.append(([float(adapter.tensors[A][0, 0]) for adapter in adapters], most))
        return [0.3, 0.1]

    client_: Client = client(SHAPES, probe=CallProbe(look))
    method = IfcaLora(rank=1, clusters=2, probe_examples=5)
    assert method.choose(client_, clusters(4.0, 6.0)) == 1
    assert looks == [([4.0, 6.0], 5)]


@pytest.mark.parametrize(
    ("weighting", "chosen", "expected"),
    [
        ("uniform", {"a": 0, "b": 0, "c": 2}, [3.0, 200.0, 6.0]),  # (2 + 4) / 2, nobody, 6
        ("examples", {"a": 0, "b": 0, "c": 2}, [3.5, 200.0, 6.0]),  # (10 * 2 + 30 * 4) / 40
        ("uniform", {"a": 1, "b": 1, "c": 1}, [100.0, 4.0, 300.0]),  # (2 + 4 + 6) / 3
        ("examples", {"a": 1, "b": 1, "c": 1}, [100.0, 13 / 3, 300.0]),  # (10 * 2 + 30 * 4 + 20 * 6) / 60
        ("examples", {"a": 1, "c": 1}, [100.0, 14 / 3, 300.0]),  # (10 * 2 + 20 * 6) / 30
        ("uniform", {"c": 0}, [6.0, 200.0, 300.0]),
    ],
)
def test_the_averages_by_hand(weighting: Any, chosen: dict[str, int], expected: list[float]) -> None:
    trained = {"a": 2.0, "b": 4.0, "c": 6.0}
    replies = {name: ClusterLora(cluster, lora(trained[name])) for name, cluster in chosen.items()}
    after = IfcaLora(weighting=weighting).aggregate(SERVER, clusters(100.0, 200.0, 300.0), replies)
    assert values(after) == pytest.approx(expected)


def test_the_personal_model_is_the_averaged_lora_that_fits_best_now() -> None:
    """Not the cluster it trained, 0, and not what it trained, 9."""
    method = IfcaLora(rank=1)
    result = method.personal(
        client(SHAPES, losses=(0.7, 0.4, 0.2)), Choice(0), clusters(1.0, 2.0, 3.0), Adapter(method.spec(), lora(9.0))
    )
    assert result is not None
    assert torch.equal(result.tensors[A], full(3.0, 1, 2))
    assert method.evaluates == "post_aggregation"


def test_more_than_ten_clusters_are_distinguished() -> None:
    """The key "1" is a prefix of "10"."""
    method = IfcaLora(rank=1, clusters=12)
    losses = [1.0] * 12
    losses[10] = 0.5
    adapter = method.adapter(client(SHAPES, losses=losses), Choice(-1), clusters(*range(1, 13)))
    assert torch.equal(adapter.tensors[A], full(11.0, 1, 2))


@pytest.mark.parametrize("field", ["clusters", "probe_examples", "rank"])
def test_invalid_values_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} = 0: must be at least 1"):
        IfcaLora(**dict[str, Any]({field: 0}))
