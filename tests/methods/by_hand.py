"""A client whose training is told what it comes to, to work a method's numbers out by hand."""

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedamole.federation.method import Client, ClientInfo, TrainingRequest, TrainingResult
from fedamole.model.params import Adapter, Shapes


def client(
    shapes: Shapes, name: str = "a", round_: int = 0, losses: Sequence[float] = (), hidden: Tensor | None = None
) -> Client:
    """A client that finds these losses, adapter by adapter, and these hidden states when it looks."""

    def look(adapters: Sequence[Adapter], most: int) -> list[float]:
        assert len(adapters) == len(losses)
        return list(losses)

    def last_hidden(adapter: Adapter, most: int) -> Tensor:
        assert hidden is not None
        return hidden

    return Client(ClientInfo(name, 10), shapes, 0, round_, look, last_hidden, width=4)


def driven(
    work: Generator[TrainingRequest, TrainingResult, Any], *pieces: Mapping[str, Tensor]
) -> tuple[list[TrainingRequest], Any]:
    """What an `update` asks for, and what it comes to, when each piece of training sets these tensors in turn."""
    asked = [next(work)]
    for piece in pieces:
        start = asked[-1].adapter
        try:
            asked.append(
                work.send(TrainingResult(Adapter(start.spec, {**start.tensors, **piece}, start.fixed), 3, 0.5))
            )
        except StopIteration as end:
            assert len(asked) == len(pieces), "it asked for fewer trainings"
            return asked, end.value
    raise AssertionError("it asks for more trainings")


def full(value: float, *shape: int) -> Tensor:
    """A tensor of one value."""
    return torch.full(shape, value)
