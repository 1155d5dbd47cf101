"""Save and load personal models as PEFT adapter folders: adapter_config.json and adapter_model.safetensors.

A mixture of experts is saved as an AMoLE adapter, which PEFT loads after `import fedamole`. A plain LoRA is saved as
PEFT's LoRA and virtual tokens as PEFT's prompt tuning; both load without this package. A LoRA on a changed linear
(FLoRA, FedEx-LoRA) is saved as one equivalent LoRA, whose rank is that of the whole change.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from fedamole.errors import BaseModelError, RunError
from fedamole.files import write_atomic
from fedamole.model.adapter_files import PREFIX, VIRTUAL, check_weights, identity_form, read_config, router_of
from fedamole.model.amole import AdapterSpec
from fedamole.model.params import (
    OWN,
    REFERENCES,
    Adapter,
    delta_key,
    shared_keys,
    stack,
    unstack,
)
from fedamole.model.prompt import PROMPT, PromptSpec, plain_prompt
from fedamole.received.files import read_json
from fedamole.received.forms import check_form
from fedamole.runs.adapter_folder import CONFIG, IDENTITY, WEIGHTS
from fedamole.runs.identity import Identity

__all__ = ["CONFIG", "IDENTITY", "PREFIX", "WEIGHTS", "load_adapter", "read_identity", "save_adapter", "without_deltas"]


def save_adapter(adapter: Adapter, folder: Path, base_name: str, identity: Identity) -> None:
    """Write a personal adapter as a PEFT adapter folder, with the identity of its base."""
    folder.mkdir(parents=True, exist_ok=True)
    common = {"base_model_name_or_path": base_name, "task_type": "CAUSAL_LM", "inference_mode": True}
    if isinstance(adapter.spec, PromptSpec):
        config, tensors = _prompt_to_peft(adapter, common)
    elif any(adapter.experts.values()):
        config, tensors = _mixture_to_peft(adapter, common)
    else:
        config, tensors = _lora_to_peft(without_deltas(adapter) if adapter.fixed else adapter, common)
    # safetensors' own file writing does not raise OSError when the disk is full.
    write_atomic(folder / WEIGHTS, save({key: value.contiguous() for key, value in tensors.items()}, {"format": "pt"}))
    config.save_pretrained(str(folder))
    written = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if written.get("target_modules"):
        written["target_modules"] = sorted(written["target_modules"])  # PEFT stores a set in arbitrary order
    write_atomic(folder / CONFIG, json.dumps(written, indent=2, sort_keys=True) + "\n")
    write_atomic(folder / IDENTITY, json.dumps(asdict(identity), indent=2) + "\n")


def _prompt_to_peft(adapter: Adapter, common: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Convert virtual tokens to the config and weights of PEFT's prompt tuning."""
    from peft import PromptTuningConfig

    prompt = plain_prompt(adapter.tensors)
    tokens, width = prompt.shape
    config = PromptTuningConfig(**common, num_virtual_tokens=tokens, token_dim=width, num_transformer_submodules=1)
    return config, {VIRTUAL: prompt}


def _mixture_to_peft(adapter: Adapter, common: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Convert a mixture of experts to the config and weights of an AMoLE adapter."""
    from fedamole.model.peft_tuner import AmoleConfig

    spec, experts = adapter.spec, adapter.experts
    assert isinstance(spec, AdapterSpec)
    own_expert, references = adapter.fixed.get(OWN), adapter.fixed.get(REFERENCES)
    config = AmoleConfig(
        **common,
        r=spec.rank,
        target_modules=list(experts),
        alpha=spec.alpha,
        dropout=spec.dropout,
        dropout_kind=spec.dropout_kind,
        top_k=spec.top_k,
        expert_pattern=experts,
        references=None if references is None else references.tolist(),
        own_expert=None if own_expert is None else next(iter(experts.values()))[int(own_expert.argmax())],
        **spec.router.to_config(),
    )
    tensors = {}
    for module, ids in experts.items():
        down, up = stack(adapter.tensors, module, ids)
        tensors[f"{PREFIX}{module}.amole_down"], tensors[f"{PREFIX}{module}.amole_up"] = down, up
    return config, tensors


def _lora_to_peft(adapter: Adapter, common: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Convert a LoRA to the config and weights of PEFT's LoRA."""
    from peft import LoraConfig

    spec, modules, tensors = adapter.spec, list(adapter.experts), dict[str, Tensor]()
    assert isinstance(spec, AdapterSpec)
    for module in modules:
        for name, key in zip("AB", shared_keys(module), strict=True):
            tensors[f"{PREFIX}{module}.lora_{name}.weight"] = adapter.tensors[key]
    settings = {"r": spec.rank, "lora_alpha": spec.alpha, "lora_dropout": spec.dropout}
    return LoraConfig(**common, target_modules=modules, **settings), tensors


def without_deltas(adapter: Adapter) -> Adapter:
    """Convert a LoRA on changed linears to one equivalent LoRA on the base.

    Its rank is the highest that any module needs to represent its change to the precision of float32. Other adapters
    are returned unchanged.
    """
    spec, changed = adapter.spec, [name for name in adapter.experts if delta_key(name) in adapter.fixed]
    if not changed or not isinstance(spec, AdapterSpec):
        return adapter
    factors = {}
    for module in changed:
        a, b = (adapter.tensors[key].double() for key in shared_keys(module))
        whole = adapter.fixed[delta_key(module)].double() + spec.scaling * b @ a
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        factors[module] = u * s.sqrt(), s.sqrt()[:, None] * v, int((s > 1e-7 * s[0]).sum())
    rank = max(1, *(module_rank for _, _, module_rank in factors.values()))
    tensors = {}
    for module, (b, a, _) in factors.items():
        missing = max(0, rank - len(a))  # the module has fewer dimensions than the rank
        key_a, key_b = shared_keys(module)
        tensors[key_a] = F.pad(a[:rank], (0, 0, 0, missing)).float()
        tensors[key_b] = F.pad(b[:, :rank], (0, missing)).float()
    return Adapter(replace(spec, rank=rank, alpha=float(rank)), tensors)


def load_adapter(folder: Path, identity: Identity | None = None) -> Adapter:
    """Load a personal adapter; with an `identity`, only an adapter of that base.

    The folder is not trusted: the config is validated first, then the names, shapes and dtypes of the weights. Raises
    RunError if validation fails, BaseModelError if the adapter was made for another base.
    """
    config = read_config(folder)
    if identity is not None:
        identity.check(read_identity(folder), f"the adapter in {folder}")
    path = folder / WEIGHTS
    if not path.exists():
        raise RunError(f"{folder}: no personal adapter here ({WEIGHTS} is missing; no other kind of weights is read)")
    if not path.is_file():
        raise RunError(f"{path} is no file: copy the adapter again from its run folder")
    try:
        with safe_open(path, "pt") as file:
            check_weights(folder, config, {key: file.get_slice(key) for key in file.keys()})  # noqa: SIM118
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{folder}: the adapter is damaged ({error}); copy it again from its run folder") from error
    return _to_adapter(config, tensors)


def read_identity(folder: Path) -> Identity:
    """Read the identity of the base that an adapter was made for; raise BaseModelError if it is missing."""
    path = folder / IDENTITY
    if not path.exists():
        raise BaseModelError(f"{folder}: {IDENTITY} is missing, so the adapter's base is unknown")
    identity = read_json(path)
    check_form(identity, identity_form, path, RunError)
    return Identity(**identity)


def _to_adapter(config: dict[str, Any], tensors: dict[str, Tensor]) -> Adapter:
    named, fixed = dict[str, Tensor](), dict[str, Tensor]()
    if config["peft_type"] == "PROMPT_TUNING":
        return Adapter(PromptSpec(config["num_virtual_tokens"]), {PROMPT: tensors[VIRTUAL]})
    if config["peft_type"] == "AMOLE":
        spec = AdapterSpec(
            config["r"],
            config["alpha"],
            config["dropout"],
            config["dropout_kind"],
            config["top_k"],
            router=router_of(config),
        )
        for module, ids in config["expert_pattern"].items():
            down, up = tensors[f"{PREFIX}{module}.amole_down"], tensors[f"{PREFIX}{module}.amole_up"]
            named.update(unstack(down, up, module, ids, spec.rank, spec.router))
            if config.get("own_expert") is not None:
                fixed[OWN] = torch.tensor([float(expert == config["own_expert"]) for expert in ids])
        if config.get("references"):
            fixed[REFERENCES] = torch.tensor(config["references"])
        return Adapter(spec, named, fixed)
    spec = AdapterSpec(config["r"], config["lora_alpha"], config["lora_dropout"])
    for module in config["target_modules"]:
        a, b = shared_keys(module)
        named[a] = tensors[f"{PREFIX}{module}.lora_A.weight"]
        named[b] = tensors[f"{PREFIX}{module}.lora_B.weight"]
    return Adapter(spec, named)
