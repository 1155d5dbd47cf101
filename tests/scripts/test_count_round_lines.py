"""The code that a reader follows through one round does not grow unnoticed."""

import ast
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from count_round_lines import count, entered_in_second_round, statements

LIMITS = {"fedit": (1336, 809), "fedamole": (1628, 1050)}
"""Most statements of the functions that a round enters, with and without model/; lower them when the code shrinks."""


@pytest.mark.parametrize("method", LIMITS)
def test_a_round_enters_no_more_code_than_this(method: str, tiny: Path, tmp_path: Path) -> None:
    entered = entered_in_second_round(method, tmp_path / "run", tiny / "config.toml")
    total, rest = count(entered), count(entered, without="model")
    limit, limit_without_model = LIMITS[method]
    assert 0 < total.code <= limit
    assert 0 < rest.code <= limit_without_model
    assert rest.code < total.code <= total.lines
    assert rest.files < total.files


def test_statements_are_counted_by_hand() -> None:
    text = 'def f(\n    x,\n):\n    """Doc."""\n    # comment\n\n    return g(\n        x,\n    )\n'
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert statements(function) == 2
