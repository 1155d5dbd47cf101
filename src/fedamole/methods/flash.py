"""FLASH on LoRAs: Chang, Ahmed, Krishnamurthy, Guler, Swami, Oymak, Roy-Chowdhury, "FLASH: Federated Learning Across
Simultaneous Heterogeneities", 2024, https://arxiv.org/abs/2402.08769.

One round:
    1. The server draws a linear model of rewards by Thompson sampling (`shared/bandit.py`) and selects the clients
       with the highest predicted rewards. With `federation.cohort = 1` all clients take part.
    2. It sends the global LoRA to the selected clients. Each trains it and sends it back with three numbers: the loss
       on the examples that it sets aside, before and after training, and the tokens that it trained on.
    3. The server averages the LoRAs and stores a context for each client that replied: its loss after training
       relative to that of other clients, the cosine distance of its update from the mean update, and its tokens. A
       fourth feature is the share of the run's rounds since the client was last asked.
    4. From round 1 on it updates the linear model. The reward of a client is the fraction of its loss that training
       saved, less the loss that remains, less `token_weight` times its tokens relative to the largest of all clients.
       Rewards, clipped to [-1, 1], and contexts are taken less their means over the round.
The model of every client is the global LoRA, scored after the aggregation.
Deviations: the paper's context and reward could not be obtained, so they are our choice. Tokens stand for latency: a
run that measured time would not be the same after it is resumed. Local training has no noise-robust loss. Round 0 is
not counted: in it every client, also one with wrong labels, learns the form of the answers. A client that has not
replied yet counts with the mean context.
Limits: a client with a harder task looks like one with wrong labels, so the clients should have similar tasks. Clients
report their own losses, so a dishonest one can be selected more often. A round with one client teaches nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, ClientInfo, Server, TrainingResult, Weighting
from fedamole.federation.randomness import numpy_generator, torch_generator
from fedamole.federation.record import Nothing
from fedamole.methods.shared.averaging import SharedTensors, mean_by_key
from fedamole.methods.shared.bandit import Array, LinearRewards, highest
from fedamole.methods.shared.checks import check_at_least
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.params import Adapter, Tensors, new_shared

FEATURES = 4
"""Features of a context: relative loss, distance of the update, relative tokens, time since the client was asked."""
PRIOR_PRECISION = 0.1
"""Below 1, because contexts and rewards are mostly well below 1 in size: with 1 a few rounds would teach too little."""
LARGEST = {"before": 20.0, "after": 20.0, "log_tokens": 30.0}
"""Largest value that each number of a report counts with."""
MIN_LOSS = 1e-6
"""Smallest loss before training, by which the saved loss is divided."""


@dataclass(frozen=True)
class Bandit:
    """Server state."""

    tensors: Mapping[str, Tensor]
    """The global LoRA."""
    rewards: Mapping[str, Tensor]
    """The linear model of rewards: `precision` (4, 4) and `response` (4), float64."""
    contexts: Mapping[str, Tensor]
    """By client that has replied: relative loss, distance of its update, log of its tokens (3), float64."""
    asked: dict[str, int]
    """Round in which a client was last asked to take part."""


@dataclass(frozen=True)
class Report:
    """Reply: the trained LoRA and what the server learns of the client."""

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Tensor]
    """`before` and `after`: mean loss in nats; `log_tokens`: log(1 + tokens trained on). 0-dimensional, as fractions of
    `LARGEST`, because a deployment bounds the norm of a reply."""


@dataclass(frozen=True)
class Flash(LoraMethod[Bandit, SharedTensors, Nothing, Report]):
    """FedIT whose clients are selected by the rewards that a contextual bandit predicts."""

    exploration: float = 0.05
    """Standard deviation of the drawn linear model, as a multiple of that of its posterior; 0: its mean."""
    token_weight: float = 0.1
    """Weight in a client's reward of its tokens, relative to the largest of all clients; 0: not counted."""
    probe_examples: int = 64
    """Largest number of examples on which a client computes its losses."""
    weighting: Weighting = "uniform"
    """Weight of a client in the average: uniform, or by its training examples."""

    paper = "Chang et al., FLASH: Federated Learning Across Simultaneous Heterogeneities, 2024, arXiv 2402.08769"
    communicates = "one LoRA down, one LoRA and three numbers (two losses, tokens) up"
    stays_local = "the data"
    evaluates = "post_aggregation"
    probes = True
    accepts_newcomers = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.exploration < float("inf"):
            raise ConfigError(f"method.exploration = {self.exploration}: must be a number of at least 0")
        if not 0 <= self.token_weight < float("inf"):
            raise ConfigError(f"method.token_weight = {self.token_weight}: must be a number of at least 0")
        check_at_least(self, probe_examples=1)

    # server
    @override
    def init(self, server: Server) -> Bandit:
        lora = new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora"))
        return Bandit(lora, _tensors(LinearRewards.prior(FEATURES, PRIOR_PRECISION)), {}, {})

    @override
    def select(self, server: Server, state: Bandit, available: Sequence[ClientInfo], count: int) -> Sequence[str]:
        """Select the clients with the highest rewards under a drawn model; equal ones at random."""
        names = [client.name for client in available]
        rng = numpy_generator(server.seed, "flash", "server", server.round)
        model = LinearRewards(state.rewards["precision"].numpy(), state.rewards["response"].numpy())
        scores = _features(server, state.contexts, state.asked, names) @ model.sample(self.exploration, rng)
        return [names[i] for i in highest(scores, count, rng)]

    @override
    def message(self, state: Bandit, client: ClientInfo) -> SharedTensors:
        return SharedTensors(state.tensors)

    @override
    def aggregate(self, server: Server, state: Bandit, replies: Mapping[str, Report]) -> Bandit:
        """Average the LoRAs, store the contexts of the clients that replied, and learn from their rewards."""
        names = sorted(replies)
        trained = {name: replies[name].tensors for name in names}
        tensors = mean_by_key(trained, server.weights(self.weighting), state.tensors)
        before, after, log_tokens = (
            np.clip([float(replies[name].numbers[key]) for name in names], 0.0, 1.0) * largest
            for key, largest in LARGEST.items()
        )
        # All losses fall during a run. Those of a round are moved to the mean that is known of its clients, so that
        # contexts of different rounds can be compared; otherwise a client that was seen early looks bad for ever.
        known = _features(server, state.contexts, state.asked, names)[:, 0]
        losses = after - after.mean() + known.mean()
        measured = np.stack([losses, _distances(trained, state.tensors), log_tokens], axis=1)
        contexts = {**state.contexts, **{name: torch.tensor(row) for name, row in zip(names, measured, strict=True)}}
        rewards = state.rewards
        if server.round > 0:
            features = _features(server, contexts, state.asked, names)
            earned = (before - after) / np.maximum(before, MIN_LOSS) - after - self.token_weight * features[:, 2]
            model = LinearRewards(rewards["precision"].numpy(), rewards["response"].numpy())
            relative = features - features.mean(axis=0)
            rewards = _tensors(model.updated(relative, np.clip(earned - earned.mean(), -1.0, 1.0)))
        # A client that was asked and failed counts too, otherwise the feature would make it wait for ever longer.
        asked = {**state.asked, **dict.fromkeys([*server.asked, *names], server.round)}
        return Bandit(tensors, rewards, contexts, asked)

    # client
    @override
    def adapter(self, client: Client, client_state: Nothing, message: SharedTensors) -> Adapter:
        return Adapter(self.spec(), message.tensors)

    @override
    def reply(
        self, client: Client, client_state: Nothing, message: SharedTensors, trained: TrainingResult
    ) -> tuple[Nothing, Report]:
        """Return the trained LoRA with its loss and that of the received one, on the same examples."""
        adapters = [self.adapter(client, client_state, message), trained.adapter]
        before, after = client.probe.losses(adapters, self.probe_examples)
        numbers = {"before": before, "after": after, "log_tokens": float(np.log1p(trained.tokens))}
        scaled = {key: torch.tensor(value / LARGEST[key], dtype=torch.float64) for key, value in numbers.items()}
        return client_state, Report(trained.adapter.tensors, scaled)


def _tensors(model: LinearRewards) -> dict[str, Tensor]:
    return {"precision": torch.from_numpy(model.precision), "response": torch.from_numpy(model.response)}


def _features(server: Server, contexts: Mapping[str, Tensor], asked: Mapping[str, int], names: Sequence[str]) -> Array:
    """Return the context (n, 4) of each client as it is before round `server.round`."""
    features = np.zeros((len(names), FEATURES))
    if contexts:
        known = {name: context.numpy() for name, context in contexts.items()}
        mean = np.mean([known[name] for name in sorted(known)], axis=0)
        features[:, :3] = [known.get(name, mean) for name in names]
        features[:, 2] = np.exp(features[:, 2] - max(context[2] for context in known.values()))
    waited = np.array([server.round - asked.get(name, -1) for name in names])
    features[:, 3] = waited / max(1, server.rounds)
    return features


def _distances(trained: Mapping[str, Tensors], sent: Tensors) -> Array:
    """Return 1 - cosine of each client's update with the mean update, in the order of the names; 1 where one is 0."""
    updates = torch.stack(
        [
            torch.cat([(trained[name][key] - sent[key]).double().flatten() for key in sorted(sent)])
            for name in sorted(trained)
        ]
    )
    distances: Array = (1 - torch.cosine_similarity(updates, updates.mean(0, keepdim=True))).numpy()
    return distances
