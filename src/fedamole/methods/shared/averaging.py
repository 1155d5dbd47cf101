"""Weighted means of tensors by name, and the methods that do nothing else at the server."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.federation.method import ClientInfo, K, Method, Server, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.params import Tensors, expert_ids, expert_keys, new_shared


def mean_by_key(replies: Mapping[str, Tensors], weights: Mapping[str, float], previous: Tensors) -> dict[str, Tensor]:
    """Average tensors by name over the clients that returned the name; a name that none returned keeps its value.

    `weights` (by client, on any positive scale) are normalised over the clients that returned the name. The sum is
    taken in the order of the clients' names and in float64, so that it does not depend on the order of arrival.
    """
    clients_by_key: dict[str, list[str]] = {}
    for client in sorted(replies):
        for key in replies[client]:
            clients_by_key.setdefault(key, []).append(client)
    means = {}
    for key, clients in clients_by_key.items():  # one key at a time, so that only one float64 copy exists
        first = replies[clients[0]][key]
        total = torch.zeros_like(first, dtype=torch.float64)
        for client in clients:
            total += replies[client][key].to(torch.float64) * weights[client]
        means[key] = (total / sum(weights[client] for client in clients)).to(first.dtype)
    return {**previous, **means}


def mean_of_experts(
    replies: Mapping[str, Tensors], weights: Mapping[str, Mapping[str, Tensor]], previous: Tensors
) -> dict[str, Tensor]:
    """Average domain experts, each with weights of its own; return the tensors of all experts of the pool.

    `weights` (E) are by client and module. Clients with weight 0 do not count, and an expert that no client returned
    with a weight above 0 keeps its value.
    """
    means: dict[str, Tensor] = {}
    for module, experts in expert_ids(previous).items():
        for expert in experts:
            keys = expert_keys(module, expert)
            of_expert = {name: float(by_module[module][expert]) for name, by_module in weights.items()}
            returned = {
                name: {key: tensors[key] for key in keys if key in tensors}
                for name, tensors in replies.items()
                if of_expert[name] > 0
            }
            means |= mean_by_key(returned, of_expert, {key: previous[key] for key in keys})
    return means


@dataclass(frozen=True)
class SharedTensors:
    """Tensors that all clients share: server state, message and reply of an `AveragedMethod`."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class AveragedMethod(Method[SharedTensors, SharedTensors, K, SharedTensors]):
    """A method that sends the same tensors to all clients and averages them by name (FedAvg)."""

    weighting: Weighting = "uniform"
    """Weight of a client in the average: uniform, or by its training examples."""

    averaged_fields = ("tensors",)

    @abstractmethod
    def initial(self, server: Server) -> Tensors:
        """Return the shared tensors before round 0."""

    @override
    def init(self, server: Server) -> SharedTensors:
        return SharedTensors(self.initial(server))

    @override
    def message(self, state: SharedTensors, client: ClientInfo) -> SharedTensors:
        return state

    @override
    def aggregate(self, server: Server, state: SharedTensors, replies: Mapping[str, SharedTensors]) -> SharedTensors:
        trained = {name: reply.tensors for name, reply in replies.items()}
        return SharedTensors(mean_by_key(trained, server.weights(self.weighting), state.tensors))


@dataclass(frozen=True)
class AveragedLora(AveragedMethod[K], LoraMethod[SharedTensors, SharedTensors, K, SharedTensors]):
    """An averaged method whose shared tensors are a LoRA, or part of one."""

    @override
    def initial(self, server: Server) -> Tensors:
        return new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora"))
