"""FedProx on a LoRA: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks",
MLSys 2020, https://arxiv.org/abs/1812.06127.

One round:
    1. The server sends the global LoRA w to the selected clients.
    2. Each client trains it with mu / 2 |w_k - w|^2 added to its loss, and sends it back.
    3. The server averages the LoRAs into the next global LoRA.
Deviations: the distance is that of the factors A and B. In the paper slow clients take fewer steps and clients are
selected with probabilities by their amounts of data; here all take the same steps and selection is uniform.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, TrainingRequest, TrainingResult
from fedamole.federation.penalties import Proximal
from fedamole.federation.privacy.releases import Release
from fedamole.federation.record import Nothing
from fedamole.methods.fedit import FedIT
from fedamole.methods.shared.averaging import SharedTensors


@dataclass(frozen=True)
class FedProx(FedIT):
    """FedIT with a proximal term that keeps each client near the global LoRA."""

    proximal: float = 0.01
    """Weight mu of the proximal term (the paper tries 0.001 to 1)."""

    paper = "Li et al., Federated Optimization in Heterogeneous Networks (FedProx), MLSys 2020, arXiv 1812.06127"
    releases: ClassVar[Mapping[str, Release]] = {"tensors": "trained"}

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proximal < 0:
            raise ConfigError(f"method.proximal = {self.proximal}: must not be negative")

    @override
    def update(
        self, client: Client, client_state: Nothing, message: SharedTensors
    ) -> Generator[TrainingRequest, TrainingResult, tuple[Nothing, SharedTensors, TrainingResult]]:
        adapter = self.adapter(client, client_state, message)
        trained = yield TrainingRequest(adapter, penalty=Proximal(message.tensors, self.proximal))
        return (*self.reply(client, client_state, message, trained), trained)
