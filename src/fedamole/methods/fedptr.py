"""FedPTR: Chen et al., "Federated Learning with Projected Trajectory Regularization", 2023,
https://arxiv.org/abs/2312.14380.

One round:
    1. The server sends the global LoRA w_t and its projected next one, w~.
    2. Each client trains w_t with mu / 2 |w_k - w~|^2 added to its loss, and sends it back.
    3. The server averages the LoRAs into w_{t+1}.
    4. It optimises vectors of synthetic rows, and a step size, so that a few gradient steps on these rows lead from w_t
       to w_{t+1}. The same steps from w_{t+1} lead to the next w~. With `projection` = "momentum" it is w_{t+1} + beta
       (w_{t+1} - w_t), without any rows.
The model of every client is the global LoRA, scored after the aggregation; `fedptr_ft` scores the same training before
the aggregation. The first round has no w~ and is FedIT's.
Deviations: the trajectory is that of a LoRA, and the rows are virtual tokens with random answers that stay fixed. All
numbers are ours, as the authors' were not found. "momentum" is a cheap stand-in and not the paper's. Rows start
each round from those of the round before.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.federation.method import Client, ClientInfo, Server, TrainingRequest, TrainingResult, Weighting
from fedamole.federation.penalties import Proximal
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import Nothing
from fedamole.federation.trajectory import TrajectoryRequest
from fedamole.methods.shared.averaging import SharedTensors, mean_by_key
from fedamole.methods.shared.checks import check_at_least, check_not_negative, check_positive
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.params import Adapter, Tensors, new_shared
from fedamole.synthesis.trajectory import Matching

VECTORS, LOG_STEP = "vectors", "log_step"
FIRST_LOG_STEP = -4.0
"""Logarithm of the inner step size with which the first optimisation starts."""


@dataclass(frozen=True)
class PtrState:
    """Server state and message."""

    tensors: Mapping[str, Tensor]
    """The global LoRA."""
    projected: Mapping[str, Tensor]
    """Its projected next one; empty before the first."""
    rows: Mapping[str, Tensor]
    """`vectors` (n, L, d) of the synthetic rows and `log_step` (0-d); empty in messages."""


@dataclass(frozen=True)
class FedPtr(LoraMethod[PtrState, PtrState, Nothing, SharedTensors]):
    """FedIT whose clients are held near where the global LoRA is going."""

    proximal: float = 0.1
    """Weight mu of the proximal term."""
    projection: Literal["virtual", "momentum"] = "virtual"
    """How the next global LoRA is projected: by synthetic rows, or by a part of the last move."""
    momentum: float = 0.5
    """Part beta of the last move, with "momentum"."""
    synthetic_rows: int = 48
    """Synthetic rows."""
    virtual_tokens: int = 12
    """Virtual tokens of a synthetic row."""
    inner_steps: int = 3
    """Gradient steps that are to make the last move."""
    outer_steps: int = 70
    """Steps of the optimisation of the rows in a round."""
    synthesis_rate: float = 0.3
    """Adam's learning rate for the vectors, as a multiple of the standard deviation of the token embeddings."""
    step_rate: float = 0.2
    """Adam's learning rate for the logarithm of the inner step size."""
    weighting: Weighting = "uniform"
    """Weight of a client in the average: uniform, or by its training examples."""

    paper = "Chen et al., Federated Learning with Projected Trajectory Regularization (FedPTR), 2023, arXiv 2312.14380"
    communicates = "two LoRAs down, one LoRA up"
    stays_local = "the data"
    evaluates = "post_aggregation"
    trains_at_server = True
    only_answers = "its synthetic rows have one answer to a prompt"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "proximal", "momentum")
        check_at_least(self, synthetic_rows=1, virtual_tokens=1, inner_steps=1, outer_steps=1)
        check_positive(self, "synthesis_rate", "step_rate")

    @override
    def steps_at_server(self) -> int:
        return self.outer_steps if self.projection == "virtual" else 0

    # server
    @override
    def init(self, server: Server) -> PtrState:
        tensors = new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora"))
        if self.projection == "momentum":
            return PtrState(tensors, {}, {})
        shape = (self.synthetic_rows, self.virtual_tokens, server.base.width)
        vectors = server.base.embedding_std * torch.randn(shape, generator=torch_generator(server.seed, "synthetic"))
        return PtrState(tensors, {}, {VECTORS: vectors, LOG_STEP: torch.tensor(FIRST_LOG_STEP)})

    @override
    def message(self, state: PtrState, client: ClientInfo) -> PtrState:
        return PtrState(state.tensors, state.projected, {})

    @override
    def aggregate(self, server: Server, state: PtrState, replies: Mapping[str, SharedTensors]) -> PtrState:
        trained = {name: reply.tensors for name, reply in replies.items()}
        after = mean_by_key(trained, server.weights(self.weighting), state.tensors)
        if self.projection == "momentum":
            moved = {name: it + self.momentum * (it - state.tensors[name]) for name, it in after.items()}
            return PtrState(after, moved, {})
        projected, rows = self.projected(server, state, after)
        return PtrState(after, projected, rows)

    def projected(self, server: Server, state: PtrState, after: Tensors) -> tuple[Tensors, dict[str, Tensor]]:
        """Return the projected next LoRA and the rows, given the last LoRA and the new one."""
        generator = torch_generator(server.seed, "labels")
        labels = torch.randint(server.base.vocabulary, (self.synthetic_rows,), generator=generator).tolist()
        rate = self.synthesis_rate * server.base.embedding_std
        how = Matching(self.inner_steps, self.outer_steps, rate, self.step_rate)
        start, rows = Adapter(self.spec(), state.tensors), state.rows
        result = server.match(TrajectoryRequest(start, after, tuple(labels), rows[VECTORS], rows[LOG_STEP], how))
        return result.projected, {VECTORS: result.matched.rows, LOG_STEP: result.matched.log_step}

    # client
    @override
    def adapter(self, client: Client, client_state: Nothing, message: PtrState) -> Adapter:
        return Adapter(self.spec(), message.tensors)

    @override
    def update(
        self, client: Client, client_state: Nothing, message: PtrState
    ) -> Generator[TrainingRequest, TrainingResult, tuple[Nothing, SharedTensors, TrainingResult]]:
        adapter = self.adapter(client, client_state, message)
        penalty = Proximal(message.projected, self.proximal) if message.projected else None
        trained = yield TrainingRequest(adapter, penalty=penalty)
        return (*self.reply(client, client_state, message, trained), trained)

    @override
    def reply(
        self, client: Client, client_state: Nothing, message: PtrState, trained: TrainingResult
    ) -> tuple[Nothing, SharedTensors]:
        return client_state, SharedTensors(trained.adapter.tensors)
