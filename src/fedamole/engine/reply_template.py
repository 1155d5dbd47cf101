"""What a client's reply has to look like, found by rehearsing its work without training; and the check against it.

The rehearsal runs the client's half of the method on the very message that was sent, and every training it asks for
returns what it was given. The reply that comes of it has the names, shapes, dtypes and fields of the real one, for
every method, without a line about the wire in any of them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from fedamole.federation.method import Client, ClientInfo, Method, Server, TrainingResult
from fedamole.federation.record import PayloadError, holds_tensors, named_tensors
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
    tensors = named_tensors(template).values()
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


def _compare(expected: Any, reply: Any, path: str) -> float:
    """Compare two records of one type; return the sum of the squares of the reply's tensors."""
    hints, squares = get_type_hints(type(expected)), 0.0
    for field in dataclasses.fields(expected):
        name, wanted, got = f"{path}{field.name}", getattr(expected, field.name), getattr(reply, field.name)
        if dataclasses.is_dataclass(wanted):
            squares += _compare(wanted, got, f"{name}.")
        elif holds_tensors(hints[field.name]):
            squares += _compare_tensors(wanted, got, name, ":")
        elif wanted != got:
            raise PayloadError(f"{name} has an unexpected value")
    return squares


def _compare_tensors(expected: Mapping[str, Any], reply: Mapping[str, Any], path: str, separator: str) -> float:
    """Compare two mappings of tensors of one depth: keys, shapes and dtypes; return the sum of squares of `reply`."""
    foreign, missing = sorted(set(reply) - set(expected)), sorted(set(expected) - set(reply))
    if foreign:
        raise PayloadError(f"{path}: {len(foreign)} keys that were not sent to this client")
    if missing:
        raise PayloadError(f"{path}: {missing[0]} is missing")
    squares = 0.0
    for key, wanted in expected.items():
        name, got = f"{path}{separator}{key}", reply[key]
        if not isinstance(wanted, Tensor):
            squares += _compare_tensors(wanted, got, name, "/")
            continue
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            was, has = (f"{list(tensor.shape[:4])} {tensor.dtype}" for tensor in (wanted, got))
            raise PayloadError(f"{name} is {has} where {was} was expected")
        if not got.isfinite().all():
            raise PayloadError(f"{name} holds NaN or infinity")
        squares += float(got.double().square().sum())
    return squares
