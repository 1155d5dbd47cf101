"""FedIT: Zhang, Vahidian, Kuo, Li, Zhang, Yu, Zhou, Chen, "Towards Building the Federated GPT: Federated
Instruction Tuning", ICASSP 2024, https://arxiv.org/abs/2305.05644.

One round:
    1. The server sends the global LoRA to the selected clients.
    2. Each client trains it on its own data and sends it back.
    3. The server averages the LoRAs (FedAvg) into the next global LoRA.
The model of every client is the global LoRA, scored after the aggregation. The variant `fedit_ft` scores the same
training before the aggregation: each client's model is the one it has trained in the last round.
Deviations: all clients have the same weight unless `weighting` is "examples" (the paper weights by examples).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from fedamole.federation.method import Client, TrainingResult
from fedamole.federation.privacy.releases import Release
from fedamole.federation.record import Nothing
from fedamole.methods.shared.averaging import AveragedLora, SharedTensors
from fedamole.model.params import Adapter


@dataclass(frozen=True)
class FedIT(AveragedLora[Nothing]):
    """One LoRA for all clients, averaged every round."""

    paper = "Zhang et al., Towards Building the Federated GPT (FedIT), ICASSP 2024, arXiv 2305.05644"
    communicates = "one LoRA down, one LoRA up"
    stays_local = "the data"
    evaluates = "post_aggregation"
    releases: ClassVar[Mapping[str, Release]] = {"tensors": "trained"}

    @override
    def adapter(self, client: Client, client_state: Nothing, message: SharedTensors) -> Adapter:
        return Adapter(self.spec(), message.tensors)

    @override
    def reply(
        self, client: Client, client_state: Nothing, message: SharedTensors, trained: TrainingResult
    ) -> tuple[Nothing, SharedTensors]:
        return client_state, SharedTensors(trained.adapter.tensors)
