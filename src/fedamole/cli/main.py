"""The command line. Nothing heavy is imported before a command needs it, so `--help` answers at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedamole.cli import personal
from fedamole.cli import report as reporting
from fedamole.cli import serve as serving
from fedamole.cli.certs import certs
from fedamole.cli.client import audit_log, client
from fedamole.cli.clients import app as clients
from fedamole.cli.deploy import server, simulate
from fedamole.cli.doctor import doctor
from fedamole.cli.explain import explain
from fedamole.cli.export import export
from fedamole.cli.health import health
from fedamole.cli.options import (
    INTERRUPTED,
    AsJson,
    Commands,
    ConfigPath,
    Overrides,
    read_config,
    run_command_line,
)
from fedamole.cli.plan import partition, plan
from fedamole.terminal import Screen, say, say_json, screen, set_up

if TYPE_CHECKING:
    from fedamole.comparison.file import Comparison
    from fedamole.federation.progress import ProgressListener

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Personalised federated fine-tuning of large language models.\n\n"
    "Every client gets a model of its own, a mixture of LoRA experts; its data decide which experts sit where.\n\n"
    "[b]Start:[/b]  fedamole demo    (a minute or two, no network, no GPU)\n\n"
    "[b]Exit codes:[/b]  0 done · 1 other error · 2 config or arguments · 3 data · 4 base model or adapter · "
    "5 run folder · 130 interrupted (resume continues)",
)


@contextmanager
def _showing_progress(title: str, as_json: bool) -> "Iterator[ProgressListener]":
    """Show progress on the terminal or in plain lines; always on the error stream, results go to the other."""
    from fedamole.cli.console import ProgressBars
    from fedamole.federation.progress import PlainProgress

    console = screen(error=True)
    if not console.is_terminal or as_json:
        yield PlainProgress(console)
        return
    listener = ProgressBars(console, title)
    with listener.progress:
        yield listener


@contextmanager
def _resumable(folder: Path | None = None) -> "Iterator[None]":
    """Say after Ctrl-C how the run in a folder goes on, or what the same command goes on with."""
    try:
        yield
    except KeyboardInterrupt:
        from fedamole.runs.run_folder import RUN

        if folder is None:
            how = "the same command goes on from the last finished round"
        elif (folder / RUN).exists():
            how = f"`fedamole resume {folder}` goes on from the last finished round"
        else:
            how = "no round had begun, and nothing was kept: start it again"
        screen(error=True).print(f"interrupted; {how}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None


def _show(paths: list[Path], as_json: bool, with_clients: bool = True) -> None:
    from fedamole.cli.console import show_runs
    from fedamole.reporting.runs import read_runs
    from fedamole.reporting.table import compare

    if as_json:
        say_json([comparison.as_json() for comparison in compare(read_runs(paths))])
    else:
        show_runs(paths, with_clients)


@app.command()
def run(config: ConfigPath = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Run one method on one federation: train, evaluate, save.

    Writes a run folder (runs/NAME unless run.folder is set) and prints its table.
    A run that was interrupted goes on with `fedamole resume FOLDER`.
    """
    from fedamole.experiment import new_run_folder, start
    from fedamole.reporting.runs import refuse_untrained

    settings = read_config(config, overrides)
    with new_run_folder(settings) as folder, _resumable(folder):
        screen(error=True).print(f"{settings.method_name} -> {folder}")
        with _showing_progress(settings.run.name, as_json) as listener:
            summary = start(settings, folder, listener)
    _show([folder], as_json)
    peak = f"peak memory {summary['peak_memory_mib']:,.0f} MiB with {summary['group']} clients in lock-step"
    screen(error=True).print(peak)
    refuse_untrained(folder)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="The folder of a run that was interrupted.")],
    base: personal.BaseName = None,
    as_json: AsJson = False,
) -> None:
    """Continue an interrupted run from its last finished round, to the very same result.

    What the run's config makes it read outside of the run's folder (data, a base) is said first. If the base has moved,
    --base names its new place, which the run's folder records for all later commands.
    """
    from fedamole.config import load_run_config
    from fedamole.experiment import reads_outside
    from fedamole.experiment import resume as resume_run
    from fedamole.reporting.runs import refuse_untrained
    from fedamole.runs.run_folder import RunFolder

    run_folder = RunFolder.open(folder)
    if not run_folder.finished and (reads := reads_outside(load_run_config(run_folder), folder, base=base is None)):
        said = f"reads what {folder} names outside that folder: {', '.join(reads)}"
        screen(error=True).print(said, style="dim", soft_wrap=True)
    with _resumable(folder), _showing_progress(folder.name, as_json) as listener:
        resume_run(folder, listener, base)
    _show([folder], as_json)
    refuse_untrained(folder)


@app.command()
def show(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or a folder with runs in it.")],
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    clients: Annotated[bool, typer.Option(help="A line for each client.")] = True,
) -> None:
    """Show finished runs side by side: clients down, methods across; seeds of one method become mean ± deviation."""
    if not markdown:
        _show(runs, as_json, clients)
        return
    from fedamole.reporting.runs import read_runs
    from fedamole.reporting.table import compare
    from fedamole.reporting.table import markdown as as_markdown

    for comparison in compare(read_runs(runs)):
        say(as_markdown(comparison) + "\n")


app.command()(plan)
app.command()(partition)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, to be told its round and its deviations.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods: paper, what travels, what stays, hyper-parameters; or explain one of them."""
    from fedamole.cli.console import one_method, several_methods
    from fedamole.config import nearest
    from fedamole.errors import ConfigError
    from fedamole.methods import METHODS, described

    if name is not None and name not in METHODS:
        raise ConfigError(f"there is no method {name!r}{nearest(name, METHODS)}")
    listed = [described(known) for known in METHODS if name in (None, known)]
    if as_json:
        say_json(listed)
    elif name is not None:
        one_method(screen(), listed[0])
    else:
        several_methods(screen(wide=150), listed)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo's runs are written.")] = Path("runs/demo"),
    seeds: Annotated[
        int,
        typer.Option(min=1, max=100, help="Run each method with seeds 0 to N - 1; the table shows mean ± deviation."),
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Compare local training, one shared LoRA and FedAMoLE on the bundled task: one table, a minute or two per seed.

    Runs that are finished in the folder are used again, and interrupted ones are continued.
    """
    from fedamole.cli.demo_runs import demo_runs
    from fedamole.comparison.trials import LOCK, start_or_resume
    from fedamole.files import exclusive
    from fedamole.reporting.runs import refuse_untrained

    runs, console = demo_runs(folder, seeds), screen(error=True)
    folder.mkdir(parents=True, exist_ok=True)
    refusal = f"{folder}: another process is running this demo; wait for it or stop it"
    with exclusive(folder / LOCK, refusal), _resumable():
        for number, run in enumerate(runs, 1):
            title = f"run {number} of {len(runs)}: {run.name}"
            if run.state == "finished":
                console.print(f"{title}: was finished before, in {run.path}", soft_wrap=True)
                continue
            console.print(f"{title} -> {run.path}", soft_wrap=True)
            with _showing_progress(title, as_json) as listener:
                start_or_resume(run.config, run.path, listener)
    paths = [run.path for run in sorted(runs, key=lambda run: (run.config.method_name, run.seed))]
    _show(paths, as_json)
    if not as_json:
        console.print(f"Each client's model: {folder}/fedamole/clients/NAME/adapter")
    for path in paths:
        refuse_untrained(path)


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(help="A TOML file: methods, seeds, scenarios (docs/compare.md).")],
    show_only: Annotated[bool, typer.Option("--show", help="Run nothing; tables of what is finished.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run nothing; list the cells and what each would do.")
    ] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables here as Markdown.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write every number of the tables here as CSV, unrounded.")] = None,
    latex: Annotated[Path | None, typer.Option(help="Write the tables here as LaTeX (booktabs).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the methods into this .svg, .png or .pdf.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods x seeds x scenarios: each cell a run, then tables, gains with tests, and a picture.

    Finished cells are skipped, unfinished ones resumed, failed ones tried again; the same command goes on after Ctrl-C.
    """
    from fedamole.cli.console import TrialLines, show_cells
    from fedamole.comparison.file import load_comparison
    from fedamole.comparison.plot import check_picture
    from fedamole.comparison.run import check_shown, failures, outlook, preview, run_comparison
    from fedamole.errors import RunError

    if plot is not None:
        check_picture(plot)
    comparison = load_comparison(file)
    if dry_run:
        cells = preview(comparison)
        say_json(cells) if as_json else show_cells(_wide(), cells)
        screen(error=True).print(outlook(comparison), soft_wrap=True)
        return
    if show_only:
        check_shown(comparison)
        failed = failures(comparison)
    else:
        lines = TrialLines(screen(error=True))
        with _resumable(), lines.progress:
            failed = run_comparison(comparison, lines)
    _report(comparison, as_json, {"markdown": markdown, "csv": csv, "latex": latex, "plot": plot})
    for cell in failed:
        screen(error=True).print(f"failed: {cell.name}: {cell.error}", soft_wrap=True)
    if failed and not show_only:
        raise RunError(f"{len(failed)} cells failed and are in no table; the same command tries them again")


def _report(comparison: "Comparison", as_json: bool, files: dict[str, Path | None]) -> None:
    """Print the tables of what is finished, and write those that were asked for into files."""
    from fedamole.cli.console import show_sheets
    from fedamole.comparison.plot import draw
    from fedamole.comparison.run import progress
    from fedamole.comparison.tables import as_csv, as_latex, as_markdown, records, sheets
    from fedamole.errors import RunError
    from fedamole.files import write_atomic
    from fedamole.reporting.results import read_scenarios

    states, scenarios = progress(comparison), read_scenarios(comparison.entries())
    if not scenarios:
        raise RunError(f"{comparison.folder}: no cell is finished, so there is no table yet")
    matched = comparison.settings.match == "parameters"
    made, numbers = sheets(scenarios, comparison.reference, matched), records(scenarios, comparison.reference)
    for kind, text in (("markdown", as_markdown(made)), ("latex", as_latex(made)), ("csv", as_csv(numbers))):
        if (path := files[kind]) is not None:
            write_atomic(path, text)
    if (path := files["plot"]) is not None:
        draw(path, scenarios)
    if as_json:
        about = {"name": comparison.settings.name, "reference": comparison.reference, "cells": states}
        say_json({**about, "records": numbers})
        return
    show_sheets(_wide(), made)
    if left := {state: count for state, count in states.items() if count and state != "finished"}:
        said = ", ".join(f"{count} {state}" for state, count in left.items())
        screen(error=True).print(f"{states['finished']} cells are finished; not in the tables: {said}")


def _wide() -> Screen:
    """A console for tables; wide enough where the output goes into a file."""
    return screen(wide=180)


DEPLOYMENT = (server, simulate, client, certs, doctor, health, audit_log)
PERSONAL = (personal.generate, personal.chat, explain, export, personal.adapt)
for command in (*DEPLOYMENT, *PERSONAL, serving.serve, reporting.report):
    app.command()(command)
app.add_typer(clients, name="clients")


def main() -> None:
    """Run the command line; a user's mistake is one clear line, never a traceback."""
    run_command_line(app, set_up())


if __name__ == "__main__":
    main()
