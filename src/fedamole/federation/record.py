"""Typed records <-> bytes: what crosses a wire or a round.

A record is a frozen dataclass of tensors by name (`Mapping[str, Tensor]`), nested records, and JSON values. The
bytes are one safetensors file whose metadata holds the JSON part: nothing is ever unpickled, bfloat16 survives, and
its length is what a message costs.
"""

import dataclasses
import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedamole.errors import FedamoleError

R = TypeVar("R")
Tensors = Mapping[str, Tensor]


class PayloadError(FedamoleError):
    """Bytes that are not the record that was expected."""


@dataclass(frozen=True)
class Nothing:
    """The record of a method that keeps, sends or returns nothing."""


def pack(record: object) -> bytes:
    """Turn a record into bytes."""
    tensors: dict[str, Tensor] = {}
    fields = _encode(record, "", tensors)
    return save(tensors, {"record": json.dumps([type(record).__name__, fields], sort_keys=True)})


class Packed(Mapping[str, bytes]):
    """A record for each of many clients, packed when it is read: a cohort's payloads are never in memory together."""

    def __init__(self, records: Mapping[str, object]) -> None:
        """Hold the records by client."""
        self.records = records
        self.sizes = dict.fromkeys(records, 0)
        """Bytes of each payload that has been read."""

    def __getitem__(self, client: str) -> bytes:
        """Pack one client's record."""
        payload = pack(self.records[client])
        self.sizes[client] = len(payload)
        return payload

    def __iter__(self) -> Iterator[str]:
        """The clients."""
        return iter(self.records)

    def __len__(self) -> int:
        """How many clients there are."""
        return len(self.records)


def unpack(kind: type[R], payload: bytes) -> R:
    """Turn bytes back into a record of the expected kind; anything else is a PayloadError."""
    try:
        name, fields = _head(payload)
        tensors = load(payload)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PayloadError(f"not a {kind.__name__}: damaged or truncated bytes ({type(error).__name__})") from error
    if name != kind.__name__:
        raise PayloadError(f"expected a {kind.__name__}, got a {name}")
    record: R = _decode(kind, fields, "", tensors)
    return record


def _head(payload: bytes) -> tuple[Any, Any]:
    """Name and fields of a packed record."""
    size = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + size])
    name, fields = json.loads(header["__metadata__"]["record"])
    return name, fields


def whole_number(payload: bytes, name: str) -> int | None:
    """Return a whole number of a packed record of any kind; None if there is none, or the bytes are no record."""
    try:
        value = _head(payload)[1][name]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return value if type(value) is int else None


def bytes_as_tensor(payload: bytes | None) -> dict[str, Tensor]:
    """Put packed bytes into another record, as one tensor of bytes."""
    return {} if payload is None else {"record": torch.frombuffer(bytearray(payload), dtype=torch.uint8)}


def tensor_as_bytes(tensors: Mapping[str, Tensor]) -> bytes | None:
    """Take packed bytes out of a record again; PayloadError for anything else than what `bytes_as_tensor` makes."""
    if not tensors:
        return None
    if set(tensors) != {"record"} or tensors["record"].dtype != torch.uint8 or tensors["record"].dim() != 1:
        raise PayloadError("a message holds one tensor of bytes and nothing else")
    return tensors["record"].numpy().tobytes()


def non_finite(record: object) -> str | None:
    """Return the name of the first tensor of a record that holds NaN or infinity, or None."""
    tensors: dict[str, Tensor] = {}
    _encode(record, "", tensors)
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def _is_tensors(hint: Any) -> bool:
    return get_origin(hint) in (Mapping, dict) and get_args(hint)[1] is Tensor


def _encode(record: Any, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    hints, fields = get_type_hints(type(record)), {}
    for field in dataclasses.fields(record):
        value, name = getattr(record, field.name), f"{path}{field.name}"
        if _is_tensors(hints[field.name]):
            tensors.update({f"{name}:{key}": tensor.contiguous() for key, tensor in value.items()})
        elif dataclasses.is_dataclass(value):
            fields[field.name] = _encode(value, f"{name}.", tensors)
        else:
            fields[field.name] = value
    return fields


def _decode(kind: Any, fields: Any, path: str, tensors: Mapping[str, Tensor]) -> Any:
    values = {}
    hints = get_type_hints(kind)
    expected_reply = {field.name for field in dataclasses.fields(kind) if not _is_tensors(hints[field.name])}
    if not isinstance(fields, dict) or set(fields) != expected_reply:
        raise PayloadError(f"{kind.__name__}: expected the fields {sorted(expected_reply)}")
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], f"{path}{field.name}"
        if _is_tensors(hint):
            prefix = f"{name}:"
            values[field.name] = {
                key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)
            }
        else:
            values[field.name] = _decode_value(hint, fields[field.name], name, tensors)
    return kind(**values)


def _fits(kind: Any, fields: dict[str, Any]) -> bool:
    """Whether these are the JSON fields of a record, to tell several kinds apart."""
    hints = get_type_hints(kind)
    return set(fields) == {field.name for field in dataclasses.fields(kind) if not _is_tensors(hints[field.name])}


def _decode_value(hint: Any, value: Any, name: str, tensors: Mapping[str, Tensor]) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    records = sum(map(dataclasses.is_dataclass, options))
    for option in options:
        if option is type(None):
            if value is None:
                return None
        elif dataclasses.is_dataclass(option):
            if isinstance(value, dict) and (records == 1 or _fits(option, value)):
                return _decode(option, value, f"{name}.", tensors)
        else:
            origin = get_origin(option)
            if origin is Mapping:
                origin = dict
            if origin is tuple and isinstance(value, list):
                return tuple(value)
            plain = origin if isinstance(origin, type) else option if isinstance(option, type) else object
            if isinstance(value, bool) and plain in (int, float):
                continue
            if isinstance(value, plain) or (plain is float and isinstance(value, int)):
                return value
    raise PayloadError(f"{name}: {type(value).__name__} where {hint} was expected")
