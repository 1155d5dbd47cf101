"""The arms of a comparison: one method (or two that share a run) in one scenario, with its config."""

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

SET_BY_COMPARISON = ("run.seed", "run.folder", "run.name", "method.name", "evaluation.pre_aggregation")
"""Settings that a comparison sets in every trial, so `overrides` must not."""
PAPER = "-paper"
"""Suffix of the second arm of a method under budget = "both", which has the budget of the method's paper."""


@dataclass(frozen=True)
class Arm:
    """A method in a scenario, over all seeds. X and X_ft share one arm if both are compared with equal settings."""

    scenario: str
    variants: Mapping[str, str]
    """For each method name of the comparison, the variant (scored model) of the run that belongs to it."""
    tables: Table
    """The config without the settings that differ between trials: seed, learning rate, folder."""

    @property
    def name(self) -> str:
        """The method that the run folders are named after."""
        return next(iter(self.variants))


def check_names(where: str, names: Iterable[str]) -> None:
    """Raise ConfigError for names that cannot be folders side by side (also on systems that ignore case)."""
    seen: dict[str, str] = {}
    for name in names:
        if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
            raise ConfigError(f"{where}.{name}: the name becomes a folder; use only letters, digits, _, +, - and .")
        if reason := not_on_windows(name):
            raise ConfigError(f"{where}.{name}: {reason}")
        if (other := seen.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)) != name:
            raise ConfigError(f"{where}.{name}: the same folder as {other!r} on some systems; choose another name")


def tables_of_methods(settings: ComparisonSettings, custom: Any) -> dict[str, Table]:
    """Return for every method name of the comparison its own config tables: [method], and [training] for the budget.

    Under budget = "both", each method whose paper takes other steps is followed by a second one, NAME-paper.

    Args:
        settings: The comparison file without [variants].
        custom: The content of [variants], not checked yet.
    """
    methods = _method_tables(settings, custom)
    if settings.budget == "bytes":
        return {label: {"method": method} for label, method in methods.items()}
    first = "paper" if settings.budget == "paper" else "steps"
    tables: dict[str, Table] = {}
    for label, method in methods.items():
        tables[label] = {"method": method, "training": {"budget": first}}
        if settings.budget == "both" and METHODS[method["name"]].budgets_differ:
            second = label + PAPER
            if second in methods:
                raise ConfigError(f'methods: budget = "both" adds {second!r} for {label!r}; rename the variant')
            tables[second] = {"method": method, "training": {"budget": "paper"}}
    return tables


def _method_tables(settings: ComparisonSettings, custom: Any) -> dict[str, Table]:
    """Return the [method] table of every method of the comparison."""
    if not isinstance(custom, dict):
        raise ConfigError(f"variants = {custom!r}: must be tables, write [variants.NAME]")
    check_names("variants", (*METHODS, *custom))
    for label, table in custom.items():
        if label in METHODS:
            raise ConfigError(f"variants.{label}: this is the name of a method; choose another name")
        if not isinstance(table, dict) or "name" not in table:
            raise ConfigError(f'variants.{label} has no method: add, for example, name = "fedamole"')
        if table["name"] not in METHODS:
            suggestion = nearest(str(table["name"]), METHODS)
            raise ConfigError(f"variants.{label}.name = {table['name']!r}: there is no such method{suggestion}")
        if label not in settings.methods:
            raise ConfigError(f"variants.{label} is not compared: add it to methods or remove it")
    known = {**{name: {"name": name} for name in METHODS}, **custom}
    for label in settings.methods:
        if label not in known:
            raise ConfigError(f"methods: {label!r} is neither a method nor one of [variants]{nearest(label, known)}")
    return {label: known[label] for label in settings.methods}


def tables_of_overrides(settings: ComparisonSettings, folder: Path) -> Table:
    """Return the overrides as tables; relative paths are taken from `folder` and made absolute."""
    for override in settings.overrides:
        key = override.partition("=")[0]
        if key in SET_BY_COMPARISON or (key == "training.budget" and settings.budget != "bytes"):
            instead = "; set `budget` instead" if key == "training.budget" else ""
            raise ConfigError(f"overrides: {override!r}: the comparison sets {key} itself; remove it{instead}")
        if key == "training.learning_rate" and settings.learning_rates:
            raise ConfigError(f"overrides: {override!r}: learning_rates sets it too; remove one of the two")
    try:
        return overridden({}, settings.overrides, folder)
    except ConfigError as error:
        raise ConfigError(f"overrides: {error}") from error


def arms_of(
    settings: ComparisonSettings, scenario: str, path: Path, methods: Mapping[str, Table], overrides: Table
) -> list[Arm]:
    """Return the arms of one scenario, in the order of the methods.

    Args:
        settings: The comparison file without [variants].
        scenario: Name of the scenario.
        path: Config of the scenario.
        methods: The config tables of each method, by its name in the comparison.
        overrides: Config tables that replace those of the scenario.
    """
    where = f"scenarios.{scenario}"
    try:
        tables = read_tables(path)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if "method" in tables:
        raise ConfigError(f"{where}: {path} has a [method]; remove it, `methods` and [variants] name the methods")
    training = tables.get("training")
    if settings.budget != "bytes" and isinstance(training, dict) and "budget" in training:
        raise ConfigError(f"{where}: {path} sets training.budget, which the comparison sets by `budget`; remove it")
    shared = merged({"run": {"threads": 1}}, merged(tables, overrides))
    by_label, configs = {}, {}
    for label, own in methods.items():
        by_label[label] = merged(shared, merged(own, {"evaluation": {"pre_aggregation": False}}))
        configs[label] = _checked(by_label[label], f"{where} ({path}), method {label!r}")
    same_run_as = {
        label: other for label in methods for other in methods if _is_same_run(configs[label], configs[other])
    }
    arms = []
    for label in methods:
        if label in same_run_as:
            continue
        variants = {label: configs[label].method_name}
        variants |= {other: configs[other].method_name for other, first in same_run_as.items() if first == label}
        arm_tables = merged(by_label[label], {"evaluation": {"pre_aggregation": len(variants) > 1}})
        config = _checked(arm_tables, f"{where} ({path}), method {label!r}")
        if not set(variants.values()) <= set(variants_of(config)):
            raise RuntimeError(f"{label}: the run does not score all of {variants}")
        arms.append(Arm(scenario, variants, arm_tables))
    return arms


def _checked(tables: Table, where: str) -> Config:
    try:
        config = to_config(tables)
        variants_of(config)
    except ConfigError as error:
        raise type(error)(f"{where}: {error}") from error
    return config


def _is_same_run(config: Config, other: Config) -> bool:
    """Return whether `config` trains as `other` and only scores before the aggregation, so that one run gives both."""
    same = {**config.tables()["method"], "name": ""} == {**other.tables()["method"], "name": ""}
    after = other.method.evaluates == "post_aggregation"
    return same and after and config.training == other.training and config.method_name == f"{other.method_name}_ft"
