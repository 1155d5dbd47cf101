"""The files of an adapter folder, and the checks that come before any of them is used."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedamole.errors import BaseModelError, RunError
from fedamole.model.params import REFERENCES, Adapter, Shapes, expert_ids
from fedamole.model.prompt import PROMPT, PromptSpec
from fedamole.received.files import read_json
from fedamole.received.forms import (
    Form,
    boolean,
    check_form,
    choice,
    either,
    listed,
    mapping,
    nothing,
    number,
    record,
    text,
    whole,
)
from fedamole.received.names import quoted
from fedamole.runs.adapter_folder import CONFIG, MOST_EXPERTS, WEIGHTS

PREFIX = "base_model.model."
VIRTUAL = "prompt_embeddings"

MOST_RANK = 65_536
MOST_VIRTUAL = 65_536
DTYPES = ("F32", "BF16", "F16")
"""Kinds of numbers that an adapter's weights may be."""

_module = text(500, re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*"))
_rank, _share = whole(1, MOST_RANK), number(0, 1)
_id = whole(0, MOST_EXPERTS - 1)
_common = record(
    {"peft_type": choice("LORA", "AMOLE", "PROMPT_TUNING"), "base_model_name_or_path": text(4096)},
    {"task_type": choice("CAUSAL_LM"), "inference_mode": boolean, "peft_version": text(100)},
)
_kinds: dict[str, Form] = {
    "LORA": record(
        {
            "r": _rank,
            "lora_alpha": number(1e-9),
            "lora_dropout": _share,
            "target_modules": listed(_module, 100_000),
        }
    ),
    "PROMPT_TUNING": record(
        {
            "num_virtual_tokens": whole(1, MOST_VIRTUAL),
            "token_dim": whole(1, 1_000_000),
            "num_transformer_submodules": whole(1, 1),
        }
    ),
    "AMOLE": record(
        {
            "r": _rank,
            "alpha": number(1e-9),
            "dropout": _share,
            "dropout_kind": choice("exact", "rank"),
            "top_k": whole(1, MOST_EXPERTS),
            "expert_pattern": mapping(listed(_id, MOST_EXPERTS), _module),
        },
        {
            "router": choice("embedding", "mixer", "instance"),
            "instance_weight": _share,
            "target_modules": listed(_module, 100_000),
            "own_expert": either(nothing, _id),
            "init_seed": whole(0, 2**32),
            "references": either(nothing, listed(listed(number(), 1_000_000), 100_000)),
        },
    ),
}
identity_form = record(dict.fromkeys(("weights", "tokenizer", "targets"), text(200)), closed=True)

_SHARED = {"peft_type", "base_model_name_or_path", "task_type", "inference_mode", "peft_version"}
_OWN = {
    "LORA": {"r", "lora_alpha", "lora_dropout", "target_modules"},
    "PROMPT_TUNING": {"num_virtual_tokens", "token_dim", "num_transformer_submodules"},
    "AMOLE": {
        "r",
        "alpha",
        "dropout",
        "dropout_kind",
        "top_k",
        "expert_pattern",
        "router",
        "instance_weight",
        "target_modules",
        "own_expert",
        "references",
        "init_seed",
    },
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LORA": {"bias": "none", "init_lora_weights": True, "megatron_core": "megatron.core", "qalora_group_size": 16},
    "PROMPT_TUNING": {"prompt_tuning_init": "RANDOM"},
    "AMOLE": {},
}
"""What PEFT writes of settings that fedamole leaves alone, where it is not null, false or empty."""


def read_config(folder: Path) -> dict[str, Any]:
    """The checked content of adapter_config.json; RunError for a missing one, and for one of another form."""
    path = folder / CONFIG
    if not path.exists():
        raise RunError(f"{folder}: no personal adapter here ({CONFIG} is missing)")
    config: dict[str, Any] = read_json(path)
    check_form(config, _common, path, RunError)
    kind = config["peft_type"]
    check_form(config, _kinds[kind], path, RunError)
    _check_words(config, kind, path)
    ids = config.get("expert_pattern", {}).values() if kind == "AMOLE" else ()
    if any(sorted(set(held)) != held for held in ids):
        raise RunError(f"{path} is damaged: the experts of a module must be in order, each once; copy the folder again")
    own = config.get("own_expert")
    if kind == "AMOLE" and own is not None and any(own not in held for held in ids):
        raise RunError(f"{path} is damaged: own_expert {own} is not held in every module; copy the folder again")
    references = config.get("references") or []
    if len({len(row) for row in references}) > 1:
        raise RunError(f"{path} is damaged: the references have different lengths; copy the folder again")
    return config


def _check_words(config: Mapping[str, Any], kind: str, path: Path) -> None:
    """Raise RunError for a setting that fedamole does not write: PEFT may import a module or load a file for it."""
    for key, value in config.items():
        if key in _OWN[kind] or key in _SHARED or not value or value == _DEFAULTS[kind].get(key):
            continue
        raise RunError(
            f"{path}: {key} = {quoted(value)} is no setting of an adapter that fedamole wrote, so the adapter is not "
            "loaded; load it with PEFT itself if you trust it"
        )


def check_weights(folder: Path, config: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise RunError unless a file's tensors (as slices) have the names, shapes and dtypes that a config asks for."""
    path = folder / WEIGHTS
    wanted = _wanted(config)
    for name in sorted(wanted.keys() ^ found.keys()):
        what = "is missing" if name in wanted else "does not belong there"
        raise RunError(f"{path}: the tensor {quoted(name, 200)} {what}; copy the adapter again from its run folder")
    for name, tensor in found.items():
        shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
        if dtype not in DTYPES:
            raise RunError(f"{path}: the tensor {quoted(name, 200)} is of {dtype}, expected one of {', '.join(DTYPES)}")
        if (
            len(shape) != 2
            or not all(shape)
            or not any(all(size in (None, real) for size, real in zip(one, shape, strict=True)) for one in wanted[name])
        ):
            asked = " or ".join(str(one).replace("None", "any") for one in wanted[name])
            raise RunError(
                f"{path}: the tensor {quoted(name, 200)} has the shape {shape}, by {CONFIG} it is {asked}; copy the "
                "adapter again from its run folder"
            )


def _wanted(config: Mapping[str, Any]) -> dict[str, list[tuple[int | None, int | None]]]:
    """The shapes that each tensor may have; None is any size."""
    kind = config["peft_type"]
    if kind == "PROMPT_TUNING":
        return {VIRTUAL: [(config["num_virtual_tokens"], config["token_dim"])]}
    rank, wanted = config["r"], dict[str, list[tuple[int | None, int | None]]]()
    if kind == "LORA":
        for module in config["target_modules"]:
            wanted[f"{PREFIX}{module}.lora_A.weight"] = [(rank, None)]
            wanted[f"{PREFIX}{module}.lora_B.weight"] = [(None, rank)]
        return wanted
    for module, ids in config["expert_pattern"].items():
        router = config.get("router", "embedding")
        up = (len(ids) + (router == "embedding")) * rank
        more = {
            "embedding": [rank if ids else 0],
            "instance": [0],
            "mixer": [len(ids), 2 * len(ids) - 1] if ids else [0],
        }[router]
        wanted[f"{PREFIX}{module}.amole_up"] = [(up, None)]
        wanted[f"{PREFIX}{module}.amole_down"] = [(up + size, None) for size in dict.fromkeys(more)]
    return wanted


def check_fits(adapter: Adapter, shapes: Shapes, width: int, where: object) -> None:
    """Raise BaseModelError unless an adapter's tensors fit the modules of a base, whose embeddings are `width` wide."""
    if isinstance(adapter.spec, PromptSpec):
        tokens = adapter.tensors.get(PROMPT)
        if tokens is None or tokens.dim() != 2 or tokens.shape[1] != width:
            raise BaseModelError(f"{where}: its virtual tokens do not have the {width} values that the base's have")
        return
    seen = adapter.fixed.get(REFERENCES)
    if seen is not None and seen.shape[1] != width:
        raise BaseModelError(f"{where}: its references are {seen.shape[1]} wide, the base's states {width}")
    for module in expert_ids(adapter.tensors):
        if module not in shapes:
            raise BaseModelError(f"{where}: it adapts {quoted(module, 200)}, which is no target of this base")
    for name, tensor in adapter.tensors.items():
        module, _, factor = name.partition("/")
        d_in, d_out = shapes[module]
        if tensor.dim() != 2:
            raise BaseModelError(f"{where}: {quoted(name, 200)} is no matrix; put it back from a copy")
        size, wanted = (tensor.shape[0], d_out) if factor.endswith("/B") else (tensor.shape[1], d_in)
        if size != wanted:
            raise BaseModelError(f"{where}: {quoted(name, 200)} is for {size} values, this base has {wanted}")
