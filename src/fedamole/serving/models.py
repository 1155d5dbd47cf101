"""Open the models of runs: as few engines as possible, each with one base in memory and one bank of adapters."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch.nn import functional as F

from fedamole.errors import ConfigError
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import Base, BaseSettings
from fedamole.model.params import Adapter, expert_ids, indices_by_kind
from fedamole.personal.generate import PromptFormat, evaluation_settings_of, prompt_format_of
from fedamole.personal.saved_models import SavedModel, base_settings_of, load_base_for, read_adapter
from fedamole.serving.engine import InferenceEngine
from fedamole.serving.scheduling import Limits
from fedamole.serving.served_models import ServedModel


def run_names(runs: Sequence[Path]) -> list[str]:
    """Return a short, unique name for each run: the end of its path, as many folders as needed."""
    parts = [run.resolve().parts for run in runs]
    if len(set(parts)) < len(parts):
        raise ConfigError("the same run is given twice; name each once")
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names):
            break
    return names


def chat_formats(names: Sequence[str], formats: Sequence[PromptFormat], mappings: Sequence[str]) -> list[PromptFormat]:
    """Return prompt formats in which messages of a chat fill columns, given words COLUMN or MODEL=COLUMN.

    A COLUMN without a model is for all models without a mapping of their own. Raises ConfigError for an unknown model,
    for two mappings of one model, and for a column that a message cannot fill.
    """
    columns: dict[str, str] = {}
    for mapping in mappings:
        name, _, column = mapping.rpartition("=")
        if name and name not in names:
            raise ConfigError(f"--chat-column {mapping}: there is no model {name!r}; the models are {', '.join(names)}")
        if name in columns:
            raise ConfigError(
                f"--chat-column {mapping}: {name or 'all models'} already has a column, {columns[name]!r}"
            )
        columns[name] = column
    return [
        _mapped(name, prompt_format, columns.get(name, columns.get("")))
        for name, prompt_format in zip(names, formats, strict=True)
    ]


def _mapped(name: str, prompt_format: PromptFormat, column: str | None) -> PromptFormat:
    if column is None:
        return prompt_format
    try:
        return prompt_format.with_message_column(column)
    except ConfigError as error:
        raise ConfigError(f"--chat-column {column} for {name}: {error}") from error


def open_models(
    saved: Sequence[tuple[str, SavedModel]],
    limits: Limits,
    device: str = "auto",
    base: str | None = None,
    mappings: Sequence[str] = (),
) -> list[ServedModel]:
    """Load named models. Models with one base and adapters of one kind share an engine; each engine has its own base.

    `mappings` are those of `chat_formats`. Raises ConfigError and BaseModelError.
    """
    names = [name for name, _ in saved]
    formats = chat_formats(names, [prompt_format_of(model) for _, model in saved], mappings)
    by_base: dict[BaseSettings, list[int]] = {}
    for index, (_, model) in enumerate(saved):
        by_base.setdefault(base_settings_of(model), []).append(index)
    served: dict[int, ServedModel] = {}
    for indices in by_base.values():
        models = [saved[index][1] for index in indices]
        free: Base | None = load_base_for(models[0], device, base)
        assert free is not None
        adapters = [read_adapter(model, free) for model in models]
        for members, padded in groups_with_same_spec(adapters):
            engine = InferenceEngine(Bank(free or load_base_for(models[0], device, base)), padded, limits)
            free = None  # a base holds the adapter layers of one bank
            for position, member in enumerate(members):
                index = indices[member]
                name, model = saved[index]
                longest = evaluation_settings_of(model).max_new_tokens
                created = int(model.folder.stat().st_mtime)
                served[index] = ServedModel(name, engine, position, formats[index], longest, created)
    return [served[index] for index in range(len(saved))]


def groups_with_same_spec(adapters: Sequence[Adapter]) -> list[tuple[list[int], list[Adapter]]]:
    """Return groups of equivalent adapters that share one spec, as a bank requires, with their indices.

    LoRA adapters of different ranks or scalings are zero-padded to the largest rank, so that they form one group.
    """
    padded = list(adapters)
    loras = [index for index, adapter in enumerate(padded) if _is_lora(adapter)]
    if len({padded[index].kind() for index in loras}) > 1:
        rank = max(spec.rank for index in loras if isinstance(spec := padded[index].spec, AdapterSpec))
        for index in loras:
            padded[index] = _pad_to_rank(padded[index], rank)
    groups = indices_by_kind(dict(enumerate(padded)))
    return [(indices, [padded[index] for index in indices]) for indices in groups]


def _is_lora(adapter: Adapter) -> bool:
    return isinstance(adapter.spec, AdapterSpec) and not adapter.fixed and not any(expert_ids(adapter.tensors).values())


def _pad_to_rank(adapter: Adapter, rank: int) -> Adapter:
    """Zero-pad a LoRA adapter to `rank`, with its scaling multiplied into B so that all adapters have scaling 1."""
    spec = adapter.spec
    assert isinstance(spec, AdapterSpec)
    missing = rank - spec.rank
    tensors = {
        name: F.pad(tensor, (0, 0, 0, missing)) if name.endswith("/A") else F.pad(tensor * spec.scaling, (0, missing))
        for name, tensor in adapter.tensors.items()
    }
    return Adapter(replace(spec, rank=rank, alpha=float(rank)), tensors)
