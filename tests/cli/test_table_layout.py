"""Tables fit the terminal; numbers and names of methods stay complete."""

import io
from collections.abc import Sequence

import pytest
from rich.cells import cell_len

from fedamole.cli.console import show_tables
from fedamole.cli.table_layout import fitted, print_table, shortened
from fedamole.comparison.tables import Table
from fedamole.terminal import Screen

METHODS = ("base", "majority", "local_only", "fedit", "fedit_ft", "fedamole", "fedamole_peers")
CLIENTS = tuple(f"university_hospital_{side}_{number}" for side in ("north", "south") for number in range(4))
SCORES = [(client, *(f"{10 * row + column}.5 ± 2.5" for column in range(7))) for row, client in enumerate(CLIENTS)]


def printed(lines: Sequence[Sequence[str]], width: int, **options: object) -> str:
    output = io.StringIO()
    console = Screen(file=output, width=width, highlight=False)
    print_table(console, lines, title="a title", caption="a caption " * 20, **options)  # type: ignore[arg-type]
    return output.getvalue()


def widest(text: str) -> int:
    return max(map(cell_len, text.splitlines()))


def cells(text: str) -> list[str]:
    return [cell.strip() for line in text.splitlines() for cell in line.replace("┃", "│").split("│")]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120])
def test_every_number_and_method_is_complete_in_every_width(width: int) -> None:
    text = printed([("client", *METHODS), *SCORES], width, names=CLIENTS)
    assert widest(text) <= width
    assert {*METHODS, *(cell for line in SCORES for cell in line[1:])} <= set(cells(text))


def test_a_table_that_fits_stays_as_it_is() -> None:
    lines = (("client", "base", "fedit"), ("bank_city", "1.0", "2.0"))
    # 9 + 4 + 5 characters, 3 for each column and 1.
    assert fitted(lines, 1, {"bank_city": "b…y"}, 28) == ([lines], False)
    assert fitted(lines, 1, {"bank_city": "b…y"}, 27) == ([(lines[0], ("b…y", "1.0", "2.0"))], False)


def test_rows_and_columns_are_exchanged_if_that_fits() -> None:
    lines = (("client", "local_only", "fedamole", "fedit"), ("a", "1.0", "2.0", "3.0"))
    exchanged = (("method", "a"), ("local_only", "1.0"), ("fedamole", "2.0"), ("fedit", "3.0"))
    assert fitted(lines, 1, {}, 30) == ([exchanged], True)


def test_else_the_columns_are_divided_and_the_first_ones_repeated() -> None:
    lines = (("scenario", "method", "pairs", "p"), ("related", "fedit", "24", "0.001"))
    parts = [
        (("scenario", "method", "pairs"), lines[1][:3]),
        (("scenario", "method", "p"), ("related", "fedit", "0.001")),
    ]
    assert fitted(lines, 2, {}, 30) == (parts, False)


def test_shortened_names_stay_different() -> None:
    assert shortened(["hospital_north_a", "bank"]) == {"hospital_north_a": "hospi…rth_a", "bank": "bank"}
    close = shortened(["hospital_north_x_ward", "hospital_south_x_ward"])
    assert len(set(close.values())) == 2
    assert all("…" in name or len(name) == 21 for name in close.values())


def test_the_tables_of_a_comparison_with_learning_rates() -> None:
    head = ("method", "score", "worst client", "loss", "MiB down", "trained parameters", "learning rate")
    rates = ("77.5 ± 2.5*", "54.4 ± 4.3", "0.385 ± 0.030", "1.25", "109k (not matched)", "0.00316, 0.01 (edge)")
    output = io.StringIO()
    table = Table("t", "caption", head, tuple((method, *rates) for method in METHODS))
    show_tables(Screen(file=output, width=80), [table])
    assert widest(output.getvalue()) <= 80
    assert {*METHODS, *rates} <= set(cells(output.getvalue()))
