from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedamole.data.examples import Task
from fedamole.data.settings import DataSettings, SourceSettings
from fedamole.data.splits import ClientRows, split_client
from fedamole.errors import DataError

SOURCE = (SourceSettings("s", path="x"),)
DEFAULTS = DataSettings(SOURCE)


def sizes(client: ClientRows) -> tuple[int, ...]:
    return len(client.train), len(client.embedding), len(client.validation), len(client.test)


def different(count: int) -> dict[int, int]:
    return {row: row for row in range(count)}


def test_shares_of_a_hundred_rows() -> None:
    """100 rows: 10 test, 10 validation, 4 embedding (5 % of the other 80), 76 train."""
    client = split_client("c", range(100), different(100), None, "classification", DEFAULTS)
    assert sizes(client) == (76, 4, 10, 10)
    assert client.test_table == "train"
    assert sorted(client.train + client.embedding + client.validation + client.test) == list(range(100))


def test_an_official_test_is_the_test_and_none_is_cut() -> None:
    """No test rows are taken: 10 validation, 4 embedding (5 % of 90 is 4.5, rounded to even)."""
    client = split_client("c", range(100), different(100), [7, 8], "classification", DEFAULTS)
    assert sizes(client) == (86, 4, 10, 2)
    assert (client.test, client.test_table) == ((7, 8), "test")


def test_what_the_embedding_cap_cuts_off_is_trained_on() -> None:
    """1,000 rows: 100 test, 100 validation, 15 embedding (5 % of 800 is 40, capped), 785 train."""
    capped = DataSettings(SOURCE, embedding_cap=15)
    assert sizes(split_client("c", range(1000), different(1000), None, "classification", capped))[:2] == (785, 15)


@pytest.mark.parametrize(("task", "cap"), [("classification", 200), ("generation", 50)])
def test_test_is_capped_by_task_and_the_surplus_stays_unread(task: Task, cap: int) -> None:
    """3,000 rows: 300 + 300, of which 200 validation and `cap` test rows are used; 5 % of 2,400 is 120."""
    client = split_client("c", range(3000), different(3000), None, task, DEFAULTS)
    assert sizes(client) == (2280, 120, 200, cap)
    official = split_client("c", range(3000), different(3000), range(900), task, DEFAULTS)
    assert len(official.test) == cap
    assert official.test != tuple(range(cap))  # drawn, not the first ones


@pytest.mark.parametrize(("task", "cap"), [("classification", 30), ("generation", 17)])
def test_validation_has_its_own_cap_by_task_which_decides_no_other_split(task: Task, cap: int) -> None:
    capped = DataSettings(SOURCE, validation_cap_classification=30, validation_cap_generation=17)
    few, many = (split_client("c", range(3000), different(3000), None, task, each) for each in (capped, DEFAULTS))
    assert (len(few.validation), len(many.validation)) == (cap, 200)
    assert (few.train, few.embedding, few.test) == (many.train, many.embedding, many.test)
    assert few.validation != many.validation[:cap]  # drawn, not the first ones


def test_seed_and_name_decide_and_nothing_else() -> None:
    def split(client: str, seed: int) -> ClientRows:
        chosen = DataSettings(SOURCE, partition_seed=seed)
        return split_client(client, range(100), different(100), None, "generation", chosen)

    assert split("c", 0) == split("c", 0)
    assert split("c", 0).test != split("c", 1).test
    assert split("c", 0).test != split("d", 0).test


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=80), st.integers(0, 5))
def test_identical_rows_never_straddle_splits(kinds: list[int], seed: int) -> None:
    chosen = DataSettings(SOURCE, partition_seed=seed)
    client = split_client("c", range(len(kinds)), dict(enumerate(kinds)), None, "classification", chosen)
    splits = [client.train, client.embedding, client.validation, client.test]
    where = [{kinds[row] for row in split} for split in splits]
    for first in range(4):
        for second in range(first):
            assert not where[first] & where[second]
    assert all(amount == 1 for amount in Counter(row for split in splits for row in split).values())


def test_a_group_beyond_the_target_is_passed_over() -> None:
    """20 rows, 12 of them equal: the 2 test rows are among the 8 others."""
    identity = {row: min(row, 8) for row in range(20)}
    client = split_client("c", range(20), identity, None, "classification", DEFAULTS)
    assert len(client.test) == 2
    assert set(range(8, 20)) <= set(client.train)


def test_a_client_with_an_empty_split_or_too_little_is_refused_with_its_sizes() -> None:
    small = split_client("c", range(3), different(3), None, "classification", DEFAULTS)
    assert small.training_size == 0
    with pytest.raises(DataError, match=r"client 'c' has an empty split: train 0, embedding 1, validation 1, test 1"):
        small.check(1)
    with pytest.raises(DataError, match=r"fewer training examples than data.min_examples = 10: train 7"):
        split_client("c", range(10), different(10), None, "classification", DEFAULTS).check(10)


def test_identical_rows_are_named_as_the_cause() -> None:
    """55 of 60 rows are equal: they are one group, so there are only six different rows."""
    identity = {row: min(row, 5) for row in range(60)}
    client = split_client("c", range(60), identity, None, "classification", DEFAULTS)
    assert (client.count, client.distinct) == (60, 6)
    with pytest.raises(DataError, match=r"only 6 of its 60 rows are different.* remove the duplicates") as caught:
        client.check(1)
    assert "give it more rows" not in str(caught.value)
    few = split_client("c", range(12), {row: row // 2 for row in range(12)}, None, "classification", DEFAULTS)
    assert few.training_size > 0
    with pytest.raises(DataError, match=r"data.min_examples = 10: train 6, .*; only 6 of its 12 rows are different"):
        few.check(10)
