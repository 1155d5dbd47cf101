"""Second moments of the inputs of adapted modules, and of the outputs of their adapters, summed over tokens."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fedamole.model.bank import Bank
from fedamole.model.batch import TokenPair, batches
from fedamole.model.params import Shapes

SUMS_AT_ONCE = 2**31
"""Bytes of sums held at a time; further modules take further passes over the examples."""


class Moments:
    """Sums over tokens of one module's inputs x and adapter outputs y, in float64."""

    def __init__(self, d_in: int, d_out: int, device: torch.device) -> None:
        """Start with no tokens; d_out = 0 if outputs are not needed."""
        self.xx = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        """X^T X (d_in, d_in)."""
        self.xy = torch.zeros(d_in, d_out, dtype=torch.float64, device=device)
        """X^T Y (d_in, d_out)."""
        self.yy = torch.zeros((), dtype=torch.float64, device=device)
        """Sum of |y|^2."""
        self.tokens = 0

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add T tokens: inputs x (T, d_in), outputs y (T, d_out)."""
        x = x.double()
        self.xx.addmm_(x.T, x)
        self.tokens += len(x)
        if y is not None:
            y = y.double()
            self.xy.addmm_(x.T, y)
            self.yy += y.square().sum()


def module_runs(shapes: Shapes, outputs: bool) -> Iterator[list[str]]:
    """Cut the modules into runs whose sums fit into `SUMS_AT_ONCE` together; at least one module each."""
    run, size = list[str](), 0
    for name, (d_in, d_out) in shapes.items():
        more = 8 * d_in * (d_in + d_out * outputs)
        if run and size + more > SUMS_AT_ONCE:
            yield run
            run, size = [], 0
        run.append(name)
        size += more
    if run:
        yield run


def collect_moments(
    bank: Bank, modules: Sequence[str], rows: Sequence[TokenPair], batch_tokens: int, outputs: bool
) -> dict[str, Moments]:
    """Sum the moments of some modules over all tokens of (prompt, answer) rows, under the one adapter loaded.

    With `outputs` the outputs are what the adapter adds to the frozen linear's. At most `batch_tokens` tokens are read
    at once.
    """
    base = bank.base
    sums = {name: Moments(base.shapes[name][0], base.shapes[name][1] * outputs, base.device) for name in modules}
    frozen_outputs: dict[str, Tensor] = {}

    def hooks(name: str) -> list[RemovableHandle]:
        def after_linear(_: torch.nn.Module, __: tuple[Any, ...], out: Tensor) -> None:
            frozen_outputs[name] = out

        def after_layer(_: torch.nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
            if bank.active.context.hidden_states is not None:
                return  # the pass over the prompts that finds the weights of each instance
            x, not_padding = inputs[0].flatten(0, -2), bank.active.context.not_padding
            y = (out - frozen_outputs.pop(name)).flatten(0, -2) if outputs else None
            if not_padding is not None:
                x, y = x[not_padding], None if y is None else y[not_padding]
            sums[name].add(x, y)

        layer = bank.layers[name]
        handles = [layer.register_forward_hook(after_layer)]
        return [*handles, layer.base_layer.register_forward_hook(after_linear)] if outputs else handles

    handles = [handle for name in modules for handle in hooks(name)]
    bank.select_clients(0, bank.clients)
    try:
        with torch.no_grad():
            for batch in batches([rows], base.pad_id, bank.packs, batch_tokens, base.device):
                with bank.forward(batch):
                    pass
    finally:
        for handle in handles:
            handle.remove()
    return sums
