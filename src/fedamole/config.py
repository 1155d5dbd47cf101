"""Read configs: strict TOML to frozen settings dataclasses, and back."""

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
from fedamole.federation.objective import check_supported
from fedamole.federation.privacy.budget import Budget, check_private
from fedamole.federation.privacy.profile import profile_settings
from fedamole.federation.privacy.settings import PrivacySettings
from fedamole.federation.robust import check_aggregation
from fedamole.federation.secure.settings import SecureAggregationSettings, check_secure_aggregation
from fedamole.federation.settings import DeploymentSettings, FederationSettings, TrainingSettings
from fedamole.methods import METHODS
from fedamole.model.base import BaseSettings, is_path
from fedamole.received.files import read_toml
from fedamole.received.forms import MOST_WHOLE
from fedamole.received.names import LONGEST_NAME, not_on_windows, quoted
from fedamole.received.renamed_keys import refuse_old_names, with_new_names
from fedamole.runs.run_folder import CONFIG, RunFolder

Table = dict[str, Any]


@dataclass(frozen=True)
class RunSettings:
    """`[run]`: name, folder, seed and device of a run."""

    name: str = "run"
    """Name of the run in tables, and of its default folder. Not a path: no `/` or `\\`, and no dot at the beginning."""
    folder: str = ""
    """Folder of the run. Empty: `runs/NAME`, or `runs/NAME-2` and so on if that exists."""
    seed: int = 0
    """Seed of initial adapters, batch order, dropout and cohorts. The partition's seed is `data.partition_seed`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`. `auto` uses the GPU if there is one."""
    threads: int = 0
    """Number of PyTorch's CPU threads, 1 to 4096; 0 = PyTorch's default. On a busy or small machine 1 is often
    fastest."""
    group: int = 0
    """Number of clients that are trained and evaluated in lock-step; 0 = as many as fit into the free memory."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Experiment trackers that receive hyper-parameters, losses, scores and the report: any of `tensorboard`, `wandb`,
    `mlflow` and `trackio`. Their packages are not part of this one."""

    def __post_init__(self) -> None:
        """Check the name and the ranges of numbers."""
        check_run_name(self.name)
        if self.group < 0:
            raise ConfigError(f"run.group = {self.group}: must be at least 1, or 0 to fill the free memory")
        if not 0 <= self.threads <= 4096:
            raise ConfigError(f"run.threads = {self.threads}: must be 1 to 4096, or 0 for PyTorch's default")
        if len(set(self.trackers)) < len(self.trackers):
            raise ConfigError(f"run.trackers = {list(self.trackers)}: a tracker is named twice; name it once")


def check_run_name(name: str, key: str = "run.name") -> None:
    """Raise ConfigError if a name, the value of `key`, cannot be the name of a folder in runs/."""
    folder_key = key.replace("name", "folder")
    forbidden = any(letter in "/\\" or unicodedata.category(letter).startswith("C") for letter in name)
    if forbidden or name != name.strip() or not name or name.startswith(".") or len(name.encode()) > LONGEST_NAME:
        raise ConfigError(
            f"{key} = {quoted(name)}: must be the name of a folder in runs/: 1 to {LONGEST_NAME} bytes without /, \\ "
            f"and control characters, no dot at the beginning and no space at the ends; {folder_key} may be any path"
        )
    if reason := not_on_windows(name):
        raise ConfigError(f"{key} = {quoted(name)}: {reason}; {folder_key} may be any path")


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    method: Method[Any, Any, Any, Any]
    method_name: str
    data: DataSettings = field(default_factory=DataSettings)
    run: RunSettings = field(default_factory=RunSettings)
    base: BaseSettings = field(default_factory=BaseSettings)
    federation: FederationSettings = field(default_factory=FederationSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    deployment: DeploymentSettings = field(default_factory=DeploymentSettings)
    secure_aggregation: SecureAggregationSettings = field(default_factory=SecureAggregationSettings)
    privacy: PrivacySettings | None = None
    """None: no differential privacy."""
    from_profile: Table = field(default_factory=dict, compare=False)
    """The settings among these that `privacy.profile` has set, by table; of a stored run empty."""
    not_from_profile: tuple[str, ...] = field(default=(), compare=False)
    """Values of `privacy.profile` that the config replaces by its own, in words."""

    def __post_init__(self) -> None:
        """Check that there are data, and that the method supports the settings of `[federation]` and the objective."""
        if not self.data.source and not self.deployment.clients:
            raise ConfigError("data.source is empty: add a [[data.source]] with name and path")
        check_aggregation(self.federation.aggregation, self.method_name, self.method)
        check_secure_aggregation(self.secure_aggregation, self.federation, self.method_name, self.method)
        self.method.check_federation(self.federation)
        check_supported(self.training, self.method_name, self.method)
        self._check_images()
        if self.privacy is not None:
            best_round, deployed = self.evaluation.best_round, bool(self.deployment.clients)
            check_private(self.method_name, self.method, self.training, self.federation, best_round, deployed)

    def _check_images(self) -> None:
        """Raise ConfigError for templates with images without such a base, and methods that cannot train on images."""
        named = [name for name, template in self.data.templates.items() if template.image is not None]
        if named and not self.base.images:
            raise ConfigError(
                f"data.templates.{named[0]}.image: the base is loaded for text alone; set base.images = true and "
                "base.model to a base with an image part"
            )
        # Of the methods with a reason, those with a partner alone train on nothing but the clients' own rows.
        if named and self.method.only_answers and self.method.trains_together == 1:
            raise ConfigError(
                f"data.templates.{named[0]}.image: the method {self.method_name} reads or makes rows that have no "
                "images; use another method"
            )

    def budget(self) -> Budget | None:
        """Return the privacy budget of the run's clients; None without `[privacy]`."""
        if self.privacy is None:
            return None
        return Budget(self.privacy, self.training, self.method, self.federation.rounds)

    def on_base(self, model: str) -> "Config":
        """Return a copy with another `base.model`."""
        return dataclasses.replace(self, base=dataclasses.replace(self.base, model=model))

    def tables(self) -> Table:
        """Return the config as TOML tables, including all defaults."""
        tables = {name: plain(getattr(self, name)) for name in SECTIONS if name != "method"}
        tables = {name: table for name, table in tables.items() if table is not None}
        return {"method": {"name": self.method_name, **plain(self.method)}, **tables}


SECTIONS: dict[str, Any] = {
    "run": RunSettings,
    "base": BaseSettings,
    "data": DataSettings,
    "federation": FederationSettings,
    "training": TrainingSettings,
    "evaluation": EvaluationSettings,
    "deployment": DeploymentSettings,
    "secure_aggregation": SecureAggregationSettings,
    "privacy": PrivacySettings,
    "method": None,
}


def read_tables(path: Path, extended_by: tuple[Path, ...] = ()) -> Table:
    """Read a TOML file and the files it extends. Its keys take precedence; tables are merged, lists replaced.

    `extended_by` are the files that lead to this one, to detect cycles.
    """
    tables: Table = read_toml(path, ConfigError)
    parent = tables.pop("extends", None)
    if parent is None:
        return rebased(tables, path.parent)
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends = {parent!r} must be the path of a config, relative to this file")
    chain = (*extended_by, path.resolve())
    if (path.parent / parent).resolve() in chain:
        raise ConfigError(
            f"{path}: extends = {parent!r} leads back to a file that extends this one, or to itself; remove it"
        )
    return merged(read_tables(path.parent / parent, chain), rebased(tables, path.parent))


def rebased(tables: Table, folder: Path) -> Table:
    """Resolve relative paths in tables against `folder`, in place; return the tables.

    `folder` is the folder of the config file, so that `extends` works across folders, or the working folder for
    overrides of the command line.
    """

    def absolute(table: Any, key: str) -> None:
        value = table.get(key) if isinstance(table, dict) else None
        if isinstance(value, str):
            table[key] = str((folder / Path(value).expanduser()).resolve())

    base = tables.get("base")
    model = base.get("model") if isinstance(base, dict) else None
    if isinstance(model, str) and (is_path(model) or (folder / model).is_dir()):
        absolute(base, "model")  # otherwise a Hub id, or the bundled base
    method = tables.get("method")
    second = method.get("server_base") if isinstance(method, dict) else None
    if isinstance(second, str) and second and (is_path(second) or (folder / second).is_dir()):
        absolute(method, "server_base")
    data = tables.get("data")
    absolute(data, "manifest")
    if isinstance(data, dict):
        absolute(data.get("public"), "path")
    if isinstance(data, dict) and isinstance(data.get("source"), list):
        for source in data["source"]:
            absolute(source, "path")
            absolute(source, "test")
    return tables


def merged(base: Table, updates: Table) -> Table:
    """Return `base` updated with `updates`; tables are merged, other values replaced."""
    result = dict(base)
    for key, value in updates.items():
        are_tables = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if are_tables else value
    return result


def overridden(tables: Table, overrides: Sequence[str], folder: Path) -> Table:
    """Apply overrides of the form `table.key=value` from the command line; paths are relative to `folder`.

    Values are TOML; a value that is not valid TOML is a string. If the key requires a string, numbers, dates and
    booleans are strings too: run.name=2025-11-27.
    """
    for override in overrides:
        name, equals, text = override.partition("=")
        keys = name.split(".")
        if not equals or len(keys) < 2 or not all(keys):
            raise ConfigError(f"override {override!r}: write table.key=value, for example federation.rounds=5")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        if not isinstance(value, str | list | dict) and _is_string_setting(keys):
            value = text
        for key in reversed(keys):
            value = {key: value}
        tables = merged(tables, rebased(value, folder))
    return tables


def _is_string_setting(keys: Sequence[str]) -> bool:
    """Whether a setting, given by its path of keys, accepts strings only."""
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


def load_config(path: Path, overrides: Sequence[str] = (), *, stored: bool = False) -> Config:
    """Read a config, apply overrides and check it.

    `stored`: fedamole wrote the file, perhaps an earlier version, so it may have the old names of RENAMED. Raises
    ConfigError, which names the file and the key and how to correct it.
    """
    try:
        tables = read_tables(path)
        return to_config(overridden(with_new_names(tables) if stored else tables, overrides, Path.cwd()))
    except ConfigError as error:
        text = str(error)
        raise type(error)(text if str(path) in text else f"{path}: {text}") from error


def load_run_config(folder: RunFolder) -> Config:
    """Read the config of a run folder, which is not trusted: it may not extend other files or be a link to outside.

    If the base has moved, `base.model` is its new path, which run.json records. Raises RunError if config.toml names
    another method than run.json.
    """
    path = folder.place(CONFIG)
    if "extends" in read_toml(path, ConfigError):
        raise ConfigError(f"{path}: the config of a run folder extends no other file; restore it from a copy")
    config = load_config(path, stored=True)
    folder.check_method(config.method_name)
    moved_base = folder.about.get("base_model")
    return config if moved_base is None else config.on_base(moved_base)


def to_config(tables: Table) -> Config:
    """Convert tables to a checked config."""
    refuse_unknown(tables, [*SECTIONS, "extends"], "")
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{name} = {table!r}: must be a table; write [{name}]")
        refuse_old_names(name, table)
    name = tables.get("method", {}).get("name", "fedamole")
    if name not in METHODS:
        raise ConfigError(f"method.name = {name!r}: there is no such method{nearest(str(name), METHODS)}")
    from_profile, not_from_profile = profile_settings(tables, [item.name for item in dataclasses.fields(METHODS[name])])
    tables = merged(from_profile, tables)
    method = {key: value for key, value in tables.get("method", {}).items() if key != "name"}
    sections = {key: build(kind, tables.get(key, {}), key) for key, kind in SECTIONS.items() if kind}
    if "privacy" not in tables:
        sections["privacy"] = None
    method = build(METHODS[name], method, "method")
    sections |= {"from_profile": from_profile, "not_from_profile": not_from_profile}
    return Config(method=method, method_name=name, **sections)


def refuse_unknown(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise ConfigError for an unknown key; `where` is the table's name, empty at the top level of a file."""
    for key in table:
        if key not in known:
            raise ConfigError(f"unknown key {f'{where}.{key}' if where else key}{nearest(key, known)}")


def nearest(word: str, known: Any) -> str:
    """Return the end of an error about an unknown word: the closest known word, or all of them."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"


def build(kind: Any, table: Any, where: str) -> Any:
    """Create a settings dataclass from a table; `where` is the table's name.

    Raises ConfigError for unknown and missing keys and for wrong types.
    """
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
    """Return a TOML value as a field's type; ConfigError if it has another type. Integers are accepted as floats."""
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
        return tuple(_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
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
    expected = {tuple: "a list", dict: "a table"}.get(origin) or {
        int: "a whole number",
        float: "a number",
        str: "text in quotes",
        bool: "true or false",
    }.get(hint, str(hint))
    shown = f"{value.isoformat()} (a date or time)" if isinstance(value, date | time) else repr(value)
    raise ConfigError(f"{where} = {shown}: must be {expected}, not {type(value).__name__}")


def plain(value: Any) -> Any:
    """Convert settings to values of TOML and JSON; keys with the value None are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        return {key: plain(item) for key, item in items.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value
