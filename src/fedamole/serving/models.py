"""The personal models of a run, made fit for one bank."""

from collections.abc import Sequence
from dataclasses import replace

from torch.nn import functional as F

from fedamole.errors import ConfigError
from fedamole.model.amole import AdapterSpec
from fedamole.model.params import Adapter, expert_ids


def alike(adapters: Sequence[Adapter], names: Sequence[str]) -> list[Adapter]:
    """Adapters that one bank can hold at once, each doing what it did.

    LoRAs of several ranks or scalings become LoRAs of the largest rank, filled up with zeros. Models that differ in
    more than that are a ConfigError.
    """
    made = list(adapters)
    if len({adapter.kind() for adapter in made}) > 1 and all(map(_is_lora, made)):
        rank = max(adapter.spec.rank for adapter in made if isinstance(adapter.spec, AdapterSpec))
        made = [_of_rank(adapter, rank) for adapter in made]
    for adapter, name in zip(made, names, strict=True):
        if adapter.kind() != made[0].kind():
            raise ConfigError(
                f"the models of {names[0]} and {name} are of different kinds, which cannot be served together; "
                "serve them in two servers, each with its clients named by --client"
            )
    return made


def _is_lora(adapter: Adapter) -> bool:
    return isinstance(adapter.spec, AdapterSpec) and not adapter.fixed and not any(expert_ids(adapter.tensors).values())


def _of_rank(adapter: Adapter, rank: int) -> Adapter:
    """The same LoRA with more rows of zeros; its scaling goes into B, so that all have the same."""
    spec = adapter.spec
    assert isinstance(spec, AdapterSpec)
    more = rank - spec.rank
    tensors = {
        name: F.pad(tensor, (0, 0, 0, more)) if name.endswith("/A") else F.pad(tensor * spec.scaling, (0, more))
        for name, tensor in adapter.tensors.items()
    }
    return Adapter(replace(spec, rank=rank, alpha=float(rank)), tensors)
