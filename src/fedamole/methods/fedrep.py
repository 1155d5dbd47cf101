"""FedRep-like, on a LoRA: Collins, Hassani, Mokhtari, Shakkottai, "Exploiting Shared Representations for Personalized
Federated Learning", ICML 2021, https://arxiv.org/abs/2102.07078.

One round:
    the server sends the global body, the LoRA of the lower layers, to the cohort;
    every client trains its own head, the LoRA of the upper layers, with the body frozen,
    then the body with the head frozen, keeps the head and sends the body back;
    the server averages the bodies.
A client's model is the global body with its own head, scored after the aggregation. Deviations: the paper's head is the
classifier's last layer; a language model's head is frozen here, so the adapters of the upper decoder layers take its
place. With `training.budget = "steps"` head and body share the round's steps, half each. With "paper" each has all of
them: the paper gives the body as many passes as FedAvg (1 to 5), and the head 10.
"""

import re
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.federation.method import (
    Client,
    ClientInfo,
    LoraMethod,
    Records,
    Server,
    TrainingRequest,
    TrainingResult,
    Weighting,
)
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.model.params import Adapter, new_shared


@dataclass(frozen=True)
class Body:
    """The LoRA of the lower layers: the server's state, and what travels both ways."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Head:
    """A client's own LoRA of the upper layers."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class FedRep(LoraMethod[Body, Body, Head, Body]):
    """Adapters of the lower layers are shared, those of the upper ones are the client's own."""

    weighting: Weighting = "uniform"
    """Weight of a client in the average: uniform, or by its training examples."""
    private_share: float = 0.5
    """Share of the decoder layers, from the top, whose adapters are private; at least one is, and one is not."""

    paper = "Collins et al., Shared Representations for Personalized FL (FedRep), ICML 2021, arXiv 2102.07078"
    communicates = "the LoRA of the lower layers both ways"
    stays_local = "the data and the LoRA of the upper layers"
    records = Records(Body, Body, Head, Body)
    evaluates = "post_aggregation"
    averaged = ("tensors",)
    paper_steps = 2.0

    def __post_init__(self) -> None:
        """Refuse a share that is none."""
        super().__post_init__()
        if not 0 < self.private_share < 1:
            raise ConfigError(f"method.private_share = {self.private_share}: must be above 0 and below 1")

    # server
    def init(self, server: Server) -> Body:
        """Draw the first body."""
        drawn = new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora"))
        return Body(_chosen(drawn, self.private(server.shapes), False))

    def message(self, state: Body, client: ClientInfo) -> Body:
        """Send the body."""
        return state

    def aggregate(self, server: Server, state: Body, replies: Mapping[str, Body]) -> Body:
        """Average the bodies that came back."""
        returned = {name: reply.tensors for name, reply in replies.items()}
        return Body(mean_by_key(returned, server.weights(self.weighting), state.tensors))

    # client
    def init_client_state(self, client: Client) -> Head:
        """Draw the head."""
        drawn = new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora"))
        return Head(_chosen(drawn, self.private(client.shapes), True))

    def adapter(self, client: Client, client_state: Head, message: Body) -> Adapter:
        """Put the client's head on the global body."""
        return Adapter(self.spec(), {**message.tensors, **client_state.tensors})

    def update(
        self, client: Client, client_state: Head, message: Body
    ) -> Generator[TrainingRequest, TrainingResult, tuple[Head, Body, TrainingResult]]:
        """Train the head, then the body."""
        both = self.adapter(client, client_state, message)
        only_head = Adapter(both.spec, both.tensors, frozen=tuple(sorted(message.tensors)))
        head = yield TrainingRequest(only_head, share=0.5, paper_share=1.0)
        only_body = Adapter(both.spec, head.adapter.tensors, frozen=tuple(sorted(client_state.tensors)))
        trained = yield TrainingRequest(only_body, share=0.5, paper_share=1.0)
        return (*self.reply(client, client_state, message, trained), trained)

    def reply(self, client: Client, client_state: Head, message: Body, trained: TrainingResult) -> tuple[Head, Body]:
        """Keep the head, send the body."""
        tensors, private = trained.adapter.tensors, self.private(client.shapes)
        return Head(_chosen(tensors, private, True)), Body(_chosen(tensors, private, False))

    def private(self, modules: Iterable[str]) -> frozenset[str]:
        """Modules of the upper layers: a module's layer is what is left of its name without its own last part."""
        layers = sorted({_layer(name) for name in modules}, key=_numbers)
        if len(layers) < 2:
            raise ConfigError("fedrep needs adapters in at least two layers: name more of them in base.targets")
        count = min(max(1, round(self.private_share * len(layers))), len(layers) - 1)
        return frozenset(name for name in modules if _layer(name) in layers[-count:])


def _layer(module: str) -> str:
    """The beginning of a module's name up to its layer's number."""
    found = re.match(r".*?\d+", module)
    return found.group() if found else module


def _numbers(name: str) -> list[int | str]:
    """Sort key by which layer 10 comes after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _chosen(tensors: Mapping[str, Tensor], private: frozenset[str], inside: bool) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if (name.rsplit("/", 2)[0] in private) == inside}
