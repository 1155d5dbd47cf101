"""Fair turns by themselves: whose request joins, and who makes room."""

from dataclasses import dataclass

import pytest

from fedamole.serving.scheduling import SLICE, BusyError, Limits, Turns


@dataclass(eq=False)
class Asked:
    client: int
    longest: int = 10
    had: int = 0
    gone: bool = False


class Place:
    """Rows under way that do nothing but run."""

    def __init__(self, **limits: int) -> None:
        self.turns, self.rows = Turns[Asked](Limits(**limits)), list[Asked]()

    def add(self, client: int, amount: int = 1, longest: int = 10) -> list[Asked]:
        made = [Asked(client, longest) for _ in range(amount)]
        for one in made:
            self.turns.add(one)
        return made

    def turn(self, tokens: int = 1) -> list[int]:
        """One turn; the clients of the rows under way."""
        joining, aside = self.turns.next(self.rows)
        self.rows = [row for row in self.rows if row not in aside and not row.gone] + joining
        for row in aside:
            row.had = 0
        for row in self.rows:
            row.had += tokens
        return sorted(row.client for row in self.rows)


def test_clients_share_the_places_evenly_however_much_they_ask() -> None:
    place = Place(rows=6)
    place.add(0, 60)
    place.add(1, 3)
    place.add(2, 60)
    assert place.turn() == [0, 0, 1, 1, 2, 2]
    place.rows[0].gone = True
    assert place.turn() == [0, 0, 1, 1, 2, 2]


def test_a_short_request_joins_at_the_next_turn_though_a_hundred_others_run_and_wait() -> None:
    place = Place(rows=4, waiting=100)
    hogs = place.add(0, 100)
    assert place.turn() == [0, 0, 0, 0]
    place.add(1)
    assert place.turn() == [0, 0, 0, 1]
    assert hogs[3] in place.turns.waiting, "the latest makes room"
    place.rows = [row for row in place.rows if row.client == 0]
    assert place.turn() == [0, 0, 0, 0]
    assert hogs[3] in place.rows, "and goes on before those that came after it"


def test_clients_alternate_where_there_is_one_place() -> None:
    """All of one client's requests came first, and none of the other's waits for more than one of them."""
    place, order = Place(rows=1), []
    place.add(0, 5)
    place.add(1, 5)
    for _ in range(10):
        order += place.turn()
        place.rows[0].gone = True
    assert order == [0, 1] * 5


def test_a_request_that_takes_all_room_gives_it_up_after_its_slice() -> None:
    place = Place(rows=8, tokens=100)
    wide = place.add(0, longest=100)
    assert place.turn() == [0]
    place.add(1)
    turns = 1
    while place.turn() == [0]:
        turns += 1
    assert turns == SLICE
    assert place.turn() == [1]
    assert place.turns.waiting == wide
    for _ in range(SLICE):
        place.turn()
    assert place.turn() == [0], "it gets its own slice in turn"


def test_nobody_is_set_aside_where_that_makes_too_little_room_or_nothing_fairer() -> None:
    place = Place(rows=8, tokens=100)
    place.add(0, 3, longest=30)
    assert place.turn() == [0, 0, 0]
    place.add(1, longest=90)
    assert place.turn() == [0, 0, 0], "one of three may go, and two are still too many"
    even = Place(rows=2)
    even.add(0, 5)
    even.add(1, 5)
    assert even.turn()
    rows = list(even.rows)
    for _ in range(3 * SLICE):
        even.turn()
    assert even.rows == rows, "nobody takes turns with himself"


def test_one_client_has_no_more_under_way_than_its_share() -> None:
    place = Place(rows=8, each=3)
    place.add(0, 20)
    assert place.turn() == [0, 0, 0]
    place.add(1, 1)
    assert place.turn() == [0, 0, 0, 1]


def test_waiting_is_limited_for_each_client_and_who_hung_up_does_not_count() -> None:
    place = Place(waiting=2)
    first, _ = place.add(0, 2)
    with pytest.raises(BusyError, match="2 requests"):
        place.add(0)
    place.add(1)
    first.gone = True
    place.add(0)
