"""Model-GLUE: the glue by hand, what clients measure and train, and a poisoned LoRA among real ones."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tests.methods.by_hand import CallProbe, client, driven
from tests.methods.zoo import Zoo
from tests.training import lora_spec
from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.probe import Probe
from fedamole.merging.adapters import adapter_of, lora_factors, lora_tensors
from fedamole.merging.low_rank import LoraFactors, change_similarities
from fedamole.merging.selective import COEFFICIENTS, mean_losses
from fedamole.methods.local_only import OwnLora
from fedamole.methods.model_glue import BEST, NEXT, UNTUNED, GlueMessage, GlueReply, GlueState, ModelGlue
from fedamole.methods.shared.clustering import silhouette_clusters
from fedamole.model.mixer import LearnedRouter
from fedamole.model.params import expert_keys, mixer_key, shared_keys

SHAPES = {"m": (2, 1)}
A, B = shared_keys("m")
NAMES = ("a", "b", "c", "d")
INFOS = tuple(ClientInfo(name, 10) for name in NAMES)
SERVER = Server(BaseInfo(SHAPES, 4), INFOS, 0, 0, rounds=2)
METHOD = ModelGlue(rank=1, alpha=1.0)


def lora(x: float, y: float) -> dict[str, Tensor]:
    """The change (x, y) of one output."""
    return {A: torch.tensor([[float(x), float(y)]]), B: torch.ones(1, 1)}


def constant(loss: float, adapters: Sequence[Any], max_examples: int) -> list[float]:
    return [loss] * len(adapters)


def change(tensors: Mapping[str, Tensor], keys: tuple[str, str] = (A, B)) -> Tensor:
    return (tensors[keys[1]] @ tensors[keys[0]]).flatten()


def distance_probe(target: tuple[float, float]) -> CallProbe:
    """A probe whose loss is the distance of an adapter's change to a target."""
    goal = torch.tensor(target)
    return CallProbe(losses=lambda adapters, _: [float((change(it.tensors) - goal).norm()) for it in adapters])


class Federation:
    """Clients that return given LoRAs, and measure with given probes."""

    def __init__(
        self, method: ModelGlue, loras: Mapping[str, Mapping[str, Tensor]], probes: Mapping[str, Probe]
    ) -> None:
        self.method, self.loras, self.probes = method, loras, probes
        self.messages: list[dict[str, GlueMessage]] = []

    def __call__(self, messages: Mapping[str, Any]) -> Mapping[str, Any]:
        self.messages.append(dict(messages))
        replies = {}
        for name, message in messages.items():
            if not message.measured:
                replies[name] = GlueReply(self.loras[name], False, {})
                continue
            work = self.method.update(client(SHAPES, name, probe=self.probes[name]), OwnLora({}), message)
            with pytest.raises(StopIteration) as end:
                next(work)
            replies[name] = end.value.value[1]
        return replies


def glued(
    loras: Mapping[str, tuple[float, float]], targets: Mapping[str, tuple[float, float]], **settings: Any
) -> tuple[GlueState, Federation]:
    """The state after the round of the glue, of clients with these changes and targets."""
    method = replace(METHOD, **settings)
    federation = Federation(
        method, {n: lora(*xy) for n, xy in loras.items()}, {n: distance_probe(xy) for n, xy in targets.items()}
    )
    return method.round(SERVER, method.init(SERVER), INFOS, federation), federation


PAIRS = {"a": (1.0, 0.0), "b": (3.0, 0.3), "c": (0.0, 1.0), "d": (0.2, 4.0)}
TARGETS = {"a": (2.0, 0.0), "b": (2.0, 0.0), "c": (0.0, 1.2), "d": (0.0, 1.2)}


def test_changes_in_pairs_are_two_clusters() -> None:
    """Cosines of 0.9 or more inside two pairs, and 0.1 across, whatever the factors are."""
    factors = [lora_factors({A: 7 * tensors[A], B: tensors[B] / 7}) for tensors in (lora(*xy) for xy in PAIRS.values())]
    similarities = change_similarities(factors)
    assert float(similarities[0, 1]) == pytest.approx(3 / (3**2 + 0.3**2) ** 0.5)
    assert silhouette_clusters((1 - similarities).numpy(), 4).tolist() == [0, 0, 1, 1]


def test_the_glue_by_hand() -> None:
    """a and b are 1 and 1.044 from (2, 0). (1 - c) a + c b at c = 0.5 is (2, 0.15), 0.15 away: taken.

    c is 0.2 from (0, 1.2), and d 2.807, above the base's 1.2: d is left out before it is tried.
    """
    state, federation = glued(PAIRS, TARGETS)
    assert state.taken == {"0": {"a": 1.0, "b": 0.5}, "1": {"c": 1.0}}
    assert (state.refused, state.zoo) == (["d"], {})
    assert change(state.mixture, expert_keys("m", 0)).tolist() == pytest.approx([2.0, 0.15], abs=1e-6)
    assert change(state.mixture, expert_keys("m", 1)).tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    assert torch.equal(state.mixture[mixer_key("m")], torch.zeros(2, 2))
    train, zoo, pair = federation.messages
    assert set(train) == set(zoo) == set(NAMES)
    assert set(zoo["a"].measured["0"]) == {"a", "b"}, "a client measures the LoRAs of its own cluster"
    assert set(pair) == {"a", "b"}
    assert set(pair["a"].measured["0"]) == {BEST, NEXT}


def test_a_lora_that_does_not_lower_the_loss_is_refused() -> None:
    """b is nearer to its clients than the base, but beside a, on the far side: every blend is farther away than a."""
    state, _ = glued({**PAIRS, "b": (3.9, 0.0), "a": (2.0, 0.0)}, {**TARGETS, "a": (1.99, 0.0), "b": (1.99, 0.0)})
    assert state.taken["0"] == {"a": 1.0}
    assert "b" in state.refused


def test_a_cluster_of_useless_loras_gives_no_expert_and_an_empty_zoo_waits() -> None:
    state, _ = glued(PAIRS, {**TARGETS, "a": (-2.0, 0.0), "b": (-2.0, 0.0)})
    assert list(state.taken) == ["1"]
    assert state.refused == ["a", "b", "d"]
    assert state.mixture[mixer_key("m")].shape == (1, 2)
    state, federation = glued(PAIRS, dict.fromkeys(NAMES, (-5.0, -5.0)))
    assert not state.mixture
    assert set(state.zoo) == set(NAMES)
    assert METHOD.message(state, INFOS[0]).mixture is False
    again = METHOD.round(replace(SERVER, round=1), state, INFOS, federation)
    assert again.rounds == 2
    assert len(federation.messages) == 4, "the glue is tried again"


def test_so_many_loras_are_tried_as_asked() -> None:
    loras = {"a": (1.0, 0.0), "b": (1.1, 0.0), "c": (1.2, 0.0), "d": (1.3, 0.0)}
    for steps in (0, 1, 3):
        _, federation = glued(loras, dict.fromkeys(NAMES, (2.0, 0.0)), merge_steps=steps, most_clusters=1)
        assert len(federation.messages) == 2 + steps <= replace(METHOD, merge_steps=steps).exchanges()


def test_a_cluster_without_a_client_in_the_round_is_measured_by_the_others() -> None:
    before = replace(METHOD.init(SERVER), zoo={name: lora(*PAIRS[name]) for name in ("c", "d")})
    federation = Federation(METHOD, {n: lora(*PAIRS[n]) for n in ("a", "b")}, {n: distance_probe((1, 1)) for n in "ab"})
    state = METHOD.round(SERVER, before, INFOS[:2], federation)
    assert {label: set(loras) for label, loras in federation.messages[1]["a"].measured.items()} == {
        "0": {"a", "b"},
        "1": {"c", "d"},
    }
    assert state.mixture


def test_a_client_measures_the_base_and_blends_of_a_pair() -> None:
    probe = distance_probe((2.0, 0.0))
    zoo = GlueMessage({}, False, {"0": {"a": lora(1, 0), "b": lora(3, 0)}}, False)
    pair = GlueMessage({}, False, {"0": {BEST: lora(1, 0), NEXT: lora(3, 0)}}, True)
    results = []
    for message in (zoo, pair):
        work = METHOD.update(client(SHAPES, probe=probe), OwnLora(lora(9, 9)), message)
        with pytest.raises(StopIteration) as end:
            next(work)
        state, reply, result = end.value.value
        assert (result.steps, change(result.adapter.tensors).tolist()) == (0, [9.0, 9.0])
        assert change(state.tensors).tolist() == [9.0, 9.0]
        results.append({name: -math.log(float(p)) for name, p in reply.likelihoods["0"].items()})
    assert results[0] == pytest.approx({"a": 1.0, "b": 1.0, UNTUNED: 2.0}, abs=1e-5)
    assert results[1] == pytest.approx({f"{c:g}": abs(1 - 2 * c) for c in COEFFICIENTS}, abs=1e-5)


def test_a_loss_that_is_infinite_is_a_large_number() -> None:
    for loss in (math.inf, math.nan, 1e9):
        probe = CallProbe(losses=partial(constant, loss))
        likelihoods = METHOD._measure(client(SHAPES, probe=probe), {"a": lora(1, 0)}, False)
        assert mean_losses([likelihoods])["a"] == pytest.approx(69.08, abs=0.01)
    assert mean_losses([{"x": torch.tensor(0.5)}, {"x": torch.tensor(0.25)}])["x"] == pytest.approx(1.5 * math.log(2))
    assert mean_losses([{"x": torch.tensor(7.0)}])["x"] == 0, "no client lowers a mean below 0"


@pytest.mark.parametrize("train_experts", [False, True])
def test_the_mixture_is_trained_and_averaged(train_experts: bool) -> None:
    method = replace(METHOD, train_experts=train_experts)
    state, _ = glued(PAIRS, TARGETS)
    message = method.message(state, INFOS[0])
    trained = {name: tensor + 1 for name, tensor in message.tensors.items()}
    (request,), (kept, reply, _) = driven(method.update(client(SHAPES), OwnLora(lora(9, 9)), message), trained)
    assert isinstance(lora_spec(request.adapter.spec).router, LearnedRouter)
    assert bool(request.adapter.frozen) != train_experts
    assert mixer_key("m") not in request.adapter.frozen
    assert kept.tensors == {}
    assert set(reply.tensors) == (set(message.tensors) if train_experts else {mixer_key("m")})
    other = replace(reply, tensors={name: tensor + 2 for name, tensor in reply.tensors.items()})
    late = GlueReply(lora(5, 5), False, {})
    after = method.aggregate(SERVER, state, {"a": reply, "b": other, "c": late})
    assert torch.equal(after.mixture[mixer_key("m")], torch.full((2, 2), 2.0))
    own = expert_keys("m", 0)[0]
    assert torch.equal(after.mixture[own], state.mixture[own]) != train_experts
    assert after.zoo == {}


def test_clients_continue_with_their_own_lora_until_the_glue() -> None:
    method = replace(METHOD, train_share=1.0)
    message = method.message(method.init(SERVER), INFOS[0])
    for kept, expected in ((OwnLora({}), message.tensors[A]), (OwnLora(lora(3, 4)), lora(3, 4)[A])):
        (request,), (after, reply, _) = driven(method.update(client(SHAPES), kept, message), lora(5, 6))
        assert torch.equal(request.adapter.tensors[A], expected)
        assert change(after.tensors).tolist() == change(reply.tensors).tolist() == [5.0, 6.0]


@pytest.mark.parametrize(
    ("key", "wrong", "message"),
    [
        ("train_share", 0.0, "must be above 0 and at most 1"),
        ("train_share", 1.5, "must be above 0 and at most 1"),
        ("most_clusters", 0, "must be at least 1"),
        ("merge_steps", -1, "must be at least 0"),
        ("probe_examples", 0, "must be at least 1"),
    ],
)
def test_wrong_values_are_refused(key: str, wrong: float, message: str) -> None:
    with pytest.raises(ConfigError, match=f"method.{key} = {wrong}: {message}"):
        ModelGlue(**dict[str, Any]({key: wrong}))


def mean_probe_loss(zoo: Zoo, factors: LoraFactors, names: Sequence[str]) -> float:
    return sum(zoo.probe(name).losses([adapter_of(factors)], 64)[0] for name in names) / len(names)


@pytest.mark.parametrize("most_clusters", [1, 4])
def test_a_poisoned_lora_is_never_taken(most_clusters: int, zoo: Zoo) -> None:
    """Real LoRAs of four clients, one of them negated and enlarged; the experts are no worse than the best alone."""
    names, bad = sorted(zoo.loras), "hospital_south"
    factors = {**zoo.loras, bad: {m: (a, -5 * b) for m, (a, b) in zoo.loras[bad].items()}}
    method = ModelGlue(rank=8, alpha=8.0, most_clusters=most_clusters)
    federation = Federation(
        method, {name: lora_tensors(it) for name, it in factors.items()}, {name: zoo.probe(name) for name in names}
    )
    infos = tuple(ClientInfo(name, 10) for name in names)
    server = Server(BaseInfo(zoo.prepared.base.shapes, 4), infos, 0, 0, rounds=2)
    state = method.round(server, method.init(server), infos, federation)
    taken = {name for each in state.taken.values() for name in each}
    assert bad in state.refused
    assert "hospital_north" in taken
    assert bad not in taken
    if most_clusters == 1:
        experts = {
            key: state.mixture[expert]
            for m in server.shapes
            for key, expert in zip(shared_keys(m), expert_keys(m, 0), strict=True)
        }
        best = min(mean_probe_loss(zoo, it, names) for it in factors.values())
        assert mean_probe_loss(zoo, lora_factors(experts), names) <= best + 1e-5
