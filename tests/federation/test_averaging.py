"""mean_by_key by hand, and what must not depend on order or on who is missing."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.weights import capped
from fedamole.methods.shared.averaging import mean_by_key


def vector(*values: float) -> Tensor:
    return torch.tensor(values)


def test_each_key_is_averaged_over_the_clients_that_returned_it() -> None:
    """x over a, b, c with weights 1, 2, 1: (0 + 2 * 3 + 6) / 4 = 3; y over b, c: (2 * 3 + 9) / 3 = 5; z nobody."""
    replies = {
        "a": {"x": vector(0.0)},
        "b": {"x": vector(3.0), "y": vector(3.0)},
        "c": {"x": vector(6.0), "y": vector(9.0)},
    }
    previous = {"x": vector(100.0), "y": vector(100.0), "z": vector(100.0)}
    after = mean_by_key(replies, {"a": 1.0, "b": 2.0, "c": 1.0, "absent": 50.0}, previous)
    assert {key: float(value) for key, value in after.items()} == {"x": 3.0, "y": 5.0, "z": 100.0}
    assert {key: float(value) for key, value in previous.items()} == {"x": 100.0, "y": 100.0, "z": 100.0}


def test_without_replies_the_state_is_unchanged() -> None:
    previous = {"x": vector(1.0)}
    assert mean_by_key({}, {}, previous) == previous


def test_a_key_that_was_not_there_before_is_taken_in() -> None:
    assert float(mean_by_key({"a": {"new": vector(4.0)}}, {"a": 3.0}, {})["new"]) == 4.0


def test_only_the_proportions_of_the_weights_matter() -> None:
    replies = {"a": {"x": vector(1.0)}, "b": {"x": vector(4.0)}}
    for scale in (1e-6, 1.0, 1e6):
        assert float(mean_by_key(replies, {"a": 2 * scale, "b": scale}, {})["x"]) == 2.0


def test_the_dtype_is_the_replies_and_the_sum_is_exact_below_it() -> None:
    """256 + 1 is 256 in bfloat16; in float64 (256 + 1 + 1 + 1 + 1) / 5 = 52."""
    replies = {
        name: {"x": torch.tensor([value], dtype=torch.bfloat16)}
        for name, value in (("a", 256.0), ("b", 1.0), ("c", 1.0), ("d", 1.0), ("e", 1.0))
    }
    mean = mean_by_key(replies, dict.fromkeys("abcde", 1.0), {})["x"]
    assert mean.dtype == torch.bfloat16
    assert float(mean) == 52.0


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4), st.lists(st.floats(0.1, 10), min_size=4, max_size=4))
@example([1e16, 1.0, -1e16, 3.0], [1.0, 1.0, 1.0, 1.0])  # summed in another order, the ones are lost
def test_the_order_of_arrival_does_not_matter(values: list[float], weights: list[float]) -> None:
    """In float64 throughout, where sums in another order differ in their last bits."""
    pairs = list(zip("abcd", values, weights, strict=True))
    replies = {name: {"x": torch.tensor([value], dtype=torch.float64)} for name, value, _ in pairs}
    scale = {name: weight for name, _, weight in pairs}
    results = {
        mean_by_key({name: replies[name] for name in order}, scale, {})["x"].numpy().tobytes()
        for order in itertools.permutations("abcd")
    }
    assert len(results) == 1


@pytest.mark.parametrize(
    ("weights", "share", "expected"),
    [
        # a may have half of all: as much as b and c together.
        ({"a": 1e9, "b": 3.0, "c": 1.0}, 0.5, {"a": 4.0, "b": 3.0, "c": 1.0}),
        # a and b may have 0.4 each, so that both are twice the rest, 2.
        ({"a": 1e9, "b": 50.0, "c": 1.0, "d": 1.0}, 0.4, {"a": 4.0, "b": 4.0, "c": 1.0, "d": 1.0}),
        ({"a": 5.0, "b": 3.0, "c": 2.0}, 0.5, {"a": 5.0, "b": 3.0, "c": 2.0}),
        ({"a": 5.0, "b": 3.0, "c": 2.0}, 1.0, {"a": 5.0, "b": 3.0, "c": 2.0}),
        # c has not come yet: of two clients none can have less than a half.
        ({"a": 7.0, "b": 2.0, "c": 0.0}, 0.4, {"a": 2.0, "b": 2.0, "c": 0.0}),
        ({}, 0.5, {}),
    ],
)
def test_no_share_of_the_weights_is_above_the_cap(
    weights: dict[str, float], share: float, expected: dict[str, float]
) -> None:
    assert capped(weights, share) == pytest.approx(expected)


def test_a_servers_weights_are_capped_by_examples_only() -> None:
    clients = (ClientInfo("a", 10**9), ClientInfo("b", 3), ClientInfo("c", 1))
    server = Server(BaseInfo({}), clients, 0, max_weight_share=0.5)
    assert server.weights("examples") == {"a": 4.0, "b": 3.0, "c": 1.0}
    assert server.weights("uniform") == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert Server(BaseInfo({}), clients, 0).weights("examples") == {"a": 1e9, "b": 3.0, "c": 1.0}
