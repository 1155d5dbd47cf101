"""Interface of the routers, which weigh the LoRA experts of an adapted linear for each token.

`EmbeddingRouter` (in `amole`), `LearnedRouter` and `InstanceWeights` (in `mixer`) implement it. An `AdapterSpec` holds
one of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from torch import Tensor

from fedamole.model.segments import Segments

if TYPE_CHECKING:
    from fedamole.model.amole import AdapterSpec, Drop, Routing


class MixtureOutput(NamedTuple):
    """Output of an adapted linear on T tokens whose mixture has n domain experts."""

    y: Tensor
    """(..., d_out): output of the frozen linear plus the adapters' contribution."""
    routing: "Routing | None" = None
    """Scores of an `EmbeddingRouter`; None for other routers and without domain experts."""
    weights: Tensor | None = None
    """(T, n): weight of each domain expert for each token; None without domain experts."""


class LinearAdapters(NamedTuple):
    """Stacked tensors of C clients' adapters of one linear, as `amole` and `mixer` define them."""

    down: Tensor
    """(C, rows, d_in): the router's rows and the A matrices."""
    up: Tensor
    """(C, rows, d_out): the transposed B matrices."""
    empty_slots: Tensor | None = None
    """(C, n) bool: True for slots without an expert; None if every client has n experts."""
    own_expert_mask: Tensor | None = None
    """(C, n): 1 for the client's own expert; needed by a `LearnedRouter` with extra logits for it."""
    expert_weights: Tensor | None = None
    """(rows, n): expert weights for each token or sequence, found by `InstanceWeights`."""


@dataclass(frozen=True)
class Router(ABC):
    """Weighs the domain experts of a linear for each token."""

    config_name: ClassVar[str]
    """Value of `router` in adapter_config.json."""
    tensor_name: ClassVar[str] = ""
    """Name of the router's own tensor in an adapter, after the module's name; empty if it has none."""
    has_shared_expert: ClassVar[bool] = False
    """Whether a shared expert, always of weight 1, follows the domain experts."""
    allows_different_experts: ClassVar[bool] = False
    """Whether clients that are loaded together may hold different domain experts."""

    @abstractmethod
    def num_rows(self, experts: int, rank: int) -> int:
        """Return the number of rows of the router's own tensor for a module with this many domain experts."""

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        base_out: Tensor,
        adapters: LinearAdapters,
        spec: "AdapterSpec",
        drop: "Drop | None",
        segments: Segments,
    ) -> MixtureOutput:
        """Add the weighted experts to the output of the frozen linear.

        Shapes: x (..., d_in), base_out (..., d_out). `segments` assigns the T rows of x to the C clients. `drop` sets
        values to zero for dropout; None disables dropout.
        """

    def check_experts(self, experts: Mapping[str, Sequence[int]], top_k: int) -> None:  # noqa: B027 - optional
        """Raise ConfigError if a module has too few domain experts, of which these are the ids, for this router."""

    def to_config(self) -> dict[str, Any]:
        """Return the fields of adapter_config.json that describe this router."""
        return {"router": self.config_name}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the router from the content of adapter_config.json."""
        return cls()
