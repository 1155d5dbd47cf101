"""Serialise typed records: server state, messages, client state and replies.

A record is a frozen dataclass. Its fields are tensors by name (`Mapping[str, Tensor]`, nested to any depth, such as
`Mapping[str, Mapping[str, Tensor]]`), other records, and JSON values. The bytes are one safetensors file whose metadata
holds the JSON part, so that nothing is ever unpickled and every dtype survives. Their number is the reported traffic.

A tensor of a field is stored as `field:key`. In a nested mapping the outer keys are stored once, in the JSON part, and
the tensor as `field.0:key`, where 0 is the index of its outer key in sorted order.
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
from typing_extensions import override

from fedamole.errors import FedamoleError
from fedamole.model.params import Tensors

R = TypeVar("R")


class PayloadError(FedamoleError):
    """The bytes are not a record of the expected type."""


@dataclass(frozen=True)
class Nothing:
    """An empty record."""


def pack(record: object) -> bytes:
    """Serialise a record."""
    tensors: dict[str, Tensor] = {}
    fields = _encode(record, "", tensors)
    return save(tensors, {"record": json.dumps([type(record).__name__, fields], sort_keys=True)})


class Packed(Mapping[str, bytes]):
    """Records by client, each serialised when it is read, so that the payloads are never all in memory."""

    def __init__(self, records: Mapping[str, object]) -> None:
        """Wrap the records, by client."""
        self.records = records
        self.sizes = dict.fromkeys(records, 0)
        """Bytes of each payload that has been read, by client."""

    @override
    def __getitem__(self, client: str) -> bytes:
        payload = pack(self.records[client])
        self.sizes[client] = len(payload)
        return payload

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    @override
    def __len__(self) -> int:
        return len(self.records)


def unpack(record_type: type[R], payload: bytes) -> R:
    """Deserialise a record; raise a PayloadError for anything but a record of this type."""
    try:
        name, fields, tensors = read_parts(payload)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        text = f"not a {record_type.__name__}: damaged or truncated bytes ({type(error).__name__})"
        raise PayloadError(text) from error
    if name != record_type.__name__:
        raise PayloadError(f"expected a {record_type.__name__}, got a {name}")
    record: R = _decode(record_type, fields, "", tensors)
    return record


def read_parts(payload: bytes) -> tuple[Any, Any, dict[str, dict[str, Tensor]]]:
    """Return name and JSON part of a packed record of any kind, and its tensors by path (the part before the colon).

    Nothing is checked against a type; bytes that are no record raise exceptions of json and safetensors.
    """
    name, fields = _head(payload)
    by_path: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in load(payload).items():
        path, _, key = full_name.partition(":")
        by_path.setdefault(path, {})[key] = tensor
    return name, fields, by_path


def field_of(path: str) -> str:
    """Return the field that the tensors of a path belong to: the path without the indices of outer keys."""
    parts = path.split(".")
    while len(parts) > 1 and parts[-1].isdecimal():
        parts.pop()
    return ".".join(parts)


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
    """Wrap serialised bytes as a field of another record: one tensor of bytes, or none."""
    return {} if payload is None else {"record": torch.frombuffer(bytearray(payload), dtype=torch.uint8)}


def tensor_as_bytes(tensors: Tensors) -> bytes | None:
    """Undo `bytes_as_tensor`; raise a PayloadError for any other tensors."""
    if not tensors:
        return None
    if set(tensors) != {"record"} or tensors["record"].dtype != torch.uint8 or tensors["record"].dim() != 1:
        raise PayloadError("a message must hold exactly one tensor of bytes")
    return tensors["record"].numpy().tobytes()


def named_tensors(record: object, prefix: str = "") -> dict[str, Tensor]:
    """Return all tensors of a record by `field:key`, or `field:outer key/key`; in a nested record `field.field:key`."""
    hints, tensors = get_type_hints(type(record)), dict[str, Tensor]()
    for field in dataclasses.fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            tensors |= named_tensors(value, f"{prefix}{field.name}.")
        elif holds_tensors(hints[field.name]):
            tensors |= joined_keys(value, f"{prefix}{field.name}:")
    return tensors


def joined_keys(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Flatten a mapping of tensors of any depth; keys are joined by slashes."""
    flat: dict[str, Tensor] = {}
    for key, value in tensors.items():
        flat |= {prefix + key: value} if isinstance(value, Tensor) else joined_keys(value, f"{prefix}{key}/")
    return flat


def non_finite(record: object) -> str | None:
    """Return the name of the first tensor of a record that holds NaN or infinity, or None."""
    return next((name for name, tensor in named_tensors(record).items() if not tensor.isfinite().all()), None)


def holds_tensors(hint: Any) -> bool:
    """Whether this type annotation is a mapping of tensors, nested or not."""
    return _depth(hint) > 0


def _depth(hint: Any) -> int:
    """How deep a mapping of tensors is nested: 1 for Mapping[str, Tensor], 0 for any other type."""
    if get_origin(hint) not in (Mapping, dict):
        return 0
    value = get_args(hint)[1]
    if value is Tensor:
        return 1
    inner = _depth(value)
    return inner + 1 if inner else 0


def _in_json(hint: Any) -> bool:
    """Whether a field of this type has a part in the JSON."""
    return _depth(hint) != 1


def _encode(record: Any, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the JSON part of a record and add its tensors to `tensors`."""
    hints, fields = get_type_hints(type(record)), {}
    for field in dataclasses.fields(record):
        value, name = getattr(record, field.name), f"{path}{field.name}"
        if depth := _depth(hints[field.name]):
            outer_keys = _encode_tensors(value, depth, name, tensors)
            if depth > 1:
                fields[field.name] = outer_keys
        elif dataclasses.is_dataclass(value):
            fields[field.name] = _encode(value, f"{name}.", tensors)
        else:
            fields[field.name] = value
    return fields


def _encode_tensors(value: Mapping[str, Any], depth: int, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Add the tensors of a mapping of this depth to `tensors`; return its outer keys, nested like the mapping."""
    if depth == 1:
        tensors.update({f"{path}:{key}": tensor.contiguous() for key, tensor in value.items()})
        return {}
    return {
        key: _encode_tensors(value[key], depth - 1, f"{path}.{index}", tensors)
        for index, key in enumerate(sorted(value))
    }


def _decode(record_type: Any, fields: Any, path: str, tensors: Mapping[str, Tensors]) -> Any:
    """Build a record from its JSON part and its tensors by path and key."""
    values, hints = {}, get_type_hints(record_type)
    expected = {field.name for field in dataclasses.fields(record_type) if _in_json(hints[field.name])}
    if not isinstance(fields, dict) or set(fields) != expected:
        raise PayloadError(f"{record_type.__name__}: expected the fields {sorted(expected)}")
    for field in dataclasses.fields(record_type):
        hint, name = hints[field.name], f"{path}{field.name}"
        if depth := _depth(hint):
            values[field.name] = _decode_tensors(fields.get(field.name), depth, name, name, tensors)
        else:
            values[field.name] = _decode_value(hint, fields[field.name], name, tensors)
    return record_type(**values)


def _decode_tensors(
    outer_keys: Any, depth: int, path: str, name: str, tensors: Mapping[str, Tensors]
) -> dict[str, Any]:
    """Build a mapping of tensors of this depth; `outer_keys` is what `_encode_tensors` returned."""
    if depth == 1:
        if outer_keys:
            raise PayloadError(f"{name}: nested too deeply")
        return dict(tensors.get(path, {}))
    if not isinstance(outer_keys, dict):
        raise PayloadError(f"{name}: {type(outer_keys).__name__} where a mapping was expected")
    return {
        key: _decode_tensors(outer_keys[key], depth - 1, f"{path}.{index}", name, tensors)
        for index, key in enumerate(sorted(outer_keys))
    }


def _has_fields(record_type: Any, fields: dict[str, Any]) -> bool:
    """Whether these are the JSON fields of a record of this type."""
    hints = get_type_hints(record_type)
    return set(fields) == {field.name for field in dataclasses.fields(record_type) if _in_json(hints[field.name])}


def _decode_value(hint: Any, value: Any, name: str, tensors: Mapping[str, Tensors]) -> Any:
    """Check a JSON value against a type annotation; decode it where it is a record."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    records = sum(map(dataclasses.is_dataclass, options))
    for option in options:
        if option is type(None):
            if value is None:
                return None
        elif dataclasses.is_dataclass(option):
            if isinstance(value, dict) and (records == 1 or _has_fields(option, value)):
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
