"""FedDM: Xiong, Wang, Cheng, Yu, Hsieh, "FedDM: Iterative Distribution Matching for Communication-Efficient Federated
Learning", CVPR 2023, https://arxiv.org/abs/2207.09653.

One round:
    1. The server sends the global LoRA w to the selected clients.
    2. Each client trains it on its own data with `own_share` of the round's steps, and keeps the result to itself.
    3. With the other steps it optimises the virtual tokens of a few synthetic examples per class, so that for each
       class the mean hidden state and the mean logits at the prompt's end are those of its real examples. Every step
       makes its passes under another LoRA: a random point between w and the client's own, plus noise (`perturbation` =
       "own"), or a random point within `radius` of w ("ball", as in the paper).
    4. The client sends its synthetic examples, and no weights.
    5. The server trains w on the synthetic examples of all clients for `server_steps` steps, and moves the result back
       to within `radius` of w if it is farther away.
The model of every client is the global LoRA, scored after the aggregation; `feddm_ft` scores the client's own LoRA of
step 2.
Deviations: virtual tokens in the prompt's template in place of images. The class of an example is its answer option.
Examples with free text are one class, and the answers of their synthetic examples are those that the client's own LoRA
generates, never the client's. The passes are made under LoRAs between w and the client's own: around w alone, the
features of a pretrained language model hardly separate the classes. No differential privacy: synthetic examples are
functions of the private data and are not private by themselves.
"""

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from fedamole.federation.distillation import Distillation
from fedamole.federation.method import Client, ClientInfo, Request, Server, TrainingRequest, TrainingResult
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import Nothing
from fedamole.federation.synthesis_request import SynthesisRequest, SynthesisResult
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.methods.shared.checks import check_at_least, check_between_0_and_1, check_not_negative, check_positive
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.params import Adapter, Shapes, Tensors, new_shared
from fedamole.synthesis.examples import SyntheticExamples, expected_examples
from fedamole.synthesis.matching import DistributionMatching
from fedamole.synthesis.outline import ExampleSizes
from fedamole.synthesis.rows import joined

MIN_ROWS_ACROSS_ORGANISATIONS = 20
"""Default of `min_class_examples` in a deployment; a client's policy requires as many (`min_rows`)."""


@dataclass(frozen=True)
class FedDm(LoraMethod[SharedTensors, SharedTensors, Nothing, SyntheticExamples]):
    """Clients send synthetic examples that match their data's features; the server trains on them."""

    perturbation: Literal["own", "ball"] = "own"
    """LoRAs of the passes: between the global and the client's own LoRA, or in a ball around the global one."""
    radius: float = 20.0
    """Largest distance of the next global LoRA from the last; with "ball" also that of the LoRAs of the passes."""
    noise: float = 0.3
    """Largest norm of the noise on the LoRAs of the passes, with "own"."""
    own_share: float = 0.2
    """Share of the round's steps for the client's own LoRA; the synthesis has the rest."""
    examples_per_class: int = 8
    """Synthetic examples of each class."""
    virtual_tokens: int = 16
    """Virtual tokens of a synthetic example."""
    max_classes: int = 10
    """Classes of a client at most: those with the most examples."""
    max_prompt_tokens: int = 64
    """Tokens of the template's own text in a synthetic example, at most; of a longer text the last ones."""
    max_answer_tokens: int = 16
    """Tokens of an answer at most; a class with a longer one is left out, generated text is cut."""
    min_class_examples: int | None = None
    """Training examples that a class must have; unset: 2, and 20 across organisations."""
    real_examples: int = 24
    """Real examples of each class that a step of the synthesis reads, at most."""
    synthesis_rate: float = 0.1
    """Adam's learning rate for the vectors, as a multiple of the standard deviation of the token embeddings."""
    server_steps: int = 60
    """Optimiser steps of the server in a round."""

    paper = "Xiong et al., FedDM: Iterative Distribution Matching for FL, CVPR 2023, arXiv 2207.09653"
    communicates = "one LoRA down, synthetic examples up: vectors, the template's text and answers by class"
    stays_local = "the data and the trained LoRA"
    evaluates = "post_aggregation"
    trains_at_server = True
    sends_synthetic_examples = True
    only_answers = "its synthetic examples have one answer to a prompt"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, examples_per_class=1, virtual_tokens=1, max_classes=1, max_prompt_tokens=1)
        check_at_least(self, max_answer_tokens=1, real_examples=1, server_steps=1, min_class_examples=1)
        check_between_0_and_1(self, "own_share")
        check_positive(self, "radius", "synthesis_rate")
        check_not_negative(self, "noise")

    @override
    def for_deployment(self) -> "FedDm":
        """Return the method with `min_class_examples` = 20 if it is unset."""
        if self.min_class_examples is not None:
            return self
        return replace(self, min_class_examples=MIN_ROWS_ACROSS_ORGANISATIONS)

    @override
    def steps_at_server(self) -> int:
        return self.server_steps

    @override
    def min_synthetic_rows(self) -> int:
        return 2 if self.min_class_examples is None else self.min_class_examples

    @override
    def rows_of_step(self, batch: int) -> int:
        return max(batch, self.max_classes * self.real_examples)

    @override
    def exposes(self, clients: int | None, shapes: Shapes | None) -> list[str]:
        return [
            "The coordinator gets synthetic examples, which are computed from a client's training rows and are not "
            "private by themselves: it can try to reconstruct rows from them. It also gets the text of the client's "
            f"template, and which of its answer options at least {self.min_synthetic_rows()} rows have."
        ]

    @property
    def sizes(self) -> ExampleSizes:
        """Number and lengths of a client's synthetic examples."""
        return ExampleSizes(
            self.examples_per_class,
            self.virtual_tokens,
            self.max_classes,
            self.max_prompt_tokens,
            self.max_answer_tokens,
            self.min_synthetic_rows(),
        )

    # server
    @override
    def init(self, server: Server) -> SharedTensors:
        return SharedTensors(new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora")))

    @override
    def message(self, state: SharedTensors, client: ClientInfo) -> SharedTensors:
        return state

    @override
    def aggregate(
        self, server: Server, state: SharedTensors, replies: Mapping[str, SyntheticExamples]
    ) -> SharedTensors:
        """Train the global LoRA on all synthetic examples; without any it stays as it is."""
        parts = [replies[name].rows() for name in sorted(replies) if len(replies[name])]
        if not parts:
            return state
        adapter, labels = Adapter(self.spec(), state.tensors), self.soft_label_term()
        request = TrainingRequest(adapter, extra=joined(parts), own_rows=False, distillation=labels)
        trained = server.train(request, self.server_steps)
        return SharedTensors(within(trained.adapter.tensors, state.tensors, self.radius))

    def soft_label_term(self) -> Distillation | None:
        """Return how much the server follows soft labels of the synthetic examples; None if they have none."""
        return None

    @override
    def expected_reply(self, template: SyntheticExamples, reply: SyntheticExamples) -> SyntheticExamples:
        return expected_examples(template, reply)

    # client
    @override
    def adapter(self, client: Client, client_state: Nothing, message: SharedTensors) -> Adapter:
        return Adapter(self.spec(), message.tensors)

    @override
    def update(
        self, client: Client, client_state: Nothing, message: SharedTensors
    ) -> Generator[Request, Any, tuple[Nothing, SyntheticExamples, TrainingResult]]:
        start = self.adapter(client, client_state, message)
        own: TrainingResult = yield TrainingRequest(start, step_fraction=self.own_share)
        made: SynthesisResult = yield self.synthesis(client, message, start, own.adapter)
        trained = replace(own, synthetic=made.examples)
        return (*self.reply(client, client_state, message, trained), trained)

    def synthesis(self, client: Client, message: SharedTensors, start: Adapter, own: Adapter) -> SynthesisRequest:
        """Return the request for synthetic examples, given the global LoRA and the one that the client has trained."""
        outline = client.outline()
        generator = torch_generator(client.seed, "synthetic", client.name, client.round)
        answers = outline.class_answers()
        return SynthesisRequest(
            outline.new_examples(self.sizes, generator),
            start,
            DistributionMatching(),
            step_fraction=1 - self.own_share,
            toward=own if self.perturbation == "own" else None,
            noise=self.noise if self.perturbation == "own" else self.radius,
            real_examples=self.real_examples,
            class_answers=answers,
            learning_rate=self.synthesis_rate * client.base.embedding_std,
            answered_by=None if answers else own,
            max_answer_tokens=self.max_answer_tokens,
        )

    @override
    def reply(
        self, client: Client, client_state: Nothing, message: SharedTensors, trained: TrainingResult
    ) -> tuple[Nothing, SyntheticExamples]:
        assert trained.synthetic is not None
        return client_state, trained.synthetic


def within(tensors: Tensors, centre: Tensors, radius: float) -> dict[str, Tensor]:
    """Move tensors towards a centre until their distance, over all of them together, is at most `radius`."""
    changes = {name: tensor.double() - centre[name].double() for name, tensor in sorted(tensors.items())}
    distance = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
    if distance <= radius:
        return dict(tensors)
    moved = {name: centre[name].double() + radius / distance * change for name, change in changes.items()}
    return {name: tensor.to(tensors[name].dtype) for name, tensor in moved.items()}
