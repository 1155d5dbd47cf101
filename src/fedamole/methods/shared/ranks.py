"""What methods share whose clients have LoRAs of different ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedamole.errors import ConfigError
from fedamole.federation.method import ClientInfo, D, K, LoraMethod, S, U
from fedamole.model.amole import AdapterSpec


@dataclass(frozen=True)
class RankedMethod(LoraMethod[S, D, K, U]):
    """A method whose clients have ranks of their own; the scaling alpha / rank is the same for all."""

    ranks: tuple[int, ...] = ()
    """Ranks given to the clients in turn, by name; what empty means is the method's."""

    def __post_init__(self) -> None:
        """Refuse ranks that are none."""
        super().__post_init__()
        if self.ranks and min(self.ranks) < 1:
            raise ConfigError(f"method.ranks = {list(self.ranks)}: ranks must be at least 1")

    def in_turn(self, clients: Sequence[ClientInfo], ranks: Sequence[int]) -> dict[str, int]:
        """Give ranks to the clients in turn, in the order of their names."""
        return {client.name: ranks[place % len(ranks)] for place, client in enumerate(clients)}

    def spec_of(self, rank: int) -> AdapterSpec:
        """What adapters of one rank share."""
        return AdapterSpec(rank, self.alpha * rank / self.rank, self.dropout, self.dropout_kind)

    def half_once_twice(self) -> tuple[int, ...]:
        """The ranks that clients have in turn where none are named."""
        return max(1, self.rank // 2), self.rank, 2 * self.rank
