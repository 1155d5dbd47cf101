"""FedAMoLE-Peers: similarities, choices, means and the fallback by hand; without peers it is training alone."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.by_hand import client, driven, full

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.methods.fedamole_peers import FedAmolePeers, Homes, OwnParts, PeerExpert
from fedamole.methods.shared.similarity import similarities

SHAPES = {"m": (2, 2), "n": (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30), ClientInfo("c", 20))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)


def expert(b_of_m: tuple[float, float], b_of_n: tuple[float, float], a: float = 1.0) -> PeerExpert:
    """An expert of rank 1 with these B matrices."""
    tensors = {"m/shared/A": full(a, 1, 2), "m/shared/B": torch.tensor([b_of_m]).T}
    return PeerExpert({**tensors, "n/shared/A": full(a, 1, 2), "n/shared/B": torch.tensor([b_of_n]).T})


REPLIES = {"a": expert((1, 0), (0, 2)), "b": expert((3, 4), (0, 1), 3.0), "c": expert((0, -1), (1, 0), 5.0)}
"""Cosines in m and n: a and b 0.6 and 1, a and c 0 and 0, b and c -0.8 and 0."""


def test_similarity_is_the_mean_cosine_over_the_modules() -> None:
    changes = {
        name: {key: value for key, value in reply.tensors.items() if key.endswith("/B")}
        for name, reply in REPLIES.items()
    }
    expected = [[1.0, 0.8, 0.0], [0.8, 1.0, -0.4], [0.0, -0.4, 1.0]]
    actual = torch.stack([*similarities(changes).values()])
    assert torch.allclose(actual, torch.tensor(expected, dtype=torch.float64))
    assert similarities({}) == {}


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({"min_similarity": 0.79}, {"a": "ab", "b": "ab", "c": "c"}),
        ({"min_similarity": 0.81}, {"a": "a", "b": "b", "c": "c"}),
        ({"min_similarity": -1.0}, {"a": "abc", "b": "abc", "c": "abc"}),
        ({"min_similarity": -1.0, "expert_choices": 1}, {"a": "abc", "b": "ab", "c": "c"}),  # c's expert chooses a
        ({"min_similarity": -1.0, "expert_choices": 0}, {"a": "a", "b": "b", "c": "c"}),
    ],
)
def test_an_expert_chooses_the_most_similar_clients(settings: dict[str, Any], chosen: dict[str, str]) -> None:
    method = FedAmolePeers(rank=1, **settings)
    weights = method.aggregate(SERVER, method.init(SERVER), REPLIES).weights
    assert {client: "".join(sorted(homes)) for client, homes in weights.items()} == chosen


@pytest.mark.parametrize(("weighting", "sizes"), [("uniform", (1, 1, 1)), ("examples", (10, 30, 20))])
def test_less_similar_experts_have_a_lower_weight(weighting: Any, sizes: tuple[int, int, int]) -> None:
    """For a: b is the most similar (0.8), and c less so by 0.8; for c: a is (0), and b less so by 0.4."""
    method = FedAmolePeers(rank=1, min_similarity=-1.0, temperature=0.4, weighting=weighting)
    weights = method.aggregate(SERVER, method.init(SERVER), REPLIES).weights
    a, b, c = sizes
    assert weights["a"] == pytest.approx({"a": a, "b": b, "c": c * math.exp(-2)})
    assert weights["c"] == pytest.approx({"a": a, "b": b * math.exp(-1), "c": c})


@pytest.mark.parametrize(("weighting", "sizes"), [("uniform", (1, 1, 1)), ("examples", (10, 30, 20))])
def test_in_a_group_of_three_no_other_expert_outweighs_the_rest(weighting: Any, sizes: tuple[int, int, int]) -> None:
    """For a: c is less similar than b by 0.8, and b gets c's weight. Otherwise a could compute b's expert."""
    method = FedAmolePeers(rank=1, min_similarity=-1.0, temperature=0.05, weighting=weighting).for_deployment()
    weights = method.aggregate(SERVER, method.init(SERVER), REPLIES).weights
    a, _, c = sizes
    assert weights["a"] == pytest.approx({"a": a, "b": c * math.exp(-16), "c": c * math.exp(-16)})
    assert weights["a"]["b"] == weights["a"]["c"]


@pytest.mark.parametrize(("weighting", "mean_a"), [("uniform", 2.0), ("examples", 2.5)])
def test_a_client_gets_the_mean_of_the_experts_that_chose_it(weighting: Any, mean_a: float) -> None:
    """Of a (A = 1, 10 examples) and b (A = 3, 30 examples): 2, or (10 + 90) / 40; c gets its own."""
    method = FedAmolePeers(rank=1, weighting=weighting)
    state = method.aggregate(SERVER, method.init(SERVER), REPLIES)
    messages = {info.name: method.message(state, info).tensors for info in INFOS}
    assert torch.equal(messages["a"]["m/shared/A"], full(mean_a, 1, 2))
    assert all(torch.equal(messages["a"][key], messages["b"][key]) for key in messages["a"])
    assert all(torch.equal(messages["c"][key], REPLIES["c"].tensors[key]) for key in messages["c"])


def test_a_deployment_has_no_means_of_two() -> None:
    """Three clients that all choose each other share; of a group of two each gets its own expert."""
    method = FedAmolePeers(rank=1).for_deployment()
    state = method.aggregate(SERVER, method.init(SERVER), REPLIES)
    assert torch.equal(method.message(state, INFOS[0]).tensors["m/shared/A"], REPLIES["a"].tensors["m/shared/A"])
    assert method.exposes(3, None) == []
    assert "min_group" in FedAmolePeers(rank=1).exposes(3, None)[0]
    everyone = replace(method, min_similarity=-1.0, temperature=1e9)
    state = everyone.aggregate(SERVER, everyone.init(SERVER), REPLIES)
    assert torch.equal(everyone.message(state, INFOS[0]).tensors["m/shared/A"], full(3.0, 1, 2))


def test_the_first_changes_decide_and_later_replies_do_not() -> None:
    """In the second round c returns what a does; it stays alone, and a client that comes late is compared then."""
    method = FedAmolePeers(rank=1)
    first = {name: REPLIES[name] for name in "ac"}
    state = method.aggregate(SERVER, method.init(SERVER), first)
    assert "b" not in state.weights
    assert all(torch.equal(value, state.first[key]) for key, value in method.message(state, INFOS[1]).tensors.items())
    state = method.aggregate(SERVER, state, {"c": REPLIES["a"], "b": REPLIES["b"]})
    assert {name: sorted(homes) for name, homes in state.weights.items()} == {
        "a": ["a", "b"],
        "b": ["a", "b"],
        "c": ["c"],
    }
    assert torch.equal(state.experts["c"]["m/shared/B"], REPLIES["a"].tensors["m/shared/B"])


def test_the_private_part_stays_and_the_rest_is_sent() -> None:
    method = FedAmolePeers(rank=3, private_share=0.5)
    state, item = method.init(SERVER), client(SHAPES)
    own = method.init_client_state(item)
    assert {key: tuple(value.shape) for key, value in own.private.items()}["m/shared/A"] == (1, 2)
    trained = {f"{m}/shared/A": torch.arange(6.0).reshape(3, 2) for m in SHAPES}
    trained |= {f"{m}/shared/B": torch.arange(6.0).reshape(2, 3) for m in SHAPES}
    (request,), (after, reply, _) = driven(method.update(item, own, method.message(state, INFOS[0])), trained)
    assert request.adapter.tensors["m/shared/A"].shape == (3, 2)
    assert after.private["m/shared/A"].tolist() == [[0.0, 1.0]]
    assert after.private["m/shared/B"].tolist() == [[0.0], [3.0]]
    assert reply.tensors["m/shared/A"].tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert reply.tensors["m/shared/B"].tolist() == [[1.0, 2.0], [4.0, 5.0]]
    again = method.adapter(item, after, reply)
    assert all(torch.equal(again.tensors[key], value) for key, value in trained.items())


@pytest.mark.parametrize(
    ("max_excess", "losses", "before", "excess", "from_own"),
    [
        (0.0, (0.5, 0.4), 0.0, 0.025, True),  # a quarter of 0.1
        (0.0, (0.4, 0.5), 0.0, -0.025, False),
        (0.0, (0.4, 0.4), 0.1, 0.075, True),  # three quarters of the earlier average
        (0.1, (0.76, 0.4), 0.0, 0.09, False),
        (0.1, (0.76, 0.4), 0.02, 0.105, True),
        (0.0, (9.0, 0.4), 0.4, 0.55, True),  # a difference counts as 1 at most
        (0.0, (0.4, 9.0), 0.4, 0.05, True),  # and as -1 at least
        (0.0, (math.nan, 0.4), 0.0, 0.25, True),
        (0.0, (math.inf, 0.4), 0.0, 0.25, True),
        (0.0, (0.4, math.inf), 0.0, -0.25, False),
        (0.0, (0.4, math.nan), 0.0, -0.25, False),
        (0.0, (math.nan, math.nan), 0.0, 0.0, False),
    ],
)
def test_a_client_uses_its_own_expert_where_that_is_better_by_more_than_the_limit(
    max_excess: float, losses: tuple[float, float], before: float, excess: float, from_own: bool
) -> None:
    method, message = FedAmolePeers(rank=1, max_excess=max_excess), expert((1, 1), (1, 1), 7.0)
    item, own = client(SHAPES, losses=losses), OwnParts({}, REPLIES["a"].tensors, before)
    (request,), (after, _, _) = driven(method.update(item, own, message), {})
    start = REPLIES["a"] if from_own else message
    assert all(torch.equal(request.adapter.tensors[key], value) for key, value in start.tensors.items())
    assert after.excess == pytest.approx(excess)
    personal = method.personal(item, own, message, None)
    assert personal is not None
    assert all(torch.equal(personal.tensors[key], value) for key, value in start.tensors.items())


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e30])
def test_a_mean_that_ruins_the_model_is_neither_used_nor_remembered_for_ever(loss: float) -> None:
    """The average is 0.25, 0.19, 0.14, 0.105, and 0.08 in the fifth round."""
    method, message = FedAmolePeers(rank=1), expert((1, 1), (1, 1), 7.0)
    own = OwnParts({}, REPLIES["a"].tensors, 0.0)
    excesses = []
    for with_mean in (loss, *[0.4] * 5):
        item = client(SHAPES, losses=(with_mean, 0.4))
        own = replace(own, excess=method.excess(item, own, message))
        excesses.append(own.excess)
    assert [excess > method.max_excess for excess in excesses] == [True] * 4 + [False] * 2


def test_with_no_limit_or_with_its_own_expert_alone_a_client_compares_nothing() -> None:
    """The probe of `client` knows no losses and would fail."""
    own = OwnParts({}, REPLIES["a"].tensors, 5.0)
    assert FedAmolePeers(rank=1, max_excess=1.0).excess(client(SHAPES), own, REPLIES["b"]) == 0.0
    assert FedAmolePeers(rank=1).excess(client(SHAPES), own, REPLIES["a"]) == 0.0


def test_the_log_names_the_homes_of_the_experts() -> None:
    method = FedAmolePeers(rank=1)
    state: Homes = method.aggregate(SERVER, method.init(SERVER), REPLIES)
    assert list(method.assignment_log(state)) == [
        {"module": "all", "client": "a", "experts": [0, 1], "relevance": [1.0, 0.8]},
        {"module": "all", "client": "b", "experts": [0, 1], "relevance": [0.8, 1.0]},
        {"module": "all", "client": "c", "experts": [2], "relevance": [1.0]},
    ]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_without_peers_it_is_training_alone(runs: Any, share: float) -> None:
    """The same losses to the bit as with `local_only`, whatever part is private."""
    alone = ("method.min_similarity=1.0", f"method.private_share={share}")
    results = [
        [line.get("loss") for line in map(json.loads, (folder / "metrics.jsonl").open())]
        for folder in (runs("local_only"), runs("fedamole_peers", *alone))
    ]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "settings",
    [
        {"private_share": -0.1},
        {"private_share": 1.0},
        {"min_similarity": 1.5},
        {"expert_choices": -1},
        {"probe_examples": 0},
    ],
)
def test_values_out_of_range_are_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        FedAmolePeers(**settings)
