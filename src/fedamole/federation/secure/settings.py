"""The `[secure_aggregation]` table of a config, and which methods and settings it works with."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedamole.errors import ConfigError
from fedamole.federation.method import Method
from fedamole.federation.record import fields_of
from fedamole.federation.settings import FederationSettings

MIN_GROUP = 3
"""Smallest allowed `min_group`: of two holders, either has the other's value after subtracting its own from the sum."""
FRACTION_BITS = 20
"""Bits after the point of a fixed-point number; its precision is 2^-21."""
SUM_LIMIT = 2 ** (31 - FRACTION_BITS)
"""A sum of fixed-point numbers does not wrap while its absolute value is below this."""


@dataclass(frozen=True)
class SecureAggregationSettings:
    """`[secure_aggregation]`: the server gets sums over groups of clients in place of single updates."""

    enabled: bool = False
    """Mask every update, so that only the sum over all holders of a tensor can be read. Works in one process only, to
    test a config; a deployment refuses it."""
    min_group: int = MIN_GROUP
    """Smallest number of clients in a sum, at least 3: the number of clients that may work together, plus 2. A tensor
    with fewer holders keeps its value."""
    clip: float = 16.0
    """Largest change of a single number in a round; a client cuts larger ones to it. The number of clients times this
    must be below 2048."""
    unmasked: tuple[str, ...] = ()
    """Fields of a client's reply that the method needs from each client alone, and that are sent without a mask."""

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers out of range."""
        if not MIN_GROUP <= self.min_group <= 2**FRACTION_BITS:
            raise ConfigError(
                f"secure_aggregation.min_group = {self.min_group}: must be at least {MIN_GROUP}, because each of two "
                "clients can subtract its own part from their sum"
            )
        most = SUM_LIMIT / MIN_GROUP
        if not 0 < self.clip < most:
            raise ConfigError(f"secure_aggregation.clip = {self.clip}: must be above 0 and below {most:.4g}")
        if len(set(self.unmasked)) < len(self.unmasked):
            raise ConfigError(f"secure_aggregation.unmasked = {list(self.unmasked)}: each name once")


def check_secure_aggregation(
    settings: SecureAggregationSettings,
    federation: FederationSettings,
    name: str,
    method: Method[Any, Any, Any, Any],
) -> None:
    """Raise ConfigError if a method or another setting does not work with secure aggregation."""
    if not settings.enabled:
        return
    if federation.aggregation not in ("auto", "mean"):
        raise ConfigError(
            f"federation.aggregation = {federation.aggregation!r}: it compares single updates, which secure "
            "aggregation hides; set it to 'mean', or secure_aggregation.enabled to false"
        )
    if not method.averaged_fields:
        raise ConfigError(
            f"secure_aggregation.enabled = true: {name} needs the reply of each client, not only sums of them; use a "
            "method that averages tensors by key, such as fedit, or set it to false"
        )
    if getattr(method, "weighting", "uniform") != "uniform":
        raise ConfigError(
            "secure_aggregation.enabled = true: the server sums updates that it cannot weight; set method.weighting "
            "to 'uniform'"
        )
    fields = [field for field in fields_of(method.records.reply) if field not in method.averaged_fields]
    if unknown := sorted(set(settings.unmasked) - set(fields)):
        known = f"it has {', '.join(fields)}" if fields else "it has none; remove the setting"
        raise ConfigError(
            f"secure_aggregation.unmasked: {unknown[0]!r} is not a field of {name}'s reply that can be sent unmasked; "
            f"{known}"
        )
    if missing := [field for field in fields if field not in settings.unmasked]:
        raise ConfigError(
            f"secure_aggregation.enabled = true: {name} needs the field {missing[0]!r} of each client's reply alone, "
            "so it cannot be summed; if the coordinator may have it, set secure_aggregation.unmasked = "
            f"{json.dumps(fields)}; otherwise use another method"
        )


def refuse_deployment(settings: SecureAggregationSettings) -> None:
    """Raise ConfigError if secure aggregation is enabled: its messages between organisations do not exist yet."""
    if settings.enabled:
        raise ConfigError(
            "secure_aggregation.enabled = true: not available between organisations yet, so the coordinator would get "
            "every single update; set it to false, or try the config in one process with `fedamole run`"
        )


def check_groups(
    settings: SecureAggregationSettings,
    holders: Mapping[str, Sequence[str]],
    clients: int,
    cohort: int,
    method: Method[Any, Any, Any, Any],
) -> None:
    """Raise ConfigError if tensors have fewer holders than a sum needs, or if sums could wrap.

    `holders` has the clients that return a tensor, by the tensor's key in a reply; `cohort` of all `clients` take part
    in a round.
    """
    if clients * settings.clip >= SUM_LIMIT:
        raise ConfigError(
            f"secure_aggregation.clip = {settings.clip:g}: with {clients} clients a sum could leave 32 bits; set it "
            f"below {SUM_LIMIT / clients:.4g}"
        )
    if cohort < settings.min_group:
        raise ConfigError(
            f"secure_aggregation.min_group = {settings.min_group}: {cohort} of {clients} clients take part in a round, "
            "and a sum over so few is never computed: let more clients take part (federation.cohort)"
        )
    few = sorted((len(names), key) for key, names in holders.items() if len(names) < settings.min_group)
    if not few:
        return
    count, key = few[0]
    remedy = "let more clients hold each tensor"
    if hasattr(method, "expert_choices"):
        remedy = f"set method.experts = {2 * clients} and method.expert_choices = {settings.min_group}"
    raise ConfigError(
        f"secure_aggregation.min_group = {settings.min_group}: {len(few)} of {len(holders)} tensors have fewer "
        f"holders, such as {key} with {count} ({', '.join(sorted(holders[key]))}); a sum over so few reveals single "
        f"updates and is never computed: {remedy}"
    )
