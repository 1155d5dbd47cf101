"""The interface of a federated method.

A method is a frozen dataclass without state; its fields are its hyper-parameters. State is passed in and returned. The
server's and the client's half stand in one file, in the order in which they run:

    state = method.init(server)                                   # server, once
    each round:
        message = method.message(state, client)                   # server, per selected client
        adapter = method.adapter(client, client_state, message)   # client
        trained = fit(TrainingRequest(adapter))                   # client, done by the framework
        client_state, reply = method.reply(client, client_state, message, trained)
        state = method.aggregate(server, state, replies)          # server

The three lines of the client are `update`. A method whose clients do more in a round overrides it and yields one
`TrainingRequest` per training. The clients of a group are trained in lock-step in either case.

State, messages and replies are frozen dataclasses of tensors and JSON values (`federation/record.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Self, TypeVar, cast, get_args, get_origin

from fedamole.federation.data_engine import DataEngine
from fedamole.federation.privacy.releases import Release
from fedamole.federation.probe import Probe
from fedamole.federation.randomness import numpy_generator
from fedamole.federation.record import Nothing
from fedamole.federation.request import TrainingRequest as TrainingRequest
from fedamole.federation.request import TrainingResult as TrainingResult
from fedamole.federation.server import BaseInfo as BaseInfo
from fedamole.federation.server import ClientInfo as ClientInfo
from fedamole.federation.server import Server as Server
from fedamole.federation.server import Weighting as Weighting
from fedamole.federation.settings import Budget, FederationSettings
from fedamole.federation.synthesis_request import Request as Request
from fedamole.model.amole import AdapterSpec
from fedamole.model.layers import MeanEmbeddings
from fedamole.model.params import Adapter, Shapes
from fedamole.model.prompt import PromptSpec
from fedamole.synthesis.outline import Outline

S = TypeVar("S")
D = TypeVar("D")
K = TypeVar("K")
U = TypeVar("U")

Evaluates = Literal["pre_aggregation", "post_aggregation"]
LoggedRelevance = Literal["probability", "token share", "similarity"]


class Records(NamedTuple):
    """The record types of a method."""

    state: type[Any]
    """Server state."""
    message: type[Any]
    """Server to client."""
    client_state: type[Any]
    """Kept by a client between rounds."""
    reply: type[Any]
    """Client to server."""


def _no_outline() -> Outline:
    raise NotImplementedError("this client has no outline of synthetic examples")


def _no_data_engine() -> DataEngine:
    raise NotImplementedError("this client has no data engine")


def _no_key() -> bytes:
    raise NotImplementedError("this client has no key")


def _now(compute: Callable[[], bytes]) -> bytes:
    return compute()


@dataclass(frozen=True)
class Client:
    """What the client's half of a method may use."""

    info: ClientInfo
    base: BaseInfo
    seed: int
    round: int
    probe: Probe
    """Forward passes without training on the examples that are set aside."""
    outline: Callable[[], Outline] = _no_outline
    """Returns the prompt and the classes of the client's synthetic examples."""
    data_engine: Callable[[], DataEngine] = _no_data_engine
    """Returns what finds weak categories of the client's data and has new rows written for them."""
    new_key: Callable[[], bytes] = _no_key
    """Returns 32 bytes from which a method derives noise: in a deployment other ones at each call, from the operating
    system's generator, so that no one else knows them; in one process from the run's seed, so that a run can be
    repeated."""
    once: Callable[[Callable[[], bytes]], bytes] = _now
    """Calls a function and returns its result, for what may be released once in a run. In a deployment the result is
    written to the client's folder first, and all later calls return it, also if the coordinator repeats rounds."""

    @property
    def name(self) -> str:
        """Name of the client."""
        return self.info.name

    @property
    def shapes(self) -> Shapes:
        """(d_in, d_out) of the adapted modules, by name."""
        return self.base.shapes


@dataclass(frozen=True)
class Newcomer(Generic[D]):
    """What a client starts from that joins a finished run."""

    message: D
    assignment_log: tuple[dict[str, Any], ...] = ()
    """Lines for its assignment.jsonl."""
    report: Mapping[str, int] = field(default_factory=dict)
    """Counts for the report of `fedamole adapt`."""


Exchange = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""exchange(messages by client) -> replies by client; a client that failed or did not answer in time is missing."""


OWN_EXPERT = "its own"
"""Role of an expert of which each client has another one."""


@dataclass(frozen=True)
class Method(ABC, Generic[S, D, K, U]):
    """A federated method with server state S, message D, client state K and reply U; see the head of this file."""

    paper: ClassVar[str] = ""
    """Authors, title, venue, link."""
    communicates: ClassVar[str] = ""
    """What is sent, in words."""
    stays_local: ClassVar[str] = ""
    """What never leaves a client, in words."""
    records: ClassVar[Records]
    """Record types; set from the generic parameters of the class."""
    evaluates: ClassVar[Evaluates]
    """Which model of a client is scored and saved: the one before or after the aggregation."""
    averaged_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of a reply of which `aggregate` uses only the mean by key over the clients that returned the key; without
    any, `federation.aggregation` cannot be median or trimmed."""
    needs_embeddings: ClassVar[bool] = False
    """Whether the embedding split is read after each training (`TrainingResult.embeddings`)."""
    probes: ClassVar[bool] = False
    """Whether a client's reply depends on `Client.probe`."""
    accepts_newcomers: ClassVar[bool] = False
    """Whether a client can join a finished run (`newcomer`); by default where all clients get the server state."""
    expert_roles: ClassVar[tuple[str, ...]] = ()
    """Roles of the experts of a client's mixture by id, in words, if they are fixed; the last is that of all further
    ones. `OWN_EXPERT` is one that each client has for itself."""
    logged_relevance: ClassVar[LoggedRelevance] = "probability"
    """What `relevance` in `assignment_log` is: the probability with which an expert chooses the client, the share of
    the client's tokens that used the expert, or a cosine similarity."""
    paper_steps: ClassVar[float] = 1.0
    """Steps of a client's round under `training.budget = "paper"`, as a multiple of those under "steps"."""
    trains_at_server: ClassVar[bool] = False
    """Whether the server trains or probes on the base (`Server.train`, `Server.probe`)."""
    needs_public_prompts: ClassVar[bool] = False
    """Whether the server reads public prompts (`Server.public`), which `[data.public]` must then name."""
    sends_synthetic_examples: ClassVar[bool] = False
    """Whether clients send synthetic examples, which a client's policy must allow."""
    trains_together: ClassVar[int] = 1
    """Adapters of a client that are trained on the same batches: 2 with partners (`TrainingRequest.partner`)."""
    only_answers: ClassVar[str] = ""
    """Why a run cannot have `training.objective = "preference"`, in words; empty: it can. A method needs a reason if it
    trains at the server, or if its clients train with extra rows, a teacher or a partner."""
    releases: ClassVar[Mapping[str, Release]] = {}
    """Kind of each field of a reply, for `[privacy]`, which a method without it refuses. Not inherited: a subclass may
    compute a field from other data. "trained" is a field that depends on the client's examples only through trainings
    that do not `stays_local`; the adapter and the penalty of these depend on no example other than in this way."""
    released_share: ClassVar[float] = 1.0
    """Share of a round's steps that do not stay local, for `[privacy]`."""
    budgets_differ: ClassVar[bool] = False
    """Whether the two budgets give different steps; set from `paper_steps`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Set the class variables that follow from others."""
        super().__init_subclass__(**kwargs)
        cls.budgets_differ = cls.paper_steps != 1
        if "releases" not in vars(cls):
            cls.releases = {}
        types = _record_types(cls, {})
        if types is not None:
            cls.records = Records(*types)
            if "accepts_newcomers" not in vars(cls):
                cls.accepts_newcomers = cls.records.state is cls.records.message and types[2] is Nothing

    def __post_init__(self) -> None:
        """Raise a ConfigError for hyper-parameters out of range."""
        self.spec()

    @abstractmethod
    def spec(self) -> AdapterSpec | PromptSpec:
        """Return the settings that all adapters of this method share."""

    def round_share(self, budget: Budget) -> float:
        """Return the steps of a client's round under a budget, as a multiple of `TrainingSettings.steps`."""
        return self.paper_steps if budget == "paper" else 1.0

    def round_steps(self, steps: int, budget: Budget) -> int:
        """Return the optimiser steps of a client's round where S is `steps`; of partners each step counts."""
        together = round(steps * self.round_share(budget)) // self.trains_together
        return max(1, together) * self.trains_together

    def steps_at_server(self) -> int:
        """Return the optimiser steps of the server in a round."""
        return 0

    def second_base(self) -> str:
        """Return the base that the server loads beside that of the federation, named as in `base.model`; empty: none.

        `Server.on_second_base` works on it. It must have the federation's tokenizer; clients never load it.
        """
        return ""

    def released(self) -> Mapping[str, Release]:
        """Return `releases` with these hyper-parameters.

        Mean embeddings are left empty under `[privacy]` if the method does not read them.
        """
        unread: Release = "mean_embedding" if self.reads_embeddings() else "empty"
        return {field: unread if kind == "mean_embedding" else kind for field, kind in self.releases.items()}

    def reads_embeddings(self) -> bool:
        """Whether the server reads the mean embeddings of replies."""
        return self.needs_embeddings

    def min_synthetic_rows(self) -> int:
        """Return from how many training rows the synthetic examples of a class are computed, at least."""
        return 1

    def rows_of_step(self, batch: int) -> int:
        """Return the training rows that a client's optimiser step reads at most, where a batch has `batch` rows."""
        return batch

    def own_row_share(self) -> float:
        """Return the smallest share of a client's own rows, on average, among those that its training reads."""
        return 1.0

    def check(self, clients: int) -> None:
        """Raise a ConfigError if the method cannot run with this number of clients."""

    def check_federation(self, federation: FederationSettings) -> None:
        """Raise a ConfigError if the method cannot run with these settings; called when a config is read."""

    def for_deployment(self) -> Self:
        """Return the method with defaults for organisations that do not trust each other; called before `check`."""
        return self

    def exposes(self, clients: int | None, shapes: Shapes | None) -> list[str]:
        """Return sentences about what others can compute from what is sent; None for what is not known yet."""
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
        """Return the message to one client; messages may differ."""

    @abstractmethod
    def aggregate(self, server: Server, state: S, replies: Mapping[str, U]) -> S:
        """Return the next state, given the replies by client: of any subset of the clients, in any order."""

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
        """Return a record with the names, shapes and fields that a reply must have.

        `template` is the reply of a dry run. A method overrides this where a client decides some of it; nothing else
        may be taken from `reply`, which is not trusted.
        """
        return template

    def assignment_log(self, state: S) -> Iterator[dict[str, Any]]:
        """Yield lines for assignment.jsonl: which client holds which experts in the next round."""
        return iter(())

    def newcomer(
        self, server: Server, state: S, info: ClientInfo, embed: Callable[[Adapter], Mapping[str, MeanEmbeddings]]
    ) -> Newcomer[D]:
        """Return what a client gets that joins a finished run, for methods with `accepts_newcomers`.

        `server.clients` includes the new client. `embed(adapter)` returns the mean router embeddings of an adapter over
        the new client's embedding split, by module. The default is the message of any other client.
        """
        return Newcomer(self.message(state, info))

    # client
    def init_client_state(self, client: Client) -> K:
        """Return the client state before the client's first round; the default is for methods that keep nothing."""
        if self.records.client_state is not Nothing:
            raise NotImplementedError(f"{type(self).__name__}.init_client_state")
        return cast(K, Nothing())

    @abstractmethod
    def adapter(self, client: Client, client_state: K, message: D) -> Adapter:
        """Return the adapter that local training starts from."""

    @abstractmethod
    def reply(self, client: Client, client_state: K, message: D, trained: TrainingResult) -> tuple[K, U]:
        """Return the next client state and the reply."""

    def update(
        self, client: Client, client_state: K, message: D
    ) -> Generator[Request, Any, tuple[K, U, TrainingResult]]:
        """Run a client's round: yield requests for training, return client state, reply and the last result.

        A `TrainingRequest` is answered by a `TrainingResult`, a `SynthesisRequest` by a `SynthesisResult`, an
        `AutoencoderRequest` by an `AutoencoderResult`.
        """
        trained = yield TrainingRequest(self.adapter(client, client_state, message))
        return (*self.reply(client, client_state, message, trained), trained)

    def personal(self, client: Client, client_state: K, message: D | None, trained: Adapter | None) -> Adapter | None:
        """Return the client's model that is scored and saved, or None for the untuned base.

        `trained` is the adapter of the client's last local training, `message` one sent after the aggregation, for
        methods that are scored after it.
        """
        if self.evaluates == "pre_aggregation" or message is None:
            return trained
        return self.adapter(client, client_state, message)


def _record_types(cls: type, arguments: Mapping[Any, Any]) -> tuple[type[Any], ...] | None:
    """Return the generic parameters of `Method` in a class; None if its own bases do not fix all of them."""
    for base in vars(cls).get("__orig_bases__", ()):
        origin = get_origin(base)
        if not (isinstance(origin, type) and issubclass(origin, Method)):
            continue
        values = tuple(arguments.get(argument, argument) for argument in get_args(base))
        if origin is Method:
            return values if all(isinstance(value, type) for value in values) else None
        types = _record_types(origin, dict(zip(vars(origin)["__parameters__"], values, strict=True)))
        if types is not None:
            return types
    return None
