"""Validation of adapter folders: adapter_config.json and adapter_model.safetensors are checked before use."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedamole.errors import BaseModelError, RunError
from fedamole.model.amole import ROUTERS, EmbeddingRouter
from fedamole.model.base import Base
from fedamole.model.mixer import InstanceWeights, LearnedRouter
from fedamole.model.params import REFERENCES, VECTORS, Adapter
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
from fedamole.runs.adapter_folder import CONFIG, MOST_EXPERTS, MOST_RANK, WEIGHTS

PREFIX = "base_model.model."
VIRTUAL = "prompt_embeddings"

MOST_VIRTUAL = 65_536
DTYPES = ("F32", "BF16", "F16")
"""Dtypes that an adapter's weights may have."""

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
        },
        dict.fromkeys(("num_layers", "num_attention_heads"), either(nothing, whole(1, 100_000))),
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
            "router": choice(*ROUTERS),
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
_SETTINGS = {
    "LORA": {"r", "lora_alpha", "lora_dropout", "target_modules"},
    "PROMPT_TUNING": {
        "num_virtual_tokens",
        "token_dim",
        "num_transformer_submodules",
        "num_layers",  # PEFT writes these two when it saves a loaded prompt again
        "num_attention_heads",
    },
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
"""Values that PEFT writes for settings that fedamole does not use, where they are not null, false or empty."""


def read_config(folder: Path) -> dict[str, Any]:
    """Read and validate adapter_config.json; raise RunError if it is missing or not of the expected form."""
    path = folder / CONFIG
    if not path.exists():
        raise RunError(f"{folder}: no personal adapter here ({CONFIG} is missing)")
    config: dict[str, Any] = read_json(path)
    check_form(config, _common, path, RunError)
    kind = config["peft_type"]
    check_form(config, _kinds[kind], path, RunError)
    _check_settings(config, kind, path)
    ids = config.get("expert_pattern", {}).values() if kind == "AMOLE" else ()
    if any(sorted(set(experts)) != experts for experts in ids):
        raise RunError(
            f"{path} is damaged: a module's expert ids must be sorted and without duplicates; copy the folder again"
        )
    own = config.get("own_expert")
    if kind == "AMOLE" and own is not None and any(own not in experts for experts in ids):
        raise RunError(f"{path} is damaged: own_expert {own} is missing in some module; copy the folder again")
    references = config.get("references") or []
    if len({len(vector) for vector in references}) > 1:
        raise RunError(f"{path} is damaged: the references have different lengths; copy the folder again")
    return config


def _check_settings(config: Mapping[str, Any], kind: str, path: Path) -> None:
    """Raise RunError for settings that fedamole does not write, as PEFT may import modules or load files for them."""
    for key, value in config.items():
        if key in _SETTINGS[kind] or key in _SHARED or not value or value == _DEFAULTS[kind].get(key):
            continue
        raise RunError(
            f"{path}: fedamole does not write the setting {key} = {quoted(value)}, so it does not load the adapter; "
            "load it with PEFT itself if you trust it"
        )


def router_of(config: Mapping[str, Any]) -> EmbeddingRouter | LearnedRouter | InstanceWeights:
    """Build the router that the content of adapter_config.json describes."""
    return ROUTERS[config.get("router", EmbeddingRouter.config_name)].from_config(config)


def check_weights(folder: Path, config: Mapping[str, Any], slices: Mapping[str, Any]) -> None:
    """Raise RunError unless the tensors of a file have the names, shapes and dtypes that a config requires.

    `slices` are the safetensors slices of the file, by tensor name.
    """
    path = folder / WEIGHTS
    expected = _expected_shapes(config)
    for name in sorted(expected.keys() ^ slices.keys()):
        problem = "is missing" if name in expected else "is not expected"
        raise RunError(f"{path}: the tensor {quoted(name, 200)} {problem}; copy the adapter again from its run folder")
    for name, tensor in slices.items():
        shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
        if dtype not in DTYPES:
            raise RunError(f"{path}: the tensor {quoted(name, 200)} is of {dtype}, expected one of {', '.join(DTYPES)}")
        if (
            len(shape) != 2
            or not all(shape)
            or any(e not in (None, s) for e, s in zip(expected[name], shape, strict=True))
        ):
            required = str(expected[name]).replace("None", "any")
            raise RunError(
                f"{path}: the tensor {quoted(name, 200)} has the shape {shape}, but {CONFIG} requires {required}; copy "
                "the adapter again from its run folder"
            )


def _expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int | None, int | None]]:
    """The shape of each tensor; None stands for any size."""
    kind = config["peft_type"]
    if kind == "PROMPT_TUNING":
        return {VIRTUAL: (config["num_virtual_tokens"], config["token_dim"])}
    rank, shapes = config["r"], dict[str, tuple[int | None, int | None]]()
    if kind == "LORA":
        for module in config["target_modules"]:
            shapes[f"{PREFIX}{module}.lora_A.weight"] = (rank, None)
            shapes[f"{PREFIX}{module}.lora_B.weight"] = (None, rank)
        return shapes
    router = router_of(config)
    for module, ids in config["expert_pattern"].items():
        rows = (len(ids) + router.has_shared_expert) * rank
        shapes[f"{PREFIX}{module}.amole_up"] = (rows, None)
        shapes[f"{PREFIX}{module}.amole_down"] = (rows + router.num_rows(len(ids), rank), None)
    return shapes


def check_fits(adapter: Adapter, base: Base, where: object) -> None:
    """Raise BaseModelError unless an adapter's tensors fit a base; `where` names the adapter in the error."""
    if isinstance(adapter.spec, PromptSpec):
        tokens = adapter.tensors.get(PROMPT)
        if tokens is None or tokens.dim() != 2 or tokens.shape[1] != base.width:
            raise BaseModelError(f"{where}: its virtual tokens must have {base.width} values each, as this base's")
        return
    for fixed, what in ((REFERENCES, "references"), (VECTORS, "virtual tokens")):
        if fixed in adapter.fixed and adapter.fixed[fixed].shape[1:] != (base.width,):
            raise BaseModelError(f"{where}: its {what} must have {base.width} values each, as this base's")
    if unknown := adapter.experts.keys() - base.shapes.keys():
        raise BaseModelError(f"{where}: it adapts {quoted(min(unknown), 200)}, which is not a target of this base")
    for name, tensor in adapter.tensors.items():
        module, _, factor = name.partition("/")
        d_in, d_out = base.shapes[module]
        if tensor.dim() != 2:
            raise BaseModelError(f"{where}: {quoted(name, 200)} is not a matrix; restore it from a copy")
        size, expected = (tensor.shape[0], d_out) if factor.endswith("/B") else (tensor.shape[1], d_in)
        if size != expected:
            raise BaseModelError(f"{where}: {quoted(name, 200)} is for {size} values, this base has {expected}")
