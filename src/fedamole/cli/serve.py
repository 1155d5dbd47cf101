"""The command `fedamole serve`. Heavy libraries are imported inside it."""

import contextlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedamole.cli.personal import MODEL, BaseName, Device, Finished, RunPath, Variant, note
from fedamole.serving.scheduling import Limits
from fedamole.terminal import say, screen

if TYPE_CHECKING:
    from fedamole.personal.saved_models import SavedModel

ACCESS, LIMITS = "Address and access", "Limits"
"""Panels of options in the help."""


def serve(
    run: RunPath,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. Any address other than loopback needs --keys.", rich_help_panel=ACCESS
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free port.", rich_help_panel=ACCESS)
    ] = 8000,
    keys: Annotated[
        Path | None,
        typer.Option(
            help="Key file: require an API key, which gives access to its client's model.", rich_help_panel=ACCESS
        ),
    ] = None,
    make_keys: Annotated[
        Path | None,
        typer.Option(
            help="Create an API key for each client without one in this key file, print the new keys, and exit.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    certs: Annotated[
        Path | None,
        typer.Option(help="Folder created by `fedamole certs`: serve over TLS.", rich_help_panel=ACCESS),
    ] = None,
    client: Annotated[
        list[str] | None, typer.Option(help="Serve only this client's model; repeatable.", rich_help_panel=MODEL)
    ] = None,
    variant: Variant = None,
    base: BaseName = None,
    device: Device = "auto",
    finished: Finished = False,
    threads: Annotated[
        int,
        typer.Option(min=0, max=4096, help="Number of CPU threads; 0: PyTorch's default.", rich_help_panel=MODEL),
    ] = 0,
    rows: Annotated[
        int, typer.Option(min=1, help="Maximum number of requests in the batch.", rich_help_panel=LIMITS)
    ] = Limits.max_rows,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of tokens in the key-value cache. Default: evaluation.batch_tokens of the run.",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    longest: Annotated[
        int,
        typer.Option(
            min=1,
            help="Maximum length of an answer, in tokens, whatever a request asks for.",
            rich_help_panel=LIMITS,
        ),
    ] = Limits.max_answer_tokens,
    waiting: Annotated[
        int, typer.Option(min=1, help="Maximum number of waiting requests per client.", rich_help_panel=LIMITS)
    ] = Limits.max_waiting,
    each: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of requests of one client in the batch. Default: --rows.",
            rich_help_panel=LIMITS,
        ),
    ] = Limits.max_rows_per_client,
    per_minute: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of tokens, of prompts and answers, per key and minute. Default: no limit.",
            rich_help_panel=LIMITS,
        ),
    ] = None,
) -> None:
    """Serve the personal models of a run over HTTP, with OpenAI's API.

    RUN is a run's folder, or the adapter folder of one model. One base in memory serves all clients: a request selects
    the client in its `model` field, and requests of different clients are decoded in one batch, each with its client's
    adapter. Press Ctrl-C to stop.

      fedamole serve RUN

      curl http://127.0.0.1:8000/v1/models

    Without keys, the server only listens on this machine. To serve other machines, create keys, give each client its
    own, and use TLS:

      fedamole serve RUN --make-keys keys.json

      fedamole serve RUN --host 0.0.0.0 --keys keys.json --certs certs
    """
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            from fedamole.errors import FedamoleError, how_to_install

            raise FedamoleError(f"serving needs {package}, which is not installed; {how_to_install('serve')}")
    import torch

    from fedamole.personal.generate import evaluation_settings_of, prompt_format_of
    from fedamole.personal.saved_models import check_finished, open_bank, outside_reads
    from fedamole.serving.connections import listen
    from fedamole.serving.engine import InferenceEngine
    from fedamole.serving.keys import read_keys
    from fedamole.serving.models import with_same_spec
    from fedamole.serving.server import HttpServer
    from fedamole.serving.service import ServedModels, Service

    models = _select_models(run, client, variant)
    names = tuple(model.client for model in models)
    if make_keys is not None:
        _print_new_keys(make_keys, names)
        return
    check_finished(models[0], finished)
    _check_access(host, keys, certs)
    api_keys = None if keys is None else read_keys(keys)
    evaluation = evaluation_settings_of(models[0])
    listening = listen(host, port)
    if threads:
        torch.set_num_threads(threads)
    console = screen(error=True)
    note(console, outside_reads(models[0], False, base))
    bank, adapters = open_bank(models, device, base)
    limits = Limits(rows, tokens or evaluation.batch_tokens, longest, waiting, each)
    engine = InferenceEngine(bank, with_same_spec(adapters, names), limits)
    created = int(models[0].folder.stat().st_mtime)
    formats = tuple(map(prompt_format_of, models))
    served = ServedModels(names, created, evaluation.max_new_tokens, formats, api_keys, per_minute)
    server = HttpServer(Service(engine, served), certs)
    engine.start()
    host_name = f"[{host}]" if ":" in host else host
    address = f"{'http' if certs is None else 'https'}://{host_name}:{listening.getsockname()[1]}/v1"
    count = "1 model" if len(names) == 1 else f"{len(names)} models"
    console.print(f"{count} on {address}: {', '.join(names)}", soft_wrap=True)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C stops the server; everything is closed by then
        server.run([listening])
    console.print("stopped")


def _select_models(run: Path, clients: list[str] | None, variant: str | None) -> "tuple[SavedModel, ...]":
    from fedamole.personal.saved_models import find_model, saved_models

    if not clients:
        return saved_models(run, variant)
    return tuple(find_model(run, client, variant) for client in dict.fromkeys(clients))


def _print_new_keys(path: Path, clients: tuple[str, ...]) -> None:
    """Create keys and print the new ones to standard output, one per line."""
    from fedamole.serving.keys import make_keys

    new_keys = make_keys(path, clients)
    for client, key in new_keys.items():
        say(f"{client} {key}")
    existing = len(clients) - len(new_keys)
    text = (
        f"{path}: {len(new_keys)} new keys, {existing} existing ones unchanged; "
        "give each client its key now, because keys cannot be shown again"
    )
    screen(error=True).print(text, soft_wrap=True)


def _check_access(host: str, keys: Path | None, certs: Path | None) -> None:
    """Raise ConfigError for settings without access control, and warn about unencrypted connections."""
    from fedamole.errors import ConfigError
    from fedamole.serving.connections import is_loopback

    if certs is not None:
        for name in ("server.crt", "server.key"):
            if not (certs / name).exists():
                raise ConfigError(
                    f"--certs {certs}: {name} is missing; create it with `fedamole certs --folder {certs}`"
                )
    if is_loopback(host):
        return
    if keys is None:
        raise ConfigError(
            f"--host {host} is reachable from other machines, so keys are required: create them with --make-keys FILE, "
            "then pass --keys FILE"
        )
    if certs is None:
        text = "without --certs, keys and texts are sent unencrypted; put a TLS proxy in front of this server"
        screen(error=True).print(f"warning: {text}", style="yellow", soft_wrap=True)
