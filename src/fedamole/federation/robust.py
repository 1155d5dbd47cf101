"""Protection of the aggregate from single clients: what is done to the replies before a method averages them.

`clipped` bounds how far a client may move what it was sent. The tensors of a reply are put into groups by kind, such as
the A's of all experts or the token projections of all modules. A tensor that was sent under the same key counts with
its change, any other with its value. The size of a client's group is the root mean square of these numbers, so that
clients with different numbers of experts or ranks can be compared. The bound for a client is

    clip_factor * median over exchanges ( median over the other clients ( size ) ),

over this exchange and the `HISTORY - 1` before it. A client's own sizes are left out of its own bound, so that it
cannot raise it slowly. An exchange counts only where two other clients returned the group: of two clients nobody can
tell which one is wrong. Nor does one count whose median is 0, as that of the A's in a first round of one step, where
all B's are 0. A group above its bound is scaled down to it; all other tensors stay the same objects.

`median` and `trimmed` replace every value of a key by the coordinate-wise median or trimmed mean of its holders, so
that the method's own mean by key returns that value.
"""

import dataclasses
import logging
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.federation.method import Method
from fedamole.federation.record import holds_tensors, named_tensors
from fedamole.model.params import Tensors

log = logging.getLogger(__name__)

Aggregation = Literal["mean", "clipped", "median", "trimmed"]
Sizes = dict[str, dict[str, float]]
"""Size of each client's change by group and client."""

HISTORY = 10
"""Exchanges whose sizes are remembered."""
FEWEST = 3
"""Fewest clients of which one that is wrong can be told from the others."""
TRIMMED = 0.2
"""Share of the values that a trimmed mean leaves out at each end; at least one."""


def check_aggregation(aggregation: str, name: str, method: Method[Any, Any, Any, Any]) -> None:
    """Refuse with a ConfigError an aggregation that this method cannot have."""
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


class Robust:
    """What is done to the replies of an exchange; `history` is all it remembers, and is part of a checkpoint."""

    def __init__(self, aggregation: Aggregation, clip_factor: float, averaged: Sequence[str]) -> None:
        """Take part in a run. `averaged` names the fields of a reply of which a mean by key is taken."""
        self.aggregation, self.clip_factor, self.averaged = aggregation, clip_factor, averaged
        self.history: list[Sizes] = []
        self._told = False

    def __call__(
        self, round_: int, sent: Mapping[str, Any], replies: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Sizes]:
        """Return the replies as they are to be aggregated, and what was clipped: the factor by client and group.

        `sent` and `replies` are the records by client. Replies that need no change are returned as they are.
        """
        if self.aggregation == "clipped":
            return self._clipped(round_, sent, replies)
        if self.aggregation == "mean":
            return dict(replies), {}
        return self._centred(round_, replies, median if self.aggregation == "median" else trimmed_mean), {}

    def _clipped(
        self, round_: int, sent: Mapping[str, Any], replies: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Sizes]:
        changes = {name: _Change(sent[name], replies[name]) for name in sorted(replies)}
        sizes: Sizes = {}
        for name, change in changes.items():
            for group, size in change.sizes.items():
                sizes.setdefault(group, {})[name] = size
        results, clipped, kept = dict(replies), dict[str, dict[str, float]](), {g: dict(s) for g, s in sizes.items()}
        for name, change in changes.items():
            factors = {}
            for group, size in change.sizes.items():
                bound = self._bound(group, name, sizes)
                if bound is not None and size > bound:
                    factors[group], kept[group][name] = bound / size, bound
            if factors:
                results[name], clipped[name] = change.scaled(factors), factors
                told = ", ".join(f"{group} to {factor:.2g} of it" for group, factor in sorted(factors.items()))
                log.warning(
                    "client %s, round %d: its change is more than %g times that of the other clients; scaled down: %s",
                    name,
                    round_,
                    self.clip_factor,
                    told,
                )
        if changes and len(changes) < FEWEST and not clipped:
            self._tell(
                "round %d: %d clients answered; with fewer than %d there is nobody to compare a change with, so "
                "that only earlier rounds bound it",
                round_,
                len(changes),
                FEWEST,
            )
        self.history = [*self.history, kept][-(HISTORY - 1) :]
        return results, clipped

    def _bound(self, group: str, client: str, now: Sizes) -> float | None:
        """Largest size of a client's group; None where nobody knows what is usual."""
        medians = []
        for sizes in (*self.history, now):
            others = [size for name, size in sizes.get(group, {}).items() if name != client]
            usual = statistics.median(others) if len(others) >= FEWEST - 1 else 0.0
            if usual > 0:
                medians.append(usual)
        return self.clip_factor * statistics.median(medians) if medians else None

    def _centred(self, round_: int, replies: Mapping[str, Any], centre: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        holders: dict[str, list[str]] = {}
        tensors = {name: named_tensors(replies[name]) for name in sorted(replies)}
        for name, own in tensors.items():
            for key in own:
                if key.partition(":")[0] in self.averaged:
                    holders.setdefault(key, []).append(name)
        changed: dict[str, dict[str, Tensor]] = {name: {} for name in replies}
        few = 0
        for key, names in holders.items():
            if len(names) < FEWEST:
                few += 1
                continue
            values = [tensors[name][key] for name in names]
            middle = centre(torch.stack(values).double()).to(values[0].dtype)
            for name in names:
                changed[name][key] = middle
        if few:
            self._tell(
                "round %d: %d of %d tensors came from fewer than %d clients; of those the mean is taken",
                round_,
                few,
                len(holders),
                FEWEST,
            )
        return {name: with_tensors(replies[name], changed[name]) for name in replies}

    def _tell(self, text: str, *words: object) -> None:
        """Warn once in a run of what holds in many rounds."""
        if not self._told:
            log.warning(text, *words)
            self._told = True


class _Change:
    """How a reply differs from what was sent, by group."""

    def __init__(self, sent: Any, reply: Any) -> None:
        self.reply, self.before = reply, named_tensors(sent)
        self.tensors = named_tensors(reply)
        self.groups: dict[str, list[str]] = {}
        for key in sorted(self.tensors):  # a record's own order differs from one reading of its bytes to the next
            origin = self._origin(key)
            self.groups.setdefault(group_of(key) if origin is not None else f"{group_of(key)} (value)", []).append(key)
        self.sizes = {group: self._size(keys) for group, keys in self.groups.items()}

    def _origin(self, key: str) -> Tensor | None:
        """What was sent under a key, cut to the shape of what came back: a client may drop ranks."""
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
        """The reply with the changes of some groups multiplied by a factor."""
        changed = {}
        for group, factor in factors.items():
            for key in self.groups[group]:
                origin, now = self._origin(key), self.tensors[key]
                moved = now.double() * factor if origin is None else origin + (now.double() - origin) * factor
                changed[key] = moved.to(now.dtype)
        return with_tensors(self.reply, changed)


def group_of(key: str) -> str:
    """The kind of a tensor: its field and its key without the module and without numbers.

    tensors:layer.0.q/expert-07/A is of the group tensors/expert/A.
    """
    field, _, name = key.partition(":")
    parts = name.split("/")
    kind = parts[-2:] if len(parts) > 2 else parts[1:]
    return "/".join([field, *(re.sub(r"-\d+$", "", part) for part in kind)])


def with_tensors(record: Any, changed: Tensors, prefix: str = "") -> Any:
    """Return a record with some of its tensors replaced; names are those of `named_tensors`."""
    hints, fields = get_type_hints(type(record)), dict[str, Any]()
    for field in dataclasses.fields(record):
        value, name = getattr(record, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            fields[field.name] = with_tensors(value, changed, f"{name}.")
        elif holds_tensors(hints[field.name]):
            fields[field.name] = _replaced(value, changed, f"{name}:")
    return dataclasses.replace(record, **fields) if changed else record


def _replaced(values: Mapping[str, Any], changed: Tensors, prefix: str) -> dict[str, Any]:
    return {
        key: changed.get(prefix + key, value)
        if isinstance(value, Tensor)
        else _replaced(value, changed, f"{prefix}{key}/")
        for key, value in values.items()
    }


def median(values: Tensor) -> Tensor:
    """Coordinate-wise median (...) of values (n, ...); of an even number the mean of the two in the middle."""
    ordered, count = values.sort(0).values, len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def trimmed_mean(values: Tensor) -> Tensor:
    """Coordinate-wise mean (...) of values (n, ...) without the lowest and the highest fifth, at least one each."""
    cut = max(1, int(TRIMMED * len(values)))
    return values.sort(0).values[cut : len(values) - cut].mean(0)
