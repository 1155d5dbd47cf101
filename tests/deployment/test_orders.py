"""Signed orders: only the coordinator can issue them, for one client, and each is accepted once."""

import itertools
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedamole.deployment.security.keys import new_key
from fedamole.deployment.security.orders import (
    MAGIC,
    Order,
    OrderCounter,
    OrderError,
    SignedLink,
    open_order,
    sign_order,
)

KEY, OTHER = new_key(), new_key()
ORDER = sign_order(KEY, "north", 7, b"request")


def test_an_order_is_taken_apart_by_its_addressee() -> None:
    assert open_order(KEY.public_key(), "north", ORDER) == Order(7, b"request")


@pytest.mark.parametrize(
    ("key", "client", "order", "why"),
    [
        (OTHER, "north", ORDER, "signature does not match the coordinator.pub"),
        (KEY, "south", ORDER, "signed for another client"),
        (KEY, "north", sign_order(None, "north", 7, b"request"), "signature"),
        (KEY, "north", sign_order(OTHER, "north", 7, b"request"), "signature"),
        (KEY, "north", ORDER[:-1] + b"T", "content does not match the signed hash"),
        (KEY, "north", ORDER + b"more", "content does not match the signed hash"),
        (KEY, "north", b"", "not a signed order"),
        (KEY, "north", MAGIC, "not a signed order"),
        (KEY, "north", b"x" * 300, "not a signed order"),
    ],
)
def test_anything_else_is_refused_with_the_reason(key: object, client: str, order: bytes, why: str) -> None:
    assert isinstance(key, type(KEY))
    with pytest.raises(OrderError, match=why):
        open_order(key.public_key(), client, order)


@given(st.integers(0, len(ORDER) - 1), st.integers(1, 255))
def test_no_changed_byte_is_obeyed(at: int, change: int) -> None:
    changed = bytearray(ORDER)
    changed[at] ^= change
    with pytest.raises(OrderError):
        open_order(KEY.public_key(), "north", bytes(changed))


def test_without_keys_the_form_is_checked_alone() -> None:
    assert open_order(None, "north", sign_order(None, "", 3, b"request")) == Order(3, b"request")
    with pytest.raises(OrderError, match="content"):
        open_order(None, "north", sign_order(None, "", 3, b"request") + b"x")


def test_each_order_is_taken_once_also_by_the_next_process(tmp_path: Path) -> None:
    taken = OrderCounter(tmp_path / "last-order", "key")
    for counter in (5, 9):
        taken.accept(Order(counter, b""))
    for again in (OrderCounter(tmp_path / "last-order", "key"), taken):
        for counter in (9, 5, 8):
            with pytest.raises(OrderError, match="accepted before"):
                again.accept(Order(counter, b""))
    OrderCounter(tmp_path / "last-order", "key").accept(Order(10, b""))
    OrderCounter(tmp_path / "last-order", "another key").accept(Order(3, b""))


def test_an_order_of_the_far_future_does_not_shut_out_all_later_ones(tmp_path: Path) -> None:
    taken = OrderCounter(tmp_path / "last-order", "key", lambda: 10**18)
    with pytest.raises(OrderError, match="more than a day in the future"):
        taken.accept(Order(10**30, b""))
    taken.accept(Order(10**18 + 5, b""))


def test_a_damaged_counter_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "last-order").write_text("x")
    with pytest.raises(OrderError, match="is damaged, so old orders"):
        OrderCounter(tmp_path / "last-order", "key")


class Wire:
    """A link that records what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, bytes]] = []

    def nodes(self) -> Mapping[int, str]:
        return {1: "north", 2: "south"}

    def send(self, node: int, payload: bytes, round_: int, seconds: float) -> str:
        self.sent.append((node, payload))
        return f"ticket-{len(self.sent)}"

    def receive(self, tickets: Collection[str]) -> Mapping[str, bytes | str]:
        return dict.fromkeys(tickets, b"answer")


def test_a_link_signs_for_each_node_and_its_counters_only_grow() -> None:
    wire, clock = Wire(), itertools.chain([100, 90, 90], itertools.repeat(200))
    link = SignedLink(wire, KEY, lambda: next(clock))
    link.nodes()
    assert link.send(1, b"a", 0, 1.0) == "ticket-1"
    for node in (2, 1, 1):
        link.send(node, b"b", 0, 1.0)
    orders = [open_order(KEY.public_key(), {1: "north", 2: "south"}[node], sent) for node, sent in wire.sent]
    assert [order.counter for order in orders] == [100, 101, 102, 200]
    assert [order.request for order in orders] == [b"a", b"b", b"b", b"b"]
    assert link.receive(["t"]) == {"t": b"answer"}
