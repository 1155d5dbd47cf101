"""Adapters as factors that can be merged, and back."""

from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.merging.low_rank import Factors, LoraFactors
from fedamole.model.amole import AdapterSpec
from fedamole.model.params import Adapter, Tensors, expert_ids, shared_keys


def factors_of(adapter: Adapter, name: str) -> dict[str, Factors]:
    """Return the factors of a LoRA by module, with its scaling multiplied into B; `name` is that of the adapter.

    Raises a ConfigError for virtual tokens, a mixture of experts, and a LoRA on changed linears.
    """
    if not isinstance(adapter.spec, AdapterSpec):
        raise ConfigError(f"{name} is a soft prompt, which changes no weights: it cannot be merged")
    if any(adapter.experts.values()) or adapter.fixed:
        raise ConfigError(f"{name} is no plain LoRA: export it as one first (fedamole export --to lora)")
    return {module: (a, b * adapter.spec.scaling) for module, (a, b) in lora_factors(adapter.tensors).items()}


def adapter_of(factors: LoraFactors, dropout: float = 0.0) -> Adapter:
    """Return the LoRA that has these factors, with a scaling of 1."""
    rank = len(next(iter(factors.values()))[0])
    return Adapter(AdapterSpec(rank=rank, alpha=float(rank), dropout=dropout), lora_tensors(factors))


def lora_factors(tensors: Tensors) -> dict[str, Factors]:
    """Return A and B of a LoRA by module, from its named tensors; the scaling is left out."""
    keys = {module: shared_keys(module) for module in expert_ids(tensors)}
    return {module: (tensors[a], tensors[b]) for module, (a, b) in keys.items()}


def lora_tensors(factors: LoraFactors) -> dict[str, Tensor]:
    """Return the named tensors of a LoRA with these factors."""
    named: dict[str, Tensor] = {}
    for module, pair in factors.items():
        named.update(zip(shared_keys(module), pair, strict=True))
    return named
