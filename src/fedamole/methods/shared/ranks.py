"""Base class of methods whose clients have LoRAs of different ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, ClientInfo, D, K, S, TrainingResult, U
from fedamole.federation.record import Nothing
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.amole import AdapterSpec
from fedamole.model.params import Adapter


@dataclass(frozen=True)
class RankedMethod(LoraMethod[S, D, K, U]):
    """A method with a LoRA rank per client; the scaling alpha / rank is the same for all."""

    ranks: tuple[int, ...] = ()
    """Ranks assigned to the clients in turn, by name; the method defines what empty means."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks and min(self.ranks) < 1:
            raise ConfigError(f"method.ranks = {list(self.ranks)}: ranks must be at least 1")

    def in_turn(self, clients: Sequence[ClientInfo], ranks: Sequence[int]) -> dict[str, int]:
        """Assign ranks to the clients in turn, in the order of their names."""
        return {client.name: ranks[i % len(ranks)] for i, client in enumerate(clients)}

    def spec_of(self, rank: int) -> AdapterSpec:
        """Return the settings of adapters of one rank."""
        return AdapterSpec(rank, self.alpha * rank / self.rank, self.dropout, self.dropout_kind)

    def half_once_twice(self) -> tuple[int, ...]:
        """Return the default ranks: half, once and twice `rank`."""
        return max(1, self.rank // 2), self.rank, 2 * self.rank


@dataclass(frozen=True)
class RankedLoraMethod(RankedMethod[S, SharedTensors, Nothing, SharedTensors]):
    """A ranked method whose clients train the LoRA that they are sent, at its rank, and send it back."""

    @override
    def adapter(self, client: Client, client_state: Nothing, message: SharedTensors) -> Adapter:
        return Adapter(self.spec_of(rank_of(message.tensors)), message.tensors)

    @override
    def reply(
        self, client: Client, client_state: Nothing, message: SharedTensors, trained: TrainingResult
    ) -> tuple[Nothing, SharedTensors]:
        return client_state, SharedTensors(trained.adapter.tensors)


def rank_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the rank of a LoRA."""
    return next(len(tensor) for name, tensor in tensors.items() if name.endswith("/A"))
