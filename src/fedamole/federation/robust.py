"""Robust aggregation: what happens to clients' replies before a method averages them.

`clipped` limits how far a client may change what it was sent. The tensors of a reply are divided into groups by kind,
such as the A matrices of all experts, or the token projections of all modules. A tensor that was sent under the same
key enters a group with its change, any other tensor with its value. The size of a client's group is the root mean
square of these values, so clients with different numbers of experts or ranks are comparable. The bound for a client is

    clip_factor * median over rounds ( median over the other clients ( size ) ),

over the current round and the `HISTORY - 1` before it. If a round has several exchanges, each is compared with the same
exchange of the other rounds. A client's own sizes do not enter its own bound, so it cannot raise the bound slowly. A
round counts only if at least two other clients returned the group: with two clients, nobody knows which one is wrong.
It does not count if its median is 0 either, as for the A matrices after a first round of one step, in which all B
matrices are 0. A group above its bound is scaled down to the bound; all other tensors are returned unchanged.

`median` and `trimmed` replace every value of a key by the coordinate-wise median or trimmed mean over the clients that
returned the key. The method's own mean by key then returns that value.
"""

import dataclasses
import logging
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.federation.method import Method
from fedamole.federation.record import fields_of, named_tensors
from fedamole.model.params import Tensors

log = logging.getLogger(__name__)

Aggregation = Literal["mean", "clipped", "median", "trimmed"]
Sizes = dict[str, dict[str, float]]
"""Size of a change, by group and client."""

HISTORY = 10
"""Number of rounds, including the current one, whose sizes define a bound."""
MIN_CLIENTS = 3
"""Minimum number of clients that allows to identify one of them as wrong."""
TRIMMED = 0.2
"""Fraction of the values that a trimmed mean drops at each end; at least one value is dropped."""


def check_aggregation(aggregation: str, name: str, method: Method[Any, Any, Any, Any]) -> None:
    """Raise ConfigError if a method does not support an aggregation."""
    if aggregation not in ("median", "trimmed"):
        return
    if not method.averaged_fields:
        raise ConfigError(
            f"federation.aggregation = {aggregation!r}: {name} does not average tensors by key alone, so that a "
            f"{aggregation} of them has no meaning; use 'clipped' or 'mean'"
        )
    if getattr(method, "weighting", "uniform") != "uniform":
        raise ConfigError(
            f"federation.aggregation = {aggregation!r} counts all clients alike: set method.weighting to 'uniform', "
            "or use 'clipped' or 'mean'"
        )


class BeforeAggregation(Protocol):
    """What replies pass through before a method aggregates them."""

    history: list[Sizes]
    """What it needs of earlier rounds; part of a checkpoint."""

    def __call__(
        self, round_: int, sent: Mapping[str, Any], replies: Mapping[str, Any], exchange: int = 0
    ) -> tuple[dict[str, Any], Sizes]:
        """Return the replies to aggregate, and by client what was clipped; `sent` and `replies` are by client."""


class Robust:
    """Applies a run's aggregation setting to the replies of each exchange."""

    def __init__(self, aggregation: Aggregation, clip_factor: float, averaged: Sequence[str]) -> None:
        """Create it for one run; `averaged` names the fields of a reply that the method averages by key."""
        self.aggregation, self.clip_factor, self.averaged = aggregation, clip_factor, averaged
        self.history: list[Sizes] = []
        """Sizes of the last rounds, oldest first; part of a checkpoint."""
        self._warned = False

    def __call__(
        self, round_: int, sent: Mapping[str, Any], replies: Mapping[str, Any], exchange: int = 0
    ) -> tuple[dict[str, Any], Sizes]:
        """Return the replies to aggregate, and the factor by which each clipped group was scaled, by client and group.

        `sent` and `replies` are records by client. A reply that needs no change is returned as it is.
        """
        if self.aggregation == "clipped":
            return self._clipped(round_, exchange, sent, replies)
        if self.aggregation == "mean":
            return dict(replies), {}
        return self._centred(round_, replies, median if self.aggregation == "median" else trimmed_mean), {}

    def _clipped(
        self, round_: int, exchange: int, sent: Mapping[str, Any], replies: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Sizes]:
        changes = {name: _Change(sent[name], replies[name]) for name in sorted(replies)}
        prefix = f"exchange {exchange}: " if exchange else ""
        sizes: Sizes = {}
        for name, change in changes.items():
            for group, size in change.sizes.items():
                sizes.setdefault(prefix + group, {})[name] = size
        bounded: Sizes = {group: dict(by_client) for group, by_client in sizes.items()}
        results, clipped = dict(replies), dict[str, dict[str, float]]()
        for name, change in changes.items():
            factors = {}
            for group, size in change.sizes.items():
                bound = self._bound(prefix + group, name, sizes)
                if bound is not None and size > bound:
                    factors[group], bounded[prefix + group][name] = bound / size, bound
            if factors:
                results[name], clipped[name] = change.scaled(factors), factors
                log.warning(
                    "client %s, round %d: its change is more than %g times that of the other clients; scaled down: %s",
                    name,
                    round_,
                    self.clip_factor,
                    ", ".join(f"{group} to {factor:.2g} of it" for group, factor in sorted(factors.items())),
                )
        if changes and len(changes) < MIN_CLIENTS and not clipped:
            self._warn_once(
                "round %d: %d clients answered; with fewer than %d their changes cannot be compared, so only earlier "
                "rounds bound them",
                round_,
                len(changes),
                MIN_CLIENTS,
            )
        if exchange:  # completes the entry that the first exchange of this round added
            self.history[-1] = {**self.history[-1], **bounded}
        else:
            self.history = [*self.history, bounded][-(HISTORY - 1) :]
        return results, clipped

    def _bound(self, group: str, client: str, now: Sizes) -> float | None:
        """Return the largest allowed size of a client's group; None if there is too little to compare it with."""
        medians = []
        for sizes in (*self.history, now):
            others = [size for name, size in sizes.get(group, {}).items() if name != client]
            median_size = statistics.median(others) if len(others) >= MIN_CLIENTS - 1 else 0.0
            if median_size > 0:
                medians.append(median_size)
        return self.clip_factor * statistics.median(medians) if medians else None

    def _centred(self, round_: int, replies: Mapping[str, Any], centre: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        holders: dict[str, list[str]] = {}
        tensors = {name: named_tensors(replies[name]) for name in sorted(replies)}
        for name, own in tensors.items():
            for key in own:
                if key.partition(":")[0] in self.averaged:
                    holders.setdefault(key, []).append(name)
        changed: dict[str, dict[str, Tensor]] = {name: {} for name in replies}
        too_few = 0
        for key, names in holders.items():
            if len(names) < MIN_CLIENTS:
                too_few += 1
                continue
            values = [tensors[name][key] for name in names]
            middle = centre(torch.stack(values).double()).to(values[0].dtype)
            for name in names:
                changed[name][key] = middle
        if too_few:
            self._warn_once(
                "round %d: %d of %d tensors came from fewer than %d clients; they are averaged by their mean",
                round_,
                too_few,
                len(holders),
                MIN_CLIENTS,
            )
        return {name: with_tensors(replies[name], changed[name]) for name in replies}

    def _warn_once(self, text: str, *values: object) -> None:
        """Log a warning unless this run has logged one already: most of them would repeat every round."""
        if not self._warned:
            log.warning(text, *values)
            self._warned = True


class _Change:
    """Difference of a reply from the message that was sent, by group."""

    def __init__(self, sent: Any, reply: Any) -> None:
        self.reply, self.before = reply, named_tensors(sent)
        self.tensors = named_tensors(reply)
        self.groups: dict[str, list[str]] = {}
        for key in sorted(self.tensors):  # the order of an unpacked record is not deterministic
            origin = self._origin(key)
            self.groups.setdefault(group_of(key) if origin is not None else f"{group_of(key)} (value)", []).append(key)
        self.sizes = {group: self._size(keys) for group, keys in self.groups.items()}

    def _origin(self, key: str) -> Tensor | None:
        """Return what was sent under a key, cut to the shape of the reply since a client may drop ranks."""
        before, now = self.before.get(key), self.tensors[key]
        if before is None or before.dim() != now.dim() or not all(map(int.__ge__, before.shape, now.shape)):
            return None
        return before[tuple(slice(size) for size in now.shape)].double()

    def _size(self, keys: Sequence[str]) -> float:
        squares, numbers = 0.0, 0
        for key in keys:
            origin, now = self._origin(key), self.tensors[key].double()
            squares += float((now if origin is None else now - origin).square().sum())
            numbers += now.numel()
        return math.sqrt(squares / max(1, numbers))

    def scaled(self, factors: Mapping[str, float]) -> Any:
        """Return the reply with the changes of some groups multiplied by a factor."""
        changed = {}
        for group, factor in factors.items():
            for key in self.groups[group]:
                origin, now = self._origin(key), self.tensors[key]
                scaled = now.double() * factor if origin is None else origin + (now.double() - origin) * factor
                changed[key] = scaled.to(now.dtype)
        return with_tensors(self.reply, changed)


def group_of(key: str) -> str:
    """Return the group of a tensor: its field and its key without the module and without numbers.

    The group of tensors:layer.0.q/expert-07/A is tensors/expert/A.
    """
    field, _, name = key.partition(":")
    parts = name.split("/")
    kind = parts[-2:] if len(parts) > 2 else parts[1:]
    return "/".join([field, *(re.sub(r"-\d+$", "", part) for part in kind)])


def with_tensors(record: Any, changed: Tensors, prefix: str = "") -> Any:
    """Return a record with some of its tensors replaced; names are those of `named_tensors`."""
    fields: dict[str, Any] = {}
    for name, field in fields_of(type(record)).items():
        value = getattr(record, name)
        if dataclasses.is_dataclass(value):
            fields[name] = with_tensors(value, changed, f"{prefix}{name}.")
        elif field.depth:
            fields[name] = _replaced(value, changed, f"{prefix}{name}:")
    return dataclasses.replace(record, **fields) if changed else record


def _replaced(values: Mapping[str, Any], changed: Tensors, prefix: str) -> dict[str, Any]:
    return {
        key: changed.get(prefix + key, value)
        if isinstance(value, Tensor)
        else _replaced(value, changed, f"{prefix}{key}/")
        for key, value in values.items()
    }


def median(values: Tensor) -> Tensor:
    """Return the coordinate-wise median (...) of values (n, ...); for even n the mean of the two middle values."""
    ordered, count = values.sort(0).values, len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def trimmed_mean(values: Tensor) -> Tensor:
    """Return the coordinate-wise mean (...) of values (n, ...) without the lowest and highest fifth of them.

    At least one value is dropped at each end.
    """
    cut = max(1, int(TRIMMED * len(values)))
    return values.sort(0).values[cut : len(values) - cut].mean(0)
