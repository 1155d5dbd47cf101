"""The configuration as a JSON schema, for completion and checks in an editor."""

import ast
import dataclasses
import inspect
import textwrap
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fedamole.config import SECTIONS, plain
from fedamole.methods import METHODS

Json = dict[str, Any]
TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
DEFAULT_METHOD = "fedamole"


def field_docstrings(settings: type) -> dict[str, str]:
    """Return the docstring of each field of a settings class and its base classes, on one line."""
    meanings: dict[str, str] = {}
    for base in reversed(settings.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = inspect.getsource(base)
        except OSError:  # a class that is made by a function, such as NAME_ft; it adds no fields
            continue
        (definition,) = ast.parse(textwrap.dedent(source)).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    meanings[name] = " ".join(text.split())
    return meanings


def config_schema() -> Json:
    """Return a JSON schema (draft 2020-12) of a config file.

    It has names, types, defaults and descriptions. Ranges, and settings that exclude each other, are checked by
    `fedamole plan` and `fedamole run` only.
    """
    tables = {name: _object(kind) for name, kind in SECTIONS.items() if kind is not None}
    method: Json = {
        "type": "object",
        "properties": {"name": {"enum": list(METHODS), "default": DEFAULT_METHOD, "description": "The method."}},
        "allOf": [_of_method(name, kind) for name, kind in METHODS.items()],
    }
    extends = {"type": "string", "description": "Path of a config that this one changes, relative to this file."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Config of fedamole",
        "type": "object",
        "properties": {"extends": extends, "method": method, **tables},
        "additionalProperties": False,
    }


def _of_method(name: str, kind: type) -> Json:
    """Return the keys that are allowed for one method; the default method has no `name`."""
    condition: Json = {"properties": {"name": {"const": name}}}
    if name != DEFAULT_METHOD:
        condition["required"] = ["name"]
    allowed = _object(kind)
    allowed["properties"] = {"name": True, **allowed["properties"]}
    return {"if": condition, "then": allowed}


def _object(settings: type) -> Json:
    """Return the schema of a table with the fields of a settings class."""
    hints, meanings = get_type_hints(settings), field_docstrings(settings)
    properties, required = {}, []
    for field in dataclasses.fields(settings):
        schema = _schema(hints[field.name])
        if field.name in meanings:
            schema["description"] = meanings[field.name]
        if field.default is not dataclasses.MISSING:
            default = plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = plain(field.default_factory())
        else:
            required.append(field.name)
            default = None
        if default is not None:
            schema["default"] = default
        properties[field.name] = schema
    table: Json = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**table, "required": required} if required else table


def _schema(hint: Any) -> Json:
    """Return the schema of a field's type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        options = [_schema(option) for option in arguments if option is not types.NoneType]
        return options[0] if len(options) == 1 else {"anyOf": options}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1])}
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _object(hint)
    return {"type": TYPES[hint]}
