"""Fair scheduling: which request joins, and which is preempted."""

from dataclasses import dataclass

import pytest

from fedamole.serving.scheduling import SLICE, BusyError, FairQueue, Limits


@dataclass(eq=False)
class Request:
    client: int
    max_length: int = 10
    tokens_since_join: int = 0
    closed: bool = False


class Simulation:
    """A batch that generates tokens without a model."""

    def __init__(self, **limits: int) -> None:
        self.queue, self.rows = FairQueue[Request](Limits(**limits)), list[Request]()

    def add(self, client: int, count: int = 1, max_length: int = 10) -> list[Request]:
        requests = [Request(client, max_length) for _ in range(count)]
        for request in requests:
            self.queue.add(request)
        return requests

    def step(self, tokens: int = 1) -> list[int]:
        """Run one step; return the clients of the rows in the batch."""
        joining, preempted = self.queue.schedule(self.rows)
        self.rows = [row for row in self.rows if row not in preempted and not row.closed] + joining
        for row in preempted:
            row.tokens_since_join = 0
        for row in self.rows:
            row.tokens_since_join += tokens
        return sorted(row.client for row in self.rows)


def test_clients_get_equal_numbers_of_rows_however_many_requests_they_send() -> None:
    batch = Simulation(max_rows=6)
    batch.add(0, 60)
    batch.add(1, 3)
    batch.add(2, 60)
    assert batch.step() == [0, 0, 1, 1, 2, 2]
    batch.rows[0].closed = True
    assert batch.step() == [0, 0, 1, 1, 2, 2]


def test_a_short_request_joins_at_the_next_step_though_a_hundred_others_run_and_wait() -> None:
    batch = Simulation(max_rows=4, max_waiting=100)
    others = batch.add(0, 100)
    assert batch.step() == [0, 0, 0, 0]
    batch.add(1)
    assert batch.step() == [0, 0, 0, 1]
    assert others[3] in batch.queue.waiting, "the latest is preempted"
    batch.rows = [row for row in batch.rows if row.client == 0]
    assert batch.step() == [0, 0, 0, 0]
    assert others[3] in batch.rows, "and continues before those that came after it"


def test_clients_alternate_if_only_one_request_fits() -> None:
    """All of one client's requests came first, and none of the other's waits for more than one of them."""
    batch, order = Simulation(max_rows=1), []
    batch.add(0, 5)
    batch.add(1, 5)
    for _ in range(10):
        order += batch.step()
        batch.rows[0].closed = True
    assert order == [0, 1] * 5


def test_a_request_that_fills_the_cache_is_preempted_after_its_slice() -> None:
    batch = Simulation(max_rows=8, max_tokens=100)
    wide = batch.add(0, max_length=100)
    assert batch.step() == [0]
    batch.add(1)
    steps = 1
    while batch.step() == [0]:
        steps += 1
    assert steps == SLICE
    assert batch.step() == [1]
    assert batch.queue.waiting == wide
    for _ in range(SLICE):
        batch.step()
    assert batch.step() == [0], "it gets the next slice"


def test_no_request_is_preempted_if_that_frees_too_little_or_is_not_fairer() -> None:
    batch = Simulation(max_rows=8, max_tokens=100)
    batch.add(0, 3, max_length=30)
    assert batch.step() == [0, 0, 0]
    batch.add(1, max_length=90)
    assert batch.step() == [0, 0, 0], "one of three may be preempted, and two are still too many"
    even = Simulation(max_rows=2)
    even.add(0, 5)
    even.add(1, 5)
    assert even.step()
    rows = list(even.rows)
    for _ in range(3 * SLICE):
        even.step()
    assert even.rows == rows, "a client's requests do not preempt each other"


def test_the_rows_of_one_client_are_limited() -> None:
    batch = Simulation(max_rows=8, max_rows_per_client=3)
    batch.add(0, 20)
    assert batch.step() == [0, 0, 0]
    batch.add(1, 1)
    assert batch.step() == [0, 0, 0, 1]


def test_waiting_requests_of_a_client_are_limited_without_cancelled_ones() -> None:
    batch = Simulation(max_waiting=2)
    first, _ = batch.add(0, 2)
    with pytest.raises(BusyError, match="2 requests"):
        batch.add(0)
    batch.add(1)
    first.closed = True
    batch.add(0)
