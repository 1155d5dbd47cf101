"""CoDream: Singh, Gupta, Vepakomma, Raskar et al., "CoDream: Exchanging dreams instead of models for federated
aggregation with heterogeneous models", 2024, https://arxiv.org/abs/2402.15968.

One round, in `dream_exchanges` + 1 exchanges:
    1. The server sends its LoRA w, the student, and the labelled dreams of the client's task from the last round.
    2. Each client trains its own LoRA, which it keeps, with `own_share` of the round's steps: on its own rows, and on
       these dreams, where it follows their soft labels.
    3. Clients of one task, which have the same template text and answer options, dream together, from the same random
       vectors in place of the columns. Each client moves the vectors by a few gradient steps, so that its own LoRA is
       sure of its answer, the hidden states of every layer have mean and variance of its real rows, and w disagrees.
       The server averages the vectors. This is done `dream_exchanges` times, the first time together with step 2.
    4. The server sends the dreams once more. Each client answers with soft labels, the distributions of its own LoRA,
       which the server averages.
    5. The server trains w on the labelled dreams of all tasks for `server_steps` steps. No client sends weights.
The model of a client is its own LoRA, scored before the aggregation: the dreams of the last round reach no client.
Deviations: a dream is virtual tokens in the prompt's template, without a generator network. The statistics of batch
normalisation are those of the layers' hidden states at the prompt's end, relative to their variance, over drawn
training rows. Nothing corresponds to the total variation of images. An exchange takes several steps of a new Adam in
place of one shared step. Distributions are over the first tokens of the answer options, for free text over the first
answer token, of which the `max_options` most likely ids are sent. All LoRAs have one rank. The defaults are ours.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.federation.distillation import Distillation
from fedamole.federation.method import Client, ClientInfo, Exchange, Request, Server, TrainingRequest, TrainingResult
from fedamole.federation.randomness import torch_generator
from fedamole.federation.synthesis_request import SynthesisRequest, SynthesisResult
from fedamole.methods.feddm import MIN_ROWS_ACROSS_ORGANISATIONS
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.methods.shared.checks import check_at_least, check_between_0_and_1, check_not_negative, check_positive
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.params import Adapter, Shapes, new_shared
from fedamole.synthesis.dream_exchange import (
    DREAM,
    LABEL,
    TRAIN,
    DreamMessage,
    DreamReply,
    DreamState,
    DreamTask,
    averaged,
    dream_examples,
    expected_dreams,
    labelled_rows,
)
from fedamole.synthesis.dreams import Dreaming
from fedamole.synthesis.examples import VECTORS


@dataclass(frozen=True)
class CoDream(LoraMethod[DreamState, DreamMessage, SharedTensors, DreamReply]):
    """Clients keep their LoRAs and learn from synthetic examples that they optimise and label together."""

    own_share: float = 0.5
    """Share of the round's steps for the client's own LoRA; the dreams have the rest."""
    dream_exchanges: int = 5
    """How often the clients move the dreams, which are then averaged, in a round."""
    dreams: int = 36
    """Dreams of a task in a round."""
    virtual_tokens: int = 16
    """Virtual tokens of a dream."""
    statistics_weight: float = 3.0
    """Weight alpha of the distances from mean and variance of the hidden states of real rows."""
    disagreement_weight: float = 6.0
    """Weight lambda of the divergence from the student."""
    temperature: float = 1.0
    """Temperature of the soft labels."""
    max_prompt_tokens: int = 64
    """Tokens of the template's own text in a dream, at most; of a longer text the last ones."""
    max_options: int = 16
    """Token ids of a soft label; a client with more answer options is treated as one with free text."""
    real_examples: int = 64
    """Training examples for mean and variance of the hidden states, at most, but not below `min_examples`."""
    min_examples: int | None = None
    """Training examples that a client needs to take part in the dreams; unset: 2, and 20 across organisations."""
    synthesis_rate: float = 0.1
    """Adam's learning rate for the vectors, as a multiple of the standard deviation of the token embeddings."""
    server_steps: int = 60
    """Optimiser steps of the server in a round."""

    paper = "Singh et al., CoDream: Exchanging dreams instead of models for federated aggregation, arXiv 2402.15968"
    communicates = "one LoRA down, vectors and soft labels of synthetic examples up and down, the template's text up"
    stays_local = "the data and the trained LoRA"
    evaluates = "pre_aggregation"
    trains_at_server = True
    sends_synthetic_examples = True
    only_answers = "its synthetic examples have one answer to a prompt"
    probes = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, dream_exchanges=1, dreams=1, virtual_tokens=1, max_prompt_tokens=1, max_options=1)
        check_at_least(self, min_examples=1, real_examples=1, server_steps=1)
        check_between_0_and_1(self, "own_share")
        check_not_negative(self, "statistics_weight", "disagreement_weight")
        check_positive(self, "temperature", "synthesis_rate")

    @override
    def for_deployment(self) -> "CoDream":
        """Return the method with `min_examples` = 20 if it is unset."""
        return self if self.min_examples is not None else replace(self, min_examples=MIN_ROWS_ACROSS_ORGANISATIONS)

    @override
    def steps_at_server(self) -> int:
        return self.server_steps

    @override
    def min_synthetic_rows(self) -> int:
        return 2 if self.min_examples is None else self.min_examples

    @override
    def rows_of_step(self, batch: int) -> int:
        return max(batch, self.real_examples, self.min_synthetic_rows())

    @override
    def exchanges(self) -> int:
        return self.dream_exchanges + 1

    @override
    def exposes(self, clients: int | None, shapes: Shapes | None) -> list[str]:
        return [
            "The coordinator gets each client's dreams, and its predictions for them. They are computed from its LoRA "
            f"and from at least {self.min_synthetic_rows()} of its training rows, and are not private by themselves: "
            "it can try to reconstruct rows from them. It also gets the text of the client's template, and knows which "
            "clients have the same text and answer options. These get averages; two can compute each other's part."
        ]

    # server
    @override
    def init(self, server: Server) -> DreamState:
        return DreamState(new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora")), {}, {})

    @override
    def message(self, state: DreamState, client: ClientInfo) -> DreamMessage:
        return DreamMessage(state.tensors, state.known(client.name), TRAIN)

    @override
    def round(self, server: Server, state: DreamState, cohort: Sequence[ClientInfo], exchange: Exchange) -> DreamState:
        replies = exchange({client.name: self.message(state, client) for client in cohort})
        after = self.aggregate(server, state, replies)
        for index in range(self.dream_exchanges):
            phase = DREAM if index < self.dream_exchanges - 1 else LABEL
            vectors = {name: after.dreams[reply.task][VECTORS] for name, reply in replies.items() if reply.tensors}
            if not vectors:
                return state
            messages = {name: DreamMessage(state.tensors, {VECTORS: it}, phase) for name, it in vectors.items()}
            replies = exchange(messages)
            after = self.aggregate(server, after, replies)
        return after

    @override
    def aggregate(self, server: Server, state: DreamState, replies: Mapping[str, DreamReply]) -> DreamState:
        """Average moved dreams by task; or average soft labels by task, and train the student on all that have some."""
        after, labelled = averaged(state, replies)
        if not labelled:
            return after
        student, follow = Adapter(self.spec(), state.tensors), Distillation(1.0, self.temperature)
        request = TrainingRequest(student, extra=after.rows(), own_rows=False, distillation=follow)
        return replace(after, tensors=server.train(request, self.server_steps).adapter.tensors)

    @override
    def expected_reply(self, template: DreamReply, reply: DreamReply) -> DreamReply:
        return expected_dreams(template, reply)

    # client
    @override
    def init_client_state(self, client: Client) -> SharedTensors:
        return SharedTensors({})

    @override
    def adapter(self, client: Client, client_state: SharedTensors, message: DreamMessage) -> Adapter:
        """Return the client's own LoRA, at first the student."""
        return Adapter(self.spec(), client_state.tensors or message.tensors)

    @override
    def update(
        self, client: Client, client_state: SharedTensors, message: DreamMessage
    ) -> Generator[Request, Any, tuple[SharedTensors, DreamReply, TrainingResult]]:
        own = TrainingResult(self.adapter(client, client_state, message), 0, 0.0)
        vectors = message.dreams.get(VECTORS)
        if message.phase == LABEL and vectors is not None:
            return client_state, self.labels(client, own.adapter, vectors), own
        if message.phase == TRAIN or vectors is None:
            own = yield self.training(client, own.adapter, message)
            if not self.takes_part(client):
                return (*self.reply(client, client_state, message, own), own)
            shape = (self.dreams, self.virtual_tokens, client.base.width)
            generator = torch_generator(client.seed, "dreams", round_=client.round)
            vectors = client.base.embedding_std * torch.randn(shape, generator=generator)
        made: SynthesisResult = yield self.dreaming(client, own.adapter, message, vectors)
        trained = replace(own, synthetic=made.examples)
        return (*self.reply(client, client_state, message, trained), trained)

    def takes_part(self, client: Client) -> bool:
        """Whether a client dreams; one with too few training examples trains its own LoRA alone."""
        return client.info.examples >= self.min_synthetic_rows()

    def training(self, client: Client, own: Adapter, message: DreamMessage) -> TrainingRequest:
        """Return the request for the client's own LoRA, on its rows and on the labelled dreams, if there are any."""
        share = self.own_share if self.takes_part(client) else 1.0
        if not message.dreams:
            return TrainingRequest(own, share)
        extra, follow = labelled_rows(message.dreams, self.task(client).prompt), Distillation(1.0, self.temperature)
        return TrainingRequest(own, share, extra=extra, distillation=follow)

    def dreaming(self, client: Client, own: Adapter, message: DreamMessage, vectors: Tensor) -> SynthesisRequest:
        """Return the request to move dreams, for one exchange."""
        task = self.task(client)
        return SynthesisRequest(
            dream_examples(vectors, task.prompt),
            own,
            Dreaming(self.statistics_weight, self.disagreement_weight, task.tokens),
            step_fraction=(1 - self.own_share) / self.dream_exchanges,
            against=Adapter(self.spec(), message.tensors),
            real_examples=max(self.real_examples, self.min_synthetic_rows()),
            learning_rate=self.synthesis_rate * client.base.embedding_std,
        )

    @override
    def reply(
        self, client: Client, client_state: SharedTensors, message: DreamMessage, trained: TrainingResult
    ) -> tuple[SharedTensors, DreamReply]:
        kept = SharedTensors(trained.adapter.tensors)
        made, task = trained.synthetic, self.task(client)
        return kept, DreamReply({}, (), "") if made is None else DreamReply(made.tensors, task.prompt, task.options)

    def labels(self, client: Client, own: Adapter, vectors: Tensor) -> DreamReply:
        """Return the soft labels of dreams under the client's own LoRA."""
        task = self.task(client)
        dreams, tokens = dream_examples(vectors, task.prompt), task.tokens or tuple(range(client.base.vocabulary))
        logits = client.probe.prompt_logits(dreams.rows().read_by(own), dreams.prompts(), tokens)
        return task.labelled(tokens, logits / self.temperature, self.max_options)

    def task(self, client: Client) -> DreamTask:
        """Return the prompt and the answer options of a client's dreams."""
        return DreamTask.of(client.outline(), self.virtual_tokens, self.max_prompt_tokens, self.max_options)
