"""Which examples a look reads, and how they are counted."""

from fedamole.federation.looks import Looks, count_tokens, drawn
from fedamole.model.batch import TokenPair

ROWS: list[TokenPair] = [((place,), (place // 10, 0)) for place in range(100)]
"""Ten labels of ten rows each, sorted by label, as some data sets are."""


def labels(rows: list[TokenPair]) -> set[int]:
    return {row[1][0] for row in rows}


def test_a_few_examples_of_sorted_data_have_many_labels() -> None:
    """The first 16 have two labels; 16 of a draw without replacement have 8.3 of 10 on average."""
    counts = [len(labels(drawn(ROWS, 16, seed, "losses", "north"))) for seed in range(200)]
    assert 7.9 < sum(counts) / len(counts) < 8.7
    assert labels(ROWS[:16]) == {0, 1}


def test_the_draw_depends_on_seed_client_and_purpose_alone() -> None:
    found = drawn(ROWS, 5, 0, "losses", "north")
    assert found == drawn(ROWS, 5, 0, "losses", "north")
    others = [drawn(ROWS, 5, 1, "losses", "north"), drawn(ROWS, 5, 0, "hidden", "north")]
    for other in (*others, drawn(ROWS, 5, 0, "losses", "south")):
        assert other != found
        assert len(set(other)) == len(other) == 5
    assert found == sorted(found), "rows keep their order"
    assert set(found) < set(drawn(ROWS, 16, 0, "losses", "north")), "more examples are these and others"


def test_fewer_rows_than_asked_for_are_all_read() -> None:
    assert drawn(ROWS[:4], 5, 0, "losses", "north") == drawn(ROWS[:4], 4, 0, "losses", "north") == ROWS[:4]


def test_rows_and_tokens_are_counted() -> None:
    """3 + 5 tokens; once, then under two adapters."""
    rows: list[TokenPair] = [((1, 2), (0,)), ((1, 2, 3), (4, 0))]
    looks = Looks()
    looks.add(rows)
    assert (looks.examples, looks.tokens) == (2, 8)
    looks.add(rows[:1], 2)
    assert (looks.examples, looks.tokens) == (4, 14)
    assert count_tokens([]) == 0
