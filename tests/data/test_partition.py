import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedamole.data import partition as module
from fedamole.data.partition import Part, allot_test, largest_remainder, partition
from fedamole.data.settings import PartitionSettings
from fedamole.errors import DataError
from fedamole.received.names import LONGEST_NAME, checked_name, checked_names, joined_name

LABELS = ["a"] * 60 + ["b"] * 40 + ["c"] * 20


def raw_sizes(parts: list[Part]) -> list[int]:
    return [len(part.rows) for part in parts]


def draw(settings: PartitionSettings, values: list[str] | None = LABELS, seed: int = 0, least: int = 1) -> list[Part]:
    count = len(LABELS if values is None else values)
    return partition("s", settings, count, values, seed, least, raw_sizes)


def test_whole_is_one_client_named_like_its_source() -> None:
    assert draw(PartitionSettings(), None) == [Part("s", tuple(range(120)))]


def test_iid_parts_are_even_random_and_cover_all() -> None:
    parts = draw(PartitionSettings("iid", clients=7), None)
    assert [part.client for part in parts] == [f"s-{index:02d}" for index in range(7)]
    assert sorted(raw_sizes(parts)) == [17] * 6 + [18]
    assert sorted(row for part in parts for row in part.rows) == list(range(120))
    assert parts[0].rows != tuple(range(len(parts[0].rows)))


def test_dirichlet_covers_all_and_alpha_sets_the_skew() -> None:
    def skew(alpha: float) -> float:
        parts = draw(PartitionSettings("dirichlet", by="l", alpha=alpha, clients=4))
        assert sorted(row for part in parts for row in part.rows) == list(range(120))
        shares = [sum(LABELS[row] == "a" for row in part.rows) / 60 for part in parts]
        return max(shares) - min(shares)

    assert skew(0.1) > 0.5
    assert skew(1000.0) < 0.15


def test_classes_gives_each_client_its_number_of_classes() -> None:
    parts = draw(PartitionSettings("classes", by="l", clients=4, classes_per_client=2))
    assert [len({LABELS[row] for row in part.rows}) for part in parts] == [2] * 4


def test_value_gives_a_client_per_value() -> None:
    parts = draw(PartitionSettings("value", by="l"))
    assert [(part.client, len(part.rows)) for part in parts] == [("s-a", 60), ("s-b", 40), ("s-c", 20)]


@pytest.mark.parametrize(
    "settings",
    [
        PartitionSettings("iid", clients=4),
        PartitionSettings("dirichlet", by="l", alpha=0.5, clients=4),
        PartitionSettings("classes", by="l", clients=4, classes_per_client=2),
    ],
    ids=lambda settings: settings.kind,
)
def test_the_seed_decides(settings: PartitionSettings) -> None:
    values = None if settings.kind == "iid" else LABELS
    assert draw(settings, values, 3) == draw(settings, values, 3)
    assert draw(settings, values, 3) != draw(settings, values, 4)


def test_partitioning_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    draw(PartitionSettings("value", by="l"))
    assert capfd.readouterr() == ("", "")


def test_dirichlet_is_redrawn_until_all_clients_have_enough() -> None:
    settings = PartitionSettings("dirichlet", by="l", alpha=0.3, clients=4)
    assert min(raw_sizes(draw(settings, least=1))) < 18
    assert min(raw_sizes(draw(settings, least=18))) >= 18


def test_dirichlet_gives_up_after_a_hundred_draws_with_the_best_sizes() -> None:
    drawn: list[list[int]] = []

    def sizes(parts: list[Part]) -> list[int]:
        drawn.append(raw_sizes(parts))
        return drawn[-1]

    settings = PartitionSettings("dirichlet", by="l", alpha=0.1, clients=4)
    with pytest.raises(DataError, match=r"none of 100 Dirichlet\(0.1\) draws gave each of 4 clients 40") as caught:
        partition("s", settings, 120, LABELS, 0, 40, sizes)
    assert len(drawn) == 100
    assert f"the best draw gave {max(drawn, key=min)}" in str(caught.value)


def test_more_than_the_rows_can_serve_is_an_error() -> None:
    with pytest.raises(DataError, match="121 clients cannot share 120 rows"):
        draw(PartitionSettings("iid", clients=121), None)
    with pytest.raises(DataError, match=r"source 's': partition 'classes' by 'l'.*`=4 is greater"):
        draw(PartitionSettings("classes", by="l", clients=2, classes_per_client=4))


def by_value(*values: str) -> list[Part]:
    return draw(PartitionSettings("value", by="l"), list(values))


def test_names_of_plain_values_are_source_and_value() -> None:
    values = ["north", "site-07", "closed_qa", "v1.0", "550e8400-e29b-41d4-a716-446655440000"]
    parts = by_value(*values)
    assert {part.client: part.value for part in parts} == {f"s-{value}": None for value in values}


def test_other_values_are_named_by_their_letters_and_hash_and_kept_beside() -> None:
    parts = by_value("NIH / Café 2", "北京市朝阳区医院", "x--1", "北京市海淀区医院")
    assert {part.client: part.value for part in parts} == {
        "s-nih-cafe-2--ba1de3bc91c1": "NIH / Café 2",
        "s--4ab55f75229f": "北京市朝阳区医院",
        "s-x-1--b3c75e8bdf44": "x--1",
        "s--6978bcde3af4": "北京市海淀区医院",
    }


def test_the_document_shows_the_names_that_values_get() -> None:
    text = (Path(__file__).parents[2] / "docs" / "start.md").read_text()
    for value in ("site_2", "North 2", "北京"):
        assert f"`{joined_name('letters', value)}`" in text
    assert joined_name("site", "North 2") in str(joined_name.__doc__)


def test_the_name_of_a_value_does_not_depend_on_the_others() -> None:
    alone = by_value("Ägypten")[0].client
    assert alone in {part.client for part in by_value("ägypten", "Ägypten", "agypten", "AGYPTEN")}


ODD = [
    "",
    " ",
    ".",
    "..",
    "/",
    "a/b",
    "a",
    "A",
    "a ",
    "a.",
    "a\0",
    "-a",
    "con",
    "CON",
    "None",
    "null",
    "0",
    "00",
    "é",
    unicodedata.normalize("NFD", "é"),
    "École",
    "école",
    "ﬁ",
    "fi",
    "ς",
    "σ",
    "Σ",
    "ß",
    "ss",
    "مستشفى",
    "Больница",
    "🏥",
    "👩‍⚕️",
    "👩⚕",
    "x" * 5000,
    "x" * 5001,
    "病" * 500,
    "病" * 501,
    "a--1",
    "a_-1",
    "../../etc",
    "C:\\x",
    "\x1b[31m",
]


def test_odd_values_give_a_client_each_with_its_own_rows() -> None:
    values = [value for value in ODD for _ in range(2)]
    parts = by_value(*values)
    clients = [part.client for part in parts]
    assert checked_names(clients, "x") == tuple(clients), "usable as folders, whatever the case"
    assert len(parts) == len(ODD)
    assert sorted(part.rows for part in parts) == [(2 * index, 2 * index + 1) for index in range(len(ODD))]
    assert all(part.value in (None, values[part.rows[0]]) for part in parts)


def test_a_source_of_the_longest_name_has_usable_client_names() -> None:
    source = "s" * 80
    parts = partition(source, PartitionSettings("value", by="l"), len(ODD), ODD, 0, 1, raw_sizes)
    checked_names([part.client for part in parts], "x")
    assert max(len(part.client) for part in parts) <= LONGEST_NAME
    assert len({part.client for part in parts}) == len(ODD)


# Characters that make texts similar: in case, in Unicode normal form, and in the characters allowed in names.
ALIKE = st.text(st.sampled_from("aA1-_./ éÉe\u0301ſsK\u212a北\0"), max_size=6)


@given(ALIKE | st.text(max_size=200), ALIKE | st.text(max_size=200))
def test_different_values_have_different_safe_names(value: str, other: str) -> None:
    first, second = joined_name("s", value), joined_name("s", other)
    for name in (first, second):
        assert checked_name(name, "x") == name
        assert name.isascii()
        assert not name.endswith(".")
    assert (first.lower() == second.lower()) == (value == other)


def test_two_values_whose_hashes_begin_alike_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "joined_name", lambda source, value: "s--0")
    with pytest.raises(DataError, match="of column 'l' would both be client 's--0'"):
        by_value("北", "京")


def test_values_that_differ_in_a_nul_are_two_classes() -> None:
    """As NumPy strings they would be equal, and the partition would fail or merge them."""
    values = ["a", "a\0"] * 40
    parts = draw(PartitionSettings("classes", by="l", clients=2, classes_per_client=1), values)
    assert [{values[row] for row in part.rows} for part in parts] == [{"a"}, {"a\0"}]


def test_an_error_of_the_partitioner_names_the_value() -> None:
    with pytest.raises(DataError, match="Label: 'b' is needed to be assigned to more"):
        draw(PartitionSettings("classes", by="l", clients=8, classes_per_client=2), ["a"] * 100 + ["b"] * 2)


def test_largest_remainder() -> None:
    """10 in the ratio 1:1:1 is 3.33 each and the first gets the remainder; 7 in 5:1:0 is 5.83, 1.17 and 0."""
    assert largest_remainder(10, [1, 1, 1]) == [4, 3, 3]
    assert largest_remainder(7, [5, 1, 0]) == [6, 1, 0]


def test_test_rows_follow_the_training_rows_value_by_value() -> None:
    """Client 0 has 3 training rows of a, client 1 1 of a and 2 of b: of 8 test a they get 6 and 2, of 3 b 0 and 3."""
    values = ["a", "a", "a", "a", "b", "b"]
    parts = [Part("0", (0, 1, 2)), Part("1", (3, 4, 5))]
    test = ["a"] * 8 + ["b"] * 3 + ["c"]
    first, second = allot_test(parts, values, 12, test, np.random.default_rng(0))
    assert [test[row] for row in first] == ["a"] * 6
    assert [test[row] for row in second] == ["a"] * 2 + ["b"] * 3
    assert not set(first) & set(second)


def test_without_values_the_test_rows_are_shared_out_evenly() -> None:
    parts = [Part("0", (0,)), Part("1", (1, 2)), Part("2", (3,))]
    shares = allot_test(parts, None, 8, None, np.random.default_rng(0))
    assert sorted(map(len, shares)) == [2, 3, 3]
    assert sorted(row for share in shares for row in share) == list(range(8))
