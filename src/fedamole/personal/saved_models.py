"""Find the personal models of a run, or a copied adapter folder, and load them on their base."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fedamole.config import Config, load_run_config
from fedamole.data.chat import stop_ids
from fedamole.data.client_labels import client_labels
from fedamole.data.examples import Shard
from fedamole.data.manifest import load_federation, read_manifest
from fedamole.errors import BaseModelError, RunError
from fedamole.experiment import reads_outside
from fedamole.model.adapter_files import check_fits, read_config
from fedamole.model.bank import Bank
from fedamole.model.base import BUNDLED, Base, BaseSettings, is_elsewhere, is_path, load_base, resolve_device
from fedamole.model.continuation import continuation_of
from fedamole.model.params import Adapter
from fedamole.model.pretrained import CONFIG, IDENTITY, load_adapter, read_identity
from fedamole.personal.hub import local_folder
from fedamole.received.names import NAME
from fedamole.runs.checkpoint import rounds_done
from fedamole.runs.identity import Identity
from fedamole.runs.run_files import CHOICE
from fedamole.runs.run_folder import MANIFEST, RUN, RunFolder

log = logging.getLogger(__name__)

BUNDLED_PATH = "fedamole/bundled/base"
"""End of the path of the bundled base on every machine."""


@dataclass(frozen=True)
class SavedModel:
    """The location of a personal model."""

    folder: Path
    """Its adapter folder."""
    client: str
    run: RunFolder | None
    """The run that it was trained in; None for an adapter folder that was copied out of its run."""
    choice: Path | None = None
    """The folder of `fedamole choose` that names the run, if any."""


def check_finished(model: SavedModel, finished: bool = False) -> None:
    """Warn if a model's run is not finished, because a later round may still give a better model.

    With `finished`, raise RunError instead. There is no check for an adapter folder that was copied out of its run.
    """
    run = model.run or _enclosing_run(model.folder)
    if run is None or run.finished:
        return
    done, rounds = rounds_done(run), run.tables()["federation"]["rounds"]
    warning = (
        f"{run.path} is not finished (round {done} of {rounds}): this is {model.client}'s best model so far, and a "
        "later round may give a better one"
    )
    if finished:
        remedy = (
            "the coordinator continues it" if run.kind == "client" else f"continue with `fedamole resume {run.path}`"
        )
        raise RunError(f"{warning}; {remedy}")
    log.warning(warning)


def _enclosing_run(adapter: Path) -> RunFolder | None:
    """The run that an adapter folder is part of, as RUN/clients/NAME/adapter; None for a copy elsewhere."""
    parents = adapter.resolve().parents
    inside = len(parents) > 2 and parents[1].name == "clients" and (parents[2] / RUN).exists()
    return RunFolder.open(parents[2]) if inside else None


def saved_models(path: Path, variant: str | None = None) -> tuple[SavedModel, ...]:
    """Return all personal models of a run folder or of a folder of `fedamole choose`, sorted by client.

    An adapter folder has one model. `variant` selects one of a run's models per client if there are several (fedit_ft
    besides fedit). Raises RunError if there is no model.
    """
    if (path / CONFIG).exists():
        resolved = path.resolve()
        # Inside a run folder, the parent is named after the client. A copy may have any name.
        return (SavedModel(path, (resolved.parent if resolved.name.startswith("adapter") else resolved).name, None),)
    if (path / CHOICE).exists():
        return _chosen_models(path, variant)
    if not (path / RUN).exists():
        raise RunError(f"{path}: neither a run's folder (no {RUN}) nor a personal model's (no {CONFIG})")
    run = RunFolder.open(path)
    name = variant or run.about["method"]
    clients = sorted(
        folder.name for folder in (path / "clients").glob("*") if folder.is_dir() and not folder.name.startswith(".")
    )
    models = tuple(
        SavedModel(run.adapter(client, name), client, run)
        for client in clients
        if (run.adapter(client, name) / CONFIG).exists()
    )
    if not models:
        reason = (
            "a coordinator's folder holds no personal models; they are saved at the clients"
            if run.kind == "server"
            else f"it has no saved model of {name!r}"
            if run.finished
            else _too_early(run)
        )
        raise RunError(f"{path}: {reason}")
    return models


def _chosen_models(path: Path, variant: str | None) -> tuple[SavedModel, ...]:
    """Return the models that a folder of `fedamole choose` names, each in the folder of its run."""
    if variant is not None:
        raise RunError(f"{path} has one chosen model for each client: leave out --variant")
    models = []
    for client, chosen in RunFolder(path).read_json(CHOICE)["clients"].items():
        if chosen["untuned"]:
            continue
        run_path = (path / chosen["run"]).resolve()
        if not (run_path / RUN).exists():
            raise RunError(
                f"{run_path}, the run that {client} chose, is missing: move the runs together with {path}, or repeat "
                "`fedamole choose`"
            )
        run = RunFolder.open(run_path)
        if run.about["id"] != chosen["id"]:
            raise RunError(f"{run.path} is not the run that {client} chose any more: repeat `fedamole choose`")
        folder = run.adapter(client, chosen["variant"])
        if not (folder / CONFIG).exists():
            raise RunError(f"{folder}, the model that {client} chose, is missing: put it back from a copy")
        models.append(SavedModel(folder, client, run, path))
    if not models:
        raise RunError(f"{path}: no client chose a trained model")
    return tuple(sorted(models, key=lambda model: model.client))


def _is_untuned(path: Path, client: str) -> bool:
    """Return whether a client has no model in a folder because it did not train up to the best round."""
    if (path / CHOICE).exists():
        chosen = RunFolder(path).read_json(CHOICE)["clients"]
        return client in chosen and bool(chosen[client]["untuned"])
    return NAME.fullmatch(client) is not None and (path / "clients" / client).is_dir()


def _too_early(run: RunFolder) -> str:
    done, rounds = rounds_done(run), run.tables()["federation"]["rounds"]
    return f"the run is not finished (round {done} of {rounds}) and has no model yet: `fedamole resume {run.path}`"


def find_model(path: Path, client: str | None, variant: str | None = None) -> SavedModel:
    """Return the personal model of one client; `client` may be None if there is only one model. Raises RunError.

    If the data were partitioned by value, a client may also be named by its value or by its label in tables.
    """
    models = {model.client: model for model in saved_models(path, variant)}
    if client is None and len(models) == 1:
        return next(iter(models.values()))
    if client is None:
        raise RunError(f"{path} has the models of {', '.join(models)}: select one with --client")
    if client in models:
        return models[client]
    if _is_untuned(path, client):
        raise RunError(
            f"{client} did not train in any round up to the best one in {path}: its model is the untuned base"
        )
    if (run := next(iter(models.values())).run) is not None:
        manifest = read_manifest(run.place(MANIFEST))
        values, labels = manifest.values(), client_labels(record.to_dict() for record in manifest.clients)
        matches = [model for name, model in models.items() if client in (values.get(name), labels.get(name))]
        if len(matches) == 1:
            return matches[0]
        if matches:
            names = ", ".join(model.client for model in matches)
            raise RunError(f"{path} has several clients with the value {client!r}: select one of {names}")
    close = "".join(f"; did you mean {name!r}?" for name in get_close_matches(client, models, n=1, cutoff=0.5))
    raise RunError(f"{path} has no client {client!r}{close}; its clients are {', '.join(models)}")


def base_settings_of(model: SavedModel) -> BaseSettings:
    """Return the settings of the base that a personal model was trained on, from its run or its adapter folder."""
    return _adapter_base(model.folder) if model.run is None else load_run_config(model.run).base


def load_base_for(model: SavedModel, device: str = "auto", base: str | None = None) -> Base:
    """Load the base that a personal model was trained on, and verify its identity.

    `base` is a folder, GGUF file or hub id to use instead of the one that the run names. Raises BaseModelError and
    ConfigError.
    """
    settings = base_settings_of(model)
    identity = stored_identity(model)
    missing = base is None and is_elsewhere(settings.model)
    if missing and identity is None and not settings.model.endswith(BUNDLED_PATH):
        raise BaseModelError(
            f"{settings.model}, the base of {model.folder}, is not on this machine: pass a copy with --base"
        )
    # The path of the bundled base differs between machines; its identity shows whether it is the right one.
    name = BUNDLED if missing else base or settings.model
    try:
        loaded = load_named(replace(settings, model=name), device, named_by_user=base is not None)
        if identity is not None:
            loaded.identity.check(identity, f"the adapter in {model.folder}")
    except BaseModelError as error:
        if missing:
            raise BaseModelError(
                f"{settings.model}, the base of {model.folder}, is not on this machine: pass a copy with --base"
            ) from error
        raise
    return loaded


def stored_identity(model: SavedModel) -> Identity | None:
    """Return the identity of the base that a personal model was trained on; None, with a warning, if it is unknown.

    `save_pretrained`, `Trainer.save_model` and the hub keep PEFT's files alone. In a run folder, run.json has the
    identity, too.
    """
    if (model.folder / IDENTITY).exists():
        return read_identity(model.folder)
    run = model.run or _enclosing_run(model.folder)
    if run is not None:
        return Identity(**run.about["base"])
    log.warning(
        "%s has no %s, so only names and sizes of the layers show that the base fits: copy this file from the adapter "
        "folder that was saved first, or make sure that the base is the right one",
        model.folder,
        IDENTITY,
    )
    return None


def load_named(settings: BaseSettings, device: str, named_by_user: bool) -> Base:
    """Load a base, without a download if only a run's files name it. Raises BaseModelError."""
    model = settings.model
    on_hub = model != BUNDLED and not Path(model).is_dir() and not is_path(model)
    try:
        return load_base(settings, resolve_device(device), Path.cwd(), local_only=on_hub and not named_by_user)
    except BaseModelError as error:
        if not on_hub or named_by_user:
            raise
        raise BaseModelError(
            f"{model!r}, the base that the run or the adapter names, is not on this machine, and a run's files may not "
            f"start a download: to download it, pass --base {model}, or pass the path of a copy"
        ) from error


def client_shard(model: SavedModel) -> tuple[Config, Shard]:
    """Return the config of a model's run and its client's data, read again as config and manifest specify.

    Only this client's data are read. Raises DataError if they are missing or changed, and RunError for an adapter
    folder without its run.
    """
    if model.run is None:
        raise RunError(f"{model.folder} is a model without its data: name the run's folder, or pass a --prompt")
    config = load_run_config(model.run)
    manifest = read_manifest(model.run.place(MANIFEST)).only(model.client)
    source = tuple(source for source in config.data.source if source.name == manifest.clients[0].source)
    data = replace(config.data, source=source, manifest=None)
    return config, load_federation(data, Path.cwd(), manifest).shards[0]


def outside_reads(model: SavedModel, own_data: bool, base: str | None = None) -> str:
    """Describe in a sentence which files outside the run folder a command reads because the run names them.

    Empty if there are none. `own_data`: whether the command reads the client's data; `base`: the user's --base.
    """
    if model.run is None:
        name = _adapter_base(model.folder).model
        outside = base is None and Path(name).is_dir()
        return f"reads the base {Path(name).resolve()}, which {model.folder / CONFIG} names" if outside else ""
    sources: tuple[str, ...] = ()
    if own_data:
        sources = (read_manifest(model.run.place(MANIFEST)).only(model.client).clients[0].source,)
    config = load_run_config(model.run)
    missing = is_elsewhere(config.base.model)  # the bundled base is loaded instead
    reads: tuple[str, ...] = () if model.choice is None else (f"model {model.folder}",)
    reads += reads_outside(config, model.run.path, sources, base=base is None and not missing)
    return f"reads files outside {model.choice or model.run.path}: {', '.join(reads)}" if reads else ""


def _adapter_base(adapter: Path) -> BaseSettings:
    """The base that an adapter folder names."""
    config = read_config(adapter)
    return BaseSettings(config["base_model_name_or_path"], tuple(config.get("target_modules") or ()))


def read_adapter(model: SavedModel, base: Base) -> Adapter:
    """Load the adapter of a personal model. Raises BaseModelError if it was not trained on this base."""
    adapter = load_adapter(model.folder, base.identity if (model.folder / IDENTITY).exists() else None)
    check_fits(adapter, base, model.folder)
    return adapter


def load_personal_model(
    path: str | Path,
    client: str | None = None,
    *,
    variant: str | None = None,
    base: str | None = None,
    device: str = "auto",
    finished: bool = False,
    is_trainable: bool = False,
) -> tuple[Any, Any]:
    """Load a client's personal model as a PEFT model.

    Args:
        path: A run's folder; an adapter folder, which may have been copied elsewhere, or saved again by PEFT or
            transformers; or the id of an adapter on the Hugging Face hub, such as `user/repo`.
        client: The client; may be left out if there is only one model.
        variant: Which of the run's models, if it has several per client (`fedit_ft` besides `fedit`).
        base: Folder, GGUF file or hub id of the base, to use instead of the one that the run names.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        finished: Raise RunError if the run is not finished. By default, that is only a warning.
        is_trainable: Whether the adapter's parameters require gradients, to train the model further with PEFT or
            transformers. The base stays frozen.

    Returns:
        The `PeftModel`, in evaluation mode unless it is trainable, and its tokenizer.

    Raises:
        RunError: There is no such run, client or model.
        BaseModelError: The base is missing, or is not the one that the adapter was trained on.
        ConfigError: An option is invalid.
    """
    from peft import PeftModel

    model = find_model(local_folder(path), client, variant)
    check_finished(model, finished)
    resident = load_base_for(model, device, base)
    read_adapter(model, resident)  # validates the files; PEFT, which reads them again, checks little
    # Without these settings `generate` does not know where an answer ends, and drops the prompt on some bases.
    stops = stop_ids(resident.tokenizer)
    resident.model.generation_config.update(
        eos_token_id=stops[0] if len(stops) == 1 else list(stops),
        pad_token_id=resident.pad_id,
        use_cache=continuation_of(resident).caches,
    )
    peft_model = PeftModel.from_pretrained(resident.model, str(model.folder), is_trainable=is_trainable)
    return peft_model.train(is_trainable), resident.tokenizer


def open_bank(
    models: Sequence[SavedModel], device: str = "auto", base: str | None = None
) -> tuple[Bank, list[Adapter]]:
    """Load the base of the models of one run, and their adapters, which are not yet loaded into the bank."""
    bank = Bank(load_base_for(models[0], device, base))
    return bank, [read_adapter(model, bank.base) for model in models]
