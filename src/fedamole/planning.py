"""Plan of a run before it starts: clients, traffic, steps, memory, and how many clients train at once."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedamole.config import Config
from fedamole.data.manifest import read_manifest
from fedamole.data.partition import numbered
from fedamole.data.settings import DataSettings, SourceSettings
from fedamole.engine.reply_template import dry_client, dry_update
from fedamole.errors import ConfigError
from fedamole.federation.client_data import ClientData
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.passes import TOKENS_AT_ONCE
from fedamole.federation.record import named_tensors, pack, unpack
from fedamole.federation.secure.settings import check_groups, refuse_deployment
from fedamole.model.base import Base
from fedamole.model.memory import HEADROOM, free_bytes, group_bytes, used_bytes
from fedamole.model.params import Shapes
from fedamole.model.prompt import PromptSpec
from fedamole.model.weightless import WeightlessBase, weight_bytes
from fedamole.runs.run_files import SPLITS

MOST_ON_CPU = 16
"""Largest group on a CPU; larger ones are hardly faster and take memory. `run.group` overrides it."""
ASSUMED_EXAMPLES = 1000
"""Training examples assumed for each client in a plan without data."""
NOT_INCLUDED = "the GPU's own context, what PyTorch keeps in reserve, evaluation, and on the server the method's state"
"""What the memory of a plan without data does not include."""


@dataclass(frozen=True)
class Plan:
    """Plan of a run."""

    clients: tuple[dict[str, Any], ...]
    """Name, task, and size of each split."""
    base: str
    base_parameters: int
    targets: int
    """Adapted linears."""
    adapter_parameters: float
    """Mean over the clients, in round 0; of several exchanges, the one with the largest adapter counts."""
    bytes_down: float
    """Mean per client and round, over all exchanges of the round; replies are about as large."""
    group: int
    """Number of clients that train in lock-step."""
    memory_mib: float
    """Estimate for local training: memory in use now (base and data; on a CPU the whole process), and a group."""
    steps: float
    """Mean optimiser steps of a client per round."""
    server_steps: int
    """Optimiser steps of the server per round, for methods that train there."""
    rounds: int
    clients_per_round: int
    exposure: tuple[str, ...]
    """What others can compute from what is sent, in sentences."""
    label_noise: dict[str, float]
    """By source with wrong answers on purpose: their fraction of the training and embedding examples."""
    noise: str
    """Noise of `[privacy]` against the signal, in a sentence; empty without it."""
    profile: str
    """Settings that `privacy.profile` has set, in words; empty if none."""
    not_from_profile: str
    """Values of `privacy.profile` that the config replaces by its own, in words; empty if none."""


@dataclass(frozen=True)
class PlanWithoutData(Plan):
    """Plan of a run on a GPU from its config and the shapes of its base alone."""

    assumed: str
    """What was assumed in place of the data."""
    base_mib: float
    """The frozen weights."""
    mib_per_client: float
    """Memory of each client in lock-step; `memory_mib` is the base plus this for `group` clients."""
    not_included: str
    """What `memory_mib` does not include."""


def planned(config: Config, base: Base, clients: Mapping[str, ClientData]) -> Plan:
    """Plan a prepared run with a known group size."""
    infos = _infos(clients)
    sizes, traffic = _sizes(config, base, infos)
    group = config.run.group
    rows = tuple(_client_row(clients[info.name]) for info in infos)
    return Plan(
        clients=rows,
        base=base.name,
        base_parameters=sum(weight.numel() for weight in base.model.parameters()),
        targets=len(base.shapes),
        adapter_parameters=_mean(sizes),
        bytes_down=_mean(traffic),
        group=group,
        memory_mib=(used_bytes(base.device) + _group_bytes(config, base, group, max(sizes))) / 2**20,
        steps=_mean([_steps(config, info.examples) for info in infos]),
        server_steps=config.method.steps_at_server(),
        rounds=config.federation.rounds,
        clients_per_round=_cohort(config, len(infos)),
        exposure=tuple(exposure(config, len(infos), rows, base.shapes)),
        label_noise=config.data.noise(),
        noise=_noise(config, infos, _mean(sizes)),
        profile=_profile(config),
        not_from_profile=", ".join(config.not_from_profile),
    )


def _profile(config: Config) -> str:
    """Return the settings that `privacy.profile` has set, as a config has them."""
    return ", ".join(
        f"{table}.{key} = {json.dumps(value)}"
        for table, keys in config.from_profile.items()
        for key, value in keys.items()
    )


def _noise(config: Config, infos: Sequence[ClientInfo], parameters: float) -> str:
    """Return the noise of the client with the fewest examples, and what to change if it is large."""
    if (budget := config.budget()) is None:
        return ""
    few = min(infos, key=lambda info: (info.examples, info.name))
    budget.check(few.name, few.examples)
    return budget.describe(few.name, few.examples, parameters)


def _steps(config: Config, examples: int) -> int:
    """Return the optimiser steps of a round of a client with this many training examples."""
    return config.method.round_steps(config.training.steps(examples), config.training.budget)


def chosen_group(config: Config, base: Base, clients: Mapping[str, ClientData]) -> int:
    """Return the largest group of a cohort whose training fits into free memory; at least 1."""
    most = _cohort(config, len(clients))
    if base.device.type == "cpu":
        most = min(most, MOST_ON_CPU)
    largest, room = max(_sizes(config, base, _infos(clients))[0]), HEADROOM * free_bytes(base.device)
    fitting = [group for group in range(1, most + 1) if _group_bytes(config, base, group, largest) <= room]
    return max(fitting, default=1)


def planned_without_data(
    config: Config, base: WeightlessBase, clients: tuple[dict[str, Any], ...], assumed: str
) -> PlanWithoutData:
    """Plan from the rows of `clients_without_data`; `run.group` = 0 counts as one client in lock-step.

    A config whose clients are those of a deployment is planned with the method as `fedamole server` runs it.
    """
    if config.deployment.clients and not config.data.source and config.data.manifest is None:
        config = replace(config, method=config.method.for_deployment())
        config.method.check(len(clients))
        refuse_deployment(config.secure_aggregation)
    infos = tuple(sorted((ClientInfo(row["client"], row["train"]) for row in clients), key=lambda info: info.name))
    check_secure_groups(config, base, infos)
    sizes, traffic = _sizes(config, base, infos)
    group, held = config.run.group or 1, weight_bytes(base, config.base.quantization) / 2**20
    each = _group_bytes(config, base, 1, max(sizes)) / 2**20
    return PlanWithoutData(
        clients=clients,
        base=base.name,
        base_parameters=sum(weight.numel() for weight in base.model.parameters()),
        targets=len(base.shapes),
        adapter_parameters=_mean(sizes),
        bytes_down=_mean(traffic),
        group=group,
        memory_mib=held + group * each,
        steps=_mean([_steps(config, info.examples) for info in infos]),
        server_steps=config.method.steps_at_server(),
        rounds=config.federation.rounds,
        clients_per_round=_cohort(config, len(infos)),
        exposure=tuple(exposure(config, len(infos), shapes=base.shapes)),
        label_noise=config.data.noise(),
        noise=_noise(config, infos, _mean(sizes)),
        profile=_profile(config),
        not_from_profile=", ".join(config.not_from_profile),
        assumed=assumed,
        base_mib=held,
        mib_per_client=each,
        not_included=NOT_INCLUDED,
    )


def clients_without_data(
    data: DataSettings, folder: Path, elsewhere: Sequence[str] = ()
) -> tuple[tuple[dict[str, Any], ...], str]:
    """Return clients and their example counts from the [data] table alone, and a sentence about what was assumed.

    With `data.manifest` (relative to `folder`) clients and counts are those stored there; where no source is named,
    clients are those of a deployment, whose data are `elsewhere`. Errors: ConfigError for a partition by value, whose
    number of clients only data or manifest know, and for two clients of one name.
    """
    if data.manifest is not None:
        records = read_manifest(folder / data.manifest).clients
        rows = [{"client": it.client, **{split: len(getattr(it, split).rows) for split in SPLITS}} for it in records]
        return tuple(rows), "clients and example counts of data.manifest"
    names = [name for source in data.source for name in _names_without_data(source)] or list(elsewhere)
    if double := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"client {double[0]!r} comes from two sources; rename one of them")
    rows = [{"client": name, "train": ASSUMED_EXAMPLES} for name in names]
    return tuple(rows), f"{ASSUMED_EXAMPLES:,} training examples for each client, as no data were looked at"


def exposure(
    config: Config, clients: int | None, rows: Sequence[Mapping[str, Any]] = (), shapes: Shapes | None = None
) -> list[str]:
    """Return sentences about what the coordinator and other clients can compute from what is sent in a run.

    `clients` is how many there are; None where that is not known, as at a client. `rows` are those of a plan: names and
    sizes of splits, as far as they are known here. `shapes` are those of the base's adapted linears, if it is loaded.
    """
    method = config.method
    if method.communicates == "nothing":
        return ["Nothing of the training is sent: the coordinator gets only the losses and scores of each client."]
    secure = config.secure_aggregation
    seen = "each client's own part before it is averaged"
    if secure.enabled:
        unmasked = "".join(f", {field} of each client" for field in secure.unmasked)
        seen = f"sums over at least {secure.min_group} clients in place of single updates{unmasked}"
    sentences = [
        f"Exchanged with the coordinator: {method.communicates}. Kept at the client: {method.stays_local}. "
        f"The coordinator gets {seen}, and the losses and scores of each client."
    ]
    hidden = secure.enabled and method.evaluates == "pre_aggregation"
    if method.stays_local == "the data" and not hidden:
        sentences.append("So the coordinator can have the personal model of every client.")
    sentences += method.exposes(clients, shapes)
    known = [row for row in rows if "embedding" in row]
    if known:
        training = config.training
        few = min(known, key=lambda row: (row["train"], row["client"]))
        batches = _steps(config, few["train"]) // method.trains_together * training.accumulation
        read = min(few["train"], batches * training.batch_size)
        sentences.append(
            f"The fewer rows, the more an update reveals of each: an update of {few['client']} is about {read} of its "
            f"{few['train']} training rows, its scores about {few['validation']} and {few['test']} rows."
        )
    if known and (method.needs_embeddings or method.probes):
        few = min(known, key=lambda row: (row["embedding"], row["client"]))
        what = "mean embeddings are" if method.needs_embeddings else "choice is"
        sentences.append(f"The {what} about {few['embedding']} rows at {few['client']}.")
    return sentences


def _names_without_data(source: SourceSettings) -> list[str]:
    if source.partition.kind == "whole":
        return [source.name]
    if source.partition.clients is None:
        raise ConfigError(
            f"source {source.name!r}: a client per value of {source.partition.by!r}, and how many there are only the "
            "data tell: store the partition once (fedamole partition CONFIG --out M.json) and set data.manifest, or "
            'plan with partition = { kind = "iid", clients = N } in its place'
        )
    return numbered(source.name, source.partition.clients)


def _infos(clients: Mapping[str, ClientData]) -> tuple[ClientInfo, ...]:
    return tuple(clients[name].info for name in sorted(clients))


def _sizes(config: Config, base: Base, infos: tuple[ClientInfo, ...]) -> tuple[list[int], list[int]]:
    """Return the adapter parameters and the bytes of the messages of each client in round 0."""
    dry_round = DryRound(config, base, infos, train=config.method.exchanges() > 1)
    dry_round.run()
    return [dry_round.sizes[info.name] for info in infos], [dry_round.bytes_down[info.name] for info in infos]


def trained_parameters(config: Config, base: Base, clients: Mapping[str, ClientData]) -> dict[str, int]:
    """Return how many parameters each client trains in round 0, by a dry run.

    A tensor that is trained twice in a round, as Ditto's LoRA, counts once, also if that is in several exchanges.
    """
    dry_round = DryRound(config, base, _infos(clients), train=True)
    dry_round.run()
    return {name: sum(sizes.values()) for name, sizes in dry_round.trained_sizes.items()}


def check_secure_groups(config: Config, base: Base, clients: Sequence[ClientInfo]) -> None:
    """Raise ConfigError if secure aggregation is enabled and tensors have too few holders, by a dry run of round 0.

    All clients take part in the dry run. Of several exchanges, a tensor has the holders of the one with the fewest.
    """
    if not config.secure_aggregation.enabled:
        return
    infos = tuple(sorted(clients, key=lambda info: info.name))
    dry_round = DryRound(config, base, infos, train=True)
    dry_round.run()
    cohort = _cohort(config, len(infos))
    check_groups(config.secure_aggregation, dry_round.holders, len(infos), cohort, config.method)


class LastExchange(Exception):  # noqa: N818  not an error
    """The last exchange of a dry round has ended; what the method does with its replies is not needed."""


class DryRound:
    """Round 0 with all clients, without data: each training returns the adapter it was given, probes return zeros."""

    def __init__(self, config: Config, base: Base, infos: tuple[ClientInfo, ...], train: bool) -> None:
        """Prepare round 0. Without `train`, clients get a message and do not work, which one exchange allows."""
        self.method, self.train, self.base, names = config.method, train, BaseInfo.of(base), [i.name for i in infos]
        self.server = Server(self.base, infos, config.run.seed, rounds=config.federation.rounds)
        self.bytes_down = dict.fromkeys(names, 0)
        """Bytes of the messages to each client, over all exchanges."""
        self.sizes = dict.fromkeys(names, 0)
        """Parameters of each client's adapter; of several exchanges the largest."""
        self.trained_sizes: dict[str, dict[str, int]] = {name: {} for name in names}
        """Number of values of each tensor that a client trains."""
        self.holders: dict[str, list[str]] = {}
        """Clients that return each averaged tensor, by its key; filled with `train`."""
        self._clients = {info.name: dry_client(self.base, info, config.run.seed, 0) for info in infos}
        self._states: dict[str, Any] = {}
        self._count = 0

    def run(self) -> None:
        """Run the round up to the replies of its last exchange."""
        state = self.method.init(self.server)
        with contextlib.suppress(LastExchange):
            self.method.round(self.server, state, self.server.clients, self._exchange)

    def _exchange(self, messages: Mapping[str, Any]) -> dict[str, Any]:
        holders: dict[str, list[str]] = {}
        replies = {name: self._update(name, message, holders) for name, message in messages.items()}
        self.holders |= {key: min(names, self.holders.get(key, names), key=len) for key, names in holders.items()}
        self._count += 1
        if self._count == self.method.exchanges():
            raise LastExchange
        return replies

    def _update(self, name: str, message: Any, holders: dict[str, list[str]]) -> Any:
        """Count what a client is sent and trains, and add it to the holders of its tensors; return its reply."""
        client = self._clients[name]
        state = self._states[name] if name in self._states else self.method.init_client_state(client)
        self.bytes_down[name] += len(pack(message))
        size = self.method.adapter(client, state, message).parameters()
        self.sizes[name] = max(self.sizes[name], size)
        if not self.train:
            return None
        state, reply, sizes = dry_update(self.method, self.server, client, state, message)
        self.trained_sizes[name] |= sizes
        for key in named_tensors(reply):
            if key.partition(":")[0] in self.method.averaged_fields:
                holders.setdefault(key, []).append(name)
        if self._count + 1 == self.method.exchanges():
            return None  # not needed any more: a plan holds no client's tensors longer than it has to
        self._states[name] = state
        # As it arrives at the server: untrained replies share their tensors, and such a record cannot be packed.
        return unpack(self.method.records.reply, pack(reply))


def _group_bytes(config: Config, base: Base, group: int, adapter_parameters: int) -> int:
    spec = config.method.spec()
    virtual = spec.virtual_tokens if isinstance(spec, PromptSpec) else 0
    answers = config.training.batch_size * config.training.answers_per_example
    one = answers * (config.training.max_length + virtual)
    group *= config.method.trains_together
    tokens = group * one
    if base.device.type == "cpu":
        tokens = min(tokens, max(one, TOKENS_AT_ONCE))
    return group_bytes(base, group, adapter_parameters, tokens)


def _cohort(config: Config, clients: int) -> int:
    return max(1, round(config.federation.cohort * clients))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _client_row(data: ClientData) -> dict[str, Any]:
    sizes = {name: len(getattr(data, name).rows) for name in ("train", "embedding", "validation", "test")}
    return {"client": data.info.name, "task": data.train.examples[0].task, **sizes}
