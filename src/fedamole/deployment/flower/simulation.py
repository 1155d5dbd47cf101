"""Flower's simulation: a deployed run whose clients are processes of Ray, for several GPUs or a cluster.

It does the same as a deployment, except for certificates, keys and network: the coordinator's loop, a client handler
with its own run folder for each client, and the messages between them. A client's data are its part of the config's
sources, partitioned as by `fedamole run`, so both ways produce the same models.
"""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedamole.config import Config, load_config, load_run_config
from fedamole.data.manifest import load_federation, read_manifest
from fedamole.deployment.client_handler import ClientHandler
from fedamole.deployment.flower.content import from_array_record, reply_content
from fedamole.deployment.flower.link import FlowerLink
from fedamole.deployment.processes import OFFLINE
from fedamole.deployment.run_session import ClientSettings
from fedamole.deployment.security.policy import UNBOUNDED
from fedamole.deployment.server_processes import prepare_folder
from fedamole.deployment.server_run import SETTINGS, coordinate
from fedamole.errors import ConfigError
from fedamole.federation.progress import ProgressListener
from fedamole.files import write_atomic
from fedamole.model.bank import Bank
from fedamole.model.base import BaseSettings, load_base, resolve_device
from fedamole.runs.run_folder import RUN, SERVER, RunFolder

SITES = f"{SERVER}/sites"
"""Folder of the clients' run folders and partitions, relative to the run folder."""


class StatelessClientHandler(ClientHandler):
    """A client handler for one message: all state is on disk, so any process can handle the next message."""

    def answer(self, payload: bytes) -> bytes:
        """Handle a request, then unlock the client's folder for the next process."""
        try:
            return super().answer(payload)
        finally:
            self._close_session()

    def _load_bank(self, config: Config) -> Bank:
        return _cached_bank(config.base, config.run.device)


@functools.cache
def _cached_bank(settings: BaseSettings, device: str) -> Bank:
    """Return this Ray process's base, which its clients use one at a time."""
    return Bank(load_base(settings, resolve_device(device), Path.cwd()))


def prepare_simulation(config: Config, folder: Path) -> None:
    """Prepare a run in a new folder: the server's settings, and each client's part of the data as a partition."""
    federation = load_federation(config.data, Path.cwd())
    names = tuple(shard.client for shard in federation.shards)
    if not names:
        raise ConfigError("data.source is empty: it defines the clients of a simulation")
    deployment = replace(config.deployment, clients=names, min_clients=min(config.deployment.min_clients, len(names)))
    prepare_folder(replace(config, deployment=deployment), folder, one_owner=True)
    for name in names:
        write_atomic(_partition_of(folder, name), federation.manifest.only(name).to_json())


def _partition_of(folder: Path, name: str) -> Path:
    return folder / SITES / f"{name}.json"


def _settings_of(folder: Path, name: str, base: str) -> ClientSettings:
    config, manifest = load_config(folder / SERVER / SETTINGS, stored=True), _partition_of(folder, name)
    source = read_manifest(manifest).clients[0].source
    (source_settings,) = (candidate for candidate in config.data.source if candidate.name == source)
    return ClientSettings(
        source_settings,
        str(folder / SITES),
        base,
        config.run.device,
        config.run.threads,
        name=name,
        manifest=str(manifest),
        policy=UNBOUNDED,
    )


def simulate(folder: Path, on_progress: Callable[[dict[str, Any]], None], cpus: int, gpus: float) -> None:
    """Start or resume the run prepared in a folder; `cpus` and `gpus` are the resources of each client.

    Raises the errors of the run.
    """
    os.environ.update(OFFLINE | {"RAY_USAGE_STATS_ENABLED": "0"})
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.WARNING)
    folder, errors = folder.resolve(), list[Exception]()
    started = (folder / RUN).exists()
    config = (
        load_run_config(RunFolder.open(folder)) if started else load_config(folder / SERVER / SETTINGS, stored=True)
    )
    names, base = config.deployment.clients, config.base.model
    server, client = ServerApp(), ClientApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            coordinate(FlowerLink(grid), folder, on_progress)
        except Exception as error:  # raised again in the main thread
            errors.append(error)

    @client.query()
    def answer(message: Message, context: Context) -> Message:
        name = names[int(str(context.node_config["partition-id"]))]
        handler = StatelessClientHandler(_settings_of(folder, name, base), ProgressListener())
        reply = handler.answer(from_array_record(message.content.array_records["request"]))
        return Message(reply_content(reply), reply_to=message)

    resources: dict[str, Any] = {"client_resources": {"num_cpus": cpus, "num_gpus": gpus}}
    run_simulation(server, client, len(names), backend_config=resources)
    if errors:
        raise errors[0]
