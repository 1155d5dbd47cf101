"""FedMoE: averages weighted by usage, the rounds of a client by hand, and experts shared within domains."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.bundled_rounds import BundledRounds
from tests.methods.by_hand import client, driven, full
from tests.training import lora_spec

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.probe import DryProbe
from fedamole.methods.fedmoe import FedMoe, UsedExperts, UsedPool
from fedamole.methods.shared.averaging import mean_of_experts
from fedamole.model.params import Adapter, expert_keys, expert_name

SHAPES = {"m": (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30), ClientInfo("c", 20))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)
SMALL: dict[str, Any] = {"rank": 1, "experts": 4, "min_experts": 1, "max_experts": 3, "top_k": 1, "review_every": 2}


def method(**changed: Any) -> FedMoe:
    return FedMoe(**{**SMALL, **changed})


def reply(value: float, usage: Mapping[int, float]) -> UsedExperts:
    """A reply whose tensors all have this value, with these experts of module m."""
    tensors = {"m/router/W": full(value, 1, 2), "m/shared/A": full(value, 1, 2), "m/shared/B": full(value, 2, 1)}
    for expert in usage:
        tensors |= dict(zip(expert_keys("m", expert), (full(value, 1, 2), full(value, 2, 1)), strict=True))
    numbers = {expert_name(expert): torch.tensor(share) for expert, share in usage.items()}
    return UsedExperts(tensors, {"m": numbers})


def value(state: UsedPool, key: str) -> float:
    return float(state.tensors[key].flatten()[0])


def test_an_expert_used_60_and_20_weighs_the_clients_3_to_1() -> None:
    """(0.75 * 4 + 0.25 * 8); an expert that no client uses keeps its value."""
    previous = {key: full(9.0, 1) for expert in (0, 1) for key in expert_keys("m", expert)}
    returned = {name: dict.fromkeys(previous, full(v, 1)) for name, v in (("a", 4.0), ("b", 8.0))}
    weights = {"a": {"m": torch.tensor([0.6, 0.0])}, "b": {"m": torch.tensor([0.2, 0.0])}}
    means = mean_of_experts(returned, weights, previous)
    assert {key: pytest.approx(float(tensor)) for key, tensor in means.items()} == {
        key: 5.0 if "expert-00" in key else 9.0 for key in previous
    }


@pytest.mark.parametrize(
    ("weighting", "expert", "shared"),
    [
        ("usage", (0.8 * 10 * 2 + 0.2 * 30 * 6) / (0.8 * 10 + 0.2 * 30), 5.0),
        ("examples", (10 * 2 + 30 * 6) / 40, 5.0),
        ("uniform", 4.0, 4.0),
    ],
)
def test_the_averages_by_hand(weighting: Any, expert: float, shared: float) -> None:
    """a (10 examples) returns 2 and uses expert 0 for 80 % of its tokens, b (30) returns 6 and uses it for 20 %."""
    small = method(weighting=weighting)
    replies = {"a": reply(2.0, {0: 0.8, 1: 0.2, 2: 0, 3: 0}), "b": reply(6.0, {0: 0.2, 1: 0.8, 2: 0, 3: 0})}
    after = small.aggregate(SERVER, small.init(SERVER), replies)
    assert value(after, expert_keys("m", 0)[0]) == pytest.approx(expert)
    assert value(after, "m/shared/B") == pytest.approx(shared)
    assert value(after, "m/router/W") == pytest.approx(shared)


def test_a_client_searches_all_experts_and_keeps_what_covers_its_usage() -> None:
    """0.6 + 0.3 cover 0.9; c does not answer and goes on with the search."""
    small = method()
    state = small.init(SERVER)
    assert state.held == {"m": {name: [0, 1, 2, 3] for name in "abc"}}
    replies = {"a": reply(1.0, {0: 0.1, 1: 0.6, 2: 0, 3: 0.3}), "b": reply(1.0, {0: 0.25, 1: 0.2, 2: 0.55, 3: 0})}
    after = small.aggregate(SERVER, state, replies)
    assert after.held == {"m": {"a": [1, 3], "b": [0, 1, 2], "c": [0, 1, 2, 3]}}
    assert after.rounds == {"a": 1, "b": 1}
    assert after.shares["a"]["m"].tolist() == pytest.approx([0.1, 0.6, 0, 0.3])
    names = {key for expert in (1, 3) for key in expert_keys("m", expert)}
    assert set(small.message(after, INFOS[0]).tensors) == {"m/router/W", "m/shared/A", "m/shared/B"} | names


def test_every_second_round_is_a_review() -> None:
    """a drops 3 (0.05 is below 0.5 / 2) and gets 2, which b, the only other client, uses most."""
    small = method()
    state = small.init(SERVER)
    for usage in ({0: 0.1, 1: 0.6, 2: 0, 3: 0.3}, {1: 0.95, 3: 0.05}, {1: 0.95, 3: 0.05}):
        assert state.held["m"]["a"] == sorted(usage)
        b = {expert: {0: 0.25, 1: 0.2, 2: 0.55}.get(expert, 0.0) for expert in state.held["m"]["b"]}
        state = small.aggregate(SERVER, state, {"a": reply(1.0, usage), "b": reply(1.0, b)})
    assert state.held["m"]["a"] == [1, 2]


def test_a_search_with_random_experts() -> None:
    small = method(experts=12, search_experts=3, search_rounds=2)
    state = small.init(SERVER)
    held = state.held["m"]
    assert {len(set(experts)) for experts in held.values()} == {3}
    assert len({tuple(experts) for experts in held.values()}) > 1
    usage = dict.fromkeys(held["a"], 0.5)
    after = small.aggregate(SERVER, state, {"a": reply(1.0, usage)})
    assert after.held == state.held, "two rounds of search"


def test_the_random_ablation_draws_as_many_experts() -> None:
    small = method(assignment="random", experts=40, max_experts=20, coverage=0.5)
    usage = dict.fromkeys(range(40), 0.1)
    first, second = (
        small.aggregate(replace(SERVER, round=r), small.init(SERVER), {"a": reply(1.0, usage)}).held["m"]["a"]
        for r in (0, 1)
    )
    assert len(set(first)) == len(set(second)) == 20
    assert first != second


def test_few_holders_keep_the_value_where_that_is_asked() -> None:
    small = method().for_deployment()
    assert small.min_holders == 3
    state = small.init(SERVER)
    usage = {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0}
    after = small.aggregate(SERVER, state, {name: reply(1.0, usage) for name in "ab"})
    assert all(torch.equal(after.tensors[key], tensor) for key, tensor in state.tensors.items())
    after = small.aggregate(SERVER, state, {name: reply(1.0, usage) for name in "abc"})
    assert value(after, expert_keys("m", 0)[0]) == 1.0
    assert "usage" not in " ".join(method(weighting="uniform").for_deployment().exposes(3, None))
    assert len(method().exposes(3, None)) == 3


class UsageProbe(DryProbe):
    """A probe that returns one usage and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(SHAPES, 4)
        self.calls: list[tuple[float, int]] = []

    def usage(self, adapter: Adapter, max_examples: int) -> dict[str, dict[int, float]]:
        self.calls.append((float(adapter.tensors["m/shared/B"][0, 0]), max_examples))
        return {"m": {1: 0.75, 3: 0.25}}


def test_a_client_trains_what_it_got_and_measures_its_usage_afterwards() -> None:
    probe, small = UsageProbe(), method(probe_examples=5)
    item = client(SHAPES, probe=probe)
    message = small.message(small.init(SERVER), INFOS[0])
    trained = {"m/shared/B": full(7.0, 2, 1)}
    (request,), (_, answer, _) = driven(small.update(item, small.init_client_state(item), message), trained)
    assert (request.step_fraction, request.adapter.frozen) == (1.0, ())
    assert lora_spec(request.adapter.spec).top_k == 1
    assert probe.calls == [(7.0, 5)]
    assert {name: float(share) for name, share in answer.usage["m"].items()} == {"expert-01": 0.75, "expert-03": 0.25}
    assert set(answer.tensors) == set(message.tensors)


def test_the_log_has_the_shares() -> None:
    small = method()
    state = small.init(SERVER)
    after = small.aggregate(SERVER, state, {"a": reply(1.0, {0: 0.1, 1: 0.6, 2: 0, 3: 0.3})})
    lines = list(small.assignment_log(after))
    assert lines[0] == {"module": "m", "client": "a", "experts": [1, 3], "relevance": [0.6, 0.3]}
    assert lines[1] == {"module": "m", "client": "b", "experts": [0, 1, 2, 3], "relevance": [0.0] * 4}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"min_experts": 0}, "min_experts = 0: must be at least 1"),
        ({"top_k": 2}, "min_experts = 1: must be at least 2"),
        ({"max_experts": 0}, "max_experts = 0: must be at least 1"),
        ({"experts": 2}, "experts = 2: must be at least 3"),
        ({"search_experts": 0}, "search_experts = 0: must be at least 1"),
        ({"search_experts": 5}, "search_experts = 5: must be at most 4"),
        ({"search_rounds": 0}, "search_rounds = 0: must be at least 1"),
        ({"review_every": 0}, "review_every = 0: must be at least 1"),
        ({"probe_examples": 0}, "probe_examples = 0: must be at least 1"),
        ({"min_holders": 0}, "min_holders = 0: must be at least 1"),
        ({"coverage": 1.1}, "coverage = 1.1: must be at least 0 and at most 1"),
        ({"drop_below": float("nan")}, "drop_below = nan: must be at least 0 and at most 1"),
    ],
)
def test_invalid_values_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"method\.{message}"):
        method(**changed)


def test_more_holders_than_clients_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.min_holders = 4: must be at most 3"):
        method(min_holders=4).check(3)


def jaccard(held: Mapping[str, Mapping[str, list[int]]]) -> tuple[float, float]:
    """Mean share of common experts of two clients, of one domain and of two."""
    within, across = list[float](), list[float]()
    for holders in held.values():
        for a, b in combinations(sorted(holders), 2):
            common = len({*holders[a]} & {*holders[b]}) / len({*holders[a]} | {*holders[b]})
            (within if a.split("_")[0] == b.split("_")[0] else across).append(common)
    return sum(within) / len(within), sum(across) / len(across)


def test_clients_of_a_domain_share_more_experts(tmp_path: Path) -> None:
    """Real text of four domains with two clients each; after the search and one review."""
    settings = ["method.review_every=1", "method.probe_examples=12", "training.local_steps=4"]
    state, _ = BundledRounds(tmp_path).train("fedmoe", *settings, rounds=2)
    within, across = jaccard(state.held)
    assert within > across + 0.1
