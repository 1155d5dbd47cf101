"""What the server's half of a method knows and may use."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedamole.data.tokens import TokenRow
from fedamole.federation.probe import Probe
from fedamole.federation.prompt_states import PromptStates
from fedamole.federation.request import TrainingRequest, TrainingResult
from fedamole.federation.server_work import ServerWork
from fedamole.federation.trajectory import TrajectoryRequest, TrajectoryResult
from fedamole.federation.weights import capped
from fedamole.model.base import Base
from fedamole.model.batch import Ids
from fedamole.model.params import Adapter, Shapes

Weighting = Literal["uniform", "examples"]


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client."""

    name: str
    examples: int
    """Size of its training split."""


@dataclass(frozen=True)
class BaseInfo:
    """Sizes of the frozen base model."""

    shapes: Shapes
    """(d_in, d_out) of the adapted modules, by name."""
    width: int = 0
    """Width d of the input embeddings."""
    embedding_std: float = 0.02
    """Standard deviation of the input embeddings' values."""
    vocabulary: int = 0
    """Token ids are below this."""

    @staticmethod
    def of(base: Base) -> "BaseInfo":
        """Return the sizes of a loaded base."""
        return BaseInfo(base.shapes, base.width, base.embedding_std, base.vocabulary)


@dataclass(frozen=True)
class Server:
    """What the server's half of a method may use."""

    base: BaseInfo
    clients: tuple[ClientInfo, ...]
    """All known clients, sorted by name."""
    seed: int
    round: int = 0
    asked: tuple[str, ...] = ()
    """During `aggregate`: names of the clients that were sent a message in this round; empty: all."""
    max_weight_share: float = 1.0
    """Largest share of one client in weights by examples."""
    rounds: int = 0
    """Rounds R of the run."""
    work: ServerWork | None = None
    """Training and probing on the base; set for methods with `trains_at_server`, except in plans and dry runs."""
    public: tuple[TokenRow, ...] = ()
    """Public prompts, for methods with `needs_public_prompts`; the answer of a row without one is empty. Empty in plans
    and dry runs."""

    @property
    def shapes(self) -> Shapes:
        """(d_in, d_out) of the adapted modules, by name."""
        return self.base.shapes

    def weights(self, weighting: "Weighting") -> dict[str, float]:
        """Return the weight of each client in an average: all equal, or by the size of the training splits.

        A client whose share of all examples is above `max_weight_share` gets the weight that has this share.
        """
        if weighting == "uniform":
            return dict.fromkeys((client.name for client in self.clients), 1.0)
        return capped({client.name: float(client.examples) for client in self.clients}, self.max_weight_share)

    def train(self, request: TrainingRequest, steps: int) -> TrainingResult:
        """Train at the server for `steps` steps on the extra rows of a request; see `ServerWork.train`."""
        return self._work().train(request, steps, self.round)

    def match(self, request: TrajectoryRequest) -> TrajectoryResult:
        """Optimise rows whose gradient steps reproduce a move of a LoRA; see `match_trajectory`."""
        return self._work().match(request)

    def probe(self, rows: Sequence[TokenRow]) -> Probe:
        """Return a probe over rows that the server has."""
        return self._work().probe(rows)

    def read(self, adapter: Adapter | None, prompts: Sequence[Ids]) -> PromptStates:
        """Return what the base computes at the ends of prompts under an adapter; see `prompt_states`."""
        return self._work().read(adapter, prompts)

    def on_second_base(self) -> "Server":
        """Return this server with its second base as the base that it trains and reads; itself if it has none."""
        second = self._work().second
        return self if second is None else replace(self, base=BaseInfo.of(second.bank.base), work=second)

    def note(self, **values: float) -> None:
        """Add numbers to the server's line of this round in metrics.jsonl."""
        self._work().notes.update(values)

    def _work(self) -> ServerWork:
        if self.work is None:
            raise RuntimeError("this server holds no base: the method must set `trains_at_server`")
        return self.work
