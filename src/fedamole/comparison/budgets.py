"""Budgets that a plan has to work out: rounds that fit into bytes."""

import dataclasses
import math

from fedamole.comparison.arms import Arm
from fedamole.comparison.file import Comparison
from fedamole.config import merged, to_config
from fedamole.errors import ConfigError
from fedamole.experiment import plan

NEARLY_NOTHING = 1024
"""Bytes per client and round below which a method has no traffic to be held to."""


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
    """Mean bytes to a client in a round, by the plan; on a CPU, as sizes depend on no device."""
    config = to_config(merged(arm.tables, {"run": {"device": "cpu", "group": 1, "seed": comparison.settings.seeds[0]}}))
    try:
        return plan(config).bytes_down
    except ConfigError as error:
        raise type(error)(f"{comparison.path}: scenarios.{arm.scenario}, method {arm.name!r}: {error}") from error
