"""The one interface: what a federated method is.

A method is a frozen dataclass without state; its fields are its hyper-parameters. State is an argument and a result.
Both halves, server and client, stand in one file in the order in which they run:

    state = method.init(server)                                   # server, once
    each round:
        message = method.message(state, client)                   # server, one per client of the cohort
        adapter = method.adapter(client, kept, message)           # client
        trained = fit(Fit(adapter))                               # client; belongs to nobody
        kept, reply = method.reply(client, kept, message, trained)
        state = method.aggregate(server, state, replies)          # server; replies of whoever answered

The three lines of the client are its `update`. A method whose clients do more overrides it and yields
one `TrainingRequest` per piece of training. The clients of a group are trained in lock-step in either case.

What crosses a wire or a round is a frozen record declared at the top of the method's file and named in `records`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Self, TypeVar

from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.federation.randomness import numpy_generator
from fedamole.federation.settings import Budget
from fedamole.federation.weights import capped
from fedamole.model.amole import AdapterSpec
from fedamole.model.layers import MeanEmbeddings
from fedamole.model.params import Adapter, Shapes, Tensors
from fedamole.model.prompt import PromptSpec

S = TypeVar("S")
D = TypeVar("D")
K = TypeVar("K")
U = TypeVar("U")

Evaluates = Literal["pre_aggregation", "post_aggregation"]
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
    width: int = 0
    """Width d of the base's input embeddings."""
    embedding_std: float = 0.02
    """Standard deviation of their numbers."""
    asked: tuple[str, ...] = ()
    """While replies are aggregated: names of the clients that were asked in this round; empty: of all."""
    max_weight_share: float = 1.0
    """Largest share of one client in weights by examples."""
    rounds: int = 0
    """Rounds R of the run."""

    def weights(self, weighting: "Weighting") -> dict[str, float]:
        """Weight of each client in an average: all equal, or by the size of the training splits.

        Where a client's share of all examples is above `max_weight_share`, its weight is the one with that share.
        """
        if weighting == "uniform":
            return dict.fromkeys((client.name for client in self.clients), 1.0)
        return capped({client.name: float(client.examples) for client in self.clients}, self.max_weight_share)


@dataclass(frozen=True)
class TrainingResult:
    """What local training returns."""

    adapter: Adapter
    steps: int
    loss: float
    """Mean training loss per answer token over the steps, without the balance loss."""
    embeddings: Mapping[str, MeanEmbeddings] = field(default_factory=dict)
    """Mean router embeddings over the embedding split by module, for methods with `embeds`."""
    tokens: int = 0
    """Tokens without padding that went through a forward and a backward pass."""


@dataclass(frozen=True)
class TrainingRequest:
    """A piece of local training that a method asks for."""

    adapter: Adapter
    """What it starts from, and which of its tensors are left as they are."""
    share: float = 1.0
    """Share of the round's steps S under `training.budget = "steps"`: the shares of a round add up to 1, so that all
    methods have the same budget."""
    anchor: Tensors = field(default_factory=dict)
    """Centre of a proximal term, by the names of the adapter's tensors; empty for none."""
    anchor_weight: float = 0.0
    """Weight mu of the term mu / 2 |w - anchor|^2."""
    tail: int = 0
    """First rank of the tail that is penalised by tail_weight * sum over modules |A[tail:]| |B[:, tail:]|."""
    tail_weight: float = 0.0
    weight_decay: float = 0.0
    """Decoupled weight decay, as in AdamW: each step first multiplies what trains by 1 - learning rate * this."""
    paper_share: float | None = None
    """What the method's paper gives this training, as a multiple of S: `share` under `training.budget = "paper"`. None:
    the same as `share`. The method names the sum over a round in `paper_steps`."""

    def share_in(self, budget: Budget) -> float:
        """Share of the round's steps under this budget."""
        return self.share if budget == "steps" or self.paper_share is None else self.paper_share


@dataclass(frozen=True)
class Client:
    """What the client's half of a method may use."""

    info: ClientInfo
    shapes: Shapes
    """(d_in, d_out) of the adapted modules."""
    seed: int
    round: int
    losses: Callable[[Sequence[Adapter], int], list[float]]
    """losses(adapters, most): mean loss per answer token of each adapter on the client's examples that are set aside
    from training for such looks, the embedding split. Of more than `most` examples a draw is taken, the same in every
    round. No step is taken."""
    last_hidden: Callable[[Adapter, int], Tensor]
    """last_hidden(adapter, most): last hidden states (S, d) at the ends of these examples' prompts, under the first of
    the adapter's two experts; of more than `most` a draw is taken, the same in every round."""
    width: int = 0
    """Width d of the base's input embeddings."""
    embedding_std: float = 0.02
    """Standard deviation of their numbers."""

    @property
    def name(self) -> str:
        """The client's name."""
        return self.info.name


Exchange = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""exchange(messages by client) -> replies by client; a client that failed or did not answer in time is missing."""


@dataclass(frozen=True)
class Method(ABC, Generic[S, D, K, U]):
    """A federated method; see the top of this file for the order of the calls."""

    paper: ClassVar[str] = ""
    """Authors, title, venue, link."""
    communicates: ClassVar[str] = ""
    """In words: what crosses the wire."""
    stays_local: ClassVar[str] = ""
    """In words: what never leaves a client."""
    records: ClassVar[Records]
    evaluates: ClassVar[Evaluates]
    """Which personal model is scored and saved: right after local training, or after the aggregation."""
    averaged: ClassVar[tuple[str, ...]] = ()
    """Fields of a reply of which `aggregate` takes nothing but the mean by key over the clients that returned the key;
    without any, `federation.aggregation` cannot be median or trimmed."""
    embeds: ClassVar[bool] = False
    """Whether `fit` also reads the embedding split (`TrainingResult.embeddings`)."""
    looks: ClassVar[bool] = False
    """Whether what a client sends depends on a look at its embedding split (`Client.losses`) before training."""
    paper_steps: ClassVar[float] = 1.0
    """Steps of a client's round under `training.budget = "paper"`, as a multiple of those under "steps"."""
    budgets_differ: ClassVar[bool] = False
    """Whether the two budgets give different steps; set from `paper_steps`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Set `budgets_differ`."""
        super().__init_subclass__(**kwargs)
        cls.budgets_differ = cls.paper_steps != 1

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that no adapter can have."""
        self.spec()

    @abstractmethod
    def spec(self) -> AdapterSpec | PromptSpec:
        """What all adapters of this method share."""

    def round_share(self, budget: Budget) -> float:
        """Steps of a client's round under this budget, as a multiple of `TrainingSettings.steps`."""
        return self.paper_steps if budget == "paper" else 1.0

    def check(self, clients: int) -> None:
        """Raise a ConfigError before anything runs when this many clients cannot be served."""

    def for_deployment(self) -> Self:
        """Return the method as organisations should run it that do not trust each other; called before `check`."""
        return self

    def exposes(self, clients: int | None, shapes: Shapes | None) -> list[str]:
        """Say in sentences what others can compute from what travels; `clients`, `shapes`: None where not known yet."""
        if clients == 2 and self.communicates != "nothing":
            return [
                "Two clients take part. In every average of the two each can subtract its own part, and has the "
                "other's update of that round."
            ]
        return []

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

    def exchanges(self) -> int:
        """Return how often `round` calls `exchange` at most; an upper bound that clients can check."""
        return 1

    def select(self, server: Server, state: S, available: Sequence[ClientInfo], count: int) -> Sequence[str]:
        """Return the names of the clients that take part in round `server.round`.

        At least 1 and at most `count` of those that are `available`. The default draws `count` of them at random,
        without replacement.
        """
        rng = numpy_generator(server.seed, "cohort", "server", server.round)
        chosen = set(rng.choice(len(available), count, replace=False).tolist())
        return [client.name for i, client in enumerate(available) if i in chosen]

    def round(self, server: Server, state: S, cohort: Sequence[ClientInfo], exchange: Exchange) -> S:
        """Run one round and return the next state.

        The default sends each client its message and aggregates the replies. A method with several exchanges in a
        round overrides this and `exchanges`. The step fractions of all training requests that a client makes in a
        round, over all exchanges, must add up to 1. A client that fails in an exchange keeps the state that it had
        before this exchange.
        """
        replies = exchange({client.name: self.message(state, client) for client in cohort})
        server = replace(server, asked=tuple(client.name for client in cohort))
        return self.aggregate(server, state, replies) if replies else state

    def expected_reply(self, template: U, reply: U) -> U:
        """What a client's reply has to look like: names, shapes and fields of a reply that the server has rehearsed.

        Overridden where a client decides some of it; the rest must not be taken from `reply`, which is not trusted.
        """
        return template

    def assignment_log(self, state: S) -> Iterator[dict[str, Any]]:
        """Yield lines about the architecture in force for the next round (who holds what)."""
        return iter(())

    # client
    @abstractmethod
    def init_client_state(self, client: Client) -> K:
        """Return what a client keeps before its first round."""

    @abstractmethod
    def adapter(self, client: Client, client_state: K, message: D) -> Adapter:
        """Return the adapter that local training starts from."""

    @abstractmethod
    def reply(self, client: Client, client_state: K, message: D, trained: TrainingResult) -> tuple[K, U]:
        """Return what the client keeps and what it sends back."""

    def update(
        self, client: Client, client_state: K, message: D
    ) -> Generator[TrainingRequest, TrainingResult, tuple[K, U, TrainingResult]]:
        """Do a round's work at the client: ask for training, return what is kept, sent back and (last) was trained."""
        trained = yield TrainingRequest(self.adapter(client, client_state, message))
        return (*self.reply(client, client_state, message, trained), trained)

    def personal(self, client: Client, client_state: K, message: D | None, trained: Adapter | None) -> Adapter | None:
        """Return the model that is scored and saved, or None for the bare base; changes nothing.

        `trained` is the adapter of the client's last local training, `message` one sent after the aggregation
        (for methods that are scored after it).
        """
        if self.evaluates == "pre_aggregation" or message is None:
            return trained
        return self.adapter(client, client_state, message)


@dataclass(frozen=True)
class LoraMethod(Method[S, D, K, U]):
    """A method whose adapters are LoRAs, or mixtures of them."""

    rank: int = AdapterSpec.rank
    """Rank r of a LoRA or an expert."""
    alpha: float = AdapterSpec.alpha
    """The scaling is alpha / rank."""
    dropout: float = AdapterSpec.dropout
    """Dropout on the input of a LoRA or an expert while training."""
    dropout_kind: Literal["exact", "rank"] = AdapterSpec.dropout_kind
    """exact: on the module's input, as in the paper; rank: on the rank-r activations, cheaper."""

    def spec(self) -> AdapterSpec:
        """What all adapters of this method share."""
        return AdapterSpec(self.rank, self.alpha, self.dropout, self.dropout_kind)


@dataclass(frozen=True)
class DecayedLoraMethod(LoraMethod[S, D, K, U]):
    """A method whose local training has weight decay."""

    weight_decay: float = 0.05
    """Decoupled weight decay of local training, as in the authors' code."""

    def __post_init__(self) -> None:
        """Raise a ConfigError for a decay outside 0 .. 1.

        A decay near 1 / learning rate would make a client forget all steps but the last, whose few rows its update
        tells.
        """
        super().__post_init__()
        if not 0 <= self.weight_decay <= 1:
            raise ConfigError(f"method.weight_decay = {self.weight_decay}: must be at least 0 and at most 1")

    def update(
        self, client: Client, client_state: K, message: D
    ) -> Generator[TrainingRequest, TrainingResult, tuple[K, U, TrainingResult]]:
        """Train with weight decay; return what is kept, sent back and was trained."""
        trained = yield TrainingRequest(self.adapter(client, client_state, message), weight_decay=self.weight_decay)
        return (*self.reply(client, client_state, message, trained), trained)
