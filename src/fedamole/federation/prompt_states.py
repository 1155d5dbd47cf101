"""What the base computes at the ends of prompts: hidden states after each layer, and logits."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fedamole.model.bank import Bank
from fedamole.model.batch import Ids, batches
from fedamole.model.params import Adapter, layers_of


class PromptStates(NamedTuple):
    """States of n prompts at their last tokens, in the order of the prompts' lengths; float32 on the CPU."""

    layers: Tensor
    """(L, n, d): hidden states after each decoder layer that has adapted modules, the lowest first."""
    logits: Tensor
    """(n, V): logits of the next token."""


def prompt_states(bank: Bank, adapter: Adapter | None, prompts: Sequence[Ids], batch_tokens: int) -> PromptStates:
    """Read prompts under an adapter (None: the untuned base), at most `batch_tokens` tokens at once.

    The adapter must not have virtual tokens or weights by instance, which would take further passes.
    """
    base, names = bank.base, layers_of(bank.base.shapes)
    bank.load([] if adapter is None else [adapter])
    states: dict[str, list[Tensor]] = {name: [] for name in names}
    logits: list[Tensor] = []

    def hook(name: str) -> RemovableHandle:
        def after(_: torch.nn.Module, __: tuple[Any, ...], out: Any) -> None:
            hidden: Tensor = out[0] if isinstance(out, tuple) else out
            indices = bank.active.context.logit_indices
            assert indices is not None
            states[name].append(hidden.flatten(0, -2).index_select(0, indices).float().cpu())

        layer: torch.nn.Module = base.model.get_submodule(name)
        return layer.register_forward_hook(after)

    handles = [hook(name) for name in names]
    try:
        with torch.no_grad():
            rows = [(prompt, (0,)) for prompt in prompts]
            for batch in batches([rows], base.pad_id, bank.packs, batch_tokens, base.device):
                with bank.forward(batch) as values:
                    logits.append(values.float().cpu())
    finally:
        for handle in handles:
            handle.remove()
    return PromptStates(torch.stack([torch.cat(states[name]) for name in names]), torch.cat(logits))
