"""A client whose training is told what it comes to, to work a method's numbers out by hand."""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedamole.federation.method import BaseInfo, Client, ClientInfo, TrainingRequest, TrainingResult
from fedamole.federation.probe import DryProbe, Probe
from fedamole.model.params import Adapter, Shapes


class FixedProbe(DryProbe):
    """A probe that returns given losses, adapter by adapter, and given hidden states."""

    def __init__(self, shapes: Shapes, losses: Sequence[float], hidden: Tensor | None) -> None:
        super().__init__(shapes, 4)
        self.fixed_losses, self.fixed_hidden = losses, hidden

    def losses(self, adapters: Sequence[Adapter], max_examples: int) -> list[float]:
        assert len(adapters) == len(self.fixed_losses)
        return list(self.fixed_losses)

    def hidden_states(self, adapter: Adapter, max_examples: int) -> Tensor:
        assert self.fixed_hidden is not None
        return self.fixed_hidden


class CallProbe(DryProbe):
    """A probe whose losses and hidden states are computed by functions."""

    def __init__(
        self,
        losses: Callable[[Sequence[Adapter], int], list[float]] | None = None,
        hidden: Callable[[Adapter, int], Tensor] | None = None,
    ) -> None:
        super().__init__({}, 4)
        self.compute_losses, self.compute_hidden = losses, hidden

    def losses(self, adapters: Sequence[Adapter], max_examples: int) -> list[float]:
        assert self.compute_losses is not None
        return self.compute_losses(adapters, max_examples)

    def hidden_states(self, adapter: Adapter, max_examples: int) -> Tensor:
        assert self.compute_hidden is not None
        return self.compute_hidden(adapter, max_examples)


def client(
    shapes: Shapes,
    name: str = "a",
    round_: int = 0,
    losses: Sequence[float] = (),
    hidden: Tensor | None = None,
    probe: Probe | None = None,
) -> Client:
    """A client whose probe returns these losses and hidden states, or with a probe of its own."""
    probe = FixedProbe(shapes, losses, hidden) if probe is None else probe
    return Client(ClientInfo(name, 10), BaseInfo(shapes, 4), 0, round_, probe)


def driven(work: Generator[Any, Any, Any], *pieces: Mapping[str, Tensor]) -> tuple[list[TrainingRequest], Any]:
    """What an `update` asks for, and what it comes to, when each piece of training sets these tensors in turn."""
    requests = [next(work)]
    for piece in pieces:
        start = requests[-1].adapter
        try:
            requests.append(
                work.send(TrainingResult(Adapter(start.spec, {**start.tensors, **piece}, start.fixed), 3, 0.5))
            )
        except StopIteration as end:
            assert len(requests) == len(pieces), "it asked for fewer trainings"
            return requests, end.value
    raise AssertionError("it asks for more trainings")


def full(value: float, *shape: int) -> Tensor:
    """A tensor of one value."""
    return torch.full(shape, value)
