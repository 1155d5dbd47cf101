"""Convert the adapters of a run so that one bank can hold all of them."""

from collections.abc import Sequence
from dataclasses import replace

from torch.nn import functional as F

from fedamole.errors import ConfigError
from fedamole.model.amole import AdapterSpec
from fedamole.model.params import Adapter, expert_ids


def with_same_spec(adapters: Sequence[Adapter], names: Sequence[str]) -> list[Adapter]:
    """Return equivalent adapters that share one spec, as a bank requires.

    LoRA adapters of different ranks or scalings are zero-padded to the largest rank. Raises ConfigError if the adapters
    differ in more than that; `names` are the clients' names in the error.
    """
    padded = list(adapters)
    if len({adapter.kind() for adapter in padded}) > 1 and all(map(_is_lora, padded)):
        rank = max(adapter.spec.rank for adapter in padded if isinstance(adapter.spec, AdapterSpec))
        padded = [_pad_to_rank(adapter, rank) for adapter in padded]
    for adapter, name in zip(padded, names, strict=True):
        if adapter.kind() != padded[0].kind():
            raise ConfigError(
                f"the models of {names[0]} and {name} are of different kinds and cannot be served together; "
                "start one server for each kind and select its clients with --client"
            )
    return padded


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
