"""Settings of a comparison that a plan computes: rounds within a traffic budget, sizes with equal parameter counts."""

import dataclasses
import math
import statistics
from collections.abc import Mapping

from fedamole.comparison.arms import Arm
from fedamole.comparison.file import Comparison
from fedamole.config import Config, Table, merged, to_config
from fedamole.errors import ConfigError
from fedamole.experiment import Prepared, check_length, plan, prepare, resolved
from fedamole.planning import trained_parameters

NEGLIGIBLE_BYTES = 1024
"""Bytes per client and round below which a method keeps its rounds under budget = "bytes"."""
SIZE_SETTINGS = ("rank", "virtual_tokens")
"""Method settings that determine how many parameters a client trains; a method has one of them."""
SET_BY_PLANS = {
    "bytes": ("federation.rounds",),
    "parameters": ("method.alpha", *(f"method.{name}" for name in SIZE_SETTINGS)),
}
"""Settings that a plan computes, by the value of `budget` or `match` that requires it."""


def planned(comparison: Comparison) -> Comparison:
    """Return the comparison with the sizes and rounds that `match` and `budget` require."""
    return within_bytes(of_equal_size(comparison))


def of_equal_size(comparison: Comparison) -> Comparison:
    """Set the rank or number of virtual tokens of every arm so that it trains about as much as the reference.

    The number compared is the mean over the clients of the parameters trained in round 0, counted on the shapes of the
    adapters. `alpha` follows the rank, so that the scaling alpha / rank stays. Without match = "parameters" the
    comparison is returned unchanged.
    """
    if comparison.settings.match != "parameters":
        return comparison
    arms: list[Arm] = []
    for scenario in comparison.settings.scenarios:
        in_scenario = [arm for arm in comparison.arms if arm.scenario == scenario]
        [reference] = [arm for arm in in_scenario if comparison.reference in arm.variants]
        try:
            # All arms of a scenario have the same base and data.
            prepared = prepare(resolved(_on_cpu(comparison, reference), comparison.folder))
            target = _mean_parameters(prepared, to_config(reference.tables))
            arms += [arm if arm is reference else _with_size_near(prepared, arm, target) for arm in in_scenario]
        except ConfigError as error:
            raise type(error)(f"{comparison.path}: scenarios.{scenario}, match: {error}") from error
    return dataclasses.replace(comparison, arms=tuple(arms))


def _with_size_near(prepared: Prepared, arm: Arm, target: float) -> Arm:
    """Return the arm with the size whose parameter count is nearest to `target`; of two equally near, the smaller."""
    config = to_config(arm.tables)
    counts: dict[int, float] = {}

    def count(size: int) -> float:
        """Return the mean parameter count at a size; infinite if the prompt does not fit into the base."""
        if size not in counts:
            try:
                resized = to_config(merged(arm.tables, {"method": _size_tables(config, size)}))
                check_length(resized, prepared.base)
                counts[size] = _mean_parameters(prepared, resized)
            except ConfigError:
                counts[size] = math.inf
        return counts[size]

    if count(1) == count(2):  # another setting, such as `ranks`, determines the size
        return arm
    below, above = 1, 2
    while count(above) < target:
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if count(middle) < target else (below, middle)
    size = min((below, above), key=lambda size: abs(count(size) - target))
    return dataclasses.replace(arm, tables=merged(arm.tables, {"method": _size_tables(config, size)}))


def size_of(config: Config) -> tuple[str, int]:
    """Return name and value of the setting that determines how many parameters a client trains."""
    [name] = [name for name in SIZE_SETTINGS if hasattr(config.method, name)]
    return name, getattr(config.method, name)


def _size_tables(config: Config, size: int) -> Table:
    """Return the settings that give a method this rank or number of virtual tokens."""
    name, _ = size_of(config)
    method: Mapping[str, float] = config.tables()["method"]
    return {name: size, **({"alpha": method["alpha"] * size / method["rank"]} if name == "rank" else {})}


def _mean_parameters(prepared: Prepared, config: Config) -> float:
    return statistics.fmean(trained_parameters(config, prepared.base, prepared.clients).values())


def _on_cpu(comparison: Comparison, arm: Arm) -> Config:
    """Return the config of an arm for a plan on the CPU; sizes do not depend on the device."""
    return to_config(merged(arm.tables, {"run": {"device": "cpu", "group": 1, "seed": comparison.settings.seeds[0]}}))


def within_bytes(comparison: Comparison) -> Comparison:
    """Set the rounds of every arm to as many as fit into the bytes that `bytes_of` sends in its configured rounds.

    Without budget = "bytes" the comparison is returned unchanged.
    """
    settings = comparison.settings
    if settings.budget != "bytes":
        return comparison
    arms: list[Arm] = []
    bytes_of = settings.bytes_of or comparison.reference
    for scenario in settings.scenarios:
        in_scenario = [arm for arm in comparison.arms if arm.scenario == scenario]
        sizes = {arm.name: _bytes_per_round(comparison, arm) for arm in in_scenario}
        [budget] = [sizes[arm.name] for arm in in_scenario if bytes_of in arm.variants]
        if budget < NEGLIGIBLE_BYTES:
            raise ConfigError(
                f"{comparison.path}: {bytes_of} sends {budget:.0f} bytes a round: set bytes_of to another method"
            )
        for arm in in_scenario:
            rounds = to_config(arm.tables).federation.rounds
            if sizes[arm.name] >= NEGLIGIBLE_BYTES:
                # The tolerance gives a method with exactly the same traffic exactly the same rounds.
                rounds = max(1, math.floor(rounds * budget / sizes[arm.name] + 1e-9))
            arms.append(dataclasses.replace(arm, tables=merged(arm.tables, {"federation": {"rounds": rounds}})))
    return dataclasses.replace(comparison, arms=tuple(arms))


def _bytes_per_round(comparison: Comparison, arm: Arm) -> float:
    """Return the planned mean number of bytes sent to a client in a round."""
    try:
        return plan(_on_cpu(comparison, arm)).bytes_down
    except ConfigError as error:
        raise type(error)(f"{comparison.path}: scenarios.{arm.scenario}, method {arm.name!r}: {error}") from error
