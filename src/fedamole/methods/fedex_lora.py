"""FedEx-LoRA: Singhal, Ponkshe, Vepakomma, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Foundation Models", ACL 2025, https://arxiv.org/abs/2410.09432.

One round:
    1. The server sends the averaged LoRA, and as factors the residuals that the client has not merged yet.
    2. The client adds the residuals to its base, trains the LoRA on top and sends it back.
    3. The server averages the A's and the B's. The residual, the mean of the products minus the product of the means,
       makes the average exact.
The model of every client is the base with all residuals and the averaged LoRA, scored after the aggregation.
Deviations: the frozen base is not changed; a client keeps the sum of the residuals beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.federation.method import Client, ClientInfo, Server, TrainingResult, Weighting
from fedamole.federation.privacy.releases import Release
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.methods.shared.lora import LoraMethod
from fedamole.methods.shared.stacks import Changes, Log, Merged, stacked
from fedamole.model.params import Adapter, new_shared, shared_keys


@dataclass(frozen=True)
class Averaged:
    """Server state: the averaged LoRA and the residuals."""

    tensors: Mapping[str, Tensor]
    log: Log


@dataclass(frozen=True)
class LoraAndResiduals:
    """Message: the averaged LoRA, and residuals to merge."""

    tensors: Mapping[str, Tensor]
    changes: Changes


@dataclass(frozen=True)
class TrainedLora:
    """Reply: the trained LoRA, and how many residuals the client has merged."""

    tensors: Mapping[str, Tensor]
    merged: int


@dataclass(frozen=True)
class FedExLora(LoraMethod[Averaged, LoraAndResiduals, Merged, TrainedLora]):
    """FedIT with exact aggregation: the error of averaging the factors is added to the base."""

    weighting: Weighting = "uniform"
    """Weight of a client in the averages: uniform, or by its training examples."""

    paper = "Singhal et al., FedEx-LoRA: Exact Aggregation for Federated Fine-Tuning, ACL 2025, arXiv 2410.09432"
    communicates = "one LoRA and the last round's residual (factors of rank (C + 1) r) down, one LoRA up"
    stays_local = "the data"
    evaluates = "post_aggregation"
    releases: ClassVar[Mapping[str, Release]] = {"tensors": "trained", "merged": "public"}

    # server
    @override
    def init(self, server: Server) -> Averaged:
        return Averaged(new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora")), Log(Changes({})))

    @override
    def message(self, state: Averaged, client: ClientInfo) -> LoraAndResiduals:
        return LoraAndResiduals(state.tensors, state.log.pending(client.name))

    @override
    def aggregate(self, server: Server, state: Averaged, replies: Mapping[str, TrainedLora]) -> Averaged:
        weights, change = server.weights(self.weighting), {}
        trained = {name: reply.tensors for name, reply in replies.items()}
        means = mean_by_key(trained, weights, state.tensors)
        for module in sorted(server.shapes):
            a, b = stacked(trained, weights, shared_keys(module))
            mean_a, mean_b = (means[key] for key in shared_keys(module))
            difference = torch.cat([b, -mean_b], dim=1) * self.spec().scaling
            change[module] = {"A": torch.cat([a, mean_a]), "B": difference}
        merged = {name: reply.merged for name, reply in replies.items()}
        return Averaged(means, state.log.add(change, merged, server.clients))

    # client
    @override
    def init_client_state(self, client: Client) -> Merged:
        return Merged.nothing(client.shapes)

    @override
    def adapter(self, client: Client, client_state: Merged, message: LoraAndResiduals) -> Adapter:
        return Adapter(self.spec(), message.tensors, client_state.merge(message.changes).deltas)

    @override
    def reply(
        self, client: Client, client_state: Merged, message: LoraAndResiduals, trained: TrainingResult
    ) -> tuple[Merged, TrainedLora]:
        merged = client_state.merge(message.changes)
        return merged, TrainedLora(trained.adapter.tensors, merged.count)
