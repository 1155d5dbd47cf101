"""The command that serves personal models. Nothing heavy is imported before it is used."""

import contextlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedamole.cli.personal import BaseName, Device, Finished, Row, RunPath
from fedamole.terminal import say, screen

if TYPE_CHECKING:
    from fedamole.personal.saved_models import Place


def serve(
    run: RunPath,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs --keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: one that is free.")] = 8000,
    client: Annotated[list[str] | None, typer.Option(help="Serve this client's model alone; may be repeated.")] = None,
    keys: Annotated[Path | None, typer.Option(help="File made by --make-keys: a key opens its client's model.")] = None,
    make_keys: Annotated[
        Path | None, typer.Option(help="Make a key for each client that has none in this file, show them, and end.")
    ] = None,
    certs: Annotated[Path | None, typer.Option(help="Folder made by `fedamole certs`: answer over TLS.")] = None,
    row: Row = None,
    base: BaseName = None,
    device: Device = "auto",
    finished: Finished = False,
    threads: Annotated[int, typer.Option(min=0, max=4096, help="PyTorch's threads on a CPU; 0: its own choice.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Most requests answered at once.")] = 32,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens remembered at once; left out: evaluation.batch_tokens.")
    ] = None,
    longest: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens, whatever a request asks.")] = 1024,
    waiting: Annotated[int, typer.Option(min=1, help="Most requests of one client that wait.")] = 64,
    each: Annotated[
        int | None, typer.Option(min=1, help="Most requests of one client answered at once; left out: --rows.")
    ] = None,
    per_minute: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens of prompts and answers for one key in a minute; left out: no limit."),
    ] = None,
) -> None:
    """Serve the personal models of all clients of a finished run over OpenAI's interface, from one base.

    The client is chosen by `model`. Requests of different clients are answered in one batch, each by its own model.
    Ctrl-C ends it.
    """
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            from fedamole.errors import FedamoleError, how_to_install

            raise FedamoleError(f"serving needs {package}, which is not installed; {how_to_install('serve')}")
    import torch

    from fedamole.config import load_run_config
    from fedamole.evaluation.personal import EvaluationSettings
    from fedamole.personal.generate import layout_of
    from fedamole.personal.saved_models import check_finished, open_bank, read_for
    from fedamole.serving.connections import listen
    from fedamole.serving.engine import Engine
    from fedamole.serving.keys import read_keys
    from fedamole.serving.models import alike
    from fedamole.serving.scheduling import Limits
    from fedamole.serving.server import Offer, Server, Service

    found = _chosen(run, client, row)
    names = tuple(place.client for place in found)
    if make_keys is not None:
        _show_new_keys(make_keys, names)
        return
    check_finished(found[0], finished)
    _check_door(host, keys, certs)
    known = None if keys is None else read_keys(keys)
    evaluation = EvaluationSettings()
    if (folder := found[0].run) is not None:
        evaluation = load_run_config(folder).evaluation
    door = listen(host, port)
    if threads:
        torch.set_num_threads(threads)
    if text := read_for(found[0], False, base):
        screen(error=True).print(text, style="dim", soft_wrap=True)
    bank, adapters = open_bank(found, device, base)
    limits = Limits(rows, tokens or evaluation.batch_tokens, longest, waiting, each)
    engine = Engine(bank, alike(adapters, names), limits)
    created = int(found[0].adapter.stat().st_mtime)
    offer = Offer(names, created, evaluation.max_new_tokens, tuple(map(layout_of, found)), known, per_minute)
    server = Server(Service(engine, offer), certs)
    engine.start()
    name = f"[{host}]" if ":" in host else host
    address = f"{'http' if certs is None else 'https'}://{name}:{door.getsockname()[1]}/v1"
    console = screen(error=True)
    amount = "1 model" if len(names) == 1 else f"{len(names)} models"
    text = f"{amount} on {address}: {', '.join(names)}"
    console.print(text, soft_wrap=True)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how a server ends; by then everything is closed
        server.run([door])
    console.print("stopped")


def _chosen(run: Path, clients: list[str] | None, row: str | None) -> "tuple[Place, ...]":
    from fedamole.personal.saved_models import find, places

    if not clients:
        return places(run, row)
    return tuple(find(run, client, row) for client in dict.fromkeys(clients))


def _show_new_keys(path: Path, clients: tuple[str, ...]) -> None:
    """The new keys on standard output, a line each; they are shown this once."""
    from fedamole.serving.keys import make_keys

    made = make_keys(path, clients)
    for client, key in made.items():
        say(f"{client} {key}")
    kept = len(clients) - len(made)
    text = f"{path}: {len(made)} new keys, {kept} kept; hand each client its own, they are not shown again"
    screen(error=True).print(text, soft_wrap=True)


def _check_door(host: str, keys: Path | None, certs: Path | None) -> None:
    """Refuse what would let strangers in, and say what would let them listen."""
    from fedamole.errors import ConfigError
    from fedamole.serving.connections import is_loopback

    if certs is not None:
        for name in ("server.crt", "server.key"):
            if not (certs / name).exists():
                raise ConfigError(f"--certs {certs}: {name} is missing; `fedamole certs --folder {certs}` makes it")
    if is_loopback(host):
        return
    if keys is None:
        raise ConfigError(f"--host {host} lets others in, so keys are needed: --make-keys FILE, then --keys FILE")
    if certs is None:
        text = "without --certs keys and texts cross the network in the clear; put a proxy with TLS before this server"
        screen(error=True).print(f"warning: {text}", style="yellow", soft_wrap=True)
