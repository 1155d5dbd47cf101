"""The one interface: what a federated method is.

A method is a frozen dataclass without state; its fields are its hyper-parameters. State is an argument and a result.
Both halves, server and client, stand in one file in the order in which they run:

    state = method.init(server)                                   # server, once
    each round:
        message = method.message(state, client)                   # server, one per client of the cohort
        adapter = method.adapter(client, kept, message)           # client
        trained = fit(adapter)                                    # client; belongs to nobody
        kept, reply = method.reply(client, kept, message, trained)
        state = method.aggregate(server, state, replies)          # server; replies of whoever answered

What crosses a wire or a round is a frozen record declared at the top of the method's file and named in `records`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import MeanEmbeddings
from fedamole.model.params import Adapter, Shapes

S = TypeVar("S")
D = TypeVar("D")
K = TypeVar("K")
U = TypeVar("U")

Evaluates = Literal["trained", "aggregated"]
Weighting = Literal["uniform", "examples"]


class Records(NamedTuple):
    """The record types of a method: server state, message down, what a client keeps, reply up."""

    state: type[Any]
    message: type[Any]
    keep: type[Any]
    reply: type[Any]


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client."""

    name: str
    examples: int
    """Size of its training split."""


@dataclass(frozen=True)
class Server:
    """What the server's half of a method may use."""

    shapes: Shapes
    """(d_in, d_out) of the adapted modules."""
    clients: tuple[ClientInfo, ...]
    """All known clients, in the order of their names; a cohort is a part of them."""
    seed: int
    round: int = 0

    def weights(self, weighting: "Weighting") -> dict[str, float]:
        """Weight of each client in an average: all equal, or by the size of the training splits."""
        return {client.name: float(client.examples) if weighting == "examples" else 1.0 for client in self.clients}


@dataclass(frozen=True)
class Trained:
    """What local training returns."""

    adapter: Adapter
    steps: int
    loss: float
    """Mean training loss per answer token over the steps, without the balance loss."""
    embeddings: Mapping[str, MeanEmbeddings] = field(default_factory=dict)
    """Mean router embeddings over the embedding split by module, for methods with `embeds`."""


@dataclass(frozen=True)
class Client:
    """What the client's half of a method may use."""

    info: ClientInfo
    shapes: Shapes
    """(d_in, d_out) of the adapted modules."""
    seed: int
    round: int
    fit: Callable[[Adapter], Trained]
    """The shared local training, on this client's data for this round."""

    @property
    def name(self) -> str:
        """The client's name."""
        return self.info.name


Ask = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]
"""ask(operation, message by client) -> reply by client, of whoever answered in time."""


@dataclass(frozen=True)
class Method(ABC, Generic[S, D, K, U]):
    """A federated method; see the top of this file for the order of the calls."""

    rank: int = AdapterSpec.rank
    """Rank r of a LoRA or an expert."""
    alpha: float = AdapterSpec.alpha
    """The scaling is alpha / rank."""
    dropout: float = AdapterSpec.dropout
    """Dropout on the input of a LoRA or an expert while training."""
    dropout_kind: Literal["exact", "rank"] = AdapterSpec.dropout_kind
    """exact: on the module's input, as in the paper; rank: on the rank-r activations, cheaper."""

    paper: ClassVar[str] = ""
    """Authors, title, venue, link."""
    travels: ClassVar[str] = ""
    """In words: what crosses the wire."""
    stays: ClassVar[str] = ""
    """In words: what never leaves a client."""
    records: ClassVar[Records]
    evaluates: ClassVar[Evaluates]
    """Which personal model is scored and saved: right after local training, or after the aggregation."""
    embeds: ClassVar[bool] = False
    """Whether `fit` also reads the embedding split (`Trained.embeddings`)."""

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that no adapter can have."""
        self.spec()

    def spec(self) -> AdapterSpec:
        """What all adapters of this method share."""
        return AdapterSpec(self.rank, self.alpha, self.dropout, self.dropout_kind)

    def check(self, clients: int) -> None:
        """Raise a ConfigError before anything runs when this many clients cannot be served."""

    # server
    @abstractmethod
    def init(self, server: Server) -> S:
        """Return the state before round 0."""

    @abstractmethod
    def message(self, state: S, client: ClientInfo) -> D:
        """Return what one client is sent; messages may differ."""

    @abstractmethod
    def aggregate(self, server: Server, state: S, replies: Mapping[str, U]) -> S:
        """Return the next state from the replies of whoever answered: any subset, in any order."""

    def round(self, server: Server, state: S, cohort: Sequence[ClientInfo], ask: Ask) -> S:
        """Run one round; a method with two exchanges overrides it."""
        replies = ask("update", {client.name: self.message(state, client) for client in cohort})
        return self.aggregate(server, state, replies) if replies else state

    def journal(self, state: S) -> Iterator[dict[str, Any]]:
        """Yield lines about the architecture in force for the next round (who holds what)."""
        return iter(())

    # client
    @abstractmethod
    def first_keep(self, client: Client) -> K:
        """Return what a client keeps before its first round."""

    @abstractmethod
    def adapter(self, client: Client, kept: K, message: D) -> Adapter:
        """Return the adapter that local training starts from."""

    @abstractmethod
    def reply(self, client: Client, kept: K, message: D, trained: Trained) -> tuple[K, U]:
        """Return what the client keeps and what it sends back."""

    def update(self, client: Client, kept: K, message: D) -> tuple[K, U, Trained]:
        """Do a round's work at the client; override it only for unusual local work."""
        trained = client.fit(self.adapter(client, kept, message))
        return (*self.reply(client, kept, message, trained), trained)

    def personal(self, client: Client, kept: K, message: D | None, trained: Adapter | None) -> Adapter | None:
        """Return the model that is scored and saved, or None for the bare base; changes nothing.

        `trained` is the adapter of the client's last local training, `message` one sent after the aggregation
        (for methods that are scored after it).
        """
        if self.evaluates == "trained" or message is None:
            return trained
        return self.adapter(client, kept, message)
