"""How a server waits: for enough clients, for those whose failure may pass, and never for ever or without a pause."""

import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.deployment.fake_link import NAMES, SHAPES, Answers, FakeLink, engine, honest_reply, run

from fedamole.engine import link as timing
from fedamole.engine.messages import EVALUATE, FAILURES, JOIN, RETRIABLE, TEST, UPDATE, Request, failure
from fedamole.errors import RunError
from fedamole.federation.method import BaseInfo, Server
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import pack
from fedamole.methods.fedit import FedIT


@pytest.fixture(autouse=True)
def hasty(monkeypatch: Any) -> None:
    monkeypatch.setattr(timing, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(timing, "POLL_SECONDS", 0.005)


def test_a_name_that_is_taken_or_not_on_the_roster(caplog: Any) -> None:
    link = FakeLink(registered={1: "ann", 2: "ann", 3: "mallory", 4: "bob"})
    there = engine(link)
    assert there.wait_for_clients() == ["ann", "bob"]
    assert {name: member.node for name, member in there.membership.members.items()} == {"ann": 1, "bob": 4}
    assert "there is another ann, which is online" in caplog.text
    assert "mallory is refused: its name is not one of deployment.clients" in caplog.text
    count = len(link.asked)
    there.wait_for_clients()
    assert len(link.asked) == count, "those that were refused are left in peace for a while"
    del link.registered[1]
    there.membership._refused_until.clear()
    assert there.wait_for_clients() == ["ann", "bob"]
    assert there.membership.members["ann"].node == 2


def test_an_unregistered_node_says_who_it_is() -> None:
    link = FakeLink(registered={1: "", 2: "ann"})
    assert engine(link).wait_for_clients() == ["ann", "eve"]


def test_example_counts_weigh_and_are_kept(tmp_path: Path) -> None:
    """A client that is asked to join again does not lose its weight in between."""
    link = FakeLink()
    there = engine(link)
    there.wait_for_clients()
    link.answers = lambda name, request: pack(failure(request, name, "not_joined"))
    there._send_and_wait({"ann": Request("run1", 0, EVALUATE, "fedit")}, {"ann": 10**6})
    assert "ann" not in there.membership.members
    assert [client.examples for client in there.clients] == [9, 9, 9]


class Told(ProgressListener):
    def __init__(self) -> None:
        self.heard: list[tuple[tuple[str, ...], int]] = []

    def present(self, names: Collection[str], waiting_for: int) -> None:
        self.heard.append((tuple(names), waiting_for))


def test_too_few_are_waited_for(caplog: Any) -> None:
    link, listener = FakeLink(registered={0: "ann"}), Told()
    there = engine(link, listener)
    with pytest.raises(RunError, match=r"waited .* for 1 more clients; here are: ann\. .* server --resume"):
        there.wait_for_clients()
    assert listener.heard == [(("ann",), 1)]
    assert len(link.asked) == 1, "one request to join, however long the wait"
    link.registered[1] = "bob"
    assert there.wait_for_clients() == ["ann", "bob"]
    assert listener.heard[-1] == (("ann", "bob"), 0)


def test_at_first_all_are_waited_for_a_while_also_after_a_restart() -> None:
    there = engine(FakeLink(registered={0: "ann", 1: "bob"}), gathering=0.15)
    there.restore({}, {"ann": (0, 0), "bob": (0, 0), "eve": (0, 0)}, {})
    began = time.monotonic()
    assert there.wait_for_clients() == ["ann", "bob"]
    assert time.monotonic() - began >= 0.14
    began = time.monotonic()
    there.wait_for_clients()
    assert time.monotonic() - began < 0.1


def message() -> bytes:
    return pack(FedIT(rank=2).init(Server(BaseInfo(SHAPES), (), 0)))


def test_a_resumed_server_sends_best_rounds_and_the_last_answered_exchange() -> None:
    link = FakeLink()
    there = engine(link)
    there.restore({"ann": {"fedit": 3}, "bob": {"fedit": 2}}, {"ann": (4, 0), "bob": (2, 1)}, {"ann": 7})
    there.wait_for_clients()
    there.update(5, dict.fromkeys(NAMES, message()))
    sent = [(r.best, r.last, r.last_exchange) for _, r in link.asked if r.operation == UPDATE]
    assert sent == [({"fedit": 3}, 4, 0), ({"fedit": 2}, 2, 1), ({}, -1, 0)]
    there.save_best("fedit", 5, ["ann", "eve"])
    there.evaluate(5, "fedit", dict.fromkeys(NAMES, message()))
    sent = [(r.best, r.last, r.last_exchange) for _, r in link.asked[-3:]]
    assert sent == [({"fedit": 5}, 5, 0), ({"fedit": 2}, 5, 0), ({"fedit": 5}, 5, 0)]


def test_failures_that_can_pass_are_asked_again_but_not_without_a_pause() -> None:
    """bob's worker comes back after a while; eve's too, but by then there are enough answers."""
    until = time.monotonic() + 0.1

    def answers(name: str, request: Request) -> bytes | str:
        if request.operation == UPDATE and name != "ann" and time.monotonic() < until:
            return pack(failure(request, name, "worker"))
        return pack(honest_reply(name, request))

    link = FakeLink(answers)
    there = engine(link)
    there.wait_for_clients()
    result = there.update(0, dict.fromkeys(NAMES, message()))
    assert sum(answer.payload is not None for answer in result.values()) >= 2
    assert 3 <= link.count(UPDATE) <= 1 + 2 * 7
    assert sum(node == 0 and request.operation == UPDATE for node, request in link.asked) == 1, "ann is not asked again"


@pytest.mark.parametrize("code", ["worker", "lost", "not_joined"])
def test_a_failure_that_never_passes_ends_the_run_after_max_wait(code: str) -> None:
    def answers(name: str, request: Request) -> bytes | str:
        fails = request.operation == UPDATE and name != "ann"
        return pack(failure(request, name, code)) if fails else pack(honest_reply(name, request))

    link = FakeLink(answers)
    there = engine(link, max_wait=0.3)
    there.wait_for_clients()
    with pytest.raises(RunError, match=r"round 0: 1 of 2 answers, .* 0 s \(deployment.max_wait\).* --resume"):
        there.update(0, dict.fromkeys(NAMES, message()))
    assert 4 <= link.count(UPDATE) <= 1 + 2 * (2 + 0.3 / 0.02)


@pytest.mark.parametrize("code", sorted(set(FAILURES) - RETRIABLE))
def test_failures_that_cannot_pass_end_the_run_only_below_min_clients(code: str) -> None:
    def answers(failing: Collection[str]) -> Answers:
        return lambda name, request: (
            pack(failure(request, name, code))
            if request.operation == UPDATE and name in failing
            else pack(honest_reply(name, request))
        )

    link = FakeLink(answers(["eve"]))
    there = engine(link)
    there.wait_for_clients()
    result = there.update(0, dict.fromkeys(NAMES, message()))
    assert result["eve"].report["failed"] == FAILURES[code]
    assert result["eve"].payload is None
    assert link.count(UPDATE) == 3
    link.answers = answers(["bob", "eve"])
    with pytest.raises(RunError, match=r"round 1: 1 clients could train, .*min_clients = 2; .* --resume"):
        there.update(1, dict.fromkeys(NAMES, message()))
    assert link.count(UPDATE) == 6


def test_a_test_that_is_interrupted_is_asked_for_again(tmp_path: Path) -> None:
    failing = ["worker", "lost"]

    def answers(name: str, request: Request) -> bytes | str:
        fails = failing and (name, request.operation) == ("eve", TEST)
        return failing.pop() if fails else pack(honest_reply(name, request))

    link = FakeLink(answers)
    assert set(run(tmp_path / "run", link)["rows"]["fedit"]["clients"]) == set(NAMES)
    assert link.count(TEST) == 5


@pytest.mark.parametrize("operation", [UPDATE, EVALUATE])
def test_a_request_that_was_lost_on_its_way_is_sent_once_more(operation: str) -> None:
    """As when the gateway is killed between the SuperLink, for which it has been delivered, and the client."""
    lost = {"bob": 1, "eve": 9}

    def answers(name: str, request: Request) -> bytes | None:
        if request.operation == operation and lost.get(name, 0) > 0:
            lost[name] -= 1
            return None
        return pack(honest_reply(name, request))

    link = FakeLink(answers)
    there = engine(link, deadline=1.0)
    there.wait_for_clients()
    result = getattr(there, operation)(
        0, *(["fedit"] if operation == EVALUATE else []), dict.fromkeys(NAMES, message())
    )
    answered = (
        result if operation == EVALUATE else [name for name, update in result.items() if update.payload is not None]
    )
    assert sorted(answered) == ["ann", "bob"]
    sent_to = [link.registered[node] for node, request in link.asked if request.operation == operation]
    assert sorted(sent_to) == ["ann", "bob", "bob", "eve", "eve"]


def test_a_join_that_is_never_answered_is_asked_again() -> None:
    link = FakeLink(lambda name, request: None)
    there = engine(link, deadline=0.05)
    with pytest.raises(RunError):
        there.wait_for_clients()
    assert 6 <= len(link.asked) <= 18, "every deadline, not at every look"


class Slow(FakeLink):
    """Clients whose answer arrives some seconds after they were asked."""

    seconds = 0.0

    def send(self, node: int, payload: bytes, round_: int, seconds: float) -> str:
        ticket = super().send(node, payload, round_, seconds)
        self.due = {**getattr(self, "due", {}), ticket: time.monotonic() + self.seconds}
        return ticket

    def receive(self, tickets: Collection[str]) -> dict[str, bytes | str]:
        return dict(super().receive([ticket for ticket in tickets if self.due[ticket] <= time.monotonic()]))


def test_a_join_that_takes_longer_than_the_pause_between_two_requests_counts(monkeypatch: Any) -> None:
    """As after a server's restart, when clients are still at a round's work: each answers every request too late."""
    monkeypatch.setattr(timing, "REFUSED_SECONDS", 0.05)
    link = Slow()
    link.seconds = 0.2
    there = engine(link, deadline=0.5, max_wait=5.0, min_clients=3)
    assert there.wait_for_clients() == ["ann", "bob", "eve"]
    count = len(link.asked)
    assert 6 <= count <= 3 * timing.MAX_OPEN_JOINS
    time.sleep(0.25)
    assert there.wait_for_clients() == ["ann", "bob", "eve"], "the answers to the other requests do no harm"
    assert len(link.asked) == count


def test_a_node_has_few_open_requests_to_join(monkeypatch: Any) -> None:
    monkeypatch.setattr(timing, "REFUSED_SECONDS", 0.01)
    link = FakeLink(lambda name, request: None)
    there = engine(link, deadline=10.0, max_wait=0.2)
    monkeypatch.setattr(timing, "RESEND_AFTER", 0.001)
    with pytest.raises(RunError):
        there.wait_for_clients()
    assert len(link.asked) == 3 * timing.MAX_OPEN_JOINS
    assert len(there.membership._open_joins) == 3 * timing.MAX_OPEN_JOINS


def test_the_number_of_examples_is_the_first_one_reported(caplog: Any) -> None:
    counts = {"ann": 9}

    def answers(name: str, request: Request) -> bytes:
        reply = honest_reply(name, request)
        if name in counts and request.operation == JOIN:
            examples = {**reply.report["examples"], "train": counts[name]}
            reply = replace(reply, report={**reply.report, "examples": examples})
        return pack(reply)

    link = FakeLink(answers)
    there = engine(link)
    there.wait_for_clients()
    counts["ann"] = 10**9
    there.membership.members.pop("ann")
    there.membership._refused_until.clear()
    there.wait_for_clients()
    assert [client.examples for client in there.clients] == [9, 9, 9]
    assert "ann now says that it has 1000000000 training examples; the 9 of its first join count" in caplog.text
    # After a restart the number in the checkpoint counts; a client that never came has none there.
    again = engine(link)
    again.restore({}, {}, {"ann": 9, "bob": 0})
    again.wait_for_clients()
    assert [client.examples for client in again.clients] == [9, 9, 9]
