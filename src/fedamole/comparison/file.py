"""A comparison read from its file, and its cells."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedamole.comparison import learning_rates
from fedamole.comparison.arms import Arm, arms_of, check_names, tables_of_methods, tables_of_overrides
from fedamole.comparison.learning_rates import Choice
from fedamole.comparison.settings import ComparisonSettings
from fedamole.comparison.trials import Cell
from fedamole.config import Table, build, check_run_name, merged, nearest, to_config
from fedamole.config import refuse_unknown as refuse_unknown_keys
from fedamole.errors import ConfigError
from fedamole.received.files import read_toml
from fedamole.reporting.results import Entry, best_validation_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """A checked comparison: its arms, each of which has been loaded as a config."""

    path: Path
    settings: ComparisonSettings
    methods: tuple[str, ...]
    """Names of the compared methods in the order of the tables, those of budget = "both" included."""
    folder: Path
    arms: tuple[Arm, ...]

    @property
    def reference(self) -> str:
        """The method whose gain over every other is tested."""
        return self.settings.reference or self.settings.methods[0]

    def grid(self, arm: Arm) -> dict[float, Cell]:
        """Return the cells that choose an arm's learning rate, by rate; none without learning_rates.

        While the best rate of one of the arm's methods is at an edge, the next rate beyond it is added. That is worked
        out from the files of the finished cells each time, so an interrupted comparison goes on where it was.
        """
        return self._tried(arm)[0]

    def _tried(self, arm: Arm) -> tuple[dict[float, Cell], dict[str, dict[float, float]]]:
        """The grid's cells, and the validation loss of each method by rate as far as its cells are finished."""
        cells: dict[float, Cell] = {}
        losses: dict[str, dict[float, float]] = {label: {} for label in arm.rows}

        def best(rates: Sequence[float]) -> list[float]:
            for rate in rates:
                if rate not in cells:
                    cells[rate] = self._cell(arm, f"grid/{arm.name}-lr{rate!r}", arm.rows, rate)
            for rate, cell in cells.items():
                for label, row in arm.rows.items():
                    if rate not in losses[label] and cell.state == "finished":
                        losses[label][rate] = best_validation_loss(cell.path, row)
            known = all(len(found) == len(rates) for found in losses.values())
            return [learning_rates.chosen(found).rate for found in losses.values()] if known else []

        rates = learning_rates.widened(self.settings.learning_rates, self.settings.widen, best)
        return {rate: cells[rate] for rate in rates}, losses

    def cells(self, arm: Arm) -> list[Cell]:
        """Return the cells of an arm, one per seed; none as long as its grid is not finished.

        Two methods of one run that choose different rates are run apart, each at its own.
        """
        settings, choices = self.settings, self.chosen(arm)
        if settings.learning_rates and not choices:
            return []
        rates = {label: choice.rate for label, choice in choices.items()}
        found = []
        for rate in dict.fromkeys(rates.get(label) for label in arm.rows):
            rows = {label: row for label, row in arm.rows.items() if rates.get(label) == rate}
            name = next(iter(rows))
            found += [self._cell(arm, f"{name}-s{seed}", rows, rate, seed) for seed in settings.seeds]
        return found

    def chosen(self, arm: Arm) -> dict[str, Choice]:
        """Return the learning rate of each method of an arm; none as long as its grid is not finished.

        It is the one with the lowest validation loss at the best round, a diverged run counting as infinitely bad;
        test is not read.
        """
        grid, losses = self._tried(arm)
        if not grid or any(len(found) < len(grid) for found in losses.values()):
            return {}
        return {label: learning_rates.chosen(found) for label, found in losses.items()}

    def _cell(self, arm: Arm, name: str, rows: Mapping[str, str], rate: float | None, seed: int | None = None) -> Cell:
        seed = self.settings.seeds[0] if seed is None else seed
        path = self.folder / arm.scenario / name
        own: Table = {"run": {"seed": seed, "name": arm.name, "folder": str(path.resolve())}}
        if rate is not None:
            own["training"] = {"learning_rate": rate}
        config = to_config(merged(arm.tables, own))
        return Cell(f"{arm.scenario}/{name}", path, arm.scenario, seed, rows, config)

    def all_cells(self) -> Iterator[Cell]:
        """Yield every cell that is known by now, grids first."""
        for arm in self.arms:
            yield from self.grid(arm).values()
            yield from self.cells(arm)

    def entries(self) -> list[Entry]:
        """Return the finished cells as the tables read them."""
        found = []
        for arm in self.arms:
            at_edge = {label: choice.at_edge for label, choice in self.chosen(arm).items()}
            found += [
                Entry(cell.scenario, label, cell.rows[label], cell.seed, cell.path, at_edge.get(label, False))
                for cell in self.cells(arm)
                if cell.state == "finished"
                for label in cell.rows
            ]
        return sorted(found, key=lambda entry: self.methods.index(entry.method))


def load_comparison(path: Path) -> Comparison:
    """Read a comparison and load the config of every arm, so that a mistake anywhere is found before anything runs.

    Raises ConfigError. Warns of a narrow grid of learning rates.
    """
    try:
        tables: Table = read_toml(path, ConfigError)
    except ConfigError as error:  # it names the file
        raise ConfigError(f"comparison {error}") from error
    try:
        refuse_unknown_keys(tables, [item.name for item in dataclasses.fields(ComparisonSettings)] + ["variants"], "")
        variants = tables.pop("variants", {})
        settings: ComparisonSettings = build(ComparisonSettings, tables, "")
        if not settings.folder:
            check_run_name(settings.name, "name")
        check_names("scenarios", settings.scenarios)
        methods = tables_of_methods(settings, variants)
        for key in ("reference", "bytes_of"):
            value = getattr(settings, key)
            if value and value not in methods:
                raise ConfigError(f"{key} = {value!r} is none of methods{nearest(value, methods)}")
        overrides = tables_of_overrides(settings, path.parent)
        arms = [
            arm
            for scenario, config in settings.scenarios.items()
            for arm in arms_of(settings, scenario, path.parent / config, methods, overrides)
        ]
    except ConfigError as error:
        raise type(error)(f"{path}: {error}") from error
    if warning := learning_rates.narrowness(settings.learning_rates):
        log.warning("%s: %s", path, warning)
    folder = Path(settings.folder or f"runs/{settings.name}")
    return Comparison(path, settings, tuple(methods), folder, tuple(arms))
