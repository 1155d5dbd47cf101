"""Base classes of methods whose adapters are LoRAs, or mixtures of them."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, Method, TrainingRequest, TrainingResult
from fedamole.federation.privacy.releases import Release
from fedamole.model.amole import AdapterSpec

S = TypeVar("S")
D = TypeVar("D")
K = TypeVar("K")
U = TypeVar("U")

MIXTURE_RELEASES: Mapping[str, Release] = {
    "tensors": "trained",
    "token_embedding": "mean_embedding",
    "expert_embeddings": "mean_embedding",
}
"""`Method.releases` of a mixture of experts whose clients return trained tensors and mean embeddings."""


@dataclass(frozen=True)
class LoraMethod(Method[S, D, K, U]):
    """A method whose adapters are LoRAs, or mixtures of them."""

    rank: int = AdapterSpec.rank
    """Rank r of a LoRA or an expert."""
    alpha: float = AdapterSpec.alpha
    """The scaling is alpha / rank."""
    dropout: float = AdapterSpec.dropout
    """Dropout on the input of a LoRA or an expert in training."""
    dropout_kind: Literal["exact", "rank"] = AdapterSpec.dropout_kind
    """exact: on the module's input, as in the paper; rank: on the rank-r activations, cheaper."""

    @override
    def spec(self) -> AdapterSpec:
        return AdapterSpec(self.rank, self.alpha, self.dropout, self.dropout_kind)


@dataclass(frozen=True)
class DecayedLoraMethod(LoraMethod[S, D, K, U]):
    """A LoRA method whose local training has weight decay."""

    weight_decay: float = 0.05
    """Decoupled weight decay of local training, as in the authors' code."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        # A decay near 1 / learning rate would erase all steps but the last, and the update would reveal its few rows.
        if not 0 <= self.weight_decay <= 1:
            raise ConfigError(f"method.weight_decay = {self.weight_decay}: must be at least 0 and at most 1")

    @override
    def update(
        self, client: Client, client_state: K, message: D
    ) -> Generator[TrainingRequest, TrainingResult, tuple[K, U, TrainingResult]]:
        trained = yield TrainingRequest(self.adapter(client, client_state, message), weight_decay=self.weight_decay)
        return (*self.reply(client, client_state, message, trained), trained)
