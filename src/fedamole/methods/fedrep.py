"""FedRep, adapted to a LoRA: Collins, Hassani, Mokhtari, Shakkottai, "Exploiting Shared Representations for
Personalized Federated Learning", ICML 2021, https://arxiv.org/abs/2102.07078.

One round:
    1. The server sends the global body, the LoRA of the lower layers, to the selected clients.
    2. Each client trains its own head, the LoRA of the upper layers, with the body frozen.
    3. It then trains the body with the head frozen, keeps the head and sends the body back.
    4. The server averages the bodies.
The model of a client is the global body with its own head, scored after the aggregation.
Deviations: in the paper the head is the last layer of a classifier. The head of a language model is frozen here, so the
adapters of the upper decoder layers take its place. With `training.budget = "steps"` each of the two trainings takes
half of the round's steps. With "paper" each takes all of them; the paper gives the body as many epochs as FedAvg (1 to
5), and the head 10.
"""

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, Server, TrainingRequest, TrainingResult
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.averaging import AveragedLora, SharedTensors
from fedamole.methods.shared.checks import check_between_0_and_1
from fedamole.model.params import Adapter, Tensors, layer_of, layers_of, new_shared


@dataclass(frozen=True)
class Head:
    """Client state: the client's own LoRA of the upper layers."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class FedRep(AveragedLora[Head]):
    """A LoRA that is shared in the lower layers and the client's own in the upper ones."""

    private_share: float = 0.5
    """Share of the decoder layers, from the top, whose adapters are private; at least one is, and one is not."""

    paper = "Collins et al., Shared Representations for Personalized FL (FedRep), ICML 2021, arXiv 2102.07078"
    communicates = "the LoRA of the lower layers both ways"
    stays_local = "the data and the LoRA of the upper layers"
    evaluates = "post_aggregation"
    paper_steps = 2.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_between_0_and_1(self, "private_share")

    @override
    def initial(self, server: Server) -> Tensors:
        return _select(super().initial(server), self.private(server.shapes), False)

    @override
    def init_client_state(self, client: Client) -> Head:
        lora = new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora"))
        return Head(_select(lora, self.private(client.shapes), True))

    @override
    def adapter(self, client: Client, client_state: Head, message: SharedTensors) -> Adapter:
        return Adapter(self.spec(), {**message.tensors, **client_state.tensors})

    @override
    def update(
        self, client: Client, client_state: Head, message: SharedTensors
    ) -> Generator[TrainingRequest, TrainingResult, tuple[Head, SharedTensors, TrainingResult]]:
        both = self.adapter(client, client_state, message)
        only_head = Adapter(both.spec, both.tensors, frozen=tuple(sorted(message.tensors)))
        head = yield TrainingRequest(only_head, step_fraction=0.5, paper_step_fraction=1.0)
        only_body = Adapter(both.spec, head.adapter.tensors, frozen=tuple(sorted(client_state.tensors)))
        trained = yield TrainingRequest(only_body, step_fraction=0.5, paper_step_fraction=1.0)
        return (*self.reply(client, client_state, message, trained), trained)

    @override
    def reply(
        self, client: Client, client_state: Head, message: SharedTensors, trained: TrainingResult
    ) -> tuple[Head, SharedTensors]:
        tensors, private = trained.adapter.tensors, self.private(client.shapes)
        return Head(_select(tensors, private, True)), SharedTensors(_select(tensors, private, False))

    def private(self, modules: Iterable[str]) -> frozenset[str]:
        """Return the modules of the upper layers.

        Raises ConfigError if the modules are in fewer than two layers.
        """
        layers = layers_of(modules)
        if len(layers) < 2:
            raise ConfigError("fedrep needs adapters in at least two layers: name more of them in base.targets")
        count = min(max(1, round(self.private_share * len(layers))), len(layers) - 1)
        return frozenset(name for name in modules if layer_of(name) in layers[-count:])


def _select(tensors: Tensors, modules: frozenset[str], inside: bool) -> dict[str, Tensor]:
    """Return the tensors of these modules, or of all others."""
    return {name: value for name, value in tensors.items() if (name.rsplit("/", 2)[0] in modules) == inside}
