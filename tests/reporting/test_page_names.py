"""Short names of clients in figures, and the colour scale of the assignment."""

import math

import pytest

from fedamole.reporting.page.names import common_beginning, note_on_short_names, short_names
from fedamole.reporting.page.scale import scale_of, tone


def test_names_that_fit_stay_as_they_are() -> None:
    short = short_names(["bank_city", "bank_village"])
    assert short == {"bank_city": "bank_city", "bank_village": "bank_village"}
    assert note_on_short_names(short) == ""


def test_the_common_beginning_is_left_out() -> None:
    names = ["regional-hospital-network-north", "regional-hospital-network-south"]
    short = short_names(names)
    assert list(short.values()) == ["…north", "…south"]
    assert note_on_short_names(short) == (
        "Figures leave out the common beginning 'regional-hospital-network-' and the middle of long client names; "
        "tables have the full names."
    )


def test_a_long_name_is_cut_in_its_middle() -> None:
    """10 characters: 5 of the beginning, the ellipsis, 4 of the end."""
    assert short_names(["abcdefghijklmnop", "x"], longest=10) == {"abcdefghijklmnop": "abcde…mnop", "x": "x"}
    assert short_names(["abcdefghijklmnop"], longest=9) == {"abcdefghijklmnop": "abcd…mnop"}


def test_short_names_stay_different() -> None:
    names = ["abc1xyz-long-long", "abc2xyz-long-long", "abc"]
    short = short_names(names, longest=5)
    assert len(set(short.values())) == 3
    assert short["abc"] == "abc"


@pytest.mark.parametrize(
    ("names", "beginning"),
    [
        (["a-b-c", "a-b-d"], "a-b-"),
        (["abc", "abd"], ""),
        (["a-b", "a-b-c"], "a-"),
        (["one"], ""),
    ],
)
def test_the_common_beginning_ends_with_a_separator(names: list[str], beginning: str) -> None:
    assert common_beginning(names) == beginning


def test_no_preference_is_neutral_and_four_times_is_full() -> None:
    scale = scale_of({"method": {"name": "fedamole"}}, clients=8)
    assert (scale["low"], scale["even"], scale["high"]) == (1 / 32, 1 / 8, 1 / 2)
    assert tone(1 / 8, scale) == 0
    assert tone(1 / 4, scale) == pytest.approx(0.5)
    assert tone(1 / 16, scale) == pytest.approx(-0.5)
    assert [tone(value, scale) for value in (0.5, 0.9, 0.0)] == [1, 1, -1]
    assert tone(0.139, scale) == pytest.approx(math.log(1.112) / math.log(4)), "a negligible preference stays pale"


def test_two_clients_reach_the_full_colour_at_certainty() -> None:
    scale = scale_of({"method": {"name": "fedamole_ft"}}, clients=2)
    assert (scale["even"], scale["high"]) == (0.5, 1.0)
    assert scale_of({"method": {"name": "fedamole"}}, clients=1)["even"] == 0.5


def test_other_methods_have_other_values_without_preference() -> None:
    shares = scale_of({"method": {"name": "fedmoe", "experts": 16}}, clients=4)
    assert (shares["name"], shares["even"], shares["random"]) == ("share of the client's tokens", 1 / 16, False)
    cosine = scale_of({"method": {"name": "fedamole_peers"}}, clients=4)
    assert [tone(value, cosine) for value in (0.0, 0.25, 1.0)] == [0.0, 0.25, 1.0]
