"""`fedamole compare`. Heavy packages are imported inside the command."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedamole.cli.choose import Margin
from fedamole.cli.options import AsJson, resumable
from fedamole.terminal import Screen, say_json, screen

if TYPE_CHECKING:
    from fedamole.comparison.file import Comparison


def compare(
    file: Annotated[Path, typer.Argument(help="A TOML file with methods, seeds and scenarios (docs/compare.md).")],
    show_only: Annotated[bool, typer.Option("--show", help="Run nothing; show tables of the finished trials.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run nothing; list the trials and what would be done with each.")
    ] = False,
    choose: Annotated[
        bool, typer.Option("--choose", help="Add the row `chosen`: each client's best method by its own validation.")
    ] = False,
    margin: Margin = 0.0,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this file as Markdown.")] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write every number of the tables to this file as CSV, unrounded.")
    ] = None,
    latex: Annotated[Path | None, typer.Option(help="Write the tables to this file as LaTeX (booktabs).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot the methods to this .svg, .png or .pdf.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods x seeds x scenarios: run every trial, then show tables, gains with significance tests, a plot.

    Each trial is an ordinary run. The command can be repeated, also after Ctrl-C: it skips finished trials, resumes
    unfinished ones and retries failed ones.

    Examples:

      fedamole compare small.toml --dry-run       list the trials
      fedamole compare small.toml --plot small.svg --csv small.csv
      fedamole compare small.toml --show          tables of what is finished
    """
    from fedamole.cli.trial_progress import TrialProgress, show_trials
    from fedamole.comparison.file import load_comparison
    from fedamole.comparison.plot import check_plot
    from fedamole.comparison.run import check_shown, failures, outlook, preview, run_comparison
    from fedamole.errors import ConfigError, RunError

    if margin and not choose:
        raise ConfigError("--margin has an effect with --choose only")
    if plot is not None:
        check_plot(plot)
    comparison = load_comparison(file)
    if dry_run:
        trials = preview(comparison)
        say_json(trials) if as_json else show_trials(_wide(), trials)
        screen(error=True).print(outlook(comparison), soft_wrap=True)
        return
    if show_only:
        check_shown(comparison)
        failed = failures(comparison)
    else:
        listener = TrialProgress(screen(error=True))
        with resumable(), listener.progress:
            failed = run_comparison(comparison, listener)
    _report(
        comparison,
        as_json,
        margin if choose else None,
        {"markdown": markdown, "csv": csv, "latex": latex, "plot": plot},
    )
    for trial in failed:
        screen(error=True).print(f"failed: {trial.name}: {trial.error}", soft_wrap=True)
    if failed and not show_only:
        raise RunError(f"{len(failed)} trials failed and are in no table; repeat the command to retry them")


def _report(comparison: "Comparison", as_json: bool, margin: float | None, files: dict[str, Path | None]) -> None:
    """Print the tables of the finished trials, and write them to the files that were requested.

    `margin` is that of the row `chosen`; None: no such row.
    """
    from fedamole.cli.console import show_tables
    from fedamole.comparison.plot import draw
    from fedamole.comparison.records import as_csv, as_records
    from fedamole.comparison.run import progress
    from fedamole.comparison.tables import as_latex, as_markdown, build_tables
    from fedamole.errors import RunError
    from fedamole.files import write_atomic
    from fedamole.reporting.results import read_scenarios

    target = comparison.settings.target
    states, scenarios = progress(comparison), read_scenarios(comparison.results(), target)
    if not scenarios:
        raise RunError(f"{comparison.folder}: no trial is finished, so there is no table yet")
    chosen = ""
    if margin is not None:
        from fedamole.comparison.chosen_row import with_chosen

        scenarios, chosen = with_chosen(comparison, scenarios, margin)
    matched = comparison.settings.match == "parameters"
    tables = build_tables(scenarios, comparison.reference, matched, chosen, target)
    records = as_records(scenarios, comparison.reference)
    for kind, text in (("markdown", as_markdown(tables)), ("latex", as_latex(tables)), ("csv", as_csv(records))):
        if (path := files[kind]) is not None:
            write_atomic(path, text)
    if (path := files["plot"]) is not None:
        draw(path, scenarios)
    if as_json:
        about = {
            "name": comparison.settings.name,
            "reference": comparison.reference,
            "target": target,
            "trials": states,
        }
        say_json({**about, "records": records})
        return
    show_tables(_wide(), tables)
    if missing := {state: count for state, count in states.items() if count and state != "finished"}:
        counts = ", ".join(f"{count} {state}" for state, count in missing.items())
        screen(error=True).print(f"{states['finished']} trials are finished; not in the tables: {counts}")


def _wide() -> Screen:
    """Return a console for tables, which is wide if the output is not a terminal."""
    return screen(wide=180)
