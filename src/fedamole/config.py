"""A run's config: strict TOML -> frozen settings, and back. It stops at `experiment.py`."""

import dataclasses
import difflib
import math
import tomllib
import types
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fedamole.data.settings import DataSettings
from fedamole.errors import ConfigError
from fedamole.evaluation.personal import EvaluationSettings
from fedamole.federation.method import Method
from fedamole.federation.robust import check_aggregation
from fedamole.federation.settings import DeploymentSettings, FederationSettings, TrainingSettings
from fedamole.methods import METHODS
from fedamole.model.base import BaseSettings
from fedamole.received.files import read_toml
from fedamole.received.forms import MOST_WHOLE
from fedamole.received.names import LONGEST_NAME, not_on_windows, quoted
from fedamole.runs.run_folder import CONFIG, RunFolder

Table = dict[str, Any]


@dataclass(frozen=True)
class RunSettings:
    """`[run]`: where a run goes and what it runs on."""

    name: str = "run"
    """Name shown in tables, and the folder's default name."""
    folder: str = ""
    """Where the run is written; unset: runs/<name>, or runs/<name>-2 and so on where that exists."""
    seed: int = 0
    """Seed of initial adapters, order, dropout, cohorts; the partition has its own, data.partition_seed."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes the GPU if there is one."""
    threads: int = 0
    """Threads of PyTorch on a CPU; 0 = PyTorch's own choice. On a busy or small machine 1 is often fastest."""
    group: int = 0
    """Clients trained and evaluated in lock-step on the one base; 0 = as many as fit into the free memory."""
    tensorboard: bool = False
    """Also write losses and scores for TensorBoard (needs this package's extra `tensorboard`)."""

    def __post_init__(self) -> None:
        """Refuse names that are no folder's, and numbers that no machine has."""
        check_run_name(self.name)
        if self.group < 0:
            raise ConfigError(f"run.group = {self.group}: at least 1, or 0 to fill the free memory")
        if not 0 <= self.threads <= 4096:
            raise ConfigError(f"run.threads = {self.threads}: 1 to 4096, or 0 for PyTorch's own choice")


def check_run_name(name: str, key: str = "run.name") -> None:
    """Refuse a name, the value of `key`, that could not be a folder inside runs/ or be shown by a terminal as it is."""
    folder = key.replace("name", "folder")
    odd = any(letter in "/\\" or unicodedata.category(letter).startswith("C") for letter in name)
    if odd or name != name.strip() or not name or name.startswith(".") or len(name.encode()) > LONGEST_NAME:
        raise ConfigError(
            f"{key} = {quoted(name)}: it names a folder inside runs/, so it is 1 to {LONGEST_NAME} bytes without /, "
            f"\\ and control characters, and neither begins with a dot nor with a space; {folder} may be any path"
        )
    if why := not_on_windows(name):
        raise ConfigError(f"{key} = {quoted(name)}: {why}; {folder} may be any path")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    method: Method[Any, Any, Any, Any]
    method_name: str
    data: DataSettings = field(default_factory=DataSettings)
    run: RunSettings = field(default_factory=RunSettings)
    base: BaseSettings = field(default_factory=BaseSettings)
    federation: FederationSettings = field(default_factory=FederationSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    deployment: DeploymentSettings = field(default_factory=DeploymentSettings)

    def __post_init__(self) -> None:
        """Refuse a run that has no data anywhere, and replies that the method could not aggregate."""
        if not self.data.source and not self.deployment.clients:
            raise ConfigError("data.source is empty: add a [[data.source]] with name and path")
        check_aggregation(self.federation.aggregation, self.method_name, self.method)

    def on_base(self, model: str) -> "Config":
        """Return the same config with another `base.model`."""
        return dataclasses.replace(self, base=dataclasses.replace(self.base, model=model))

    def tables(self) -> Table:
        """The config as TOML tables, every default spelled out."""
        tables = {name: plain(getattr(self, name)) for name in SECTIONS if name != "method"}
        return {"method": {"name": self.method_name, **plain(self.method)}, **tables}


SECTIONS: dict[str, Any] = {
    "run": RunSettings,
    "base": BaseSettings,
    "data": DataSettings,
    "federation": FederationSettings,
    "training": TrainingSettings,
    "evaluation": EvaluationSettings,
    "deployment": DeploymentSettings,
    "method": None,
}


def read_tables(path: Path, extended_by: tuple[Path, ...] = ()) -> Table:
    """Read a TOML file and what it extends: the nearer file's keys win, tables are merged, lists replaced."""
    tables: Table = read_toml(path, ConfigError)
    parent = tables.pop("extends", None)
    if parent is None:
        return rebased(tables, path.parent)
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends = {parent!r} must be the path of a config, relative to this one")
    chain = (*extended_by, path.resolve())
    if (path.parent / parent).resolve() in chain:
        raise ConfigError(f"{path}: extends = {parent!r} leads back to a file that extends this one, or to itself")
    return merged(read_tables(path.parent / parent, chain), rebased(tables, path.parent))


def rebased(tables: Table, folder: Path) -> Table:
    """Make paths that are relative to `folder` absolute, in place; return the tables.

    `folder` is that of the config file, so that `extends` may cross folders; for words of the command line it is the
    working folder.
    """

    def absolute(table: Any, key: str) -> None:
        value = table.get(key) if isinstance(table, dict) else None
        if isinstance(value, str):
            table[key] = str((folder / Path(value).expanduser()).resolve())

    base = tables.get("base")
    model = base.get("model") if isinstance(base, dict) else None
    if isinstance(model, str) and (model.startswith((".", "/", "~")) or (folder / model).is_dir()):
        absolute(base, "model")  # anything else is a hub id, or the bundled base
    data = tables.get("data")
    absolute(data, "manifest")
    if isinstance(data, dict) and isinstance(data.get("source"), list):
        for source in data["source"]:
            absolute(source, "path")
            absolute(source, "test")
    return tables


def merged(below: Table, above: Table) -> Table:
    """Lay one set of tables over another."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def overridden(tables: Table, overrides: Sequence[str], folder: Path) -> Table:
    """Apply `table.key=value` words of the command line; paths are relative to `folder`.

    Values are TOML, and bare words count as text. Where a key holds text, so do words that TOML reads as a number, a
    date or a truth value: run.name=2025-11-27.
    """
    for word in overrides:
        name, equals, text = word.partition("=")
        keys = name.split(".")
        if not equals or len(keys) < 2 or not all(keys):
            raise ConfigError(f"override {word!r}: write table.key=value, for example federation.rounds=5")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        if not isinstance(value, str | list | dict) and _holds_text(keys):
            value = text
        for key in reversed(keys):
            value = {key: value}
        tables = merged(tables, rebased(value, folder))
    return tables


def _holds_text(keys: Sequence[str]) -> bool:
    """Whether a setting, named by the keys of its tables, holds nothing but text."""
    kinds = [*METHODS.values()] if keys[0] == "method" else [SECTIONS.get(keys[0])]
    for key in keys[1:]:
        hints: list[Any] = []
        for kind in kinds:
            if dataclasses.is_dataclass(kind):
                hints += [get_type_hints(kind)[item.name] for item in dataclasses.fields(kind) if item.name == key]
            elif get_origin(kind) is dict:
                hints.append(get_args(kind)[1])
        kinds = [option for hint in hints for option in (get_args(hint) if _is_union(hint) else (hint,))]
    return bool(kinds) and all(kind in (str, types.NoneType) for kind in kinds)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and check a config; every error names the file, the key and the remedy."""
    try:
        return to_config(overridden(read_tables(path), overrides, Path.cwd()))
    except ConfigError as error:
        text = str(error)
        raise type(error)(text if str(path) in text else f"{path}: {text}") from error


def load_run_config(folder: RunFolder) -> Config:
    """The config of a run's folder, which may come from elsewhere: it extends nothing, and links lead nowhere else.

    If the base has moved, `base.model` is its new place, which run.json records.
    """
    path = folder.place(CONFIG)
    if "extends" in read_toml(path, ConfigError):
        raise ConfigError(f"{path}: a run's config is whole and extends no other file; put it back from a copy")
    config, moved = load_config(path), folder.about.get("base_model")
    return config if moved is None else config.on_base(moved)


def to_config(tables: Table) -> Config:
    """Turn tables into a checked config."""
    refuse_unknown(tables, [*SECTIONS, "extends"], "")
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{name} = {table!r}: must be a table, write [{name}]")
    chosen = dict(tables.get("method", {}))
    name = chosen.pop("name", "fedamole")
    if name not in METHODS:
        raise ConfigError(f"method.name = {name!r}: there is no such method{nearest(str(name), METHODS)}")
    sections = {key: build(kind, tables.get(key, {}), key) for key, kind in SECTIONS.items() if kind}
    return Config(method=build(METHODS[name], chosen, "method"), method_name=name, **sections)


def refuse_unknown(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise ConfigError for a key that is not known; `where` is the table's name, empty for a file's top level."""
    for key in table:
        if key not in known:
            raise ConfigError(f"unknown key {f'{where}.{key}' if where else key}{nearest(key, known)}")


def nearest(word: str, known: Any) -> str:
    """What an error about an unknown word ends with: the known word that was probably meant, or all of them."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"


def build(kind: Any, table: Any, where: str) -> Any:
    """Build a settings dataclass from a table, refusing unknown keys and wrong types; `where` is the table's name."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where} = {table!r}: must be a table")
    hints = get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}
    refuse_unknown(table, list(fields), where)
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in table:
            raise ConfigError(f"{where}.{name} is missing".lstrip("."))
    return kind(**{key: _convert(hints[key], value, f"{where}.{key}".lstrip(".")) for key, value in table.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check a TOML value against a field's type; whole numbers may stand where a number with a point is meant."""
    origin, arguments = get_origin(hint), get_args(hint)
    if _is_union(hint):
        options = [option for option in arguments if option is not type(None)]
        for option in options[:-1]:
            try:
                return _convert(option, value, where)
            except ConfigError:
                continue
        return _convert(options[-1], value, where)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} = {value!r}: must be one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], item, f"{where}[{place}]") for place, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} = {value}: must be a finite number")
    if isinstance(value, int) and abs(value) > MOST_WHOLE:
        raise ConfigError(f"{where} = {quoted(value)}: must be a whole number of at most 2^53")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    wanted = {tuple: "a list", dict: "a table"}.get(origin) or {
        int: "a whole number",
        float: "a number",
        str: "text in quotes",
        bool: "true or false",
    }.get(hint, str(hint))
    shown = f"{value.isoformat()} (a date or time)" if isinstance(value, date | time) else repr(value)
    raise ConfigError(f"{where} = {shown}: must be {wanted}, not {type(value).__name__}")


def plain(value: Any) -> Any:
    """Turn settings into what TOML and JSON can hold; unset keys are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        return {key: plain(item) for key, item in items.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value
