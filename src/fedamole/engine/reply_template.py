"""Checks a client's reply against a template, the reply of a dry run.

The dry run runs the client's half of the method on the message that was sent. Each training returns the adapter that it
was given, and probes return zeros. Its reply has the names, shapes, dtypes and fields of the real one, for every
method.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedamole.federation.data_engine import DryDataEngine
from fedamole.federation.method import BaseInfo, Client, ClientInfo, Method, Server
from fedamole.federation.probe import DryProbe
from fedamole.federation.record import PayloadError, fields_of, named_tensors
from fedamole.model.layers import MeanEmbeddings
from fedamole.model.params import Adapter, expert_ids
from fedamole.synthesis.examples import SyntheticExamplesError
from fedamole.synthesis.outline import LargestOutline

GROWTH, SMALL = 10.0, 0.1
"""Largest norm of a reply as a multiple of the message's, and the value that counts where the message is smaller."""


def dry_client(base: BaseInfo, info: ClientInfo, seed: int, round_: int) -> Client:
    """Return a `Client` whose probe reads nothing and returns zeros."""
    outline = LargestOutline(base.width, base.vocabulary, base.embedding_std)
    probe = DryProbe(base.shapes, base.width)
    return Client(info, base, seed, round_, probe, lambda: outline, DryDataEngine, lambda: bytes(32))


def dry_run(method: Method[Any, Any, Any, Any], server: Server, info: ClientInfo, message: Any) -> Any:
    """Run a client's half of a round without training or data; return the reply."""
    client = dry_client(server.base, info, server.seed, server.round)
    return dry_update(method, server, client, method.init_client_state(client), message)[1]


def dry_update(
    method: Method[Any, Any, Any, Any], server: Server, client: Client, client_state: Any, message: Any
) -> tuple[Any, Any, dict[str, int]]:
    """Run `Method.update` without training; return client state, reply, and the size of each trained tensor."""
    work, sizes = method.update(client, client_state, message), dict[str, int]()
    try:
        request = next(work)
        while True:
            for training in request.trainings:
                sizes |= training.adapter.trained_sizes()
            embeddings = _zero_embeddings(method, server, request.adapter) if method.needs_embeddings else {}
            request = work.send(request.unchanged(embeddings))
    except StopIteration as end:
        return end.value[0], end.value[1], sizes


def _zero_embeddings(method: Any, server: Server, adapter: Adapter) -> Mapping[str, MeanEmbeddings]:
    rank, experts = method.spec().rank, expert_ids(adapter.tensors)
    return {
        module: MeanEmbeddings(torch.zeros(rank), {expert: torch.zeros(rank) for expert in experts.get(module, ())})
        for module in server.shapes
    }


def check_reply(method: Method[Any, Any, Any, Any], template: Any, reply: Any, max_norm: float | None) -> None:
    """Compare a reply with the template: names, shapes, dtypes and fields; all values finite and the norm in bounds.

    Without `max_norm` the bound comes from the template, which holds the tensors of the message. Raises a PayloadError
    that names what is wrong and contains no values.
    """
    _compare_types(template, reply, "")
    try:
        expected = method.expected_reply(template, reply)
    except SyntheticExamplesError as error:
        raise PayloadError(str(error)) from error
    except Exception as error:  # the method reads values that are not checked yet
        raise PayloadError(f"not a reply of this method ({type(error).__name__})") from error
    squares = _compare(expected, reply, "")
    if max_norm is None:
        limit, source = usual_norm(expected), "10 times what was sent; it is unset"
    else:
        limit, source = max_norm, "as it is set"
    if not squares <= limit**2:
        raise PayloadError(f"its norm, {squares**0.5:.3g}, is above deployment.max_norm = {limit:.3g} ({source})")


def usual_norm(template: Any) -> float:
    """Return the default bound: `GROWTH` times the template's norm, or that of as many values of size `SMALL`."""
    tensors = named_tensors(template).values()
    squares = sum(float(tensor.double().square().sum()) for tensor in tensors)
    numbers = sum(tensor.numel() for tensor in tensors)
    return GROWTH * math.sqrt(max(squares, numbers * SMALL**2))


def _compare_types(template: Any, reply: Any, path: str) -> None:
    """Check the types of JSON values; in Python, True equals 1 and is in range(3)."""
    for field in dataclasses.fields(template):
        wanted, got = getattr(template, field.name), getattr(reply, field.name)
        if type(wanted) is not type(got) and not isinstance(wanted, Mapping):
            raise PayloadError(f"{path}{field.name} has an unexpected type")
        if dataclasses.is_dataclass(wanted):
            _compare_types(wanted, got, f"{path}{field.name}.")


def _compare(expected: Any, reply: Any, path: str) -> float:
    """Compare two records of one type; return the sum of the squares of the reply's tensors."""
    squares = 0.0
    for name, field in fields_of(type(expected)).items():
        wanted, got = getattr(expected, name), getattr(reply, name)
        if dataclasses.is_dataclass(wanted):
            squares += _compare(wanted, got, f"{path}{name}.")
        elif field.depth:
            squares += _compare_tensors(wanted, got, f"{path}{name}", ":")
        elif wanted != got:
            raise PayloadError(f"{path}{name} has an unexpected value")
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
