"""Ditto on LoRAs: Li, Hu, Beirami, Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML
2021, https://arxiv.org/abs/2012.04221.

One round:
    1. The server sends the global LoRA w to the selected clients.
    2. Each client trains w and sends it back.
    3. It also trains a LoRA v of its own, which it keeps, with lambda / 2 |v - w|^2 added to the loss.
    4. The server averages the global LoRAs (FedAvg).
The model of a client is its own v.
Deviations: the distance is that of the factors A and B; all clients have the same lambda, where in the paper each may
choose it on validation data. With `training.budget = "steps"` each of the two trainings takes half of the round's
steps, so that a round costs as much as with any other method; with "paper" each takes all of them.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, TrainingRequest, TrainingResult
from fedamole.federation.penalties import Proximal
from fedamole.federation.privacy.releases import Release
from fedamole.federation.randomness import torch_generator
from fedamole.methods.local_only import OwnLora
from fedamole.methods.shared.averaging import AveragedLora, SharedTensors
from fedamole.model.params import Adapter, new_shared


@dataclass(frozen=True)
class Ditto(AveragedLora[OwnLora]):
    """A global LoRA, and one per client that is kept near it."""

    proximal: float = 0.1
    """Weight lambda of the distance to the global LoRA (the paper tries 0.05 to 2)."""

    paper = "Li et al., Ditto: Fair and Robust Federated Learning Through Personalization, ICML 2021, arXiv 2012.04221"
    communicates = "one LoRA down, one LoRA up"
    stays_local = "the data and the client's own LoRA"
    evaluates = "pre_aggregation"
    paper_steps = 2.0
    releases: ClassVar[Mapping[str, Release]] = {"tensors": "trained"}
    released_share = 0.5

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proximal < 0:
            raise ConfigError(f"method.proximal = {self.proximal}: must not be negative")

    @override
    def init_client_state(self, client: Client) -> OwnLora:
        return OwnLora(new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora")))

    @override
    def adapter(self, client: Client, client_state: OwnLora, message: SharedTensors) -> Adapter:
        """Return the client's own LoRA."""
        return Adapter(self.spec(), client_state.tensors)

    @override
    def update(
        self, client: Client, client_state: OwnLora, message: SharedTensors
    ) -> Generator[TrainingRequest, TrainingResult, tuple[OwnLora, SharedTensors, TrainingResult]]:
        shared = yield TrainingRequest(
            Adapter(self.spec(), message.tensors), step_fraction=0.5, paper_step_fraction=1.0
        )
        own = yield TrainingRequest(
            self.adapter(client, client_state, message),
            step_fraction=0.5,
            paper_step_fraction=1.0,
            penalty=Proximal(message.tensors, self.proximal),
            stays_local=True,
        )
        _, reply = self.reply(client, client_state, message, shared)
        return OwnLora(own.adapter.tensors), reply, own

    @override
    def reply(
        self, client: Client, client_state: OwnLora, message: SharedTensors, trained: TrainingResult
    ) -> tuple[OwnLora, SharedTensors]:
        """Return the trained global LoRA as the reply."""
        return client_state, SharedTensors(trained.adapter.tensors)
