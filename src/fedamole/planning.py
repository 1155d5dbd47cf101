"""What a run would take, worked out before it starts: clients, traffic, steps, memory, and how many train at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedamole.config import Config
from fedamole.federation.local import TOKENS_AT_ONCE
from fedamole.federation.method import Client, Server, Trained
from fedamole.federation.record import pack
from fedamole.federation.worker import ClientData
from fedamole.model.base import Base
from fedamole.model.memory import HEADROOM, free_bytes, group_bytes, used_bytes
from fedamole.model.params import Adapter

MOST_ON_CPU = 16
"""Clients at once on a CPU: more gain little, on short texts alone, and take memory; `run.group` sets more."""


@dataclass(frozen=True)
class Plan:
    """What a run would do, without running it."""

    clients: tuple[dict[str, Any], ...]
    """Name, task, and size of each split."""
    base: str
    base_parameters: int
    targets: int
    """Adapted linears."""
    adapter_parameters: float
    """Mean over the clients, in round 0."""
    bytes_down: float
    """Mean per client and round; what comes back up is about as much."""
    group: int
    """Clients that train in lock-step."""
    memory_mib: float
    """Estimate for local training: what is held now (base and data; on a CPU the whole process), and a group."""
    steps: float
    """Mean optimiser steps of a client per round."""
    rounds: int
    clients_per_round: int


def planned(config: Config, base: Base, clients: Mapping[str, ClientData]) -> Plan:
    """Plan a prepared run, whose group has been chosen."""
    sizes, traffic = _sizes(config, base, clients)
    infos = [clients[name].info for name in sorted(clients)]
    group = config.run.group
    return Plan(
        clients=tuple(_client_row(clients[info.name]) for info in infos),
        base=base.name,
        base_parameters=sum(weight.numel() for weight in base.model.parameters()),
        targets=len(base.shapes),
        adapter_parameters=_mean(sizes),
        bytes_down=_mean(traffic),
        group=group,
        memory_mib=(used_bytes(base.device) + _group_bytes(config, base, group, max(sizes))) / 2**20,
        steps=_mean([config.training.steps(info.examples) for info in infos]),
        rounds=config.federation.rounds,
        clients_per_round=_cohort(config, len(infos)),
    )


def chosen_group(config: Config, base: Base, clients: Mapping[str, ClientData]) -> int:
    """Most clients of a cohort whose training fits into the memory that is free now; at least one."""
    most = _cohort(config, len(clients))
    if base.device.type == "cpu":
        most = min(most, MOST_ON_CPU)
    largest, room = max(_sizes(config, base, clients)[0]), HEADROOM * free_bytes(base.device)
    fitting = [group for group in range(1, most + 1) if _group_bytes(config, base, group, largest) <= room]
    return max(fitting, default=1)


def _sizes(config: Config, base: Base, clients: Mapping[str, ClientData]) -> tuple[list[int], list[int]]:
    """Adapter parameters, and bytes of the message, of each client in round 0."""
    method, infos = config.method, tuple(clients[name].info for name in sorted(clients))
    state = method.init(Server(base.shapes, infos, config.run.seed))
    sizes, traffic = [], []
    for info in infos:
        client = Client(info, base.shapes, config.run.seed, 0, _never)
        message = method.message(state, info)
        sizes.append(method.adapter(client, method.first_keep(client), message).parameters())
        traffic.append(len(pack(message)))
    return sizes, traffic


def _group_bytes(config: Config, base: Base, group: int, adapter_parameters: int) -> int:
    one = config.training.batch_size * config.training.max_length
    tokens = group * one
    if base.device.type == "cpu":
        tokens = min(tokens, max(one, TOKENS_AT_ONCE))
    return group_bytes(base, group, adapter_parameters, tokens)


def _cohort(config: Config, clients: int) -> int:
    return max(1, round(config.federation.cohort * clients))


def _never(_: Adapter) -> Trained:
    raise RuntimeError("a plan trains nothing")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _client_row(data: ClientData) -> dict[str, Any]:
    task = "classification" if data.train.examples[0].options else "generation"
    sizes = {name: len(getattr(data, name).rows) for name in ("train", "embedding", "validation", "test")}
    return {"client": data.info.name, "task": task, **sizes}
