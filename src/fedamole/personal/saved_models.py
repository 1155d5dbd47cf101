"""Personal models found again: in a run's folder, or in a copy of one's adapter folder, and put on their base."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedamole.config import Config, load_run_config, nearest
from fedamole.data.client_labels import client_labels
from fedamole.data.examples import Shard
from fedamole.data.manifest import load_federation, read_manifest
from fedamole.errors import BaseModelError, RunError
from fedamole.experiment import reads_outside
from fedamole.model.adapter_files import check_fits, read_config
from fedamole.model.bank import Bank
from fedamole.model.base import BUNDLED, Base, BaseSettings, is_elsewhere, load_base, resolve_device
from fedamole.model.continuation import continuation_of
from fedamole.model.params import Adapter
from fedamole.model.pretrained import CONFIG, load_adapter, read_identity
from fedamole.received.names import NAME
from fedamole.runs.checkpoint import rounds_done
from fedamole.runs.run_folder import MANIFEST, RUN, RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a personal model lies."""

    adapter: Path
    """Its adapter folder."""
    client: str
    run: RunFolder | None
    """The run it came from; None for an adapter folder that was copied elsewhere."""


def check_finished(place: Place, finished: bool = False) -> None:
    """Warn that a model's run is not finished, so that a later round may still give a better model.

    `finished` makes it a RunError. A copy of an adapter folder, away from its run, tells nothing of that.
    """
    run = place.run or _run_around(place.adapter)
    if run is None or run.finished:
        return
    done, rounds = rounds_done(run), run.tables()["federation"]["rounds"]
    warning = (
        f"{run.path} is not finished (round {done} of {rounds}): this is {place.client}'s best model so far, and a "
        "later round may give a better one"
    )
    if finished:
        how = "the coordinator goes on with it" if run.kind == "client" else f"`fedamole resume {run.path}` goes on"
        raise RunError(f"{warning}; {how}")
    log.warning(warning)


def _run_around(adapter: Path) -> RunFolder | None:
    """The run that an adapter folder lies in, as RUN/clients/NAME/adapter; None for a copy elsewhere."""
    parents = adapter.resolve().parents
    inside = len(parents) > 2 and parents[1].name == "clients" and (parents[2] / RUN).exists()
    return RunFolder.open(parents[2]) if inside else None


def places(path: Path, row: str | None = None) -> tuple[Place, ...]:
    """All personal models of a run's folder, in the order of their clients; or the one of an adapter folder.

    `row` is one of the run's models where it has several (fedit_ft beside fedit). Raises RunError where there is none.
    """
    if (path / CONFIG).exists():
        whole = path.resolve()
        # In a run's folder the client's folder has the name; a copy has whatever name it was given.
        return (Place(path, (whole.parent if whole.name.startswith("adapter") else whole).name, None),)
    if not (path / RUN).exists():
        raise RunError(f"{path}: neither a run's folder ({RUN}) nor a personal model's ({CONFIG}) is here")
    run = RunFolder.open(path)
    name = row or run.about["method"]
    clients = sorted(one.name for one in (path / "clients").glob("*") if one.is_dir() and not one.name.startswith("."))
    found = tuple(
        Place(run.adapter(client, name), client, run)
        for client in clients
        if (run.adapter(client, name) / CONFIG).exists()
    )
    if not found:
        why = (
            "a coordinator's folder holds no personal model, each is at its client"
            if run.kind == "server"
            else f"it has no saved model of {name!r}"
            if run.finished
            else _too_early(run)
        )
        raise RunError(f"{path}: {why}")
    return found


def _too_early(run: RunFolder) -> str:
    done, rounds = rounds_done(run), run.tables()["federation"]["rounds"]
    return f"the run is not finished (round {done} of {rounds}) and has no model yet: `fedamole resume {run.path}`"


def find(path: Path, client: str | None, row: str | None = None) -> Place:
    """The personal model of one client; `client` may be left out where there is only one. Raises RunError.

    A client of a partition by value may be named by its value too, or as tables call it.
    """
    found = {place.client: place for place in places(path, row)}
    if client is None and len(found) == 1:
        return next(iter(found.values()))
    if client is None:
        raise RunError(f"{path} has the models of {', '.join(found)}: name one by --client")
    if client in found:
        return found[client]
    if NAME.fullmatch(client) and (path / "clients" / client).is_dir():
        raise RunError(f"{client} never trained up to its best round in {path}: its model is the bare base")
    if (run := next(iter(found.values())).run) is not None:
        manifest = read_manifest(run.place(MANIFEST))
        values, labels = manifest.values(), client_labels(one.to_dict() for one in manifest.clients)
        named = [place for name, place in found.items() if client in (values.get(name), labels.get(name))]
        if len(named) == 1:
            return named[0]
        if named:
            names = ", ".join(place.client for place in named)
            raise RunError(f"{path} has several clients of the value {client!r}: name one of {names}")
    raise RunError(f"{path} has no client {client!r}{nearest(client, found)}; there are {', '.join(found)}")


def base_of(place: Place, device: str = "auto", base: str | None = None) -> Base:
    """Load the base that a personal model was trained on, and make sure that it is that one.

    `base` names a copy of it elsewhere than the run says. Raises BaseModelError and ConfigError.
    """
    settings = _settings_of(place.adapter) if place.run is None else load_run_config(place.run).base
    wanted = read_identity(place.adapter)
    absent = base is None and is_elsewhere(settings.model)
    # The bundled base lies elsewhere on another machine; whether it is the right one its identity tells.
    named = BUNDLED if absent else base or settings.model
    try:
        found = load_named(replace(settings, model=named), device, named_by_user=base is not None)
        found.identity.check(wanted, f"the adapter in {place.adapter}")
    except BaseModelError as error:
        if absent:
            told = f"{settings.model}, the base of {place.adapter}, is not here: name a copy of it by --base"
            raise BaseModelError(told) from error
        raise
    return found


def load_named(settings: BaseSettings, device: str, named_by_user: bool) -> Base:
    """Load a base; where only a file of a run names it, nothing is downloaded for it. Raises BaseModelError."""
    model = settings.model
    on_hub = model != BUNDLED and not Path(model).is_dir() and not model.startswith(("/", ".", "~"))
    try:
        return load_base(settings, resolve_device(device), Path.cwd(), local_only=on_hub and not named_by_user)
    except BaseModelError as error:
        if not on_hub or named_by_user:
            raise
        raise BaseModelError(
            f"{model!r}, the base that the run names, cannot be loaded from what is on this machine, and no file of a "
            f"run starts a download: name it yourself by --base {model}, or name a copy"
        ) from error


def own_shard(place: Place) -> tuple[Config, Shard]:
    """The config of a model's run and its client's own data, read again as config and manifest say; no other's are.

    Raises DataError where the data are gone or changed, RunError for an adapter folder without its run.
    """
    if place.run is None:
        raise RunError(f"{place.adapter} is a model without its data: name the run's folder, or give a --prompt")
    config = load_run_config(place.run)
    manifest = read_manifest(place.run.place(MANIFEST)).only(place.client)
    source = tuple(one for one in config.data.source if one.name == manifest.clients[0].source)
    data = replace(config.data, source=source, manifest=None)
    return config, load_federation(data, Path.cwd(), manifest).shards[0]


def read_for(place: Place, own_data: bool, base: str | None = None) -> str:
    """A sentence on what a model's run makes a command read outside of the run's folder; empty where that is nothing.

    `own_data` tells whether the client's own data are read too, `base` whether the user has named the base.
    """
    if place.run is None:
        model = _settings_of(place.adapter).model
        foreign = base is None and Path(model).is_dir()
        return f"reads the base {Path(model).resolve()}, which {place.adapter / CONFIG} names" if foreign else ""
    sources: tuple[str, ...] = ()
    if own_data:
        sources = (read_manifest(place.run.place(MANIFEST)).only(place.client).clients[0].source,)
    config = load_run_config(place.run)
    elsewhere = is_elsewhere(config.base.model)  # then the bundled base is tried
    reads = reads_outside(config, place.run.path, sources, base=base is None and not elsewhere)
    return f"reads what {place.run.path} names outside that folder: {', '.join(reads)}" if reads else ""


def _settings_of(adapter: Path) -> BaseSettings:
    config = read_config(adapter)
    return BaseSettings(config["base_model_name_or_path"], tuple(config.get("target_modules") or ()))


def read_adapter(place: Place, base: Base) -> Adapter:
    """The checked adapter of a personal model, for this base and no other."""
    adapter = load_adapter(place.adapter, base.identity)
    check_fits(adapter, base.shapes, base.width, place.adapter)
    return adapter


def load_personal_model(
    path: str | Path,
    client: str | None = None,
    *,
    row: str | None = None,
    base: str | None = None,
    device: str = "auto",
    finished: bool = False,
) -> tuple[Any, Any]:
    """Load a client's personal model as a PeftModel, with its tokenizer.

    `path` is a run's folder, or an adapter folder wherever it was copied to; `row` one of the run's models where it
    has several; `base` a copy of the base elsewhere than the run says. A run that is not finished gives a warning, and
    a RunError with `finished`. Raises RunError, BaseModelError, ConfigError.
    """
    from peft import PeftModel

    place = find(Path(path), client, row)
    check_finished(place, finished)
    found = base_of(place, device, base)
    read_adapter(place, found)  # PEFT, which reads the same files, checks little of them
    # Otherwise `generate` would not know where an answer ends, or lose the prompt on some bases.
    found.model.generation_config.update(
        eos_token_id=found.tokenizer.eos_token_id, pad_token_id=found.pad_id, use_cache=continuation_of(found).caches
    )
    return PeftModel.from_pretrained(found.model, str(place.adapter)).eval(), found.tokenizer


def open_bank(found: Sequence[Place], device: str = "auto", base: str | None = None) -> tuple[Bank, list[Adapter]]:
    """One resident base for the personal models of one run, and their adapters, which are not loaded yet."""
    bank = Bank(base_of(found[0], device, base))
    return bank, [read_adapter(place, bank.base) for place in found]
