"""Secure aggregation between simulated clients: the same masks, checks and sums as between organisations.

Every exchange of a run passes through all four steps of the protocol (`participant.py`), with clients that live in this
process. Those that trained take part. For each tensor, the values of all its holders are replaced by the mean that
comes out of the opened sum, so that the method's own mean by key returns it; a tensor without a sum is left out of the
replies and keeps its value. A simulation protects nobody, as one process knows everything. It shows what a deployment
would compute.
"""

import dataclasses
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric import ec
from torch import Tensor

from fedamole.federation.record import fields_of, named_tensors
from fedamole.federation.robust import Sizes
from fedamole.federation.secure.fixed_point import decode
from fedamole.federation.secure.journal import Journal
from fedamole.federation.secure.participant import Participant
from fedamole.federation.secure.settings import SecureAggregationSettings
from fedamole.federation.secure.statements import Context
from fedamole.federation.secure.sums import GroupSum, announce, open_sums
from fedamole.model.params import Tensors

log = logging.getLogger(__name__)


class SimulatedSecureAggregation:
    """Replaces the replies of each exchange by securely computed means."""

    def __init__(self, settings: SecureAggregationSettings, averaged: Sequence[str], clients: Sequence[str]) -> None:
        """Create the simulated clients of a run; `averaged` names the fields of a reply that are summed."""
        self.settings, self.averaged = settings, averaged
        self.history: list[Sizes] = []
        """Stays empty: nothing is compared between rounds."""
        self._folder = tempfile.TemporaryDirectory(prefix="fedamole-journals-")
        keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in clients}
        roster = {name: key.public_key() for name, key in keys.items()}
        self.participants = {
            name: Participant(
                name,
                key,
                roster,
                Journal(Path(self._folder.name) / f"{index}.jsonl"),
                run="simulation",
                min_group=settings.min_group,
                clip=settings.clip,
            )
            for index, (name, key) in enumerate(keys.items())
        }

    def __call__(
        self, round_: int, sent: Mapping[str, Any], replies: Mapping[str, Any], exchange: int = 0
    ) -> tuple[dict[str, Any], Sizes]:
        """Return the replies with means in place of single values; the second value is always empty."""
        tensors = {
            name: {
                key: tensor
                for key, tensor in named_tensors(replies[name]).items()
                if key.partition(":")[0] in self.averaged
            }
            for name in sorted(replies)
        }
        holders: dict[str, list[str]] = {}
        for name, own in tensors.items():
            for key in own:
                holders.setdefault(key, []).append(name)
        before = _common_values({name: named_tensors(sent[name]) for name in tensors}, tensors, holders)
        values = {
            name: {key: _numbers(tensor) - _numbers(before.get(key)) for key, tensor in own.items()}
            for name, own in tensors.items()
        }
        sums = self._sums(
            Context("simulation", round_, exchange), values, holders, {key: key in before for key in holders}
        )
        self._warn(round_, len(holders), len(sums))
        means: dict[str, Tensor] = {}
        for key, group in sums.items():
            like = tensors[holders[key][0]][key]
            mean = decode(group.total) / len(group.clients) + _numbers(before.get(key))
            means[key] = torch.from_numpy(mean).reshape(like.shape).to(like.dtype)
        return {name: _with_means(replies[name], means, self.averaged) for name in replies}, {}

    def _sums(
        self,
        context: Context,
        values: Mapping[str, Mapping[str, Any]],
        holders: Mapping[str, Sequence[str]],
        relative: Mapping[str, bool],
    ) -> dict[str, GroupSum]:
        """Run the four steps between the clients that have values; return the opened sums by key."""
        clients = {name: self.participants[name] for name in values}
        advertisements = {name: client.advertise(context) for name, client in clients.items()}
        groups = {key: tuple(names) for key, names in holders.items()}
        announcement = announce(context, advertisements, groups, relative, self.settings.min_group)
        masked = {name: client.mask(announcement, values[name]) for name, client in clients.items()}
        survivors = frozenset(masked)
        confirmations = {name: client.confirm(context, survivors) for name, client in clients.items()}
        revealed = {name: client.reveal(context, confirmations) for name, client in clients.items()}
        return open_sums(announcement, masked, survivors, revealed, self.settings.min_group)

    def _warn(self, round_: int, tensors: int, summed: int) -> None:
        if summed < tensors:
            log.warning(
                "round %d: %d of %d tensors came from fewer than %d clients; they keep their values "
                "(secure_aggregation.min_group)",
                round_,
                tensors - summed,
                tensors,
                self.settings.min_group,
            )
        for name, client in self.participants.items():
            if client.clipped:
                log.warning(
                    "client %s, round %d: %d numbers changed by more than %g and were cut to it "
                    "(secure_aggregation.clip)",
                    name,
                    round_,
                    client.clipped,
                    self.settings.clip,
                )
                client.clipped = 0


def _numbers(tensor: Tensor | None) -> Any:
    """Return the values (n) of a tensor as float64; 0 without a tensor."""
    return 0.0 if tensor is None else tensor.detach().to("cpu", torch.float64).numpy().reshape(-1)


def _common_values(
    sent: Mapping[str, Tensors], tensors: Mapping[str, Tensors], holders: Mapping[str, Sequence[str]]
) -> dict[str, Tensor]:
    """Return what was sent under each key, if all its holders were sent the same, of the shape that they return."""
    common = {}
    for key, names in holders.items():
        values = [sent[name].get(key) for name in names]
        first = values[0]
        if first is None or any(tensors[name][key].shape != first.shape for name in names):
            continue
        if all(value is first or (value is not None and torch.equal(value, first)) for value in values):
            common[key] = first
    return common


def _with_means(record: Any, means: Tensors, averaged: Sequence[str]) -> Any:
    """Return a reply whose averaged fields hold the means of its own keys, without the keys that have no mean."""
    depths = fields_of(type(record))
    fields = {name: _means_of(getattr(record, name), means, f"{name}:") for name in averaged if depths[name].depth}
    return dataclasses.replace(record, **fields)


def _means_of(values: Mapping[str, Any], means: Tensors, prefix: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(value, Tensor):
            result[key] = _means_of(value, means, f"{prefix}{key}/")
        elif prefix + key in means:
            result[key] = means[prefix + key]
    return result
