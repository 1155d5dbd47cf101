"""`fedamole run`, `resume`, `show`, `demo` and `methods`. Heavy packages are imported inside the commands."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from fedamole.cli.completion import complete_methods, complete_runs
from fedamole.cli.options import AsJson, ConfigPath, Overrides, read_config, resumable
from fedamole.cli.personal import BaseName
from fedamole.terminal import say, say_json, screen

if TYPE_CHECKING:
    from fedamole.federation.progress import ProgressListener


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show on standard error what a command does before its progress can be shown: a spinner, or one line in a log."""
    console = screen(error=True)
    if console.is_terminal:
        with console.status(Text(text)):
            yield
    else:
        console.print(text, soft_wrap=True)
        yield


@contextmanager
def _progress(title: str, as_json: bool) -> "Iterator[ProgressListener]":
    """Show progress on standard error: progress bars on a terminal, lines elsewhere."""
    from fedamole.cli.console import ProgressBars
    from fedamole.federation.progress import PlainProgress

    console = screen(error=True)
    if not console.is_terminal or as_json:
        yield PlainProgress(console)
        return
    listener = ProgressBars(console, title)
    with listener.progress:
        yield listener


def _show(paths: list[Path], as_json: bool, with_clients: bool = True) -> None:
    from fedamole.cli.console import show_runs
    from fedamole.reporting.run_table import run_tables
    from fedamole.reporting.runs import read_runs

    if as_json:
        say_json([table.as_json() for table in run_tables(read_runs(paths))])
    else:
        show_runs(paths, with_clients)


def run(config: ConfigPath = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Train one method on one federation, evaluate it and save the clients' models.

    Writes a run folder (runs/NAME, or run.folder) and prints its table of scores.

    Examples:

      fedamole run                                        the bundled demo task with FedAMoLE
      fedamole run my.toml                                the config my.toml
      fedamole run my.toml method.name=fedit run.seed=1   the same with other settings
    """
    with waiting("loading PyTorch and the settings"):
        from fedamole.experiment import new_run_folder, start
        from fedamole.reporting.runs import refuse_untrained

        settings = read_config(config, overrides)
    with new_run_folder(settings) as folder, resumable(folder):
        screen(error=True).print(f"{settings.method_name} -> {folder}")
        with _progress(settings.run.name, as_json) as listener:
            summary = start(settings, folder, listener)
    _show([folder], as_json)
    memory = f"peak memory {summary['peak_memory_mib']:,.0f} MiB with {summary['group']} clients in lock-step"
    screen(error=True).print(memory)
    refuse_untrained(folder)


def resume(
    folder: Annotated[Path, typer.Argument(help="Folder of the interrupted run.", autocompletion=complete_runs)],
    base: BaseName = None,
    as_json: AsJson = False,
) -> None:
    """Continue an interrupted run after its last finished round; the result is identical to an uninterrupted run.

    Before it starts, it lists the files outside the run folder that the run's config reads (data, a base). If the base
    has moved, give its new path by --base; the run folder records it for later commands.

    Examples:

      fedamole resume runs/mine
      fedamole resume runs/mine --base /models/qwen
    """
    with waiting("loading PyTorch and the run"):
        from fedamole.config import load_run_config
        from fedamole.experiment import reads_outside
        from fedamole.experiment import resume as resume_run
        from fedamole.reporting.runs import refuse_untrained
        from fedamole.runs.run_folder import RunFolder

    run_folder = RunFolder.open(folder)
    if not run_folder.finished and (paths := reads_outside(load_run_config(run_folder), folder, base=base is None)):
        text = f"reads files outside {folder}: {', '.join(paths)}"
        screen(error=True).print(text, style="dim", soft_wrap=True)
    with resumable(folder), _progress(folder.name, as_json) as listener:
        resume_run(folder, listener, base)
    _show([folder], as_json)
    refuse_untrained(folder)


def show(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, or a folder with runs in it.", autocompletion=complete_runs)
    ],
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    clients: Annotated[bool, typer.Option(help="Show a row for each client.")] = True,
) -> None:
    """Show test scores of finished runs in one table: clients down, methods across.

    Runs that differ only in the seed share a column, with mean ± standard deviation.

    Examples:

      fedamole show runs/demo                       all runs in a folder
      fedamole show runs/a runs/b --no-clients      two runs, summary only
    """
    if not markdown:
        _show(runs, as_json, clients)
        return
    from fedamole.reporting.run_table import as_markdown, run_tables
    from fedamole.reporting.runs import read_runs

    for table in run_tables(read_runs(runs)):
        say(as_markdown(table) + "\n")


def methods(
    name: Annotated[
        str | None,
        typer.Argument(help="Explain this method; default: list all methods.", autocompletion=complete_methods),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods with their paper and what they communicate, or explain one of them.

    The explanation of a method has its round, its deviations from the paper, and its settings with their defaults.

    Examples:

      fedamole methods
      fedamole methods fedit
    """
    from fedamole.cli.console import show_method, show_methods
    from fedamole.errors import ConfigError
    from fedamole.reporting.method_descriptions import method_descriptions

    descriptions = method_descriptions()
    if name is not None and name not in descriptions:
        from fedamole.config import nearest  # imports PyTorch

        raise ConfigError(f"there is no method {name!r}{nearest(name, descriptions)}")
    selected = [description for known, description in descriptions.items() if name in (None, known)]
    if as_json:
        say_json(selected)
    elif name is not None:
        show_method(screen(), selected[0])
    else:
        show_methods(screen(wide=150), selected)


def demo(
    folder: Annotated[Path, typer.Option(help="Folder for the demo's runs.")] = Path("runs/demo"),
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="Run each method with this number of seeds: 0, 1, and so on.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Compare local training, one shared LoRA (FedIT), FedAMoLE and its variant FedAMoLE-Peers on a bundled task.

    Takes some minutes per seed and needs no network and no GPU. Finished runs in the folder are used again, and
    interrupted ones are continued.

    Examples:

      fedamole demo
      fedamole demo --seeds 3         mean and standard deviation over three seeds
      fedamole report runs/demo       an HTML report on the result
    """
    with waiting("loading PyTorch"):
        from fedamole.cli.demo_runs import demo_runs
    from fedamole.comparison.trials import LOCK, start_or_resume
    from fedamole.files import exclusive
    from fedamole.reporting.runs import refuse_untrained

    trials, console = demo_runs(folder, seeds), screen(error=True)
    folder.mkdir(parents=True, exist_ok=True)
    refusal = f"{folder}: another process is running this demo; wait for it or stop it"
    with exclusive(folder / LOCK, refusal), resumable():
        for number, trial in enumerate(trials, 1):
            title = f"run {number} of {len(trials)}: {trial.name}"
            if trial.state == "finished":
                console.print(f"{title}: already finished, in {trial.path}", soft_wrap=True)
                continue
            console.print(f"{title} -> {trial.path}", soft_wrap=True)
            with _progress(title, as_json) as listener:
                start_or_resume(trial.config, trial.path, listener)
    paths = [trial.path for trial in sorted(trials, key=lambda trial: (trial.config.method_name, trial.seed))]
    _show(paths, as_json)
    if not as_json:
        console.print(f"Each client's model: {folder}/fedamole_peers/clients/NAME/adapter")
    for path in paths:
        refuse_untrained(path)
