"""The arms of a comparison: which method runs with which config in which scenario, and which two share one run."""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedamole.comparison.settings import ComparisonSettings
from fedamole.config import Config, Table, merged, nearest, overridden, read_tables, to_config
from fedamole.errors import ConfigError
from fedamole.experiment import variants_of
from fedamole.methods import METHODS
from fedamole.received.names import not_on_windows

GIVEN_BY_CELLS = ("run.seed", "run.folder", "run.name", "method.name", "evaluation.pre_aggregation")
"""Settings that a comparison sets in every cell, so that `overrides` cannot."""
PAPER = "-paper"
"""What the name of a method's arm with the budget of its paper ends with, under budget = "both"."""


@dataclass(frozen=True)
class Arm:
    """A method in a scenario, over all seeds; with X and X_ft asked for together, both of them."""

    scenario: str
    rows: Mapping[str, str]
    """Row of the run's summary by method as the comparison calls it."""
    tables: Table
    """The config without what differs between cells: seed, learning rate, folder."""

    @property
    def name(self) -> str:
        """The method that the runs are named after."""
        return next(iter(self.rows))


def check_names(where: str, names: Iterable[str]) -> None:
    """Raise ConfigError for names that cannot be folders beside each other; case does not tell folders apart."""
    seen: dict[str, str] = {}
    for name in names:
        if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
            raise ConfigError(f"{where}.{name}: letters, digits, _ + - and . only, as it names a folder")
        if why := not_on_windows(name):
            raise ConfigError(f"{where}.{name}: {why}")
        if (other := seen.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)) != name:
            raise ConfigError(f"{where}.{name}: it is the folder of {other!r} on some systems; choose another name")


def tables_of_methods(settings: ComparisonSettings, variants: Any) -> dict[str, Table]:
    """Return for every method of the comparison, by its name there, the tables of its own: [method] and the budget.

    Under budget = "both" each method whose paper takes other steps is followed by a second one, NAME-paper.
    """
    methods = _method_tables(settings, variants)
    if settings.budget == "bytes":
        return {label: {"method": method} for label, method in methods.items()}
    first = "paper" if settings.budget == "paper" else "steps"
    found: dict[str, Table] = {}
    for label, method in methods.items():
        found[label] = {"method": method, "training": {"budget": first}}
        if settings.budget == "both" and METHODS[method["name"]].budgets_differ:
            second = label + PAPER
            if second in methods:
                raise ConfigError(f'methods: budget = "both" makes {second!r} out of {label!r}; rename the variant')
            found[second] = {"method": method, "training": {"budget": "paper"}}
    return found


def _method_tables(settings: ComparisonSettings, variants: Any) -> dict[str, Table]:
    """The [method] table of every method asked for."""
    if not isinstance(variants, dict):
        raise ConfigError(f"variants = {variants!r}: must be tables, write [variants.NAME]")
    check_names("variants", (*METHODS, *variants))
    for label, table in variants.items():
        if label in METHODS:
            raise ConfigError(f"variants.{label}: a method is called so already; choose another name")
        if not isinstance(table, dict) or "name" not in table:
            raise ConfigError(f'variants.{label} has no method: add name = "fedamole", say')
        if table["name"] not in METHODS:
            close = nearest(str(table["name"]), METHODS)
            raise ConfigError(f"variants.{label}.name = {table['name']!r}: there is no such method{close}")
        if label not in settings.methods:
            raise ConfigError(f"variants.{label} is not compared: add it to methods or remove it")
    known = {**{name: {"name": name} for name in METHODS}, **variants}
    for label in settings.methods:
        if label not in known:
            raise ConfigError(f"methods: {label!r} is neither a method nor one of [variants]{nearest(label, known)}")
    return {label: known[label] for label in settings.methods}


def tables_of_overrides(settings: ComparisonSettings, folder: Path) -> Table:
    """Return the settings of every cell as tables, paths made absolute."""
    for word in settings.overrides:
        key = word.partition("=")[0]
        if key in GIVEN_BY_CELLS or (key == "training.budget" and settings.budget != "bytes"):
            by = "; set `budget` in its place" if key == "training.budget" else ""
            raise ConfigError(f"overrides: {word!r}: the comparison sets {key} itself; remove it{by}")
        if key == "training.learning_rate" and settings.learning_rates:
            raise ConfigError(f"overrides: {word!r}: learning_rates chooses it; remove one of the two")
    try:
        return overridden({}, settings.overrides, folder)
    except ConfigError as error:
        raise ConfigError(f"overrides: {error}") from error


def arms_of(
    settings: ComparisonSettings, scenario: str, path: Path, methods: Mapping[str, Table], overrides: Table
) -> list[Arm]:
    """Return the arms of one scenario, in the order of the methods.

    `methods` holds each method's own tables, `path` the scenario's config, `overrides` what is laid over it.
    """
    where = f"scenarios.{scenario}"
    try:
        tables = read_tables(path)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if "method" in tables:
        raise ConfigError(f"{where}: {path} has a [method]; remove it, `methods` and [variants] name them")
    training = tables.get("training")
    if settings.budget != "bytes" and isinstance(training, dict) and "budget" in training:
        raise ConfigError(f"{where}: {path} sets training.budget, which the comparison's `budget` does; remove it")
    run = merged({"run": {"threads": 1}}, merged(tables, overrides))
    asked, configs = {}, {}
    for label, own in methods.items():
        asked[label] = merged(run, merged(own, {"evaluation": {"pre_aggregation": False}}))
        configs[label] = _checked(asked[label], f"{where} ({path}), method {label!r}")
    seen_before = {
        label: trained for label in methods for trained in methods if _looks_before(configs[label], configs[trained])
    }
    arms = []
    for label in methods:
        if label in seen_before:
            continue
        rows = {label: configs[label].method_name}
        rows |= {other: configs[other].method_name for other, trained in seen_before.items() if trained == label}
        own = merged(asked[label], {"evaluation": {"pre_aggregation": len(rows) > 1}})
        config = _checked(own, f"{where} ({path}), method {label!r}")
        if not set(rows.values()) <= set(variants_of(config)):
            raise RuntimeError(f"{label}: rows {rows} are not those of its run")
        arms.append(Arm(scenario, rows, own))
    return arms


def _checked(tables: Table, where: str) -> Config:
    try:
        config = to_config(tables)
        variants_of(config)
    except ConfigError as error:
        raise type(error)(f"{where}: {error}") from error
    return config


def _looks_before(config: Config, trained: Config) -> bool:
    """Whether a config is the training of another looked at before the aggregation, so that one run gives both."""
    same = {**config.tables()["method"], "name": ""} == {**trained.tables()["method"], "name": ""}
    after = trained.method.evaluates == "post_aggregation"
    return same and after and config.training == trained.training and config.method_name == f"{trained.method_name}_ft"
