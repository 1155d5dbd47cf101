"""Builds a run from a config: the one place where base, data, method, engine and loop are put together."""

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch

from fedamole.config import Config, load_run_config
from fedamole.data.manifest import Federation, Manifest, TableRecord, load_federation, read_manifest
from fedamole.data.public import PublicRows, check_unchanged, load_public
from fedamole.data.templates import BUILT_IN
from fedamole.data.tokens import TokenRow
from fedamole.engine.in_process import InProcess
from fedamole.errors import BaseModelError, ConfigError, RunError, require_extra
from fedamole.federation.client_data import ClientData, client_data
from fedamole.federation.engine import Engine
from fedamole.federation.loop import Loop
from fedamole.federation.method import BaseInfo, ClientInfo, Evaluates, Server
from fedamole.federation.objective import check_objective
from fedamole.federation.privacy.profile import warn_not_applied
from fedamole.federation.private_worker import PrivateWorker
from fedamole.federation.probe import ProbeCounts
from fedamole.federation.progress import ProgressListener
from fedamole.federation.robust import BeforeAggregation, Robust
from fedamole.federation.secure.settings import refuse_deployment
from fedamole.federation.server_work import ServerWork
from fedamole.federation.worker import Worker
from fedamole.files import new_folder
from fedamole.model.bank import Bank
from fedamole.model.base import BUNDLED, Base, is_elsewhere, load_base, named_base, resolve_device
from fedamole.model.prompt import PromptSpec
from fedamole.model.second_base import load_second_base
from fedamole.model.weightless import weightless_base
from fedamole.planning import (
    Plan,
    PlanWithoutData,
    check_secure_groups,
    chosen_group,
    clients_without_data,
    planned,
    planned_without_data,
)
from fedamole.reporting.card import write_cards
from fedamole.runs.identity import Identity
from fedamole.runs.run_folder import MANIFEST, RunFolder
from fedamole.tracking.tracked import emptied_without_trackers, tracked
from fedamole.tracking.trackers import check_trackers


def variants_of(config: Config) -> dict[str, Evaluates]:
    """Return the scored models of a run with the moment of scoring: fedit, and fedit_ft if the config asks for it.

    Raises ConfigError if `evaluation.pre_aggregation` has no effect.
    """
    variants: dict[str, Evaluates] = {config.method_name: config.method.evaluates}
    if config.evaluation.pre_aggregation:
        if config.method.evaluates == "pre_aggregation":
            raise ConfigError(
                f"evaluation.pre_aggregation = true: {config.method_name} is scored before the aggregation anyway; "
                "remove it"
            )
        variants[f"{config.method_name}_ft"] = "pre_aggregation"
    return variants


def resolved(config: Config, folder: Path) -> Config:
    """Fill in device, threads and folder, which depend on this machine, so that a resumed run uses the same."""
    device = resolve_device(config.run.device)
    threads = config.run.threads or torch.get_num_threads()
    run = dataclasses.replace(config.run, device=str(device), threads=threads, folder=str(folder))
    return dataclasses.replace(config, run=run)


def settled(config: Config, deployed: bool) -> Config:
    """Replace settings that are "auto"; their values differ between a deployment and a run in one process."""
    federation, evaluation = config.federation, config.evaluation
    if federation.aggregation == "auto":
        federation = dataclasses.replace(federation, aggregation="clipped" if deployed else "mean")
    if evaluation.best_round == "auto":
        local = deployed or config.privacy is not None
        evaluation = dataclasses.replace(evaluation, best_round="client" if local else "mean")
    return dataclasses.replace(config, federation=federation, evaluation=evaluation)


def wanted_folder(config: Config) -> Path:
    """Return run.folder, or runs/<name>, to which `new_run_folder` adds a number if it exists."""
    return Path(config.run.folder) if config.run.folder else Path("runs") / config.run.name


@contextmanager
def new_run_folder(config: Config) -> Iterator[Path]:
    """Create the folder of a new run: run.folder, or the first of runs/<name>, runs/<name>-2, ... that is free.

    Runs that start at the same time get different folders. If the block fails, a folder that is still empty is
    removed. Raises RunError if run.folder is not empty.
    """
    wanted, numbered = wanted_folder(config), not config.run.folder
    if not numbered:
        RunFolder(wanted).refuse_existing()
    if not numbered and wanted.exists():
        yield wanted
        return
    with new_folder(wanted, numbered) as folder:
        yield folder


@dataclass(frozen=True)
class Prepared:
    """Checked inputs of a run."""

    config: Config
    base: Base
    federation: Federation
    clients: dict[str, ClientData]
    public: tuple[TokenRow, ...] = ()
    """The server's public prompts, for methods that need them."""
    second: Base | None = None
    """The server's second base, for methods that have one."""


def check_public(config: Config) -> None:
    """Raise ConfigError if the method needs public prompts at the server and the config names none."""
    if config.method.needs_public_prompts and config.data.public is None:
        raise ConfigError(
            f"method.name = {config.method_name!r}: its server needs public prompts; add [data.public] with path = "
            "<file of prompts that belong to no client>"
        )


def public_rows(config: Config, base: Base, stored: TableRecord | None) -> PublicRows | None:
    """Return the server's public prompts, or None for a method that needs none.

    `stored` is the record of those that the run was started with. Raises DataError if they are not the same.
    """
    if not config.method.needs_public_prompts:
        return None
    public = load_public(config.data, Path.cwd(), base.tokenizer, config.training.max_length)
    if stored is not None:
        check_unchanged(public.record, stored)
    return public


def second_base(config: Config, base: Base, stored: Identity | None) -> Base | None:
    """Return the server's second base, or None for a method without one; see `load_second_base`."""
    model = config.method.second_base()
    if not model:
        return None
    return load_second_base(model, config.base, base, Path.cwd(), config.training.max_length, stored)


def prepare(config: Config, manifest: Manifest | None = None, stored: Identity | None = None) -> Prepared:
    """Load base and data, and check that the method can serve these clients.

    `manifest` and `stored`, the identity of the server's second base, are those of a run that is resumed.
    """
    torch.set_num_threads(config.run.threads)
    variants_of(config)
    check_public(config)
    if not config.data.source:
        raise ConfigError(
            "data.source is empty, as in a deployment, where each organisation has its own data: use `fedamole server` "
            "to run it, `fedamole plan --without-data` to plan it"
        )
    federation = load_federation(config.data, Path.cwd(), manifest)
    config.method.check(len(federation.shards))
    check_objective(config.training, federation.shards)
    base = load_base(config.base, torch.device(config.run.device), Path.cwd())
    check_length(config, base)
    second = second_base(config, base, stored)
    max_length = config.training.max_length
    public = public_rows(config, base, federation.manifest.public)
    if public is not None:
        manifest = dataclasses.replace(federation.manifest, public=public.record)
        federation = dataclasses.replace(federation, manifest=manifest)
    clients = {shard.client: client_data(shard, base.tokenizer, max_length) for shard in federation.shards}
    check_secure_groups(config, base, [data.info for data in clients.values()])
    check_budget(config, clients)
    group = config.run.group or chosen_group(config, base, clients)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, group=group))
    return Prepared(config, base, federation, clients, () if public is None else public.rows, second)


def check_length(config: Config, base: Base) -> None:
    """Raise ConfigError if the base has too few positions for `training.max_length` and the virtual tokens."""
    max_length, spec = config.training.max_length, config.method.spec()
    virtual = spec.virtual_tokens if isinstance(spec, PromptSpec) else 0
    if max_length + virtual > base.max_positions:
        prompt = f" and method.virtual_tokens = {virtual}" if virtual else ""
        raise ConfigError(
            f"training.max_length = {max_length}{prompt}: this base has {base.max_positions} positions; "
            f"lower {'one of them' if virtual else 'it'}"
        )


def start(config: Config, folder: Path, listener: ProgressListener) -> dict[str, Any]:
    """Run a config in a new folder and return the summary."""
    RunFolder(folder).refuse_existing()
    check_trackers(config)
    warn_not_applied(config.not_from_profile)
    listener.stage("loading the data and the base")
    prepared = prepare(resolved(config, folder.resolve()))
    config = prepared.config
    run = RunFolder.create(
        folder,
        tomli_w.dumps(prepared.config.tables()),
        prepared.federation.manifest.to_json(),
        config.method_name,
        prepared.base.identity,
        second=None if prepared.second is None else prepared.second.identity,
    )
    with emptied_without_trackers(run):
        return _run(prepared, run, listener)


def resume(path: Path, listener: ProgressListener, base: str | None = None) -> dict[str, Any]:
    """Continue a run from its last intact checkpoint and return the summary.

    `base` names a copy of the run's base (folder, file or hub id) if the one in the config is gone; see `record_base`.
    Raises BaseModelError if the base is missing or has other weights.
    """
    folder = RunFolder.open(path)
    if folder.kind != "simulation":
        raise RunError(
            f"{path} is the {folder.kind}'s part of a deployment: continue it with `fedamole server --resume FOLDER` "
            "at the coordinator; clients need no command"
        )
    if base is not None:
        record_base(folder, base)
    if folder.finished:
        write_cards(folder)
        return folder.read_json("summary.json")
    config = load_run_config(folder)
    refuse_missing_base(config, path)
    check_trackers(config)
    listener.stage("loading the data and the base")
    prepared = prepare(config, read_manifest(folder.place(MANIFEST)), folder.second_base)
    prepared.base.identity.check(Identity(**folder.about["base"]), f"the run in {path}")
    return _run(prepared, folder, listener)


def record_base(folder: RunFolder, base: str) -> None:
    """Check that `base` (a folder, GGUF file or hub id) is a copy of a run's base, and record it in run.json.

    config.toml stays as it was written. Raises BaseModelError if the base is missing or is another one, and RunError
    while a process runs this run.
    """
    config = load_run_config(folder).on_base(named_base(base))
    with folder.locked():
        found = load_base(config.base, resolve_device(config.run.device), Path.cwd())
        found.identity.check(Identity(**folder.about["base"]), f"the run in {folder.path}")
        folder.move_base(config.base.model)


def refuse_missing_base(config: Config, path: Path) -> None:
    """Raise BaseModelError if the base of the run in `path` is a folder that does not exist."""
    if is_elsewhere(config.base.model):
        raise BaseModelError(f"{config.base.model}, the base of {path}, is not here: name a copy of it by --base")


def reads_outside(
    config: Config, folder: Path, sources: Collection[str] | None = None, base: bool = True
) -> tuple[str, ...]:
    """Describe what a command reads outside the run's folder because of the run's config, one text for each.

    `sources` are the names of the data sources that are read (None: all); `base` says whether the base is.
    """
    outside, top = [], os.path.realpath(folder)

    def add(kind: str, path: str) -> None:
        real = os.path.realpath(path)
        if os.path.commonpath([top, real]) != top:
            outside.append(f"{kind} {real}")

    second = config.method.second_base() if sources is None else ""
    for model in (*((config.base.model,) if base else ()), *((second,) if second else ())):
        if model != BUNDLED and (model.startswith("/") or Path(model).is_dir()):
            add("base", model)
        elif model != BUNDLED:
            outside.append(f"base {model} of the Hugging Face hub")
    public = config.data.public if sources is None and config.method.needs_public_prompts else None
    for source in (*config.data.source, *(() if public is None else (public.source(),))):
        if sources is None or source.name in sources:
            for path in (source.path, source.test):
                if path is not None:
                    add("data", path)
            if source.hub is not None:
                outside.append(f"data set {source.hub} of the Hugging Face hub")
    return tuple(dict.fromkeys(outside))


def worker_of(config: Config, bank: Bank, folder: RunFolder) -> Worker:
    """Return the worker that trains and scores clients on a base; their private states are in `folder`."""
    variants, settings = variants_of(config), (config.training, config.evaluation, folder, config.run.seed)
    if (budget := config.budget()) is not None:
        return PrivateWorker(budget, bank, config.method, variants, *settings)
    return Worker(bank, config.method, variants, *settings)


def check_budget(config: Config, clients: Mapping[str, ClientData]) -> None:
    """Raise ConfigError if a client cannot keep to the privacy budget in all rounds."""
    if (budget := config.budget()) is not None:
        every_turn = {name for name, it in {**BUILT_IN, **config.data.templates}.items() if it.every_turn}
        if conversations := [source.name for source in config.data.source if source.template in every_turn]:
            raise ConfigError(
                f"[privacy]: source {conversations[0]!r} trains on every assistant turn, but the guarantee is for "
                'single examples, not for conversations; use template = "chat"'
            )
        for name, data in clients.items():
            budget.check(name, len(data.train.rows))


def server_of(
    config: Config,
    base: Base,
    clients: Sequence[ClientInfo] = (),
    bank: Bank | None = None,
    public: Sequence[TokenRow] = (),
    second: Base | None = None,
) -> Server:
    """Return the `Server` that the server's half of a method works with before round 0.

    A method that trains at the server works on `bank`; `public` are its public prompts, `second` its second base.
    """
    rounds, seed, work = config.federation.rounds, config.run.seed, None
    if bank is not None and config.method.trains_at_server:
        work = ServerWork(bank, config.training, config.evaluation.batch_tokens, seed)
        if second is not None:
            work.second = dataclasses.replace(work, bank=Bank(second), counts=ProbeCounts(), notes={})
    return Server(BaseInfo.of(base), tuple(clients), seed, rounds=rounds, work=work, public=tuple(public))


def loop_of(config: Config, engine: Engine, server: Server, folder: RunFolder, listener: ProgressListener) -> Loop:
    """Return the round loop of a config over an engine."""
    config = settled(config, engine.deployed)
    federation, evaluation = config.federation, config.evaluation
    if engine.deployed:
        refuse_deployment(config.secure_aggregation)
        server = dataclasses.replace(server, max_weight_share=config.deployment.weight_share)
    assert evaluation.best_round != "auto"
    return Loop(
        config.method,
        variants_of(config),
        engine,
        server,
        federation,
        folder,
        select=evaluation.select,
        listener=listener,
        best_round=evaluation.best_round,
        robust=_before_aggregation(config, [client.name for client in server.clients]),
    )


def _before_aggregation(config: Config, clients: Sequence[str]) -> BeforeAggregation:
    """Return what replies pass through before the method aggregates them."""
    averaged = config.method.averaged_fields
    if config.secure_aggregation.enabled:
        require_extra("flower", "cryptography")
        from fedamole.federation.secure.simulation import SimulatedSecureAggregation

        return SimulatedSecureAggregation(config.secure_aggregation, averaged, clients)
    assert config.federation.aggregation != "auto"
    return Robust(config.federation.aggregation, config.federation.clip_factor, averaged)


def _run(prepared: Prepared, folder: RunFolder, listener: ProgressListener) -> dict[str, Any]:
    config, base = prepared.config, prepared.base
    worker = worker_of(config, Bank(base), folder)
    with folder.locked(), folder.session(), tracked(config, folder, listener) as listener:
        engine = InProcess(worker, prepared.clients, listener, config.run.group)
        server = server_of(config, base, engine.clients, worker.bank, prepared.public, prepared.second)
        summary = loop_of(config, engine, server, folder, listener).run()
        write_cards(folder)
    return summary


def plan(config: Config) -> Plan:
    """Return sizes, feasibility, parameters, traffic and memory of a run without running it."""
    prepared = prepare(resolved(config, wanted_folder(config)))
    return planned(prepared.config, prepared.base, prepared.clients)


def plan_without_data(config: Config) -> PlanWithoutData:
    """Return the same for a GPU from the config alone: no data are read, no base is loaded, nothing is downloaded."""
    variants_of(config)
    check_public(config)
    clients, assumed = clients_without_data(config.data, Path.cwd(), config.deployment.clients)
    config.method.check(len(clients))
    base = weightless_base(config.base, Path.cwd())
    check_length(config, base)
    return planned_without_data(config, base, clients, assumed)
