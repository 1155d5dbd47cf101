"""The command `report`. Nothing heavy is imported before it is used."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedamole.terminal import Screen, say, screen

if TYPE_CHECKING:
    from fedamole.reporting.page.reading import Told

LOOK, RELOAD = 2.0, 5
"""Seconds between two looks at the files of a running run, and between two reloads of its page."""


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of one federation, or a folder with them in it.")],
    out: Annotated[Path, typer.Option(help="The page to write; an older report there is written over.")] = Path(
        "report.html"
    ),
    figures: Annotated[
        Path | None, typer.Option(help="Also write the figures into this folder, as SVG and PNG for a paper.")
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Follow runs that are under way: the page grows with them until they end.")
    ] = False,
) -> None:
    """Write one HTML page on runs: scores, gains, who holds which expert, data, costs.

    The page needs no network and nothing beside it: open it in a browser, send it on, print it.
    Unfinished runs and the folders of a deployment's server and clients are fine.
    """
    from fedamole.reporting.figures import check_folder, draw_all
    from fedamole.reporting.page.content import content
    from fedamole.reporting.page.document import check_place, write_page
    from fedamole.reporting.page.reading import read_folders

    check_place(out)
    if figures is not None:
        check_folder(figures)
    said = screen(error=True)

    def write() -> "list[Told]":
        told = read_folders(runs)
        going_on = live and not all(one.finished for one in told)
        write_page(out, content(told), RELOAD if going_on else 0)
        return told

    told = write()
    say(out.resolve().as_uri() if live else out)
    if live:
        try:
            _follow(told, write, said)
        except KeyboardInterrupt:
            write_page(out, content(read_folders(runs)))  # a page that nobody writes any more need not reload
            said.print("stopped following; the page stays as it is")
    if figures is not None:
        for path in draw_all(figures, content(read_folders(runs))):
            say(path)


def _follow(told: "Sequence[Told]", write: "Callable[[], list[Told]]", said: Screen) -> None:
    """Write the page anew whenever a file of an unfinished run has changed, until there is none."""
    seen = _sizes(told)
    while not all(one.finished for one in told):
        time.sleep(LOOK)
        if (now := _sizes(told)) == seen:
            continue
        seen, told = now, write()
        done = "; ".join(f"{one.label}: {one.done} of {one.rounds} rounds" for one in told)
        said.print(f"{done} -> page written", soft_wrap=True)


def _sizes(told: "Sequence[Told]") -> list[tuple[int, int] | None]:
    """Size and time of change of each file that a page depends on."""
    from fedamole.runs.run_folder import ASSIGNMENT, METRICS, ROUTING, SUMMARY

    files = [one.run.path / name for one in told for name in (METRICS, ASSIGNMENT, SUMMARY, ROUTING)]
    return [(found.stat().st_size, found.stat().st_mtime_ns) if found.exists() else None for found in files]
