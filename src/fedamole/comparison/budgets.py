"""What a plan has to work out for the arms of a comparison: rounds that fit into bytes, ranks of equal size."""

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

NEARLY_NOTHING = 1024
"""Bytes per client and round below which a method has no traffic to be held to."""


SIZED_BY = ("rank", "virtual_tokens")
"""Settings of methods that decide how many numbers a client trains; a method has one of them."""
SET_BY_PLANS = {
    "bytes": ("federation.rounds",),
    "parameters": ("method.alpha", *(f"method.{name}" for name in SIZED_BY)),
}
"""Settings that are worked out by a plan, by the value of `budget` or `match` that asks for them."""


def planned(comparison: Comparison) -> Comparison:
    """Return a comparison whose arms have the sizes and rounds that `match` and `budget` ask for."""
    return within_bytes(of_equal_size(comparison))


def of_equal_size(comparison: Comparison) -> Comparison:
    """Set every arm's rank or number of virtual tokens such that it trains about as much as the reference.

    Compared are means over the clients of the numbers that one trains in round 0, which are counted on the adapters'
    shapes. `alpha` follows the rank, so that the scaling alpha / rank stays. Only `match = "parameters"` changes
    anything.
    """
    if comparison.settings.match != "parameters":
        return comparison
    arms: list[Arm] = []
    for scenario in comparison.settings.scenarios:
        inside = [arm for arm in comparison.arms if arm.scenario == scenario]
        [given] = [arm for arm in inside if comparison.reference in arm.rows]
        try:
            # Base and data are those of the scenario, the same for all its arms.
            prepared = prepare(resolved(_on_cpu(comparison, given), comparison.folder))
            wanted = _size(prepared, to_config(given.tables))
            sized = [arm if arm is given else _sized(prepared, arm, wanted) for arm in inside]
        except ConfigError as error:
            raise type(error)(f"{comparison.path}: scenarios.{scenario}, match: {error}") from error
        arms += sized
    return dataclasses.replace(comparison, arms=tuple(arms))


def _sized(prepared: Prepared, arm: Arm, wanted: float) -> Arm:
    """The arm with the size whose count is nearest to `wanted`, the smaller of two equally near."""
    config = to_config(arm.tables)
    counts: dict[int, float] = {}

    def count(size: int) -> float:
        """Numbers trained at a size, infinite where the base has no room for it."""
        if size not in counts:
            try:
                resized = to_config(merged(arm.tables, {"method": _of_size(config, size)}))
                check_length(resized, prepared.base)
                counts[size] = _size(prepared, resized)
            except ConfigError:
                counts[size] = math.inf
        return counts[size]

    if count(1) == count(2):  # a setting of the variant decides the size
        return arm
    below, above = 1, 2
    while count(above) < wanted:
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if count(middle) < wanted else (below, middle)
    size = min((below, above), key=lambda size: abs(count(size) - wanted))
    return dataclasses.replace(arm, tables=merged(arm.tables, {"method": _of_size(config, size)}))


def size_of(config: Config) -> tuple[str, int]:
    """Name and value of the setting that decides how many numbers a client trains."""
    [name] = [name for name in SIZED_BY if hasattr(config.method, name)]
    return name, getattr(config.method, name)


def _of_size(config: Config, size: int) -> Table:
    """Settings of a method that give it a rank, or a number of virtual tokens."""
    name, _ = size_of(config)
    method: Mapping[str, float] = config.tables()["method"]
    return {name: size, **({"alpha": method["alpha"] * size / method["rank"]} if name == "rank" else {})}


def _size(prepared: Prepared, config: Config) -> float:
    return statistics.fmean(trained_parameters(config, prepared.base, prepared.clients).values())


def _on_cpu(comparison: Comparison, arm: Arm) -> Config:
    """The config of an arm for a plan: on a CPU, as sizes depend on no device."""
    return to_config(merged(arm.tables, {"run": {"device": "cpu", "group": 1, "seed": comparison.settings.seeds[0]}}))


def within_bytes(comparison: Comparison) -> Comparison:
    """Give every arm as many rounds as fit into its scenario's bytes; under another budget nothing changes."""
    settings = comparison.settings
    if settings.budget != "bytes":
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
    """Mean bytes to a client in a round, by the plan."""
    try:
        return plan(_on_cpu(comparison, arm)).bytes_down
    except ConfigError as error:
        raise type(error)(f"{comparison.path}: scenarios.{arm.scenario}, method {arm.name!r}: {error}") from error
