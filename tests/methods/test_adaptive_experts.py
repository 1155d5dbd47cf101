"""Adaptive Expert Models: schedules of epsilon, the choice, the mixture by hand, and clusters that do not starve."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.bundled_rounds import BundledRounds, Replies
from tests.methods.by_hand import CallProbe, client, driven, full
from tests.training import lora_spec

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.methods.adaptive_experts import AdaptiveExperts, OwnMixture
from fedamole.methods.fedit import FedIT
from fedamole.methods.shared.cluster_loras import ClusterLora, Clusters
from fedamole.model.mixer import LearnedRouter, mixer_linear
from fedamole.model.params import Adapter, expert_keys, mixer_key, stack
from fedamole.model.router import LinearAdapters
from fedamole.model.segments import Segments

SHAPES = {"m": (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30), ClientInfo("c", 20))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)
A, B, MIXER = "m/shared/A", "m/shared/B", mixer_key("m")
NAMES = [f"client {index}" for index in range(400)]


def lora(value: float) -> dict[str, torch.Tensor]:
    return {A: full(value, 1, 2), B: full(-value, 2, 1)}


def clusters(*loras: float) -> Clusters:
    return Clusters({str(k): lora(value) for k, value in enumerate(loras)})


def chosen(method: AdaptiveExperts, losses: tuple[float, ...], round_: int = 0) -> Counter[int]:
    """How many of 400 clients with these losses choose each cluster."""
    sent = clusters(*range(1, len(losses) + 1))
    return Counter(method.choose(client(SHAPES, name, round_, losses), sent) for name in NAMES)


@pytest.mark.parametrize(
    ("epsilon_schedule", "count", "round_", "expected"),
    [
        ("constant", 2, 3, 0.1),
        ("inverse", 2, 0, 1.0),
        ("inverse", 4, 3, 0.25),
        ("inverse_clusters", 2, 3, 0.25),  # 4^-(2/2)
        ("inverse_clusters", 4, 3, 0.5),  # 4^-(2/4)
        ("inverse_clusters", 4, 0, 1.0),
    ],
)
def test_the_schedules_by_hand(epsilon_schedule: Any, count: int, round_: int, expected: float) -> None:
    method = AdaptiveExperts(clusters=count, epsilon_schedule=epsilon_schedule)
    assert method.exploration_rate(round_) == pytest.approx(expected)


def test_without_exploration_the_lowest_loss_is_chosen() -> None:
    assert chosen(AdaptiveExperts(rank=1, clusters=3, epsilon=0.0), (0.3, 0.1, 0.2)) == {1: 400}


def test_explorers_draw_among_all_clusters() -> None:
    """Expected with epsilon 0.3 and J = 3: 40 of 400 at each of the two others (deviation 6)."""
    counts = chosen(AdaptiveExperts(rank=1, clusters=3, epsilon=0.3), (0.3, 0.1, 0.2))
    assert 22 <= counts[0] <= 58
    assert 22 <= counts[2] <= 58
    everyone = chosen(AdaptiveExperts(rank=1, clusters=2, epsilon=1.0), (0.1, 0.2))
    assert 160 <= everyone[0] <= 240


def test_every_round_draws_anew() -> None:
    method, sent = AdaptiveExperts(rank=1, epsilon=1.0), clusters(1.0, 2.0)
    drawn = [[method.choose(client(SHAPES, name, round_), sent) for name in NAMES[:40]] for round_ in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_equal_losses_are_drawn() -> None:
    counts = chosen(AdaptiveExperts(rank=1, clusters=3, epsilon=0.0), (0.1, 0.2, 0.1))
    assert counts[1] == 0
    assert 160 <= counts[0] <= 240
    assert len(chosen(AdaptiveExperts(rank=1, clusters=2, epsilon=0.0), (float("nan"), 0.1))) == 2


def test_nothing_is_read_by_explorers_and_before_the_first_training() -> None:
    def refuse(adapters: Sequence[Adapter], most: int) -> list[float]:
        raise AssertionError("a probe")

    item = client(SHAPES, probe=CallProbe(refuse))
    method = AdaptiveExperts(rank=1, epsilon=0.0)
    assert method.choose(item, method.init(SERVER)) in (0, 1)
    assert AdaptiveExperts(rank=1, epsilon=1.0).choose(item, clusters(1.0, 2.0)) in (0, 1)
    with pytest.raises(AssertionError, match="a probe"):
        method.choose(item, clusters(1.0, 2.0))


def test_the_probe_reads_at_most_probe_examples() -> None:
    seen: list[int] = []

    def look(adapters: Sequence[Adapter], most: int) -> list[float]:
        seen.append(most)
        return [float(adapter.tensors[A][0, 0]) for adapter in adapters]

    method = AdaptiveExperts(rank=1, epsilon=0.0, probe_examples=5)
    assert method.choose(client(SHAPES, probe=CallProbe(look)), clusters(4.0, 3.0)) == 1
    assert seen == [5]


def test_a_client_starts_with_fedits_lora_and_equal_weights() -> None:
    first = AdaptiveExperts(rank=2).init_client_state(client(SHAPES))
    own_a, own_b = expert_keys("m", 0)
    assert torch.equal(first.tensors[own_a], FedIT(rank=2).init(SERVER).tensors[A])
    assert not first.tensors[own_b].any()
    assert torch.equal(first.tensors[MIXER], torch.zeros(3, 2))
    assert first.cluster == -1


def test_the_cluster_is_trained_first_and_the_mixture_beside_it() -> None:
    """The client trains cluster 1 to 9, then its own LoRA to 7 beside the clusters 1 and 9, which are frozen."""
    method, (own_a, own_b) = AdaptiveExperts(rank=1, epsilon=0.0), expert_keys("m", 0)
    item = client(SHAPES, losses=(0.7, 0.2))
    work = method.update(item, method.init_client_state(item), clusters(1.0, 2.0))
    mixture = {own_a: full(7.0, 1, 2), own_b: full(8.0, 2, 1), MIXER: full(0.5, 3, 2)}
    (cluster, mixed), (state, reply, trained) = driven(work, lora(9.0), mixture)
    assert torch.equal(cluster.adapter.tensors[A], full(2.0, 1, 2))
    assert (set(cluster.adapter.tensors), cluster.adapter.frozen) == ({A, B}, ())
    assert (cluster.step_fraction, mixed.step_fraction) == (0.5, 0.5)
    assert (cluster.paper_step_fraction, mixed.paper_step_fraction) == (1.0, 1.0)
    assert lora_spec(mixed.adapter.spec).router == LearnedRouter()
    assert set(mixed.adapter.frozen) == {*expert_keys("m", 1), *expert_keys("m", 2)}
    assert [float(mixed.adapter.tensors[expert_keys("m", k)[0]][0, 0]) for k in (1, 2)] == [1.0, 9.0]
    assert state == OwnMixture(state.tensors, 1)
    assert {key: float(value[0, 0]) for key, value in state.tensors.items()} == {own_a: 7.0, own_b: 8.0, MIXER: 0.5}
    assert reply.cluster == 1
    assert {key: float(value[0, 0]) for key, value in reply.tensors.items()} == {A: 9.0, B: -9.0}
    assert torch.equal(trained.adapter.tensors[own_a], full(7.0, 1, 2))


def test_the_model_is_the_own_lora_with_the_clusters_of_the_next_message() -> None:
    method = AdaptiveExperts(rank=1)
    first = method.init_client_state(client(SHAPES))
    model = method.personal(client(SHAPES), first, clusters(3.0, 4.0), None)
    assert model is not None
    assert [float(model.tensors[expert_keys("m", k)[0]][0, 0]) for k in (1, 2)] == [3.0, 4.0]
    assert torch.equal(model.tensors[expert_keys("m", 0)[0]], first.tensors[expert_keys("m", 0)[0]])
    assert method.evaluates == "post_aggregation"


def test_the_mixture_by_hand() -> None:
    """Weights 0.75 and 0.25 of outputs 0.8 and 0.2 give 0.65; the third expert has weight 0.

    The token is (1, 0). The logits are ln 3, 0 and -100, the experts' A are 1 and their B 0.8, 0.2 and 5.
    """
    method = AdaptiveExperts(rank=1, alpha=1.0)
    tensors = {MIXER: torch.tensor([[1.0986123, 0.0], [0.0, 0.0], [-100.0, 0.0]])}
    for k, value in enumerate((0.8, 0.2, 5.0)):
        tensors |= dict(zip(expert_keys("m", k), (torch.tensor([[1.0, 0.0]]), full(value, 2, 1)), strict=True))
    down, up = stack(tensors, "m", [0, 1, 2])
    x = torch.tensor([[1.0, 0.0]])
    adapters = LinearAdapters(down.unsqueeze(0), up.unsqueeze(0))
    y = mixer_linear(x, torch.zeros(1, 2), adapters, method.spec(), None, Segments((1,), x.device)).y
    assert y.flatten().tolist() == pytest.approx([0.65, 0.65])


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [("uniform", [3.0, 6.0]), ("examples", [3.5, 6.0])],  # (2 + 4) / 2; (10 * 2 + 30 * 4) / 40
)
def test_the_averages_within_the_clusters(weighting: Any, expected: list[float]) -> None:
    replies = {name: ClusterLora(k, lora(v)) for name, k, v in (("a", 0, 2.0), ("b", 0, 4.0), ("c", 1, 6.0))}
    after = AdaptiveExperts(rank=1, weighting=weighting).aggregate(SERVER, clusters(100.0, 200.0), replies)
    assert [float(after.loras[str(k)][A][0, 0]) for k in (0, 1)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("clusters", 1, "must be at least 2"),
        ("probe_examples", 0, "must be at least 1"),
        ("epsilon", -0.1, "must be at least 0 and at most 1"),
        ("epsilon", 1.1, "must be at least 0 and at most 1"),
        ("epsilon", float("nan"), "must be at least 0 and at most 1"),
    ],
)
def test_invalid_values_are_refused(key: str, value: float, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"method\.{key} = .*: {message}"):
        AdaptiveExperts(**dict[str, Any]({key: value}))


def test_no_cluster_starves_with_exploration(tmp_path: Path) -> None:
    """Real text: without exploration a cluster that falls behind in round 0 is never trained again."""
    bundled = BundledRounds(tmp_path)

    def clusters_trained(epsilon: float) -> list[set[int]]:
        settings = ["method.clusters=3", f"method.epsilon={epsilon}", "method.probe_examples=12"]
        trained = list[set[int]]()

        def record(replies: Replies) -> Replies:
            trained.append({reply.cluster for reply in replies.values()})
            return replies

        bundled.train("adaptive_experts", *settings, "training.local_steps=4", rounds=3, changed=record)
        return trained

    first, *greedy = clusters_trained(0.0)
    assert first == {0, 1, 2}, "each cluster is drawn at the start"
    assert set().union(*greedy) < {0, 1, 2}
    _, *exploring = clusters_trained(0.3)
    assert set().union(*exploring) == {0, 1, 2}
