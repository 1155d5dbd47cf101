"""Fed-ET: Cho, Manoel, Joshi, Sim, Dimitriadis, "Heterogeneous Ensemble Knowledge Transfer for Training Large Models in
Federated Learning", IJCAI 2022, https://arxiv.org/abs/2204.12703.

One round:
    1. The server sends each selected client the LoRA of its group; the clients of a group have one rank.
    2. Each client trains it and sends it back. The server averages the LoRAs of each group.
    3. The server reads public prompts under each client's LoRA. The weight of a client on a prompt is the variance of
       its log-probabilities over the classes. The class with the largest weighted mean of the logits is the consensus;
       the diversity target is the same mean over those clients alone that choose another class.
    4. The server trains a LoRA of its own, larger base with cross-entropy on the consensus + `diversity_weight` times
       the KL divergence from the diversity target.
    5. It trains the LoRA of each group to follow the distributions of its own model on the same prompts.
A client's model is the LoRA of its group, scored after the aggregation. The server needs public prompts
(`[data.public]`), whose answers are not read. The classes are the first tokens of a prompt's options. A prompt without
options has the tokens that the clients' models find the most probable.
Deviations: the clients' architectures are ranks of a LoRA on one base. The server's base has the same tokenizer, and is
that base itself unless `server_base` names another. Step 5 stands in for the head that server and clients share in the
paper, and the LoRA of the server starts fresh instead of from the mean of the heads. Optimiser, learning rate and batch
size are those of `[training]` (the paper: SGD); `transfer_steps` is ours, and of free text only the first token
counts. Rows with a diversity target have the loss (cross-entropy + weight * KL) / (1 + weight). The server's model is
not scored or saved as a personal model; metrics.jsonl has its agreement with the consensus. As in the paper, a client
whose model is very certain has a large weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.data.tokens import TokenRow
from fedamole.errors import ConfigError
from fedamole.federation.distillation import Distillation
from fedamole.federation.method import ClientInfo, Server, TrainingRequest
from fedamole.federation.randomness import numpy_generator, torch_generator
from fedamole.methods.shared.averaging import SharedTensors, mean_by_key
from fedamole.methods.shared.checks import check_at_least
from fedamole.methods.shared.ensemble import (
    Consensus,
    PromptClasses,
    class_logits,
    consensus,
    ordered_rows,
    prompt_classes,
)
from fedamole.methods.shared.ranks import RankedLoraMethod, rank_of
from fedamole.model.batch import Ids, TokenPair
from fedamole.model.params import Adapter, Tensors, new_shared
from fedamole.synthesis.rows import ExtraRows, SoftLabels


@dataclass(frozen=True)
class EnsembleState:
    """Server state."""

    groups: Mapping[str, Mapping[str, Tensor]]
    """The LoRA of each group, by the group's rank."""
    ranks: dict[str, int]
    """The rank of each client."""
    server: Mapping[str, Tensor]
    """The LoRA of the server's base; empty before its first training."""


@dataclass(frozen=True)
class FedEt(RankedLoraMethod[EnsembleState]):
    """One LoRA per rank, and a larger model at the server that learns from all clients' models and teaches them."""

    ranks: tuple[int, ...] = ()
    """Ranks assigned to the clients in turn, by name; empty: half, once and twice `rank`."""
    server_base: str = ""
    """A base that the server alone loads, named as in `base.model`, with the same tokenizer; empty: the base of the
    federation."""
    diversity_weight: float = 0.05
    """Weight of the divergence from the diversity target."""
    server_steps: int = 128
    """Optimiser steps of the server's model in a round."""
    transfer_steps: int = 32
    """Optimiser steps of each group's LoRA at the server in a round."""
    public_prompts: int = 64
    """Public prompts that the server reads at most; of more, a draw that is the same in all rounds."""
    free_text_tokens: int = 8
    """Classes of a public prompt without options: the most probable next tokens."""

    paper = "Cho et al., Heterogeneous Ensemble Knowledge Transfer (Fed-ET), IJCAI 2022, arXiv 2204.12703"
    communicates = "a LoRA of the client's rank down, the same up"
    stays_local = "the data"
    evaluates = "post_aggregation"
    trains_at_server = True
    needs_public_prompts = True
    only_answers = "its server's model gives distributions over one answer to a prompt"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.diversity_weight < float("inf"):
            raise ConfigError(f"method.diversity_weight = {self.diversity_weight}: must be at least 0")
        check_at_least(self, server_steps=1, transfer_steps=1, public_prompts=1, free_text_tokens=2)

    @override
    def second_base(self) -> str:
        return self.server_base

    @override
    def steps_at_server(self) -> int:
        return self.server_steps + self.transfer_steps * len(set(self.client_ranks()))

    def client_ranks(self) -> tuple[int, ...]:
        """Return the ranks that clients get in turn."""
        return self.ranks or self.half_once_twice()

    # server
    @override
    def init(self, server: Server) -> EnsembleState:
        ranks = self.in_turn(server.clients, self.client_ranks())
        groups = {
            str(rank): new_shared(server.shapes, rank, torch_generator(server.seed, f"lora/{rank}"))
            for rank in sorted(set(ranks.values()))
        }
        return EnsembleState(groups, ranks, {})

    @override
    def message(self, state: EnsembleState, client: ClientInfo) -> SharedTensors:
        return SharedTensors(state.groups[str(state.ranks[client.name])])

    @override
    def aggregate(self, server: Server, state: EnsembleState, replies: Mapping[str, SharedTensors]) -> EnsembleState:
        weights, groups = server.weights("uniform"), dict[str, Mapping[str, Tensor]]()
        for rank, lora in state.groups.items():
            members = {name: it.tensors for name, it in replies.items() if str(state.ranks[name]) == rank}
            groups[rank] = mean_by_key(members, weights, lora)
        rows, second = self.rows(server), server.on_second_base()
        prompts = [row.prompt for row in rows]
        adapters = [Adapter(self.spec_of(rank_of(it.tensors)), it.tensors) for _, it in sorted(replies.items())]
        logits = [server.read(adapter, prompts).logits for adapter in adapters]
        classes = prompt_classes(rows, logits, self.free_text_tokens)
        agreed = consensus(torch.stack([class_logits(each, classes) for each in logits]), classes.valid)

        lora = state.server or new_shared(second.shapes, self.rank, torch_generator(server.seed, "lora/server"))
        own = second.train(self.learning(lora, prompts, classes, agreed), self.server_steps).adapter
        chosen = class_logits(second.read(own, prompts).logits, classes)
        server.note(consensus_agreement=float((chosen.argmax(1) == agreed.labels).double().mean()))

        soft = SoftLabels(classes.ids.unsqueeze(1), chosen.softmax(1).unsqueeze(1))
        extra = ExtraRows(labelled(prompts, classes, chosen.argmax(1)), soft=soft)
        for rank, tensors in sorted(groups.items()):
            start = Adapter(self.spec_of(int(rank)), tensors)
            request = TrainingRequest(start, extra=extra, own_rows=False, distillation=Distillation(1.0))
            groups[rank] = server.train(request, self.transfer_steps).adapter.tensors
        return EnsembleState(groups, state.ranks, own.tensors)

    def rows(self, server: Server) -> list[TokenRow]:
        """Return the public prompts that are read in each round, each once."""
        rows = ordered_rows(server.public)
        order = numpy_generator(server.seed, "public", "server").permutation(len(rows)).tolist()
        return [rows[i] for i in sorted(order[: self.public_prompts])]

    def learning(
        self, lora: Tensors, prompts: Sequence[Ids], classes: PromptClasses, agreed: Consensus
    ) -> TrainingRequest:
        """Return the training of the server's model on the consensus and the diversity target."""
        rows, adapter = labelled(prompts, classes, agreed.labels), Adapter(self.spec(), lora)
        if not self.diversity_weight:
            return TrainingRequest(adapter, extra=ExtraRows(rows), own_rows=False)
        soft = SoftLabels(classes.ids.unsqueeze(1), agreed.dissent.unsqueeze(1))
        term = Distillation(self.diversity_weight / (1 + self.diversity_weight))
        return TrainingRequest(adapter, extra=ExtraRows(rows, soft=soft), own_rows=False, distillation=term)


def labelled(prompts: Sequence[Ids], classes: PromptClasses, labels: Tensor) -> tuple[TokenPair, ...]:
    """Return each prompt with the token of its class `labels[i]` as its answer."""
    tokens = classes.ids.gather(1, labels.unsqueeze(1)).squeeze(1).tolist()
    return tuple((prompt, (token,)) for prompt, token in zip(prompts, tokens, strict=True))
