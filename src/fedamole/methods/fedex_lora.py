"""FedEx-LoRA: Singhal, Ponkshe, Vepakomma, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Foundation Models", ACL 2025, https://arxiv.org/abs/2410.09432.

One round:
    the server sends the averaged LoRA, and the residuals that the client has not merged yet, as factors;
    the client adds the residuals to its base, trains the LoRA on top and sends it back;
    the server averages A's and B's; the residual, the mean of the products less the product of the means, makes that
    exact.
Every client's model is the base with all residuals and the averaged LoRA, scored after the aggregation.
Deviations: the frozen base is not written; a client keeps the sum of the residuals beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedamole.federation.method import Client, ClientInfo, LoraMethod, Records, Server, TrainingResult, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.methods.shared.stacks import Changes, Log, Merged, stacked
from fedamole.model.params import Adapter, new_shared, shared_keys


@dataclass(frozen=True)
class Averaged:
    """The server's state: the averaged LoRA and the residuals."""

    tensors: Mapping[str, Tensor]
    log: Log


@dataclass(frozen=True)
class LoraAndResiduals:
    """Message down: the averaged LoRA, and residuals to merge."""

    tensors: Mapping[str, Tensor]
    changes: Changes


@dataclass(frozen=True)
class TrainedLora:
    """Reply up: the trained LoRA, and how many residuals the client has merged."""

    tensors: Mapping[str, Tensor]
    merged: int


@dataclass(frozen=True)
class FedExLora(LoraMethod[Averaged, LoraAndResiduals, Merged, TrainedLora]):
    """FedIT made exact: what averaging factors loses goes into the base."""

    weighting: Weighting = "uniform"
    """Weight of a client in the averages: uniform, or by its training examples."""

    paper = "Singhal et al., FedEx-LoRA: Exact Aggregation for Federated Fine-Tuning, ACL 2025, arXiv 2410.09432"
    communicates = "one LoRA and the last round's residual (factors of rank (C + 1) r) down, one LoRA up"
    stays_local = "the data"
    records = Records(Averaged, LoraAndResiduals, Merged, TrainedLora)
    evaluates = "post_aggregation"

    # server
    def init(self, server: Server) -> Averaged:
        """Draw the first LoRA."""
        return Averaged(new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora")), Log(Changes({})))

    def message(self, state: Averaged, client: ClientInfo) -> LoraAndResiduals:
        """Send the LoRA and what the client has not merged yet."""
        return LoraAndResiduals(state.tensors, state.log.pending(client.name))

    def aggregate(self, server: Server, state: Averaged, replies: Mapping[str, TrainedLora]) -> Averaged:
        """Average, and log what the average misses."""
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
    def init_client_state(self, client: Client) -> Merged:
        """Begin with no residual."""
        return Merged.nothing(client.shapes)

    def adapter(self, client: Client, client_state: Merged, message: LoraAndResiduals) -> Adapter:
        """Start from the averaged LoRA on the base with all residuals."""
        return Adapter(self.spec(), message.tensors, client_state.merge(message.changes).deltas)

    def reply(
        self, client: Client, client_state: Merged, message: LoraAndResiduals, trained: TrainingResult
    ) -> tuple[Merged, TrainedLora]:
        """Keep the sum of the residuals, send the trained LoRA."""
        now = client_state.merge(message.changes)
        return now, TrainedLora(trained.adapter.tensors, now.count)
