"""FFA-LoRA: Sun, Li, Li, Ding, "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024,
https://arxiv.org/abs/2403.12313.

Before round 0, server and clients draw the same factors A from the run's seed; they are never trained or sent.
One round:
    1. The server sends the global factors B to the selected clients.
    2. Each client trains B with A frozen and sends it back.
    3. The server averages the B's. With the same A everywhere this is exactly the average of the products BA.
Deviations: the paper's noise for differential privacy is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from fedamole.federation.method import Client, Server, TrainingResult
from fedamole.federation.privacy.releases import Release
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import Nothing
from fedamole.methods.fedit import FedIT
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.model.params import Adapter, Tensors, new_shared


@dataclass(frozen=True)
class FfaLora(FedIT):
    """One LoRA for all clients, of which only B is trained."""

    paper = "Sun et al., Improving LoRA in Privacy-preserving FL (FFA-LoRA), ICLR 2024, arXiv 2403.12313"
    communicates = "B of one LoRA down, B up; A is drawn from the run's seed on both sides"
    stays_local = "the data"
    releases: ClassVar[Mapping[str, Release]] = {"tensors": "trained"}

    @override
    def initial(self, server: Server) -> Tensors:
        return _only(super().initial(server), "B")

    @override
    def adapter(self, client: Client, client_state: Nothing, message: SharedTensors) -> Adapter:
        """Return the global B with the frozen A."""
        frozen = _only(new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora")), "A")
        return Adapter(self.spec(), {**frozen, **message.tensors}, frozen=tuple(sorted(frozen)))

    @override
    def reply(
        self, client: Client, client_state: Nothing, message: SharedTensors, trained: TrainingResult
    ) -> tuple[Nothing, SharedTensors]:
        return client_state, SharedTensors(_only(trained.adapter.tensors, "B"))


def _only(tensors: Tensors, factor: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.endswith(f"/{factor}")}
