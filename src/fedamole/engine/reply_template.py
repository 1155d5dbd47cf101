"""What a client's reply has to look like, found by rehearsing its work without training; and the check against it.

The rehearsal runs the client's half of the method on the very message that was sent, and every training it asks for
returns what it was given. The reply that comes of it has the names, shapes, dtypes and fields of the real one, for
every method, without a line about the wire in any of them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedamole.federation.method import Client, ClientInfo, Method, Server, TrainingResult
from fedamole.federation.record import PayloadError
from fedamole.federation.robust import flattened
from fedamole.model.layers import MeanEmbeddings
from fedamole.model.params import Adapter, expert_ids

GROWTH, SMALL = 10.0, 0.1
"""How many times larger than what was sent a reply may be, and the size of a number where what was sent is smaller."""


def dry_run(method: Method[Any, Any, Any, Any], server: Server, info: ClientInfo, message: Any) -> Any:
    """Return a reply of the form that a client which got this message will send."""

    def no_losses(adapters: Sequence[Adapter], most: int) -> list[float]:
        return [0.0] * len(adapters)

    def no_hidden(adapter: Adapter, most: int) -> Tensor:
        return torch.ones(1, server.width)

    client = Client(
        info, server.shapes, server.seed, server.round, no_losses, no_hidden, server.width, server.embedding_std
    )
    work = method.update(client, method.init_client_state(client), message)
    try:
        fit = next(work)
        while True:
            embeddings = _embeddings(method, server, fit.adapter) if method.embeds else {}
            fit = work.send(TrainingResult(fit.adapter, 1, 0.0, embeddings))
    except StopIteration as end:
        return end.value[1]


def _embeddings(method: Any, server: Server, adapter: Adapter) -> Mapping[str, MeanEmbeddings]:
    """Zeros in the form of what reading the embedding split gives."""
    rank, held = method.spec().rank, expert_ids(adapter.tensors)
    return {
        module: MeanEmbeddings(torch.zeros(rank), {expert: torch.zeros(rank) for expert in held.get(module, ())})
        for module in server.shapes
    }


def check_reply(method: Method[Any, Any, Any, Any], template: Any, reply: Any, max_norm: float | None) -> None:
    """Compare a reply with the rehearsed one: names, shapes, dtypes, fields; finite; not too large.

    Without a `max_norm` the rehearsed reply, which holds what was sent, gives one. Raises PayloadError that names what
    is wrong, with nothing of the content in it.
    """
    _compare_kinds(template, reply, "")
    try:
        wanted = method.expected_reply(template, reply)
    except Exception as error:  # a method reads what no one has checked yet
        raise PayloadError(f"not a reply of this method ({type(error).__name__})") from error
    squares = _compare(wanted, reply, "")
    if max_norm is None:
        most, source = usual_norm(wanted), "10 times what was sent; it is unset"
    else:
        most, source = max_norm, "as it is set"
    if not squares <= most**2:
        raise PayloadError(f"its norm, {squares**0.5:.3g}, is above deployment.max_norm = {most:.3g} ({source})")


def usual_norm(template: Any) -> float:
    """Largest norm that a reply may have: 10 times that of the rehearsed one, or of as many numbers of size SMALL."""
    tensors = flattened(template).values()
    squares = sum(float(tensor.double().square().sum()) for tensor in tensors)
    numbers = sum(tensor.numel() for tensor in tensors)
    return GROWTH * math.sqrt(max(squares, numbers * SMALL**2))


def _compare_kinds(template: Any, got: Any, path: str) -> None:
    """Check that plain fields are of the same type: for Python, True is a 1 and is in range(3)."""
    for field in dataclasses.fields(template):
        this, that = getattr(template, field.name), getattr(got, field.name)
        if type(this) is not type(that) and not isinstance(this, Mapping):
            raise PayloadError(f"{path}{field.name} is not what it has to be")
        if dataclasses.is_dataclass(this):
            _compare_kinds(this, that, f"{path}{field.name}.")


def _compare(wanted: Any, got: Any, path: str) -> float:
    """Check a record against another of the same type; return the sum of its squares."""
    squares = 0.0
    for field in dataclasses.fields(wanted):
        name, this, that = f"{path}{field.name}", getattr(wanted, field.name), getattr(got, field.name)
        if dataclasses.is_dataclass(this):
            squares += _compare(this, that, f"{name}.")
        elif _tensors(this) and _tensors(that) and (this or that):
            squares += _compare_tensors(this, that, name)
        elif this != that:
            raise PayloadError(f"{name} is not what it has to be")
    return squares


def _tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(item, Tensor) for item in value.values())


def _compare_tensors(wanted: Mapping[str, Tensor], got: Mapping[str, Tensor], name: str) -> float:
    foreign, missing = sorted(set(got) - set(wanted)), sorted(set(wanted) - set(got))
    if foreign or missing:
        what = f"{len(foreign)} tensors it was not given" if foreign else f"{missing[0]} is missing"
        raise PayloadError(f"{name}: {what}")
    squares = 0.0
    for key, tensor in got.items():
        if tensor.shape != wanted[key].shape or tensor.dtype != wanted[key].dtype:
            was, has = (f"{list(one.shape[:4])} {one.dtype}" for one in (wanted[key], tensor))
            raise PayloadError(f"{name}:{key} is {has} where {was} was expected")
        if not tensor.isfinite().all():
            raise PayloadError(f"{name}:{key} holds NaN or infinity")
        squares += float(tensor.double().square().sum())
    return squares
