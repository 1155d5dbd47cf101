import io
import os
import pty
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from fedamole.cli.server_progress import RunTable, show_progress
from fedamole.terminal import Screen

EVIL = "\x1b[2J[red]a[/red][link=http://evil.example]b\nround 9/9 done\u202e"


def drawn(board: RunTable) -> str:
    console = Console(file=io.StringIO(), width=200, color_system="truecolor", force_terminal=True)
    console.print(board)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_foreign_text_in_the_table_is_text(tmp_path: Path) -> None:
    board = RunTable(EVIL)
    board.update({"what": "joined", "client": EVIL})
    board.update({"what": "round", "round": 0, "rounds": 2, "cohort": [EVIL]})
    board.update({"what": "answered", "round": 0, "client": EVIL, "failed": EVIL, "seconds": 1.0})
    board.update({"what": "stage", "text": EVIL})
    text = drawn(board)
    assert "\x1b[2J" not in text
    assert "\u202e" not in text
    assert "\x1b]8" not in text  # no link
    assert "\x1b[31m" not in text  # nothing red
    harmless = "\\x1b[2J[red]a[/red][link=http://evil.example]b\\nround 9/9 done\\u202e"
    assert text.count(harmless) == 4  # title, name, state, caption
    assert text.count(f"failed: {harmless}") == 1


def test_markup_that_is_broken_does_not_break_the_table() -> None:
    board = RunTable("[/]")
    board.update({"what": "joined", "client": "[/b]"})
    assert "[/b]" in drawn(board)


def lines(*fed: dict[str, object], terminal: bool = False) -> str:
    file = io.StringIO()
    console = Screen(file=file, width=80, force_terminal=terminal)
    with show_progress(console, Path("runs/x")) as (say, show):
        for line in fed:
            show(line)
        say(f"bye {EVIL}")
    return file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_an_early_stop_is_shown(terminal: bool) -> None:
    stopped: dict[str, object] = {"what": "stopped", "text": "stopped after 2 of 9 rounds"}
    assert "stopped after 2 of 9 rounds" in lines(stopped, terminal=terminal)


def test_lines_of_progress_are_lines() -> None:
    joined: dict[str, object] = {"what": "joined", "client": EVIL}
    warned: dict[str, object] = {"what": "warning", "text": EVIL}
    failed = {"what": "answered", "round": 0, "client": "a", "failed": EVIL}
    text = lines(joined, warned, failed)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert len(text.splitlines()) == 3 + 2  # what the program itself says may have several lines
    assert text.splitlines()[0].endswith("\\nround 9/9 done\\u202e has joined")
    assert "\x1b[2J" not in lines(warned, terminal=True)


def test_on_a_real_terminal() -> None:
    """The same on a pseudo-terminal, where the table is redrawn repeatedly."""
    main, other = pty.openpty()
    with os.fdopen(other, "w") as file:
        console = Screen(file=file, force_terminal=True, width=120, color_system="truecolor")
        with show_progress(console, Path("runs/x")) as (_, show):
            show({"what": "joined", "client": EVIL})
    seen = b""
    with suppress(OSError):  # the end: nobody writes any more
        while part := os.read(main, 65536):
            seen += part
    assert b"\x1b[2J" not in seen
    assert b"\\x1b[2J" in seen
    os.close(main)
