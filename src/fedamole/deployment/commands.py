"""The commands of a deployment: server, client, certs, doctor. Nothing heavy is imported before one is used."""

import importlib.util
import json
import os
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedamole.personal.commands import renamed

ConfigPath = Annotated[Path | None, typer.Argument(help="A TOML config with [deployment] clients (docs/deploy.md).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that differ, e.g. federation.rounds=5.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="No TLS and no keys; on 127.0.0.1 only, to try things out.")]


def _installed(*more: str) -> None:
    """Make sure that what a deployment needs beyond a simulation is here; and write for this user's eyes only."""
    from fedamole.deployment.processes import PRIVATE
    from fedamole.errors import FedamoleError

    extra = "ray" if more else "flower"
    for package in ("flwr", "cryptography", *more):
        if importlib.util.find_spec(package) is None:
            raise FedamoleError(f'this needs {package}, which is not here: pip install "fedamole[{extra}]"')
    os.umask(PRIVATE)


def server(
    config: ConfigPath = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder; no config then.")] = None,
    certs: Annotated[Path | None, typer.Option(help="Folder made by `fedamole certs`.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on, as clients name it or 0.0.0.0.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The one port that a firewall lets in.")] = 9092,
    insecure: Insecure = False,
) -> None:
    """Coordinate a run across organisations: wait for the clients, run the rounds, survive faults.

    Ends with the run's table. A server that was stopped or killed goes on by --resume FOLDER with the round that was
    under way; clients reconnect by themselves.
    """
    _installed()
    from fedamole.config import load_config
    from fedamole.console import show_runs
    from fedamole.deployment.progress import watching
    from fedamole.deployment.server import Door, Server, finished, prepare_folder
    from fedamole.errors import ConfigError
    from fedamole.experiment import free_folder

    if (config is None) == (resume is None):
        raise ConfigError("give either a config to start a run, or --resume FOLDER to go on with one")
    door = Door(host, port, certs, insecure)
    if config is not None:
        settings = load_config(config, list(overrides or []))
        folder = free_folder(settings)
        prepare_folder(settings, folder)
    else:
        assert resume is not None
        folder = resume
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    console = Console(stderr=True)
    if resume is None or not finished(folder):
        with watching(console, folder) as (say, show):
            Server(folder, door, say, show).run(stop)
    if stop.is_set():
        raise typer.Exit(130)
    show_runs([folder])


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
    _installed("ray")
    from fedamole.config import load_config
    from fedamole.console import show_runs
    from fedamole.deployment.flower_simulation import prepare_simulation
    from fedamole.deployment.flower_simulation import simulate as run_simulation
    from fedamole.deployment.progress import watching
    from fedamole.deployment.server import finished
    from fedamole.errors import ConfigError
    from fedamole.experiment import free_folder

    if (config is None) == (resume is None):
        raise ConfigError("give either a config to start a run, or --resume FOLDER to go on with one")
    if config is not None:
        settings = load_config(config, list(overrides or []))
        folder = free_folder(settings)
        prepare_simulation(settings, folder)
    else:
        assert resume is not None
        folder = resume
    if not finished(folder):
        with watching(Console(stderr=True), folder) as (_, show):
            run_simulation(folder, show, cpus, gpus)
    show_runs([folder])


def client(
    server: Annotated[str, typer.Option(help="host:port of the coordinator.")],
    name: Annotated[str, typer.Option(help="This organisation's name, as in the server's deployment.clients.")],
    data: Annotated[Path, typer.Option(help="Its rows: .jsonl, .json, .csv (each also .gz) or .parquet.")],
    certs: Annotated[Path | None, typer.Option(help="Folder with ca.crt and node.key from the coordinator.")] = None,
    test: Annotated[Path | None, typer.Option(help="Its own test file; else test rows are cut from the data.")] = None,
    template: Annotated[str, typer.Option(help="How rows become prompts; auto chooses by the columns.")] = "auto",
    column: Annotated[list[str] | None, typer.Option(help="A column under another name: instruction=question.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most so many rows.")] = None,
    base: Annotated[str | None, typer.Option(help="This machine's copy of the base model: folder or hub id.")] = None,
    folder: Annotated[Path, typer.Option(help="Where its run folders are written.")] = Path("runs"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(help="PyTorch's threads on a CPU; 0: its own choice.")] = 0,
    share_labels: Annotated[bool, typer.Option("--share-labels", help="Tell the server how often each answer occurs.")]
    = False,
    insecure: Insecure = False,
) -> None:
    """Take part in a federation with data that stay here: only what the method sends leaves this machine.

    Only outgoing connections are made. Runs until Ctrl-C and reconnects by itself; for every run it takes part in there
    is a folder FOLDER/<run>-NAME, and in it the personal model: clients/NAME/adapter.
    """
    _installed()
    from fedamole.deployment.client import Client, Connection, client_home
    from fedamole.errors import DataError

    for path in (data, test):
        if path is not None and not path.exists():
            raise DataError(f"there is no file {path}")
    columns = renamed(column)
    source = {"name": name, "path": str(data.resolve()), "template": template, "columns": columns}
    more = {"test": None if test is None else str(test.resolve()), "limit": limit}
    settings = {
        "source": source | {key: value for key, value in more.items() if value is not None},
        "folder": str(folder.resolve()), "device": device, "threads": threads, "share_labels": share_labels,
        **({} if base is None else {"base": base}),
    }
    console = Console(stderr=True)
    Client(
        Connection(server, certs, insecure), settings, client_home(str(folder), name),
        lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True),
    ).run()


def certs(
    folder: Annotated[Path, typer.Option(help="Where CA, certificates and keys are kept.")] = Path("certs"),
    host: Annotated[list[str] | None, typer.Option(help="Name or address by which clients reach the server.")] = None,
    client: Annotated[list[str] | None, typer.Option(help="Make a key for this client, to be handed over.")] = None,
    admit: Annotated[list[str] | None, typer.Option(help="NAME=FILE.pub: admit a key made by its client.")] = None,
    own: Annotated[str | None, typer.Option(help="At a client: make a key of one's own; send the .pub only.")] = None,
    renew: Annotated[bool, typer.Option("--renew", help="A new server certificate from the same CA.")] = False,
    days: Annotated[int, typer.Option(help="Days that the server certificate is valid.")] = 825,
) -> None:
    """Make what a secure federation needs: a CA, the server's certificate, a key for each client.

    Existing files are kept; run it again to add clients.  Hand certs/clients/NAME to the organisation NAME, and keep
    ca.key and server.key to yourself.
    """
    _installed()
    from fedamole.deployment.certificates import admit as admit_key
    from fedamole.deployment.certificates import make_certificates, make_own_key
    from fedamole.errors import ConfigError

    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if own is not None:
        say(f"{make_own_key(folder, own)} is for the coordinator; node.key beside it never leaves this machine")
        return
    admitted = [word.partition("=")[::2] for word in admit or []]
    if not all(path for _, path in admitted):
        raise ConfigError("--admit: write NAME=FILE.pub")
    if both := sorted({name for name, _ in admitted} & set(client or [])):
        raise ConfigError(f"{both[0]}: --admit brings a key that it has, --client makes one; give one of the two")
    made = make_certificates(folder, host or [], client or [], days, renew)
    for path in made.written:
        say(f"written  {path}")
    for path in made.kept:
        say(f"kept     {path}")
    for name, public in admitted:
        say(f"admitted {admit_key(folder, name, Path(public))}")


def doctor(
    config: Annotated[Path | None, typer.Option(help="Server: the config of the run.")] = None,
    server: Annotated[str | None, typer.Option(help="Client: host:port of the coordinator.")] = None,
    certs: Annotated[Path | None, typer.Option(help="Folder with certificates or keys.")] = None,
    base: Annotated[str | None, typer.Option(help="Client: its copy of the base model.")] = None,
    data: Annotated[Path | None, typer.Option(help="Client: its data file.")] = None,
    template: Annotated[str, typer.Option(help="Client: the template that it will name.")] = "auto",
    column: Annotated[list[str] | None, typer.Option(help="Client: as for `fedamole client`.")] = None,
    host: Annotated[str, typer.Option(help="Server: address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Server: port to listen on.")] = 9092,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of lines.")] = False,
) -> None:
    """Find out what is wrong with a set-up before it fails: a server's (default), or a client's (with --server).

    Looks at versions, ports, certificates, base, data columns, disk and device; shows no content of data.
    """
    from dataclasses import asdict

    from fedamole.deployment.doctor import examine_client, examine_server

    at_client = server is not None or data is not None
    if at_client:
        found = examine_client(server, certs, base, data, template, renamed(column))
    else:
        found = examine_server(config, certs, host, port)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found]))
    else:
        console, marks = Console(), {"ok": "[green]ok[/]", "warning": "[yellow]!![/]", "problem": "[red]no[/]"}
        for finding in found:
            console.print(marks[finding.state], end=" ")
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            console.print(f"{finding.what:<12} {finding.text}{remedy}", highlight=False, markup=False, soft_wrap=True)
    if any(finding.state == "problem" for finding in found):
        raise typer.Exit(1)
