"""RegMean on LoRAs: Jin, Ren, Preotiuc-Pietro, Cheng, "Dataless Knowledge Fusion by Merging Weights of Language
Models", ICLR 2023, https://arxiv.org/abs/2212.09849.

One round:
    1. The server sends the global LoRA to the selected clients.
    2. Each client trains it and sends it back. In a merging round it also sends the second moments G = mean of x x^T
       of each module's inputs under the trained LoRA.
    3. The server averages the LoRAs (FedAvg). In a merging round it takes the change of the base whose outputs are
       nearest to each client's own on that client's inputs: (sum_i B_i A_i G_i) (sum_i G_i)^-1, truncated to the rank.
The last round is a merging round, and every `moments_every`-th. A client's model is the global LoRA, scored after the
aggregation.
Deviations: the paper merges full models once, after training; here LoRAs are averaged in the rounds before. The change
has the LoRA's rank: it is truncated in the metric of the summed moments. Moments are those of prompts and answers of
the embedding split, not of the training data. With `federation.patience` a run may stop before its last round, so
that `moments_every` must then be set, to at most the patience: so a round has merged before the run can stop.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, ClientInfo, Server, TrainingResult, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import Nothing
from fedamole.federation.settings import FederationSettings
from fedamole.merging.low_rank import padded
from fedamole.merging.moments import from_tensors, input_modules, shrink, to_tensors
from fedamole.merging.regmean import check_off_diagonal, regmean
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.methods.shared.checks import check_at_least
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.params import Adapter, Shapes, new_shared, shared_keys


@dataclass(frozen=True)
class GlobalLora:
    """Server state and message: the global LoRA, and whether clients return moments in the coming round."""

    tensors: Mapping[str, Tensor]
    merges: bool


@dataclass(frozen=True)
class LoraWithMoments:
    """Reply: the trained LoRA, and in a merging round the moments of the inputs, as `merging/moments.py` packs them."""

    tensors: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]
    """By module; modules that read the same input have it once, under the first of their names."""


@dataclass(frozen=True)
class RegMean(LoraMethod[GlobalLora, GlobalLora, Nothing, LoraWithMoments]):
    """LoRAs that are merged by least squares on the clients' inputs."""

    off_diagonal: float = 0.9
    """Factor alpha of the off-diagonal values of the moments (the paper: 0.1 to 1; 1 is best with many tokens)."""
    moments_every: int = 0
    """Rounds between two merging rounds, beside the last round; 0: only the last round merges. With
    `federation.patience`, from 1 to the patience, because a run that stops early has no last round to merge in."""
    moments_examples: int = 64
    """Largest number of examples whose inputs enter the moments."""
    moments_rank: int = 0
    """Eigenvectors of the moments that are sent, with the rest of the diagonal; 0: the moments themselves."""
    weighting: Weighting = "uniform"
    """Weight of a client in averages and merges: uniform, or by its training examples."""

    paper = "Jin et al., Dataless Knowledge Fusion by Merging Weights (RegMean), ICLR 2023, arXiv 2212.09849"
    communicates = "one LoRA down, one LoRA up; in merging rounds also the second moments of the modules' inputs up"
    stays_local = "the data"
    evaluates = "post_aggregation"
    probes = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_off_diagonal(self.off_diagonal, "method.off_diagonal")
        check_at_least(self, moments_examples=1)
        for key in ("moments_every", "moments_rank"):
            if getattr(self, key) < 0:
                raise ConfigError(f"method.{key} = {getattr(self, key)}: must not be negative")

    @override
    def check_federation(self, federation: FederationSettings) -> None:
        """Raise a ConfigError if `patience` could stop the run before any round has merged."""
        patience, every = federation.patience, self.moments_every
        if patience and not 1 <= every <= patience:  # a run stops after `patience` rounds at the earliest
            raise ConfigError(
                f"federation.patience = {patience} with method.moments_every = {every}: the run could stop early "
                f"without ever merging; set method.moments_every to a number from 1 to {patience}, or "
                "federation.patience to 0"
            )

    @override
    def exposes(self, clients: int | None, shapes: Shapes | None) -> list[str]:
        return [
            *super().exposes(clients, shapes),
            "In merging rounds the coordinator gets the second moments of each module's inputs over the embedding "
            "split. They are a function of the data and hide nothing by themselves: in the first layer they say which "
            "words occur together, and with fewer tokens than a module has inputs they determine the tokens' span.",
        ]

    def merges(self, server: Server, round_: int) -> bool:
        """Return whether a round is a merging round."""
        return round_ == server.rounds - 1 or (self.moments_every > 0 and (round_ + 1) % self.moments_every == 0)

    # server
    @override
    def init(self, server: Server) -> GlobalLora:
        lora = new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora"))
        return GlobalLora(lora, self.merges(server, 0))

    @override
    def message(self, state: GlobalLora, client: ClientInfo) -> GlobalLora:
        return state

    @override
    def aggregate(self, server: Server, state: GlobalLora, replies: Mapping[str, LoraWithMoments]) -> GlobalLora:
        """Merge the replies that have moments, or average; a DataError for moments that are not positive."""
        weights = server.weights(self.weighting)
        with_moments = {name: replies[name] for name in sorted(replies) if replies[name].moments}
        if with_moments:
            tensors = self._merged(server.shapes, with_moments, weights)
        else:
            tensors = mean_by_key({name: reply.tensors for name, reply in replies.items()}, weights, state.tensors)
        return GlobalLora(tensors, self.merges(server, server.round + 1))

    def _merged(
        self, shapes: Shapes, replies: Mapping[str, LoraWithMoments], weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        total, tensors = sum(weights[name] for name in replies), dict[str, Tensor]()
        source = ""
        for module, source_of in sorted(input_modules(shapes).items(), key=lambda pair: (pair[1], pair[0])):
            if source_of != source:  # unpacked once for all modules that read the same input
                source = source_of
                grams = [
                    shrink(from_tensors(reply.moments[source], f"client {name}, {source}"), self.off_diagonal)
                    * (weights[name] / total)
                    for name, reply in replies.items()
                ]
            a, b = shared_keys(module)
            factors = [(reply.tensors[a], reply.tensors[b]) for reply in replies.values()]
            tensors[a], tensors[b] = padded(regmean(factors, grams, self.rank), self.rank)
        return tensors

    @override
    def expected_reply(self, template: LoraWithMoments, reply: LoraWithMoments) -> LoraWithMoments:
        """Return the template; raise a DataError for moments that are not positive, which `aggregate` cannot use."""
        for module, packed in reply.moments.items():
            from_tensors(packed, module)
        return template

    # client
    @override
    def adapter(self, client: Client, client_state: Nothing, message: GlobalLora) -> Adapter:
        return Adapter(self.spec(), message.tensors)

    @override
    def reply(
        self, client: Client, client_state: Nothing, message: GlobalLora, trained: TrainingResult
    ) -> tuple[Nothing, LoraWithMoments]:
        """Return the trained LoRA; in a merging round, read the embedding split for the moments."""
        packed: dict[str, dict[str, Tensor]] = {}
        if message.merges:
            moments = client.probe.moments(trained.adapter, self.moments_examples)
            for module in sorted(set(input_modules(client.shapes).values())):
                packed[module] = to_tensors(moments[module].mean, self.moments_rank)
        return client_state, LoraWithMoments(trained.adapter.tensors, packed)
