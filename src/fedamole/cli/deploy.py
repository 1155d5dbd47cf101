"""`fedamole server` and `fedamole simulate`. Large packages are imported only when a command runs."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedamole.cli.options import INTERRUPTED, Overrides
from fedamole.deployment.requirements import require_flower
from fedamole.terminal import screen

if TYPE_CHECKING:
    from fedamole.config import Config

ServerConfig = Annotated[Path | None, typer.Argument(help="A TOML config with [deployment] clients (docs/deploy.md).")]
Resume = Annotated[Path | None, typer.Option(help="Continue the run in this folder; then give no config.")]
BaseLocation = Annotated[
    str | None,
    typer.Option("--base", help="With --resume: the new location of the run's base, a folder, GGUF file or hub id."),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="No TLS and no keys; only on 127.0.0.1, for tests.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Server: port to listen on, open in the firewall.")]
HOST, PORT = "127.0.0.1", 9092
"""Defaults of `fedamole server` and `fedamole doctor`."""


def server(
    config: ServerConfig = None,
    overrides: Overrides = None,
    resume: Resume = None,
    base: BaseLocation = None,
    certs: Annotated[Path | None, typer.Option(help="Folder made by `fedamole certs`.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on: the name that clients use, or 0.0.0.0.")] = HOST,
    port: Port = PORT,
    insecure: Insecure = False,
) -> None:
    """Coordinate a run across organisations: wait for clients, run the rounds, recover from failures.

    Prints the table of results at the end. Continue a stopped or killed server with --resume FOLDER; it repeats the
    interrupted round, and clients reconnect automatically.
    """
    _check_options(config, resume, base)
    require_flower()
    from fedamole.cli.console import show_runs
    from fedamole.cli.server_progress import show_progress
    from fedamole.deployment.processes import without_proxy
    from fedamole.deployment.server_processes import ListenSettings, ServerProcesses, finished, prepare_folder
    from fedamole.reporting.runs import refuse_untrained

    os.environ.update(without_proxy())
    listen = ListenSettings(host, port, certs, insecure)
    folder = _run_folder(config, overrides, resume, base, prepare_folder)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    if resume is None or not finished(folder):
        with show_progress(screen(error=True), folder) as (print_line, on_progress):
            ServerProcesses(folder, listen, print_line, on_progress).run(stop)
    if stop.is_set():
        raise typer.Exit(INTERRUPTED)
    show_runs([folder])
    refuse_untrained(folder)


def simulate(
    config: Annotated[Path | None, typer.Argument(help="A TOML config, as for `fedamole run`.")] = None,
    overrides: Overrides = None,
    resume: Resume = None,
    base: BaseLocation = None,
    cpus: Annotated[int, typer.Option(min=1, help="CPU cores per client.")] = 1,
    gpus: Annotated[float, typer.Option(min=0.0, help="GPUs per client; 0.5: two clients share one.")] = 0.0,
) -> None:
    """Run a config in Flower's simulation: clients are processes of Ray, for several GPUs or a cluster.

    On one machine `fedamole run` is faster, as its clients share one base and train in lock-step. The result is a
    coordinator's run folder, with each client's own run folder in server/sites/.
    """
    _check_options(config, resume, base)
    require_flower(simulation=True)
    from fedamole.cli.console import show_runs
    from fedamole.cli.server_progress import show_progress
    from fedamole.deployment.flower.simulation import prepare_simulation
    from fedamole.deployment.flower.simulation import simulate as run_simulation
    from fedamole.deployment.server_processes import finished
    from fedamole.reporting.runs import refuse_untrained

    folder = _run_folder(config, overrides, resume, base, prepare_simulation)
    if not finished(folder):
        with show_progress(screen(error=True), folder) as (_, on_progress):
            run_simulation(folder, on_progress, cpus, gpus)
    show_runs([folder])
    refuse_untrained(folder)


def _check_options(config: Path | None, resume: Path | None, base: str | None) -> None:
    """Raise ConfigError unless exactly one of config and --resume is given, and --base only with --resume."""
    from fedamole.errors import ConfigError

    if (config is None) == (resume is None):
        raise ConfigError("give either a config to start a run, or --resume FOLDER to continue one")
    if base is not None and resume is None:
        raise ConfigError(f"--base needs --resume; for a new run set base.model={base}")


def _run_folder(
    config: Path | None,
    overrides: list[str] | None,
    resume: Path | None,
    base: str | None,
    prepare: "Callable[[Config, Path], None]",
) -> Path:
    """Prepare the folder of a new run, or return that of the run to resume, with its base at `base` if that is given.

    The options must have passed `_check_options`.
    """
    from fedamole.config import load_config
    from fedamole.deployment.server_processes import move_base
    from fedamole.experiment import new_run_folder

    if resume is not None:
        if base is not None:
            move_base(resume, base)
        return resume
    assert config is not None
    settings = load_config(config, list(overrides or []))
    with new_run_folder(settings) as folder:
        prepare(settings, folder)
    return folder
