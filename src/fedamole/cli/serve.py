"""The command `fedamole serve`. Heavy libraries are imported inside it."""

import contextlib
import importlib.util
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedamole.cli.personal import MODEL, BaseName, Device, Finished, Variant, note
from fedamole.serving.scheduling import Limits
from fedamole.terminal import log_bare_lines, say, screen

if TYPE_CHECKING:
    from fedamole.personal.saved_models import SavedModel

ACCESS, LIMITS = "Address and access", "Limits"
"""Panels of options in the help."""


def serve(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Folders of runs, or adapter folders of single personal models.", show_default=False
        ),
    ],
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
    cors: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin of a web page whose scripts may use the models, such as http://localhost:3000; repeatable.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    metrics: Annotated[
        bool,
        typer.Option(
            "--metrics",
            help="Serve /metrics for Prometheus. With --make-keys: also create its key.",
            rich_help_panel=ACCESS,
        ),
    ] = False,
    log_requests: Annotated[
        bool,
        typer.Option("--log-requests", help="Log a line for each request, without its texts.", rich_help_panel=ACCESS),
    ] = False,
    docs_page: Annotated[
        bool,
        typer.Option(
            "--docs-page",
            help="Serve /docs, a page on which a browser can try the API. It loads Swagger UI from the internet.",
            rich_help_panel=ACCESS,
        ),
    ] = False,
    client: Annotated[
        list[str] | None,
        typer.Option(
            help="Serve only this client's model; repeatable. With several runs: RUN/CLIENT.", rich_help_panel=MODEL
        ),
    ] = None,
    chat_column: Annotated[
        list[str] | None,
        typer.Option(
            help="COLUMN or MODEL=COLUMN: the last message of a chat fills this column of the client's template; "
            "repeatable.",
            rich_help_panel=MODEL,
        ),
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
    drain: Annotated[
        float,
        typer.Option(
            min=0,
            max=86400,
            help="Seconds that open requests have to finish when the server stops; new ones are refused.",
            rich_help_panel=LIMITS,
        ),
    ] = 30.0,
    per_minute: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of tokens, of prompts and answers, per key and minute. Default: no limit.",
            rich_help_panel=LIMITS,
        ),
    ] = None,
) -> None:
    """Serve the personal models of runs over HTTP, with OpenAI's API.

    RUN is a run's folder, or the adapter folder of one model. One base in memory serves all clients: a request selects
    the client in its `model` field (RUN/CLIENT with several runs), and requests of different clients are decoded in one
    batch, each with its client's adapter. Press Ctrl-C to stop when open requests are finished, twice to stop at once.

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

    from fedamole.personal.generate import evaluation_settings_of
    from fedamole.personal.saved_models import check_finished, outside_reads
    from fedamole.serving.connections import listen
    from fedamole.serving.keys import read_keys
    from fedamole.serving.models import open_models
    from fedamole.serving.served_models import METRICS_OWNER, ServiceSettings
    from fedamole.serving.server import HttpServer
    from fedamole.serving.service import Service

    saved = _select_models(runs, client, variant)
    names = tuple(name for name, _ in saved)
    if make_keys is not None:
        _print_new_keys(make_keys, (*names, METRICS_OWNER) if metrics else names)
        return
    models = {model.run.path if model.run else model.folder: model for _, model in saved}  # one for each run
    for model in models.values():
        check_finished(model, finished)
    origins = _check_access(host, keys, certs, cors or [])
    api_keys = None if keys is None else read_keys(keys)
    listening = listen(host, port)
    if threads:
        torch.set_num_threads(threads)
    console = screen(error=True)
    for model in models.values():
        note(console, outside_reads(model, False, base))
    max_tokens = tokens or evaluation_settings_of(saved[0][1]).batch_tokens
    limits = Limits(rows, max_tokens, longest, waiting, each)
    served = open_models(saved, limits, device, base, chat_column or [])
    if log_requests:
        log_bare_lines(logging.getLogger("fedamole.serving.metrics"))
    settings = ServiceSettings(api_keys, per_minute, origins, metrics, log_requests, docs_page)
    service = Service(served, settings)
    server = HttpServer(service, certs, drain)
    if len(service.models.engines) > 1:
        text = f"{len(service.models.engines)} bases are loaded, because the models have different bases or kinds"
        console.print(text, soft_wrap=True)
    for engine in service.models.engines:
        engine.start()
    host_name = f"[{host}]" if ":" in host else host
    address = f"{'http' if certs is None else 'https'}://{host_name}:{listening.getsockname()[1]}/v1"
    count = "1 model" if len(names) == 1 else f"{len(names)} models"
    console.print(f"{count} on {address}: {', '.join(names)}", soft_wrap=True)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C stops the server; everything is closed by then
        server.run([listening])
    console.print("stopped")


def _select_models(runs: list[Path], clients: list[str] | None, variant: str | None) -> "list[tuple[str, SavedModel]]":
    """Return the selected models with their names: the client, or run/client with several runs."""
    from fedamole.config import nearest
    from fedamole.errors import RunError
    from fedamole.personal.saved_models import find_model, saved_models
    from fedamole.serving.models import run_names

    only = list(dict.fromkeys(clients or []))
    if len(runs) == 1:
        if not only:
            return [(model.client, model) for model in saved_models(runs[0], variant)]
        selected = [find_model(runs[0], client, variant) for client in only]
        return [(model.client, model) for model in selected]
    named = {
        f"{name}/{model.client}": model
        for name, run in zip(run_names(runs), runs, strict=True)
        for model in saved_models(run, variant)
    }
    for client in only:
        if client not in named:
            known = ", ".join(named)
            raise RunError(f"--client {client}: there is no such model{nearest(client, named)}; the models are {known}")
    return [(name, model) for name, model in named.items() if not only or name in only]


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


def _check_access(host: str, keys: Path | None, certs: Path | None, origins: list[str]) -> tuple[str, ...]:
    """Return the origins of web pages without a slash at the end, and warn about unencrypted connections.

    Raises ConfigError for settings without access control.
    """
    from fedamole.errors import ConfigError
    from fedamole.serving.connections import is_loopback

    for origin in origins:
        if origin == "*" and keys is None:
            raise ConfigError("--cors '*' lets any web page use the models: name the origins, or require --keys")
        if origin != "*" and not re.fullmatch(r"https?://[^/\s*?#]+/?", origin):
            raise ConfigError(f"--cors {origin}: write an origin, such as http://localhost:3000, or '*'")
    checked = tuple(origin.rstrip("/") for origin in origins)
    if certs is not None:
        for name in ("server.crt", "server.key"):
            if not (certs / name).exists():
                raise ConfigError(
                    f"--certs {certs}: {name} is missing; create it with `fedamole certs --folder {certs}`"
                )
    if is_loopback(host):
        return checked
    if keys is None:
        raise ConfigError(
            f"--host {host} is reachable from other machines, so keys are required: create them with --make-keys FILE, "
            "then pass --keys FILE"
        )
    if certs is None:
        text = "without --certs, keys and texts are sent unencrypted; put a TLS proxy in front of this server"
        screen(error=True).print(f"warning: {text}", style="yellow", soft_wrap=True)
    return checked
