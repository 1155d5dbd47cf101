"""`fedamole report`. Heavy packages are imported inside the command."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedamole.cli.completion import complete_runs
from fedamole.terminal import Screen, say, screen

if TYPE_CHECKING:
    from fedamole.reporting.page.reading import RunData

POLL_SECONDS, RELOAD_SECONDS = 2.0, 5
"""Seconds between two checks of the files of an unfinished run, and between two reloads of its page."""


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders of one federation, or a folder with them in it.", autocompletion=complete_runs
        ),
    ],
    out: Annotated[Path, typer.Option(help="The HTML file to write; an older report is replaced.")] = Path(
        "report.html"
    ),
    figures: Annotated[
        Path | None, typer.Option(help="Also write the figures to this folder, as SVG and PNG for a paper.")
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Follow unfinished runs: update the page until they are finished.")
    ] = False,
) -> None:
    """Write an HTML report on runs: learning curves, test scores, gains, assignment of experts, data, costs.

    The page is one file that needs no network. Unfinished runs and the folders of a deployment's server and clients can
    be reported too.

    Examples:

      fedamole report runs/demo                         report.html on all runs in a folder
      fedamole report runs/mine --live                  follow a run
      fedamole report runs/demo --figures figures       figures for a paper
    """
    from fedamole.reporting.figures import check_folder, draw_all
    from fedamole.reporting.page.content import content
    from fedamole.reporting.page.document import check_output, write_page
    from fedamole.reporting.page.reading import read_folders

    check_output(out)
    if figures is not None:
        check_folder(figures)
    console = screen(error=True)

    def write() -> "list[RunData]":
        current = read_folders(runs)
        unfinished = live and not all(data.finished for data in current)
        write_page(out, content(current), RELOAD_SECONDS if unfinished else 0)
        return current

    data = write()
    say(out.resolve().as_uri() if live else out)
    if live:
        try:
            _follow(data, write, console)
        except KeyboardInterrupt:
            write_page(out, content(read_folders(runs)))  # without reloading
            console.print("stopped following; the page is no longer updated")
    if figures is not None:
        for path in draw_all(figures, content(read_folders(runs))):
            say(path)


def _follow(runs: "Sequence[RunData]", write: "Callable[[], list[RunData]]", console: Screen) -> None:
    """Write the page again whenever a file of the runs has changed, until all runs are finished."""
    before = None  # the files may have changed since `runs` were read, so the first page is written once more
    while not all(data.finished for data in runs):
        time.sleep(POLL_SECONDS)
        if (now := _file_states(runs)) == before:
            continue
        before, runs = now, write()
        progress = "; ".join(f"{data.label}: {data.done} of {data.rounds} rounds" for data in runs)
        console.print(f"{progress} -> page written", soft_wrap=True)


def _file_states(runs: "Sequence[RunData]") -> list[tuple[int, int] | None]:
    """Return size and modification time of each file that the page depends on."""
    from fedamole.runs.run_folder import ASSIGNMENT, AUDIT, METRICS, ROUTING, SUMMARY

    paths = [data.run.path / name for data in runs for name in (METRICS, ASSIGNMENT, SUMMARY, ROUTING, AUDIT)]
    return [(path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else None for path in paths]
