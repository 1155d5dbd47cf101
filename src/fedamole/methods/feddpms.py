"""FedDPMS: Chen and Vikalo, "Federated Learning in Non-IID Settings Aided by Differentially Private Synthetic Data",
2022, https://arxiv.org/abs/2206.00686.

One round:
    1. The server sends the global LoRA w and an autoencoder to the selected clients. The encoder maps the hidden state
       at a prompt's end to a latent vector, the decoder maps a latent vector to virtual tokens.
    2. In the first `warmup_rounds` rounds each client trains w on its own rows, and the autoencoder so that the virtual
       tokens, read under the w that it was sent, give the hidden states of its prompts. The server averages both. After
       the warm-up the autoencoder, and the w under which states are encoded, stay as they are.
    3. In its first round after the warm-up each client releases, once in a run, noisy mean latent vectors of its
       classes. The server averages them over the clients of one task, which have the same template text and options.
    4. From the next round on, a client that has few rows of a class (`rare_below`) decodes latent vectors around the
       class's mean to synthetic examples, and trains w on its own rows and on these. The server averages w.
The model of every client is the global LoRA, scored after the aggregation; `feddpms_ft` scores the client's own.
What (epsilon, delta) covers: the mean latent vectors of one client, released once, where neighbouring data sets differ
in one training example that is replaced by any other, also of another class. Their classes and numbers are covered too.
What it does not cover: the LoRA and, in the warm-up, the autoencoder, which are trained on the same rows and sent
without noise, as in every other method. So the run as a whole is not differentially private.
The noise comes from a key of the client. In a deployment the client draws it from the operating system, and writes its
release to its disk before it leaves, so that a repeated round releases nothing else. In a simulation the key follows
from the run's seed, so that a run can be repeated, and whoever has the seed can subtract the noise.
Deviations: the decoder makes virtual tokens for a language model in place of images. In place of a classifier, the
global LoRA reads what is decoded and must give it the example's class (`class_weight`). The autoencoder is frozen
before the release. Latent vectors are clipped. The noise is that of the analytic Gaussian mechanism, on sums and
numbers by class. A mean has a value for each dimension; the released code collapses them to one number. The paper
selects usable means with the clients' models. Here a class is left out if its noisy number is small, or so small that
its mean would be mostly noise; this costs no privacy. Clients with free text, or with more than `max_options` answer
options, train and send the LoRA alone. All defaults are ours.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from typing_extensions import override

from fedamole.federation.autoencoder_request import AutoencoderRequest, AutoencoderResult
from fedamole.federation.method import Client, ClientInfo, Request, Server, TrainingRequest, TrainingResult, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.methods.feddm import MIN_ROWS_ACROSS_ORGANISATIONS
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.methods.shared.checks import check_at_least, check_between_0_and_1, check_not_negative, check_positive
from fedamole.methods.shared.latent_release import Decoding, Prompts, Release, release, synthetic_rows
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.params import Adapter, Shapes, new_shared
from fedamole.synthesis.dream_exchange import DreamTask
from fedamole.synthesis.latent_exchange import (
    LatentKept,
    LatentMessage,
    LatentReply,
    LatentState,
    expected_latents,
)
from fedamole.synthesis.latents import DECODER, AutoencoderSizes, new_autoencoder


@dataclass(frozen=True)
class FedDpms(LoraMethod[LatentState, LatentMessage, LatentKept, LatentReply]):
    """Clients release noisy class means of latent vectors, from which others decode examples of classes they lack."""

    weighting: Weighting = "uniform"
    """Weight of a client in the averages: uniform, or by its training examples."""
    epsilon: float = 8.0
    """Epsilon of a client's release, for one replaced example. It does not cover the LoRA and the autoencoder."""
    delta: float = 1e-5
    """Delta of a client's release; less than 1 / the number of a client's training examples."""
    warmup_rounds: int = 5
    """Rounds in which the autoencoder is trained, before any release."""
    own_share: float = 0.5
    """Share of the steps of a warm-up round for the LoRA; the autoencoder has the rest."""
    latent_size: int = 16
    """Size of a latent vector."""
    latent_norm: float = 3.0
    """Norm to which latent vectors are clipped; the noise is proportional to it."""
    hidden_size: int = 64
    """Units of the hidden layers of encoder and decoder."""
    virtual_tokens: int = 8
    """Virtual tokens of a synthetic example."""
    kl_weight: float = 0.05
    """Weight of the divergence of latent vectors from the standard normal distribution."""
    class_weight: float = 0.5
    """Weight of the cross-entropy of the class under the global LoRA, given what was decoded."""
    autoencoder_rate: float = 0.003
    """Adam's learning rate for the autoencoder."""
    real_examples: int = 64
    """Training examples from which the autoencoder is trained in a round, at most."""
    rare_below: int = 1
    """A client with fewer training examples of a class trains on synthetic ones; 1: of classes that it lacks."""
    examples_per_class: int = 16
    """Synthetic examples of such a class, at most; those of all classes are no more than the client's own."""
    latent_noise: float = 0.3
    """Standard deviation of the latent vectors of synthetic examples around the mean of their class."""
    min_class_examples: int | None = None
    """Smallest noisy number of examples of a class whose mean is released; unset: 2, and 20 across organisations."""
    max_prompt_tokens: int = 64
    """Tokens of the template's own text in a synthetic example, at most; of a longer text the last ones."""
    max_options: int = 16
    """Answer options of a client at most; one with more trains and sends the LoRA alone."""

    paper = "Chen and Vikalo, FL in Non-IID Settings Aided by Differentially Private Synthetic Data, arXiv 2206.00686"
    communicates = (
        "one LoRA up and down; in the warm-up an autoencoder up and down, then a decoder down, and noisy mean latent "
        "vectors by class up and down"
    )
    stays_local = "the data; in a deployment also the key of the noise"
    evaluates = "post_aggregation"
    accepts_newcomers = True
    sends_synthetic_examples = True
    only_answers = "its synthetic examples have one answer to a prompt"
    probes = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, warmup_rounds=1, latent_size=1, hidden_size=1, virtual_tokens=1, real_examples=1)
        check_at_least(self, rare_below=1, examples_per_class=1, min_class_examples=1)
        check_at_least(self, max_prompt_tokens=1, max_options=1)
        check_between_0_and_1(self, "own_share", "delta")
        check_positive(self, "epsilon", "latent_norm", "autoencoder_rate")
        check_not_negative(self, "kl_weight", "class_weight", "latent_noise")

    @override
    def for_deployment(self) -> "FedDpms":
        """Return the method with `min_class_examples` = 20 if it is unset."""
        return replace(self, min_class_examples=self.min_class_examples or MIN_ROWS_ACROSS_ORGANISATIONS)

    @override
    def min_synthetic_rows(self) -> int:
        return 2 if self.min_class_examples is None else self.min_class_examples

    @override
    def own_row_share(self) -> float:
        return 0.5

    @override
    def exposes(self, clients: int | None, shapes: Shapes | None) -> list[str]:
        return [
            *super().exposes(clients, shapes),
            "The coordinator gets mean latent vectors of a client's classes once, computed from all its training rows, "
            f"with noise for epsilon = {self.epsilon:g} and delta = {self.delta:g}, for one replaced row. The other "
            "clients with the same template and answer options get averages of them. Epsilon does not cover the LoRA "
            "and the autoencoder, which are sent without noise.",
        ]

    # server
    @override
    def init(self, server: Server) -> LatentState:
        sizes = AutoencoderSizes(self.hidden_size, self.latent_size, self.virtual_tokens)
        autoencoder = new_autoencoder(sizes, server.base.width, torch_generator(server.seed, "autoencoder"))
        lora = new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora"))
        return LatentState(lora, autoencoder, {}, {}, {})

    @override
    def message(self, state: LatentState, client: ClientInfo) -> LatentMessage:
        if client.name not in state.means:
            return LatentMessage(state.tensors, state.autoencoder, state.reader, state.task_means(client.name))
        decoder = {name: tensor for name, tensor in state.autoencoder.items() if name.startswith(DECODER)}
        return LatentMessage(state.tensors, decoder, {}, state.task_means(client.name))

    @override
    def aggregate(self, server: Server, state: LatentState, replies: Mapping[str, LatentReply]) -> LatentState:
        """Average the LoRA, in the warm-up also the autoencoder; later keep the means that clients release."""
        weights, tasks = server.weights(self.weighting), {name: reply.task for name, reply in replies.items()}
        loras = mean_by_key({name: it.tensors for name, it in replies.items()}, weights, state.tensors)
        known = {**state.tasks, **{name: task for name, task in tasks.items() if task}}
        if server.round < self.warmup_rounds:
            trained = {name: reply.autoencoder for name, reply in replies.items() if reply.task}
            autoencoder = mean_by_key(trained, weights, state.autoencoder)
            return replace(state, tensors=loras, autoencoder=autoencoder, tasks=known)
        means = {name: reply.means for name, reply in replies.items() if reply.means}
        reader = state.reader or state.tensors  # the LoRA that was sent in the first round after the warm-up
        return replace(state, tensors=loras, reader=reader, means={**state.means, **means}, tasks=known)

    @override
    def expected_reply(self, template: LatentReply, reply: LatentReply) -> LatentReply:
        return expected_latents(template, reply, self.max_options, self.latent_size, self.latent_norm)

    # client
    @override
    def init_client_state(self, client: Client) -> LatentKept:
        return LatentKept({})

    @override
    def adapter(self, client: Client, client_state: LatentKept, message: LatentMessage) -> Adapter:
        return Adapter(self.spec(), message.tensors)

    @override
    def update(
        self, client: Client, client_state: LatentKept, message: LatentMessage
    ) -> Generator[Request, Any, tuple[LatentKept, LatentReply, TrainingResult]]:
        start, outline = self.adapter(client, client_state, message), client.outline()
        task = DreamTask.of(outline, self.virtual_tokens, self.max_prompt_tokens, self.max_options)
        prompts = outline.class_prompts() if task.tokens else {}
        warmup = client.round < self.warmup_rounds
        request = TrainingRequest(
            start, extra=None if warmup else synthetic_rows(client, message, task, prompts, self.decoding)
        )
        autoencoder = message.autoencoder if warmup else {}
        if warmup and prompts:
            request = replace(request, step_fraction=self.own_share)
        trained: TrainingResult = yield request
        if warmup and prompts:
            made: AutoencoderResult = yield self.autoencoder_training(client, start, message, task, prompts)
            autoencoder = made.tensors
        how = Release(self.epsilon, self.delta, self.latent_norm, self.min_synthetic_rows())
        kept = release(client, client_state, message, self.spec(), prompts, None if warmup else how)
        means = {} if warmup else kept.means
        return (
            kept,
            LatentReply(trained.adapter.tensors, autoencoder, means, task.key if prompts else ""),
            trained,
        )

    @property
    def decoding(self) -> Decoding:
        """How synthetic examples are made."""
        return Decoding(self.rare_below, self.examples_per_class, self.latent_noise)

    def autoencoder_training(
        self, client: Client, adapter: Adapter, message: LatentMessage, task: DreamTask, prompts: Prompts
    ) -> AutoencoderRequest:
        """Return the request to train the autoencoder on a draw of the client's prompts, read under the adapter."""
        every = [(prompt, label) for label, of_class in sorted(prompts.items()) for prompt in of_class]
        generator = torch_generator(client.seed, "states", client.name, client.round)
        drawn = [every[i] for i in torch.randperm(len(every), generator=generator)[: self.real_examples].tolist()]
        return AutoencoderRequest(
            message.autoencoder,
            adapter,
            client.probe.prompt_hidden(adapter, [prompt for prompt, _ in drawn]),
            torch.tensor([label for _, label in drawn]),
            task.tokens,
            task.prompt,
            1 - self.own_share,
            self.kl_weight,
            self.class_weight if len(task.tokens) == len(client.outline().class_answers()) else 0.0,
            learning_rate=self.autoencoder_rate,
        )

    @override
    def reply(self, client: Client, client_state: LatentKept, message: LatentMessage, trained: TrainingResult) -> Any:
        return client_state, LatentReply(trained.adapter.tensors, {}, client_state.means)
