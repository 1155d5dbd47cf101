"""Flower's simulation: a deployed run whose clients live in Ray's processes, for several GPUs or a cluster.

What a deployment does is done here, but for certificates, keys and a network: the coordinator's loop, the clients' half
of it with a run folder for each, and the messages between them. A client's data are its part of the config's sources,
drawn as `fedamole run` draws them, so that both ways end in the same models.
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

from fedamole.config import Config, load_config
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
from fedamole.runs.run_folder import SERVER

SITES = f"{SERVER}/sites"
"""Where the clients' own run folders and partitions lie, in the run's folder."""


class StatelessClientHandler(ClientHandler):
    """A client for one message: its state is on disk, so that any process can take the next one."""

    def answer(self, payload: bytes) -> bytes:
        """Do what is asked, and leave the client's folder to whichever process is next."""
        try:
            return super().answer(payload)
        finally:
            self._close_session()

    def _load_bank(self, config: Config) -> Bank:
        return _resident(config.base, config.run.device)


@functools.cache
def _resident(settings: BaseSettings, device: str) -> Bank:
    """The base of one of Ray's processes, which all clients that come to it use one after the other."""
    return Bank(load_base(settings, resolve_device(device), Path.cwd()))


def prepare_simulation(config: Config, folder: Path) -> None:
    """Lay a run ready in a new folder: the server's settings, and each client's part of the data as a partition."""
    federation = load_federation(config.data, Path.cwd())
    names = tuple(shard.client for shard in federation.shards)
    if not names:
        raise ConfigError("data.source is empty: a simulation takes its clients from there")
    deployment = replace(config.deployment, clients=names, min_clients=min(config.deployment.min_clients, len(names)))
    prepare_folder(replace(config, deployment=deployment), folder, one_owner=True)
    for name in names:
        write_atomic(_partition_of(folder, name), federation.manifest.only(name).to_json())


def _partition_of(folder: Path, name: str) -> Path:
    return folder / SITES / f"{name}.json"


def _settings_of(folder: Path, name: str) -> ClientSettings:
    config, manifest = load_config(folder / SERVER / SETTINGS), _partition_of(folder, name)
    source = read_manifest(manifest).clients[0].source
    (own,) = (one for one in config.data.source if one.name == source)
    return ClientSettings(
        own,
        str(folder / SITES),
        config.base.model,
        config.run.device,
        config.run.threads,
        name=name,
        manifest=str(manifest),
        policy=UNBOUNDED,
    )


def simulate(folder: Path, on_progress: Callable[[dict[str, Any]], None], cpus: int, gpus: float) -> None:
    """Begin the run that lies ready in a folder, or go on with it; `cpus` and `gpus` are what each client is given.

    Errors are those of the run.
    """
    os.environ.update(OFFLINE | {"RAY_USAGE_STATS_ENABLED": "0"})
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.WARNING)
    folder, errors = folder.resolve(), list[Exception]()
    names = load_config(folder / SERVER / SETTINGS).deployment.clients
    server, client = ServerApp(), ClientApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            coordinate(FlowerLink(grid), folder, on_progress)
        except Exception as error:  # raised again where somebody reads it, as this is a thread of Flower's
            errors.append(error)

    @client.query()
    def answer(message: Message, context: Context) -> Message:
        name = names[int(str(context.node_config["partition-id"]))]
        reply = StatelessClientHandler(_settings_of(folder, name), ProgressListener()).answer(
            from_array_record(message.content.array_records["request"])
        )
        return Message(reply_content(reply), reply_to=message)

    resources: dict[str, Any] = {"client_resources": {"num_cpus": cpus, "num_gpus": gpus}}
    run_simulation(server, client, len(names), backend_config=resources)
    if errors:
        raise errors[0]
