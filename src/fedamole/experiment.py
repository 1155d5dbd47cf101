"""From a config to a run: the only place where everything is put together."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch

from fedamole.config import Config, load_config
from fedamole.data.manifest import Federation, Manifest, load_federation, read_manifest
from fedamole.engine.in_process import InProcess
from fedamole.errors import ConfigError
from fedamole.federation.loop import Loop, Watcher
from fedamole.federation.method import Client, Evaluates, Server, Trained
from fedamole.federation.record import pack
from fedamole.federation.run_folder import CONFIG, MANIFEST, RunFolder
from fedamole.federation.worker import ClientData, Worker, client_data
from fedamole.model.bank import Bank
from fedamole.model.base import Base, Identity, load_base, resolve_device
from fedamole.model.params import Adapter
from fedamole.reporting.tensorboard import TensorBoardMirror


def rows_of(config: Config) -> dict[str, Evaluates]:
    """Names of the models a run scores, and when each comes to be: fedit, and fedit_ft where it is asked for."""
    rows: dict[str, Evaluates] = {config.method_name: config.method.evaluates}
    if config.evaluation.before_aggregation:
        if config.method.evaluates == "trained":
            raise ConfigError(
                f"evaluation.before_aggregation = true: {config.method_name} is scored before the aggregation anyway; "
                "remove it"
            )
        rows[f"{config.method_name}_ft"] = "trained"
    return rows


def resolved(config: Config, folder: Path) -> Config:
    """Spell out what depends on this machine, so that a resumed run uses the same: device, threads, folder."""
    device = resolve_device(config.run.device)
    threads = config.run.threads or torch.get_num_threads()
    run = dataclasses.replace(config.run, device=str(device), threads=threads, folder=str(folder))
    return dataclasses.replace(config, run=run)


def free_folder(config: Config) -> Path:
    """Folder of a new run: the one asked for, or the first of runs/<name>, runs/<name>-2, ... that is free."""
    if config.run.folder:
        return Path(config.run.folder)
    path, number = Path("runs") / config.run.name, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{config.run.name}-{number}"
    return path


@dataclass(frozen=True)
class Prepared:
    """What a run needs, checked before anything runs."""

    config: Config
    base: Base
    federation: Federation
    clients: dict[str, ClientData]


def prepare(config: Config, manifest: Manifest | None = None) -> Prepared:
    """Load base and data and check that the method can serve these clients."""
    torch.set_num_threads(config.run.threads)
    rows_of(config)
    federation = load_federation(config.data, Path.cwd(), manifest)
    config.method.check(len(federation.shards))
    base = load_base(config.base, torch.device(config.run.device), Path.cwd())
    longest = config.training.max_length
    if longest > base.max_positions:
        raise ConfigError(
            f"training.max_length = {longest}: this base has {base.max_positions} positions; lower it"
        )
    clients = {shard.client: client_data(shard, base.tokenizer, longest) for shard in federation.shards}
    return Prepared(config, base, federation, clients)


def start(config: Config, folder: Path, watcher: Watcher) -> dict[str, Any]:
    """Run a config in a new folder; return the summary."""
    RunFolder(folder).refuse_existing()
    config = resolved(config, folder.resolve())
    prepared = prepare(config)
    run = RunFolder.create(
        folder, tomli_w.dumps(config.tables()), prepared.federation.manifest.to_json(), config.method_name,
        prepared.base.identity,
    )
    return _run(prepared, run, watcher)


def resume(path: Path, watcher: Watcher) -> dict[str, Any]:
    """Continue a run from its last intact checkpoint; return the summary."""
    folder = RunFolder.open(path)
    if folder.finished:
        return folder.read_json("summary.json")
    config = load_config(path / CONFIG)
    prepared = prepare(config, read_manifest(path / MANIFEST))
    Identity(**folder.about["base"]).check(prepared.base.identity, "the base that base.model names now")
    return _run(prepared, folder, watcher)


def _run(prepared: Prepared, folder: RunFolder, watcher: Watcher) -> dict[str, Any]:
    config = prepared.config
    rows = rows_of(config)
    worker = Worker(
        Bank(prepared.base), config.method, rows, config.training, config.evaluation, folder, config.run.seed
    )
    mirror = TensorBoardMirror(folder.path / "tensorboard") if config.run.tensorboard else None
    with folder.locked():
        loop = Loop(
            config.method, rows, InProcess(worker, prepared.clients, watcher), prepared.base.shapes,
            config.federation, folder,
            seed=config.run.seed, select=config.evaluation.select, watcher=watcher, mirror=mirror,
        )
        return loop.run()


@dataclass(frozen=True)
class Plan:
    """What a run would do, without running it."""

    clients: tuple[dict[str, Any], ...]
    """Name, task, and size of each split."""
    base: str
    base_parameters: int
    targets: int
    """Adapted linears."""
    adapter_parameters: float
    """Mean over the clients, in round 0."""
    bytes_down: float
    """Mean per client and round; what comes back up is about as much."""
    memory_mib: float
    """Estimate: base, the largest client's adapter with gradient and Adam state, and one batch's activations."""
    steps: float
    """Mean optimiser steps of a client per round."""
    rounds: int
    clients_per_round: int


def plan(config: Config) -> Plan:
    """Work out sizes, feasibility, parameters and traffic of a run without running anything."""
    config = resolved(config, free_folder(config))
    prepared = prepare(config)
    base, method = prepared.base, config.method
    infos = tuple(prepared.clients[name].info for name in sorted(prepared.clients))
    server = Server(base.shapes, infos, config.run.seed)
    state = method.init(server)
    messages = {info.name: method.message(state, info) for info in infos}
    adapters = []
    for info in infos:
        client = Client(info, base.shapes, config.run.seed, 0, _never)
        adapters.append(method.adapter(client, method.first_keep(client), messages[info.name]).parameters())
    return Plan(
        clients=tuple(_client_row(prepared.clients[info.name]) for info in infos),
        base=base.name,
        base_parameters=sum(weight.numel() for weight in base.model.parameters()),
        targets=len(base.shapes),
        adapter_parameters=_mean(adapters),
        bytes_down=_mean([len(pack(message)) for message in messages.values()]),
        memory_mib=_memory_mib(config, base, max(adapters)),
        steps=_mean([config.training.steps(info.examples) for info in infos]),
        rounds=config.federation.rounds,
        clients_per_round=max(1, round(config.federation.cohort * len(infos))),
    )


def _never(_: Adapter) -> Trained:
    raise RuntimeError("a plan trains nothing")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _client_row(data: ClientData) -> dict[str, Any]:
    task = "classification" if data.train.examples[0].options else "generation"
    sizes = {name: len(getattr(data, name).rows) for name in ("train", "embedding", "validation", "test")}
    return {"client": data.info.name, "task": task, **sizes}


def _memory_mib(config: Config, base: Base, adapter_parameters: int) -> float:
    """Rough: weights; 16 bytes per adapter number; about 24 values per token and hidden unit of every layer; logits."""
    weights = list(base.model.parameters())
    text = base.model.config.get_text_config()
    tokens = config.training.batch_size * config.training.max_length
    item = weights[0].element_size()
    layers = 1 if config.base.gradient_checkpointing else text.num_hidden_layers
    activations = tokens * (24 * layers * text.hidden_size * item + text.vocab_size * (item + 4))
    held = sum(weight.numel() * weight.element_size() for weight in weights)
    total: float = held + 16 * adapter_parameters + activations
    return total / 2**20
