"""`fedamole compare`: methods x seeds x scenarios from one file, each cell an ordinary run folder (docs/compare.md)."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedamole.cells import FREE, Cell, CellWatcher, copied, run_cells
from fedamole.config import Config, Table, build, merged, nearest, overridden, read_tables, rebased, to_config
from fedamole.config import refuse_unknown as refuse_unknown_keys
from fedamole.errors import ConfigError
from fedamole.experiment import plan, rows_of
from fedamole.files import exclusive
from fedamole.methods import METHODS
from fedamole.received.files import read_toml
from fedamole.reporting.comparison import Entry, best_validation_loss

NEARLY_NOTHING = 1024
"""Bytes per client and round below which a method has no traffic to be held to."""
GIVEN_BY_CELLS = ("run.seed", "run.folder", "run.name", "method.name", "evaluation.before_aggregation")
"""Settings that a comparison sets in every cell, so that `overrides` cannot."""


@dataclass(frozen=True)
class ComparisonSettings:
    """A comparison file without its [variants]."""

    name: str
    methods: tuple[str, ...]
    """Names of the registry or of [variants], in the order of the tables."""
    scenarios: dict[str, str]
    """Configs without a [method] by the scenario's name; relative to the comparison file."""
    reference: str = ""
    """The method whose gain over every other is tested; unset: the first."""
    seeds: tuple[int, ...] = (0,)
    """Values of run.seed; the partition has its own seed and stays."""
    budget: Literal["steps", "bytes"] = "steps"
    """What is the same for all: local steps and rounds, or the bytes sent to clients in all rounds together."""
    bytes_of: str = ""
    """The method whose traffic is the budget "bytes"; unset: the reference."""
    workers: int = 1
    """Cells at once."""
    overrides: tuple[str, ...] = ()
    """Settings for every cell, as on the command line; a variant's own win."""
    learning_rates: tuple[float, ...] = ()
    """Rates to choose from, by scenario and method, on validation with the first seed; unset: the scenario's."""
    folder: str = ""
    """Where the cells are written; unset: runs/<name>."""

    def __post_init__(self) -> None:
        """Refuse what would make no table."""
        for key in ("methods", "seeds", "scenarios"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty: name at least one")
        for key in ("methods", "seeds", "learning_rates"):
            values = getattr(self, key)
            if double := [value for value in values if values.count(value) > 1]:
                raise ConfigError(f"{key}: {double[0]!r} stands there twice; remove one")
        if self.workers < 1:
            raise ConfigError(f"workers = {self.workers}: at least 1")
        if self.bytes_of and self.budget != "bytes":
            raise ConfigError(f'bytes_of = {self.bytes_of!r} is read with budget = "bytes" only; set that or remove it')
        for key in ("reference", "bytes_of"):
            value = getattr(self, key)
            if value and value not in self.methods:
                raise ConfigError(f"{key} = {value!r} is none of methods{nearest(value, self.methods)}")
        for name in self.scenarios:
            _check_name("scenarios", name)


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


@dataclass(frozen=True)
class Comparison:
    """A checked comparison: its arms, each of which has been loaded as a config."""

    path: Path
    settings: ComparisonSettings
    folder: Path
    arms: tuple[Arm, ...]

    @property
    def reference(self) -> str:
        """The method whose gain over every other is tested."""
        return self.settings.reference or self.settings.methods[0]

    def grid(self, arm: Arm) -> dict[float, Cell]:
        """Cells that choose an arm's learning rate; none without learning_rates."""
        rates = self.settings.learning_rates
        return {rate: self._cell(arm, f"grid/{arm.name}-lr{rate!r}", arm.rows, rate) for rate in rates}

    def cells(self, arm: Arm) -> list[Cell]:
        """Cells of an arm, one per seed; none as long as its grid is not finished.

        Two methods of one run that choose different rates are run apart, each at its own.
        """
        settings, chosen = self.settings, self.chosen(arm)
        if settings.learning_rates and not chosen:
            return []
        found = []
        for rate in dict.fromkeys(chosen.get(label) for label in arm.rows):
            rows = {label: row for label, row in arm.rows.items() if chosen.get(label) == rate}
            name = next(iter(rows))
            found += [self._cell(arm, f"{name}-s{seed}", rows, rate, seed) for seed in settings.seeds]
        return found

    def chosen(self, arm: Arm) -> dict[str, float]:
        """Learning rate of each method of an arm: the lowest validation loss of its best round; test is not read."""
        grid = self.grid(arm)
        if not grid or any(cell.state != "finished" for cell in grid.values()):
            return {}
        losses = {
            label: {rate: best_validation_loss(cell.path, row) for rate, cell in grid.items()}
            for label, row in arm.rows.items()
        }
        return {label: min(found, key=lambda rate: found[rate]) for label, found in losses.items()}

    def _cell(
        self, arm: Arm, name: str, rows: Mapping[str, str], rate: float | None, seed: int | None = None
    ) -> Cell:
        seed = self.settings.seeds[0] if seed is None else seed
        path = self.folder / arm.scenario / name
        own: Table = {"run": {"seed": seed, "name": arm.name, "folder": str(path.resolve())}}
        if rate is not None:
            own["training"] = {"learning_rate": rate}
        config = to_config(merged(arm.tables, own))
        return Cell(f"{arm.scenario}/{name}", path, arm.scenario, seed, rows, config)

    def all_cells(self) -> Iterator[Cell]:
        """Every cell that is known by now, grids first."""
        for arm in self.arms:
            yield from self.grid(arm).values()
            yield from self.cells(arm)

    def entries(self) -> list[Entry]:
        """What the finished cells have to say, for the tables."""
        found = [
            Entry(cell.scenario, label, cell.rows[label], cell.seed, cell.path)
            for arm in self.arms for cell in self.cells(arm) if cell.state == "finished" for label in cell.rows
        ]
        return sorted(found, key=lambda entry: self.settings.methods.index(entry.method))


def load_comparison(path: Path) -> Comparison:
    """Read a comparison and load the config of every arm, so that a mistake anywhere is found before anything runs."""
    try:
        tables: Table = read_toml(path, ConfigError)
    except ConfigError as error:  # it names the file
        raise ConfigError(f"comparison {error}") from error
    try:
        refuse_unknown_keys(tables, [item.name for item in dataclasses.fields(ComparisonSettings)] + ["variants"], "")
        variants = tables.pop("variants", {})
        settings: ComparisonSettings = build(ComparisonSettings, tables, "")
        methods = _method_tables(settings, variants)
        overrides = _overrides(settings, path.parent)
        arms = [
            arm for scenario, config in settings.scenarios.items()
            for arm in _arms(settings, scenario, path.parent / config, methods, overrides)
        ]
    except ConfigError as error:
        raise type(error)(f"{path}: {error}") from error
    return Comparison(path, settings, Path(settings.folder or f"runs/{settings.name}"), tuple(arms))


def _check_name(where: str, name: str) -> None:
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise ConfigError(f"{where}.{name}: letters, digits, _ + - and . only, as it names a folder")


def _method_tables(settings: ComparisonSettings, variants: Any) -> dict[str, Table]:
    """The [method] table of every method asked for."""
    if not isinstance(variants, dict):
        raise ConfigError(f"variants = {variants!r}: must be tables, write [variants.NAME]")
    for label, table in variants.items():
        _check_name("variants", label)
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


def _overrides(settings: ComparisonSettings, folder: Path) -> Table:
    """Settings of every cell as tables, paths made absolute."""
    for word in settings.overrides:
        key = word.partition("=")[0]
        if key in GIVEN_BY_CELLS:
            raise ConfigError(f"overrides: {word!r}: the comparison sets {key} itself; remove it")
        if key == "training.learning_rate" and settings.learning_rates:
            raise ConfigError(f"overrides: {word!r}: learning_rates chooses it; remove one of the two")
    try:
        return rebased(overridden({}, settings.overrides), folder)
    except ConfigError as error:
        raise ConfigError(f"overrides: {error}") from error


def _arms(
    settings: ComparisonSettings, scenario: str, path: Path, methods: Mapping[str, Table], overrides: Table
) -> list[Arm]:
    """The arms of one scenario, in the order of the methods."""
    where = f"scenarios.{scenario}"
    try:
        tables = read_tables(path)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if "method" in tables:
        raise ConfigError(f"{where}: {path} has a [method]; remove it, `methods` and [variants] name them")
    run = merged({"run": {"threads": 1}}, merged(tables, overrides))
    asked, configs = {}, {}
    for label, method in methods.items():
        plain = {"method": method, "evaluation": {"before_aggregation": False}}
        asked[label] = merged(run, plain)
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
        own = merged(asked[label], {"evaluation": {"before_aggregation": len(rows) > 1}})
        config = _checked(own, f"{where} ({path}), method {label!r}")
        if not set(rows.values()) <= set(rows_of(config)):
            raise RuntimeError(f"{label}: rows {rows} are not those of its run")
        arms.append(Arm(scenario, rows, own))
    return arms


def _checked(tables: Table, where: str) -> Config:
    try:
        config = to_config(tables)
        rows_of(config)
    except ConfigError as error:
        raise type(error)(f"{where}: {error}") from error
    return config


def _looks_before(config: Config, trained: Config) -> bool:
    """Whether a config is the training of another looked at before the aggregation, so that one run gives both."""
    same = {**config.tables()["method"], "name": ""} == {**trained.tables()["method"], "name": ""}
    after = trained.method.evaluates == "aggregated"
    return same and after and config.method_name == f"{trained.method_name}_ft"


def within_bytes(comparison: Comparison) -> Comparison:
    """Give every arm as many rounds as fit into its scenario's bytes; nothing changes under the budget "steps"."""
    settings = comparison.settings
    if settings.budget == "steps":
        return comparison
    arms: list[Arm] = []
    giver = settings.bytes_of or comparison.reference
    for scenario in settings.scenarios:
        inside = [arm for arm in comparison.arms if arm.scenario == scenario]
        sizes = {arm.name: _bytes_per_round(comparison, arm) for arm in inside}
        [given] = [sizes[arm.name] for arm in inside if giver in arm.rows]
        if given < NEARLY_NOTHING:
            raise ConfigError(f"{comparison.path}: {giver} sends {given:.0f} bytes a round: set bytes_of to another")
        for arm in inside:
            rounds = to_config(arm.tables).federation.rounds
            if sizes[arm.name] >= NEARLY_NOTHING:
                # The tiny allowance keeps a method that sends exactly as much at exactly as many rounds.
                rounds = max(1, math.floor(rounds * given / sizes[arm.name] + 1e-9))
            arms.append(dataclasses.replace(arm, tables=merged(arm.tables, {"federation": {"rounds": rounds}})))
    return dataclasses.replace(comparison, arms=tuple(arms))


def _bytes_per_round(comparison: Comparison, arm: Arm) -> float:
    """Mean bytes to a client in a round, by the plan; on a CPU, as sizes depend on no device."""
    config = to_config(merged(arm.tables, {"run": {"device": "cpu", "group": 1, "seed": comparison.settings.seeds[0]}}))
    try:
        return plan(config).bytes_down
    except ConfigError as error:
        raise type(error)(f"{comparison.path}: scenarios.{arm.scenario}, method {arm.name!r}: {error}") from error


def run_comparison(comparison: Comparison, watcher: CellWatcher) -> list[Cell]:
    """Run every cell that is not finished, grids first; return the cells that failed.

    Raises RunError while another process runs the comparison: both would make the same folders.
    """
    comparison.folder.mkdir(parents=True, exist_ok=True)
    refusal = f"{comparison.folder}: another process is running this comparison; wait for it or stop it"
    with exclusive(comparison.folder / ".lock", refusal):
        return _run_comparison(comparison, watcher)


def _run_comparison(comparison: Comparison, watcher: CellWatcher) -> list[Cell]:
    comparison = within_bytes(comparison)
    check_stored(comparison)
    workers = comparison.settings.workers
    grid = [cell for arm in comparison.arms for cell in comparison.grid(arm).values()]
    if grid:
        run_cells(grid, workers, watcher)
        _reuse_grid(comparison)
        check_stored(comparison)
    run_cells([cell for arm in comparison.arms for cell in comparison.cells(arm)], workers, watcher)
    return failures(comparison)


def check_stored(comparison: Comparison, free: Sequence[str] = FREE) -> None:
    """Refuse folders of cells with other settings than the comparison asks for, `free` ones apart (RunError)."""
    for cell in comparison.all_cells():
        cell.refuse_other_config(str(comparison.path), free)


def check_shown(comparison: Comparison) -> None:
    """The same before tables are made without a run; rounds worked out from bytes are taken as they are stored."""
    check_stored(comparison, (*FREE, "federation.rounds") if comparison.settings.budget == "bytes" else FREE)


def failures(comparison: Comparison) -> list[Cell]:
    """Cells whose last try failed."""
    return [cell for cell in comparison.all_cells() if cell.state == "failed"]


def _reuse_grid(comparison: Comparison) -> None:
    """The grid's run of the rate that was chosen is the first seed's cell: the same settings, trained once."""
    first = comparison.settings.seeds[0]
    for arm in comparison.arms:
        grid, chosen = comparison.grid(arm), comparison.chosen(arm)
        for cell in comparison.cells(arm):
            if cell.seed == first:
                copied(cell, grid[chosen[next(iter(cell.rows))]].path)


def preview(comparison: Comparison) -> list[dict[str, Any]]:
    """What the next call would do with each cell; runs nothing."""
    comparison = within_bytes(comparison)
    check_stored(comparison)
    listed: list[dict[str, Any]] = []
    for arm in comparison.arms:
        cells = [*comparison.grid(arm).values(), *comparison.cells(arm)]
        for cell in cells:
            config = cell.config
            listed.append({
                "cell": cell.name, "methods": list(cell.rows), "does": _next(cell),
                "rounds": config.federation.rounds, "learning_rate": config.training.learning_rate,
            })
        if comparison.settings.learning_rates and not comparison.chosen(arm):
            waiting = "waits for its learning rate"
            rounds = to_config(arm.tables).federation.rounds
            listed += [
                {"cell": f"{arm.scenario}/{arm.name}-s{seed}", "methods": list(arm.rows), "does": waiting,
                 "rounds": rounds, "learning_rate": None}
                for seed in comparison.settings.seeds
            ]
    return listed


def _next(cell: Cell) -> str:
    if cell.state == "failed":
        return f"is tried again; it failed: {cell.error}"
    return {"new": "is run", "unfinished": "is resumed", "finished": "is finished"}[cell.state]


def progress(comparison: Comparison) -> dict[str, int]:
    """How many cells are in which state, those that wait for their learning rate counted as new."""
    counts: dict[str, int] = {"finished": 0, "failed": 0, "unfinished": 0, "new": 0}
    for arm in comparison.arms:
        cells: Sequence[Cell] = comparison.cells(arm)
        counts["new"] += 0 if cells else len(comparison.settings.seeds)
        for cell in cells:
            counts[cell.state] += 1
    return counts
