"""A personal model as a folder that PEFT loads: adapter_config.json and adapter_model.safetensors.

A mixture is saved as an AMoLE adapter (load it after `import fedamole`), a plain LoRA as PEFT's own LoRA, which
loads without this package.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedamole.errors import BaseModelError, RunError
from fedamole.model.amole import AdapterSpec
from fedamole.model.base import Identity
from fedamole.model.params import Adapter, expert_ids, shared_keys, stack, unstack

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
IDENTITY = "base_identity.json"


def save_adapter(adapter: Adapter, folder: Path, base_name: str, identity: Identity) -> None:
    """Write a personal adapter as a PEFT adapter folder, with the identity of its base."""
    from peft import LoraConfig

    from fedamole.model.peft_tuner import AmoleConfig

    folder.mkdir(parents=True, exist_ok=True)
    spec, held = adapter.spec, expert_ids(adapter.tensors)
    common: dict[str, Any] = {
        "r": spec.rank,
        "target_modules": list(held),
        "base_model_name_or_path": base_name,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }
    tensors: dict[str, Tensor] = {}
    if any(held.values()):
        config: Any = AmoleConfig(
            **common, alpha=spec.alpha, dropout=spec.dropout, dropout_kind=spec.dropout_kind, top_k=spec.top_k,
            expert_pattern=held,
        )
        for module, ids in held.items():
            down, up = stack(adapter.tensors, module, ids)
            tensors[f"{PREFIX}{module}.amole_down"], tensors[f"{PREFIX}{module}.amole_up"] = down, up
    else:
        config = LoraConfig(**common, lora_alpha=spec.alpha, lora_dropout=spec.dropout)
        for module in held:
            a, b = shared_keys(module)
            tensors[f"{PREFIX}{module}.lora_A.weight"] = adapter.tensors[a]
            tensors[f"{PREFIX}{module}.lora_B.weight"] = adapter.tensors[b]
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    config.save_pretrained(str(folder))
    written = json.loads((folder / CONFIG).read_text())
    written["target_modules"] = sorted(held)  # LoRA keeps a set, whose order would differ from run to run
    (folder / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    (folder / IDENTITY).write_text(json.dumps(asdict(identity), indent=2) + "\n")


def load_adapter(folder: Path, identity: Identity | None = None) -> Adapter:
    """Read a personal adapter back as data; with an `identity` given, an adapter of another base is refused."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        missing = Path(error.filename or WEIGHTS).name
        raise RunError(f"{folder}: no personal adapter here ({missing} is missing)") from error
    except (json.JSONDecodeError, SafetensorError) as error:
        raise RunError(f"{folder}: the adapter is damaged ({error}); copy it again from its run folder") from error
    if identity is not None:
        if not (folder / IDENTITY).exists():
            raise BaseModelError(f"{folder}: {IDENTITY} is missing, so nobody can tell which base this adapter is for")
        identity.check(Identity(**json.loads((folder / IDENTITY).read_text())), f"the adapter in {folder}")
    return _to_adapter(config, tensors)


def _to_adapter(config: dict[str, Any], tensors: dict[str, Tensor]) -> Adapter:
    named: dict[str, Tensor] = {}
    if config["peft_type"] == "AMOLE":
        spec = AdapterSpec(
            config["r"], config["alpha"], config["dropout"], config["dropout_kind"], config["top_k"]
        )
        for module, ids in config["expert_pattern"].items():
            down, up = tensors[f"{PREFIX}{module}.amole_down"], tensors[f"{PREFIX}{module}.amole_up"]
            named.update(unstack(down, up, module, ids, spec.rank))
        return Adapter(spec, named)
    spec = AdapterSpec(config["r"], config["lora_alpha"], config["lora_dropout"])
    for module in config["target_modules"]:
        a, b = shared_keys(module)
        named[a] = tensors[f"{PREFIX}{module}.lora_A.weight"]
        named[b] = tensors[f"{PREFIX}{module}.lora_B.weight"]
    return Adapter(spec, named)
