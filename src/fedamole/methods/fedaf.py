"""FedAF: Wang et al., "An Aggregation-Free Federated Learning for Tackling Data Heterogeneity", CVPR 2024,
https://arxiv.org/abs/2404.18962.

One round, in two exchanges; what is not mentioned is as in FedDM:
    1. The server sends the global LoRA w to the selected clients.
    2. Each client mixes w with a fresh LoRA, gamma w + (1 - gamma) fresh, and sends under it the mean logits of its
       answer options for each class.
    3. The server sends back the mean logits of all clients with the same answer options, and w again.
    4. Each client trains its own LoRA, and then optimises synthetic examples as in FedDM, around the LoRA of step 2. To
       the loss it adds for each class the distance between the option logits of the synthetic examples and the mean
       logits that it was sent. It sends the examples, and for each class a soft label: the mean distribution of its
       own LoRA over the answer options.
    5. The server averages the soft labels of each class over the clients. It trains w on all synthetic examples with
       cross-entropy + lambda KL(soft label of the class || model).
The model of every client is the global LoRA, scored after the aggregation; `fedaf_ft` scores the client's own LoRA of
step 4.
Deviations: those of FedDM. A fresh LoRA has B = 0, so mixing also shrinks the change BA. Soft labels come from the
client's own LoRA. They cover the first tokens of the options, and give no probability to other tokens. The divergence
is that of each example, in place of the class's mean. The weights, the temperature and gamma are those of a
re-implementation by others; the authors' own were not found. Clients with free text, or with more than
`max_options` options, take part as in FedDM.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.distillation import Distillation
from fedamole.federation.method import Client, ClientInfo, Exchange, Records, Request, Server, TrainingResult
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import Nothing
from fedamole.federation.synthesis_request import SynthesisRequest
from fedamole.methods.feddm import FedDm
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.methods.shared.checks import check_at_least, check_not_negative, check_positive
from fedamole.model.batch import Ids
from fedamole.model.params import Adapter, Shapes, new_shared
from fedamole.synthesis.class_reply import (
    ClassReply,
    expected_logits,
    first_tokens,
    logits_for,
    options_hash,
    with_mean_labels,
    without_labels,
)
from fedamole.synthesis.collaboration import Collaborative, centred
from fedamole.synthesis.examples import PROBABILITIES, SyntheticExamples, expected_examples


@dataclass(frozen=True)
class ClassMessage(SharedTensors):
    """Message: the global LoRA, and in the second exchange what clients have measured with it."""

    logits: Mapping[str, Tensor]
    """Mean option logits (clients, options) by class."""
    measure: bool
    """Whether the client is to send its mean logits, and to train nothing."""


@dataclass(frozen=True)
class FedAf(FedDm):
    """FedDM with synthetic examples that agree with the predictions of all clients, and with soft labels."""

    agreement_weight: float = 0.8
    """Weight of the distance to the clients' mean logits in the loss of the synthetic examples."""
    label_weight: float = 0.8
    """Weight lambda of the divergence from the soft labels at the server."""
    temperature: float = 2.0
    """Temperature of the soft labels."""
    global_share: float = 0.9
    """Share gamma of the global LoRA in the mixture with a fresh one."""
    label_examples: int = 64
    """Training examples of each class from which a client computes mean logits and soft labels, at most."""
    max_options: int = 16
    """Answer options of a client at most; one with more sends no logits and no soft labels."""

    paper = "Wang et al., An Aggregation-Free FL for Tackling Data Heterogeneity (FedAF), CVPR 2024, arXiv 2404.18962"
    communicates = (
        "one LoRA down, mean logits by class up; then the LoRA and all clients' mean logits down, synthetic examples "
        "with soft labels up"
    )
    records = Records(SharedTensors, ClassMessage, Nothing, ClassReply)
    probes = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "agreement_weight", "label_weight")
        check_positive(self, "temperature")
        if not 0 <= self.global_share <= 1:
            raise ConfigError(f"method.global_share = {self.global_share}: must be at least 0 and at most 1")
        check_at_least(self, label_examples=self.min_synthetic_rows(), max_options=1)

    @override
    def exchanges(self) -> int:
        return 2

    @override
    def exposes(self, clients: int | None, shapes: Shapes | None) -> list[str]:
        return [
            *super().exposes(clients, shapes),
            "All clients with the same answer options get each other's mean logits by class, which are means over at "
            f"least {self.min_synthetic_rows()} rows. The coordinator also gets soft labels by class.",
        ]

    # server
    @override
    def message(self, state: SharedTensors, client: ClientInfo) -> ClassMessage:
        return ClassMessage(state.tensors, {}, False)

    @override
    def round(
        self, server: Server, state: SharedTensors, cohort: Sequence[ClientInfo], exchange: Exchange
    ) -> SharedTensors:
        messages = {client.name: self.message(state, client) for client in cohort}
        measured = exchange({name: replace(message, measure=True) for name, message in messages.items()})
        replies = exchange(
            {name: replace(messages[name], logits=logits_for(reply, measured)) for name, reply in measured.items()}
        )
        return self.aggregate(server, state, replies) if replies else state

    @override
    def aggregate(
        self, server: Server, state: SharedTensors, replies: Mapping[str, SyntheticExamples]
    ) -> SharedTensors:
        """Train the global LoRA on all synthetic examples, with the mean soft label of each class."""
        examples = {name: reply for name, reply in replies.items() if reply.tensors}
        labelled = with_mean_labels(examples) if self.label_weight else without_labels(examples)
        return super().aggregate(server, state, labelled)

    @override
    def soft_label_term(self) -> Distillation | None:
        """Return w with which (1 - w) CE + w T^2 KL is CE + lambda KL but for a factor."""
        if not self.label_weight:
            return None
        return Distillation(self.label_weight / (self.label_weight + self.temperature**2), self.temperature)

    @override
    def expected_reply(self, template: SyntheticExamples, reply: SyntheticExamples) -> SyntheticExamples:
        assert isinstance(reply, ClassReply)
        if template.tensors:
            return replace(expected_examples(template, reply), logits={}, options="")
        return expected_logits(reply, self.max_options)

    # client
    @override
    def update(
        self, client: Client, client_state: Nothing, message: SharedTensors
    ) -> Generator[Request, Any, tuple[Nothing, SyntheticExamples, TrainingResult]]:
        assert isinstance(message, ClassMessage)
        if not message.measure:
            return (yield from super().update(client, client_state, message))
        adapter = self.mixed(client, self.adapter(client, client_state, message))
        logits = {str(label): centred(it).mean(0) for label, it in self.class_logits(client, adapter).items()}
        reply = ClassReply({}, (), (), (), (), logits, options_hash(self.answers(client)) if logits else "")
        return client_state, reply, TrainingResult(adapter, 0, 0.0)

    @override
    def synthesis(self, client: Client, message: SharedTensors, start: Adapter, own: Adapter) -> SynthesisRequest:
        assert isinstance(message, ClassMessage)
        request = super().synthesis(client, message, self.mixed(client, start), own)
        logits = {int(label): tensor for label, tensor in message.logits.items()}
        tokens = first_tokens(self.answers(client))
        return replace(request, objective=Collaborative(request.objective, self.agreement_weight, tokens, logits))

    @override
    def reply(
        self, client: Client, client_state: Nothing, message: SharedTensors, trained: TrainingResult
    ) -> tuple[Nothing, SyntheticExamples]:
        """Return the examples with the soft labels of their classes, all 0 for a class without one."""
        _, examples = super().reply(client, client_state, message, trained)
        tokens, count = first_tokens(self.answers(client)), len(examples)
        probabilities = torch.zeros(count, 1, self.max_options)
        for label, logits in self.class_logits(client, trained.adapter).items():
            own = torch.tensor([it == label for it in examples.classes], dtype=torch.bool)
            probabilities[own, 0, : len(tokens)] = (logits / self.temperature).softmax(1).mean(0)
        ids = (*tokens, *[0] * (self.max_options - len(tokens))) * count
        tensors = {**examples.tensors, PROBABILITIES: probabilities}
        return client_state, ClassReply(tensors, examples.prompt, examples.answers, examples.classes, ids)

    def answers(self, client: Client) -> tuple[Ids, ...]:
        """Return the answer options of a client; empty for free text, and for more than `max_options`."""
        answers = client.outline().class_answers()
        return answers if len(answers) <= self.max_options else ()

    def class_logits(self, client: Client, adapter: Adapter) -> dict[int, Tensor]:
        """Return the option logits (n, options) of drawn training examples, by class with enough of them."""
        tokens, generator = first_tokens(self.answers(client)), torch_generator(client.seed, "labels", client.name)
        logits: dict[int, Tensor] = {}
        for label, prompts in sorted(client.outline().class_prompts().items() if tokens else ()):
            if len(prompts) >= self.min_synthetic_rows():
                drawn = torch.randperm(len(prompts), generator=generator)[: self.label_examples].tolist()
                logits[label] = client.probe.prompt_logits(adapter, [prompts[i] for i in drawn], tokens)
        return logits

    def mixed(self, client: Client, adapter: Adapter) -> Adapter:
        """Mix the global LoRA with a fresh one, which is the same in both exchanges of a round."""
        generator, share = torch_generator(client.seed, "fresh", client.name, client.round), self.global_share
        fresh = new_shared(client.shapes, self.rank, generator)
        tensors = {name: share * tensor + (1 - share) * fresh[name] for name, tensor in adapter.tensors.items()}
        return replace(adapter, tensors=tensors)
