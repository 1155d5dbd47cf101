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
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

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
    fields = _encode(record, 0, "", tensors)
    return save(tensors, {"record": json.dumps([type(record).__name__, fields], sort_keys=True)})


@dataclass(eq=False)
class Packed(Mapping[str, bytes]):
    """Records by client, each serialised when it is read, so that the payloads are never all in memory."""

    records: Mapping[str, object]
    sizes: Counter[str] = field(default_factory=Counter)
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
    tensors: dict[str, Tensor] = {}
    for name, (_, depth) in fields_of(type(record)).items():
        value = getattr(record, name)
        if dataclasses.is_dataclass(value):
            tensors |= named_tensors(value, f"{prefix}{name}.")
        elif depth:
            tensors |= joined_keys(value, f"{prefix}{name}:")
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


class Field(NamedTuple):
    """A field of a record type."""

    hint: Any
    """Its type annotation."""
    depth: int
    """How deep a mapping of tensors is nested: 1 for Mapping[str, Tensor], 0 for any other type."""


def fields_of(record_type: Any) -> dict[str, Field]:
    """Return the fields of a record type by name."""
    hints = get_type_hints(record_type)
    return {
        field.name: Field(hints[field.name], _depth(hints[field.name])) for field in dataclasses.fields(record_type)
    }


def _depth(hint: Any) -> int:
    """The depth of a type annotation, as in `Field`."""
    if get_origin(hint) not in (Mapping, dict):
        return 0
    value = get_args(hint)[1]
    if value is Tensor:
        return 1
    inner = _depth(value)
    return inner + 1 if inner else 0


def _in_json(fields: Mapping[str, Field]) -> set[str]:
    """Names of the fields that have a part in the JSON: all but plain mappings of tensors."""
    return {name for name, (_, depth) in fields.items() if depth != 1}


def _encode(value: Any, depth: int, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return the JSON part of a record, or of a field of this depth, and add its tensors to `tensors`."""
    if depth == 1:
        tensors.update({f"{path}:{key}": tensor.contiguous() for key, tensor in value.items()})
        return {}
    if depth:
        items = enumerate(sorted(value.items()))
        return {key: _encode(inner, depth - 1, f"{path}.{index}", tensors) for index, (key, inner) in items}
    if not dataclasses.is_dataclass(value):
        return value
    start, fields = f"{path}." if path else "", fields_of(type(value))
    parts = {name: _encode(getattr(value, name), depth, start + name, tensors) for name, (_, depth) in fields.items()}
    return {name: parts[name] for name in _in_json(fields)}


def _decode(record_type: Any, part: Any, path: str, tensors: Mapping[str, Tensors]) -> Any:
    """Build a record from its JSON part and its tensors by path and key."""
    fields, values = fields_of(record_type), {}
    if not isinstance(part, dict) or set(part) != _in_json(fields):
        raise PayloadError(f"{record_type.__name__}: expected the fields {sorted(_in_json(fields))}")
    for name, (hint, depth) in fields.items():
        if depth:
            values[name] = _decode_tensors(part.get(name), depth, path + name, tensors)
        else:
            values[name] = _decode_value(hint, part[name], path + name, tensors)
    return record_type(**values)


def _decode_tensors(outer_keys: Any, depth: int, path: str, tensors: Mapping[str, Tensors]) -> dict[str, Any]:
    """Build a mapping of tensors of this depth; `outer_keys` is what `_encode` returned."""
    if depth == 1 and not outer_keys:
        return dict(tensors.get(path, {}))
    if depth == 1:
        raise PayloadError(f"{field_of(path)}: nested too deeply")
    if not isinstance(outer_keys, dict):
        raise PayloadError(f"{field_of(path)}: {type(outer_keys).__name__} where a mapping was expected")
    items = enumerate(sorted(outer_keys.items()))
    return {key: _decode_tensors(inner, depth - 1, f"{path}.{index}", tensors) for index, (key, inner) in items}


def _decode_value(hint: Any, value: Any, path: str, tensors: Mapping[str, Tensors]) -> Any:
    """Check a JSON value against a type annotation; decode it where it is a record."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    records = sum(map(dataclasses.is_dataclass, options))
    for option in options:
        kind = get_origin(option) or option
        if dataclasses.is_dataclass(option):
            if isinstance(value, dict) and (records == 1 or set(value) == _in_json(fields_of(option))):
                return _decode(option, value, f"{path}.", tensors)
        elif isinstance(value, bool) and kind in (int, float):
            continue
        elif not isinstance(kind, type) or isinstance(value, _JSON_TYPES.get(kind, kind)):
            return tuple(value) if kind is tuple else value
    raise PayloadError(f"{path}: {type(value).__name__} where {hint} was expected")


_JSON_TYPES: dict[type, Any] = {Mapping: dict, tuple: list, float: (int, float)}
"""Types of the JSON values that stand for values of other types."""
