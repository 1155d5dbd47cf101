"""A method with three exchanges in a round: two that train half of the steps each, and one that trains nothing."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.federation.method import Client, ClientInfo, Exchange, Records, Server, TrainingRequest, TrainingResult
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.params import Adapter, new_shared


@dataclass(frozen=True)
class Average:
    """Server state and message: one LoRA, and whether the client is to measure it instead of training it."""

    tensors: Mapping[str, Tensor]
    measures: Mapping[str, Tensor]
    """Mean loss of the LoRA over the clients in the last round, 0-d."""
    measure: bool = False


@dataclass(frozen=True)
class Trained:
    """Client state and reply: the LoRA that was trained last."""

    tensors: Mapping[str, Tensor]
    measures: Mapping[str, Tensor]


@dataclass(frozen=True)
class ThreeExchanges(LoraMethod[Average, Average, Trained, Trained]):
    """FedIT that averages twice in a round, then measures the average at the clients.

    A client starts each training from the mean of what it is sent and what it trained last, so its result depends on
    its state after the exchange before.
    """

    paper = "none: a method for tests"
    communicates = "one LoRA down, one LoRA up, twice; then one LoRA down, one number up"
    stays_local = "the data"
    records = Records(Average, Average, Trained, Trained)
    evaluates = "post_aggregation"

    @override
    def exchanges(self) -> int:
        return 3

    @override
    def init(self, server: Server) -> Average:
        tensors = new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora"))
        return Average(tensors, {"loss": torch.tensor(0.0)})

    @override
    def message(self, state: Average, client: ClientInfo) -> Average:
        return state

    @override
    def round(self, server: Server, state: Average, cohort: Sequence[ClientInfo], exchange: Exchange) -> Average:
        for _ in range(2):
            state = self.aggregate(server, state, exchange({client.name: state for client in cohort}))
        measured = exchange({client.name: Average(state.tensors, state.measures, True) for client in cohort})
        losses = {name: reply.measures for name, reply in measured.items()}
        return Average(state.tensors, mean_by_key(losses, server.weights("uniform"), state.measures))

    @override
    def aggregate(self, server: Server, state: Average, replies: Mapping[str, Trained]) -> Average:
        returned = {name: reply.tensors for name, reply in replies.items()}
        return Average(mean_by_key(returned, server.weights("uniform"), state.tensors), state.measures)

    @override
    def init_client_state(self, client: Client) -> Trained:
        return Trained({}, {})

    @override
    def adapter(self, client: Client, client_state: Trained, message: Average) -> Adapter:
        own = client_state.tensors
        return Adapter(self.spec(), {key: (t + own.get(key, t)) / 2 for key, t in message.tensors.items()})

    @override
    def update(
        self, client: Client, client_state: Trained, message: Average
    ) -> Generator[TrainingRequest, TrainingResult, tuple[Trained, Trained, TrainingResult]]:
        adapter = self.adapter(client, client_state, message)
        if message.measure:
            loss = torch.tensor(client.probe.losses([adapter], 4)[0])
            return client_state, Trained({}, {"loss": loss}), TrainingResult(adapter, 0, 0.0)
        result = yield TrainingRequest(adapter, step_fraction=0.5)
        return (*self.reply(client, client_state, message, result), result)

    @override
    def reply(
        self, client: Client, client_state: Trained, message: Average, trained: TrainingResult
    ) -> tuple[Trained, Trained]:
        record = Trained(trained.adapter.tensors, {})
        return record, record


def steps_by_exchange(lines: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], list[int]]:
    """Optimiser steps of each exchange, by round and client."""
    steps: dict[tuple[int, str], list[int]] = {}
    for line in lines:
        if line["split"] == "train":
            assert line.get("exchange", 0) == len(steps.setdefault((line["round"], line["client"]), []))
            steps[line["round"], line["client"]].append(line["steps"])
    return steps
