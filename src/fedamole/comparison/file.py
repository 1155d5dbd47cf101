"""A comparison read from its TOML file, and the trials it consists of."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from fedamole.comparison import learning_rates
from fedamole.comparison.arms import Arm, arms_of, check_names, tables_of_methods, tables_of_overrides
from fedamole.comparison.learning_rates import Choice
from fedamole.comparison.settings import ComparisonSettings
from fedamole.comparison.trials import Trial
from fedamole.config import Table, build, check_run_name, merged, nearest, to_config
from fedamole.config import refuse_unknown as refuse_unknown_keys
from fedamole.errors import ConfigError
from fedamole.methods import METHODS
from fedamole.received.files import read_toml
from fedamole.reporting.results import TrialResult, best_validation_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """A checked comparison; the config of every arm has been loaded once."""

    path: Path
    settings: ComparisonSettings
    methods: tuple[str, ...]
    """Names of the compared methods in the order of the tables, those added by budget = "both" included."""
    folder: Path
    arms: tuple[Arm, ...]

    @property
    def reference(self) -> str:
        """The method whose gain over every other method is tested."""
        return self.settings.reference or self.settings.methods[0]

    def grid_trials(self, arm: Arm) -> dict[float, list[Trial]]:
        """Return the trials of an arm's grid search by learning rate, one per seed of the search; empty without
        `learning_rates`.

        If the best rate of a method of the arm is at an edge of the grid, the next rate beyond the edge is added. This
        is computed from the files of the finished trials each time, so an interrupted comparison continues where it
        stopped.
        """
        return self._grid_search(arm)[0]

    def _grid_search(self, arm: Arm) -> tuple[dict[float, list[Trial]], dict[str, dict[float, float]]]:
        """Return the grid's trials by rate, and the mean validation losses of finished rates by method and rate."""
        first, *others = self.settings.seeds[: self.settings.search_seeds]
        trials: dict[float, list[Trial]] = {}
        losses: dict[str, dict[float, float]] = {label: {} for label in arm.variants}

        def best(rates: Sequence[float]) -> list[float]:
            for rate in rates:
                if rate not in trials:
                    name = f"grid/{arm.name}-lr{rate!r}"
                    names = {first: name, **{seed: f"{name}-s{seed}" for seed in others}}
                    trials[rate] = [self._trial(arm, name, arm.variants, rate, seed) for seed, name in names.items()]
            for rate, of_seeds in trials.items():
                for label, variant in arm.variants.items():
                    if rate not in losses[label] and all(trial.state == "finished" for trial in of_seeds):
                        values = [best_validation_loss(trial.path, variant) for trial in of_seeds]
                        losses[label][rate] = sum(values) / len(values)
            complete = all(len(by_rate) == len(rates) for by_rate in losses.values())
            return [learning_rates.chosen(by_rate).rate for by_rate in losses.values()] if complete else []

        rates = learning_rates.widened(self.settings.learning_rates, self.settings.widen, best)
        return {rate: trials[rate] for rate in rates}, losses

    def trials(self, arm: Arm) -> list[Trial]:
        """Return the trials of an arm, one per seed; empty while its grid search is unfinished.

        Two methods that share a run but choose different learning rates get separate trials.
        """
        settings, choices = self.settings, self.chosen(arm)
        if settings.learning_rates and not choices:
            return []
        rates = {label: choice.rate for label, choice in choices.items()}
        trials = []
        for rate in dict.fromkeys(rates.get(label) for label in arm.variants):
            variants = {label: variant for label, variant in arm.variants.items() if rates.get(label) == rate}
            name = next(iter(variants))
            trials += [self._trial(arm, f"{name}-s{seed}", variants, rate, seed) for seed in settings.seeds]
        return trials

    def chosen(self, arm: Arm) -> dict[str, Choice]:
        """Return the learning rate of each method of an arm; empty while its grid search is unfinished.

        The rate with the lowest mean validation loss at the best round is chosen. A diverged run has an infinite loss.
        The test split is not read.
        """
        trials, losses = self._grid_search(arm)
        if not trials or any(len(by_rate) < len(trials) for by_rate in losses.values()):
            return {}
        return {label: learning_rates.chosen(by_rate) for label, by_rate in losses.items()}

    def _trial(self, arm: Arm, name: str, variants: Mapping[str, str], rate: float | None, seed: int) -> Trial:
        path = self.folder / arm.scenario / name
        own: Table = {"run": {"seed": seed, "name": arm.name, "folder": str(path.resolve())}}
        if rate is not None:
            own["training"] = {"learning_rate": rate}
        config = to_config(merged(arm.tables, own))
        return Trial(f"{arm.scenario}/{name}", path, arm.scenario, seed, variants, config)

    def all_trials(self) -> Iterator[Trial]:
        """Yield every trial that is known so far, the grid search of each arm first."""
        for arm in self.arms:
            yield from chain.from_iterable(self.grid_trials(arm).values())
            yield from self.trials(arm)

    def results(self) -> list[TrialResult]:
        """Return the finished trials, one entry per method, for `read_scenarios`."""
        results = []
        for arm in self.arms:
            at_edge = {label: choice.at_edge for label, choice in self.chosen(arm).items()}
            results += [
                TrialResult(trial.scenario, label, variant, trial.seed, trial.path, at_edge.get(label, False))
                for trial in self.trials(arm)
                if trial.state == "finished"
                for label, variant in trial.variants.items()
            ]
        return sorted(results, key=lambda result: self.methods.index(result.method))


def load_comparison(path: Path) -> Comparison:
    """Read a comparison file and load the config of every arm, so that all mistakes are found before anything runs.

    Logs a warning if the grid of learning rates is narrow.

    Raises:
        ConfigError: The file, a scenario's config or a setting is invalid.
    """
    try:
        tables: Table = read_toml(path, ConfigError)
    except ConfigError as error:  # its text names the file
        raise ConfigError(f"comparison {error}") from error
    try:
        refuse_unknown_keys(tables, [item.name for item in dataclasses.fields(ComparisonSettings)] + ["variants"], "")
        custom = tables.pop("variants", {})
        settings: ComparisonSettings = build(ComparisonSettings, tables, "")
        if not settings.folder:
            check_run_name(settings.name, "name")
        check_names("scenarios", settings.scenarios)
        methods = tables_of_methods(settings, custom)
        for key in ("reference", "bytes_of"):
            value = getattr(settings, key)
            if value and value not in methods:
                raise ConfigError(f"{key} = {value!r} is not one of methods{nearest(value, methods)}")
        if settings.target not in (*METHODS, *methods):
            raise ConfigError(
                f"target = {settings.target!r} is no method{nearest(settings.target, (*METHODS, *methods))}"
            )
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
