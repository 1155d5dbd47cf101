"""Output for people cannot control the terminal, and keeps its meaning."""

import io
import json
import logging
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text

from fedamole.reporting.markdown import code, literal, table
from fedamole.terminal import PrintableFormatter, Screen, printable, printable_json, say, screen

NASTY = "[link=http://x]y[/link] :boom: \x1b]0;owned\x07\x9b31m \u202egnp\u2066 a\u200bb\u2028c\ud800 [red]"
STEERS = "\x1b\x07\x9b\u202e\u2066\u200b\u2028\ud800"


def test_foreign_text_is_shown_letter_by_letter() -> None:
    shown = printable(NASTY)
    assert not set(shown) & set(STEERS)
    assert r"\x1b]0;owned\x07\x9b31m \u202egnp\u2066 a\u200bb\u2028c\ud800" in shown
    assert printable("plain, tab\tand\nline") == "plain, tab\tand\nline"
    assert printable("\U000e0001") == r"\U000e0001"
    assert printable(3) == "3"


@pytest.mark.parametrize(
    "text",
    [
        "\U0001f469\u200d\U0001f4bb",
        "\U0001f3f3\ufe0f\u200d\U0001f308",
        "\U0001f469\U0001f3fd\u200d\U0001f680",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\u0915\u094d\u200d\u0937",
        "\u00e9\u00e8 \u4f60\u597d",
    ],
)
def test_joiners_stay_where_a_script_or_an_emoji_needs_them(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    "text", ["a\u200db", "\u200d\U0001f469", "\U0001f469\u200d", "bank\u200c_city", "1\ufe0f\u200da"]
)
def test_joiners_go_elsewhere(text: str) -> None:
    assert not set(printable(text)) & {"\u200c", "\u200d"}


def shown_by(what: Any, **options: Any) -> str:
    console = screen(wide=400)
    console.file, console.width = io.StringIO(), 400
    console.print(what, **options)
    return str(console.file.getvalue())


def test_nothing_that_is_printed_steers(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = Table(NASTY, title=NASTY, caption=NASTY)
    cells.add_row(NASTY)
    cells.add_row(Text(NASTY))
    for what in (NASTY, Text(NASTY), Text.assemble(("x", "bold"), NASTY), cells):
        text = shown_by(what)
        assert not set(text) & set(STEERS), repr(text)
        assert text.count("[link=http://x]y[/link] :boom: ") == (5 if what is cells else 1)
    assert shown_by("loss 0.5 [bold]x[/bold]", style="dim") == "loss 0.5 [bold]x[/bold]\n"


def test_style_comes_as_an_argument() -> None:
    console = Screen(file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print("x\x1b[31m", style="bold")
    assert console.file.getvalue() == "\x1b[1mx\\x1b[31m\x1b[0m\n"  # type: ignore[attr-defined]


def test_lines_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b[2Jb")
    assert capsys.readouterr().out == "a\\x1b[2Jb\n"
    for value in ({"\x1b\u202e": ["é \u200b \U000e0001", 0.5, None]}, "plain", [NASTY[:-8]]):
        text = printable_json(value)
        assert json.loads(text) == value
        assert printable(text) == text
    assert "é" in printable_json("é\x9b")


def test_log_records_are_printable() -> None:
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "client %s", (NASTY,), None)
    assert not set(PrintableFormatter("%(message)s").format(record)) & set(STEERS)
    try:
        raise ValueError(NASTY)
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    assert not set(PrintableFormatter("%(message)s").format(record)) & set(STEERS)


# --- Markdown -------------------------------------------------------------------------------------------------


def test_markdown_shows_foreign_text_and_does_nothing() -> None:
    text = literal("</script><img src=x onerror=alert(1)> [a](http://x) **b** `c` |d| _e_ www.x\n# h \x1b[31m\u202e")
    assert text == (
        r"&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt; \[a\](http&#58;//x) \*\*b\*\* \`c\` \|d\| \_e\_ www&#46;x "
        r"\# h \\x1b\[31m\\u202e"
    )
    assert literal("bank_city: 27.5*") == r"bank_city: 27.5\*"
    assert code("a`b``c") == "```a`b``c```"
    assert code("`") == "`` ` ``"
    assert code("x\n\n# y") == "`x # y`"
    assert table(["a"], [[code("x|y")], [literal("x|y")]]) == "| a |\n| --- |\n| `x\\|y` |\n| x\\|y |"
