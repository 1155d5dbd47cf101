"""`fedamole server` and `fedamole simulate`. Nothing heavy is imported before a command needs it."""

import os
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from fedamole.deployment.requirements import require_flower
from fedamole.terminal import screen

ConfigPath = Annotated[Path | None, typer.Argument(help="A TOML config with [deployment] clients (docs/deploy.md).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that differ, e.g. federation.rounds=5.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="No TLS and no keys; on 127.0.0.1 only, to try things out.")]


def server(
    config: ConfigPath = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder; no config then.")] = None,
    certs: Annotated[Path | None, typer.Option(help="Folder made by `fedamole certs`.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on, as clients name it or 0.0.0.0.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The one port that a firewall lets in.")] = 9092,
    insecure: Insecure = False,
) -> None:
    """Coordinate a run across organisations: wait for the clients, run the rounds, survive faults.

    Ends with the run's table. A server that was stopped or killed goes on by --resume FOLDER with the round that was
    under way; clients reconnect by themselves.
    """
    require_flower()
    from fedamole.cli.console import show_runs
    from fedamole.cli.server_progress import show_progress
    from fedamole.config import load_config
    from fedamole.deployment.processes import without_proxy
    from fedamole.deployment.server_processes import ListenSettings, ServerProcesses, finished, prepare_folder
    from fedamole.errors import ConfigError
    from fedamole.experiment import new_run_folder
    from fedamole.reporting.runs import refuse_untrained

    if (config is None) == (resume is None):
        raise ConfigError("give either a config to start a run, or --resume FOLDER to go on with one")
    os.environ.update(without_proxy())
    listen = ListenSettings(host, port, certs, insecure)
    if config is not None:
        settings = load_config(config, list(overrides or []))
        with new_run_folder(settings) as folder:
            prepare_folder(settings, folder)
    else:
        assert resume is not None
        folder = resume
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    console = screen(error=True)
    if resume is None or not finished(folder):
        with show_progress(console, folder) as (say, show):
            ServerProcesses(folder, listen, say, show).run(stop)
    if stop.is_set():
        raise typer.Exit(130)
    show_runs([folder])
    refuse_untrained(folder)


def simulate(
    config: Annotated[Path | None, typer.Argument(help="A TOML config, as for `fedamole run`.")] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder; no config then.")] = None,
    cpus: Annotated[int, typer.Option(min=1, help="Processors that each client is given.")] = 1,
    gpus: Annotated[float, typer.Option(min=0.0, help="GPUs that each client is given; 0.5: two share one.")] = 0.0,
) -> None:
    """Run a config on Flower's simulation: clients in Ray's processes, for several GPUs or a cluster.

    On one machine `fedamole run` is faster, as its clients share one base and train in lock-step. The result is a
    coordinator's folder, with each client's own run folder in server/sites/.
    """
    require_flower(simulation=True)
    from fedamole.cli.console import show_runs
    from fedamole.cli.server_progress import show_progress
    from fedamole.config import load_config
    from fedamole.deployment.flower.simulation import prepare_simulation
    from fedamole.deployment.flower.simulation import simulate as run_simulation
    from fedamole.deployment.server_processes import finished
    from fedamole.errors import ConfigError
    from fedamole.experiment import new_run_folder
    from fedamole.reporting.runs import refuse_untrained

    if (config is None) == (resume is None):
        raise ConfigError("give either a config to start a run, or --resume FOLDER to go on with one")
    if config is not None:
        settings = load_config(config, list(overrides or []))
        with new_run_folder(settings) as folder:
            prepare_simulation(settings, folder)
    else:
        assert resume is not None
        folder = resume
    if not finished(folder):
        with show_progress(screen(error=True), folder) as (_, show):
            run_simulation(folder, show, cpus, gpus)
    show_runs([folder])
    refuse_untrained(folder)
