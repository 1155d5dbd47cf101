"""Merge personal models of a finished run, or LoRA folders of one base, into one LoRA that plain PEFT loads."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fedamole.errors import ConfigError
from fedamole.evaluation.likelihood import mean_losses
from fedamole.federation.client_data import client_data
from fedamole.federation.probe import ClientProbe, ProbeCounts
from fedamole.federation.randomness import torch_generator
from fedamole.files import new_folder, write_atomic
from fedamole.merging.adapters import adapter_of, factors_of
from fedamole.merging.low_rank import LoraFactors, check_same_modules
from fedamole.merging.recipes import merge_dare, merge_linear, merge_regmean, merge_svd, merge_ties
from fedamole.merging.selective import COEFFICIENTS, Selection, blend, merge_selectively, useful
from fedamole.model.bank import Bank
from fedamole.model.batch import TokenPair
from fedamole.model.params import Adapter
from fedamole.model.pretrained import load_adapter, save_adapter, without_deltas
from fedamole.personal.export import as_lora, texts_of
from fedamole.personal.export_settings import ExportSettings
from fedamole.personal.lora_folders import load_lora_folders
from fedamole.personal.merge_settings import NEED_DATA, MergeSettings
from fedamole.personal.saved_models import (
    SavedModel,
    client_shard,
    find_model,
    load_base_for,
    read_adapter,
    saved_models,
)

REPORT = "merge.json"


@dataclass(frozen=True)
class ClientModel:
    """One model of a run, with its client's data."""

    name: str
    adapter: Adapter
    """The model as it is saved."""
    lora: LoraFactors
    """The model as a LoRA."""
    probe: ClientProbe
    """Reads the client's embedding split."""
    validation: Sequence[TokenPair]
    """Validation split."""


def models_to_merge(
    paths: Sequence[Path], clients: Sequence[str] | None = None, variant: str | None = None
) -> dict[str, SavedModel]:
    """Return the models that a command line names, by name: those of clients of one run, or several adapter folders.

    Raises a RunError for what is no model, and a ConfigError for anything but two models or more.
    """
    if len(paths) == 1:
        if clients is None:
            models = list(saved_models(paths[0], variant))
        else:
            if twice := [name for name in clients if clients.count(name) > 1]:
                raise ConfigError(f"--clients names {twice[0]} twice")
            models = [find_model(paths[0], name, variant) for name in clients]
        named = {model.client: model for model in models}
        if len(named) < 2:
            raise ConfigError(
                f"a merge needs at least two models, and here is {', '.join(named) or 'none'}: name more clients with "
                "--clients, or several adapter folders"
            )
        return named
    if clients is not None or variant is not None:
        raise ConfigError("--clients and --variant select models of one run: leave them out with several folders")
    named = {}
    for path in paths:
        models = list(saved_models(path))
        if models[0].run is not None:
            raise ConfigError(f"{path} is a run: name one run, or several adapter folders (RUN/clients/NAME/adapter)")
        if any(path.resolve() == model.folder.resolve() for model in named.values()):
            raise ConfigError(f"{path} is named twice")
        named[str(path)] = replace(models[0], client=str(path))
    return named


def merge(
    models: Mapping[str, SavedModel],
    out: Path,
    settings: MergeSettings,
    *,
    device: str = "auto",
    base: str | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write the merged LoRA to a new folder that plain PEFT loads; return the report, which is saved as merge.json.

    The report has each client's validation loss (nats per answer token) under the untuned base, its own model
    (`before`) and the merged one (`after`), which is read back from disk; there are none for adapter folders without
    their run.

    Raises:
        RunError: `out` exists.
        BaseModelError: The models have different bases, or the base is missing.
        ConfigError: The models cannot be merged by this recipe.
        DataError: The clients' data are missing or changed.
    """
    with new_folder(out):  # reserves the name before the work begins
        clients, loras = list[ClientModel](), dict[str, LoraFactors]()
        if without_data := [name for name, saved in models.items() if saved.run is None]:
            _check_recipe(settings.recipe, without_data[0])
            folders = {name: saved.folder for name, saved in models.items()}
            resident, loras = load_lora_folders(folders, device, base, notify)
            bank = Bank(resident)
        else:
            notify("loading the base")
            resident = load_base_for(next(iter(models.values())), device, base)
            bank = Bank(resident)
            clients = [_client_model(name, saved, bank, settings, notify) for name, saved in models.items()]
            loras = {client.name: client.lora for client in clients}
        check_same_modules(loras)
        rank = settings.rank or max(len(a) for lora in loras.values() for a, _ in lora.values())
        notify(f"merging {len(loras)} models by {settings.recipe}")
        merged, about = _merged(loras, clients, settings, rank)
        losses = {}
        for client in clients:
            notify(f"scoring {client.name} on validation")
            own = {key: _loss(bank, adapter, client) for key, adapter in (("base", None), ("before", client.adapter))}
            losses[client.name] = own
        with TemporaryDirectory(prefix=f".{out.name}.writing-", dir=out.parent) as writing:
            target = Path(writing) / "lora"
            save_adapter(adapter_of(merged), target, resident.name, resident.identity)
            written = load_adapter(target, resident.identity)
            for client in clients:
                losses[client.name]["after"] = _loss(bank, written, client)
            report = {"recipe": settings.recipe, "rank": rank, "models": list(models), **about, "losses": losses}
            write_atomic(target / REPORT, json.dumps(report, indent=1) + "\n")
            target.rename(out)
    return report


def _check_recipe(recipe: str, name: str) -> None:
    """Raise ConfigError for a recipe that reads data, which are not known of LoRA folders; `name` is one of them."""
    if recipe in NEED_DATA:
        raise ConfigError(
            f"--recipe {recipe} reads the clients' data, which are not known of {name}: name the run that the models "
            "were trained in, or use linear, svd, ties or dare"
        )


def _client_model(
    name: str, saved: SavedModel, bank: Bank, settings: MergeSettings, notify: Callable[[str], None]
) -> ClientModel:
    """Read a model of a run and its client's data, and turn the model into a LoRA if it is none."""
    adapter = read_adapter(saved, bank.base)
    if not all(tensor.isfinite().all() for tensor in (*adapter.tensors.values(), *adapter.fixed.values())):
        raise ConfigError(f"{saved.folder} holds NaN or infinity: leave this model out of the merge")
    lora, (probe, validation) = without_deltas(adapter), _data(saved, bank)
    if any(lora.experts.values()):
        notify(f"fitting a LoRA to {name}'s model")
        texts = texts_of(saved, bank.base, None, settings.tokens)
        lora, _ = as_lora(bank, adapter, texts, ExportSettings(rank=settings.rank))
    return ClientModel(name, adapter, factors_of(lora, str(saved.folder)), probe, validation)


def _data(saved: SavedModel, bank: Bank) -> tuple[ClientProbe, list[TokenPair]]:
    """Read a client's embedding and validation splits."""
    config, shard = client_shard(saved)
    data = client_data(shard, bank.base.tokenizer, min(config.training.max_length, bank.base.max_positions))
    tokens, seed = config.evaluation.batch_tokens, config.run.seed
    probe = ClientProbe(bank, data.embedding.rows, saved.client, seed, tokens, ProbeCounts())
    return probe, list(data.validation.pairs())


def _loss(bank: Bank, adapter: Adapter | None, client: ClientModel) -> float:
    bank.load([] if adapter is None else [adapter])
    return mean_losses(bank, [client.validation], client.probe.batch_tokens)[0]


def _merged(
    loras: Mapping[str, LoraFactors], clients: Sequence[ClientModel], settings: MergeSettings, rank: int
) -> tuple[LoraFactors, dict[str, Any]]:
    """Return the merged factors, and what the report says of the recipe; `clients` are those of a run, if it is one."""
    if settings.recipe == "linear":
        return merge_linear(loras, rank), {}
    if settings.recipe == "svd":
        return merge_svd(loras, rank), {}
    if settings.recipe == "ties":
        return merge_ties(loras, rank, settings.density), {"density": settings.density}
    if settings.recipe == "dare":
        generator = torch_generator(0, "dare")
        return merge_dare(loras, rank, settings.density, generator), {"density": settings.density}
    if settings.recipe == "regmean":
        moments = {}
        for client in clients:
            read = client.probe.moments(adapter_of(client.lora), settings.examples)
            moments[client.name] = {module: read[module].mean for module in client.lora}
        merged = merge_regmean(loras, moments, rank, settings.off_diagonal)
        return merged, {"off_diagonal": settings.off_diagonal, "examples": settings.examples}
    selection, useless = _selected(clients, loras, settings.examples, rank)
    about = {"taken": dict(selection.taken), "refused": [*useless, *selection.refused], "examples": settings.examples}
    return selection.factors, about


def _selected(
    clients: Sequence[ClientModel], loras: Mapping[str, LoraFactors], examples: int, rank: int
) -> tuple[Selection, list[str]]:
    """Merge selectively by the mean loss over the clients' embedding splits; also return the useless models.

    Useless is a model that has no lower loss than the untuned base at its own client.
    """

    def losses(factors: Sequence[LoraFactors]) -> list[list[float]]:
        adapters = [adapter_of(lora) for lora in factors]
        return [client.probe.losses(adapters, examples) for client in clients]

    untuned = {module: (a, torch.zeros_like(b)) for module, (a, b) in clients[0].lora.items()}
    rows = losses([untuned, *loras.values()])
    own = {name: rows[i][i + 1] for i, name in enumerate(loras)}
    names = useful(own, {name: rows[i][0] for i, name in enumerate(loras)})
    means = {name: sum(row[i + 1] for row in rows) / len(rows) for i, name in enumerate(loras)}
    if not names:
        raise ConfigError(
            "--recipe selective: no model has a lower loss than the untuned base on its own client's embedding split"
        )

    def evaluate(pairs: Mapping[str, tuple[LoraFactors, LoraFactors]]) -> dict[str, list[float]]:
        results = {}
        for group, pair in pairs.items():
            by_client = losses([blend(*pair, coefficient, rank) for coefficient in COEFFICIENTS])
            results[group] = [sum(values) / len(values) for values in zip(*by_client, strict=True)]
        return results

    selections = merge_selectively({"all": names}, loras, means, evaluate, rank=rank, steps=len(names))
    return selections["all"], sorted(set(loras) - set(names))
