"""Preferences: the loss of direct preference optimisation (DPO), and how often a model prefers the preferred answer.

Source: Rafailov, Sharma, Mitchell, Ermon, Manning, Finn, "Direct Preference Optimization: Your Language Model is
Secretly a Reward Model", NeurIPS 2023, https://arxiv.org/abs/2305.18290.

The log-probability of an answer is the sum over its tokens, with the end marker. Its *log ratio* is its log-probability
under the model minus that under the reference model, which is the untuned base. The *margin* of a pair is the log ratio
of the chosen answer minus that of the rejected one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fedamole.evaluation.likelihood import by_length
from fedamole.model.adapter_store import AdapterStore
from fedamole.model.bank import Bank
from fedamole.model.batch import Batch, Ids, collate, token_losses

AnswerPair = tuple[Ids, tuple[Ids, Ids]]
"""Token ids of a prompt, and of its chosen and its rejected answer."""


def dpo_losses(margins: Tensor, beta: float) -> Tensor:
    """Return -log sigmoid(beta * margin) of each pair, in nats, in the shape of `margins`."""
    return -F.logsigmoid(beta * margins)


def preference_scores(log_probabilities: Tensor, reference: Tensor) -> dict[str, float]:
    """Return the percentages of pairs in which a model prefers the chosen answer; a tie counts half.

    `preference` compares log ratios, as the loss does: the untuned base has 50. `ranking_accuracy` compares the
    log-probabilities themselves, so that the shorter answer of a pair is at an advantage. Both tensors are (N, 2) with
    the log-probabilities of the chosen and the rejected answers, of the model and of the reference.
    """

    def percentage(values: Tensor) -> float:
        differences = values[:, 0] - values[:, 1]
        return 100.0 * float(((differences > 0).double() + 0.5 * (differences == 0).double()).mean())

    ranking = percentage(log_probabilities)
    return {"preference": percentage(log_probabilities - reference), "ranking_accuracy": ranking}


def sequence_log_probabilities(logits: Tensor, batch: Batch) -> Tensor:
    """Return the log-probability of the answer of each row of a batch (rows), from its logits (K, V)."""
    rows = batch.logit_indices
    if batch.sequences is None:
        rows = rows.div(batch.ids.shape[1], rounding_mode="floor")
    else:
        rows = batch.sequences.owner.index_select(0, rows)
    losses = token_losses(logits, batch.labels)
    return -losses.new_zeros(sum(map(len, batch.prompts))).index_add(0, rows, losses)


def pair_log_probabilities(
    bank: Bank, clients: Sequence[Sequence[AnswerPair]], batch_tokens: int, reference: bool = False
) -> list[Tensor]:
    """Return the log-probabilities (N, 2) of the chosen and the rejected answers of each client's pairs, float64.

    The model is each client's loaded adapter, or with `reference` the untuned base.
    """
    if reference:
        with bank.lent(AdapterStore(bank.base, []), 0, 0):
            return pair_log_probabilities(bank, clients, batch_tokens)
    keys = [(client, i) for client, pairs in enumerate(clients) for i in range(2 * len(pairs))]
    rows = [
        (bank.prefix(prompt), answer) for pairs in clients for prompt, answers in pairs for answer in answers
    ]  # the chosen answer of a client's pair p is its row 2 p, the rejected one its row 2 p + 1
    results = [torch.zeros(2 * len(pairs), dtype=torch.float64) for pairs in clients]
    bank.select_clients(0, bank.clients)
    with torch.no_grad():
        for group in by_length([len(prompt) + len(answer) for prompt, answer in rows], batch_tokens):
            group.sort()  # groups the rows by client
            by_client = [[rows[i] for i in group if keys[i][0] == client] for client in range(len(clients))]
            batch = collate(by_client, bank.base.pad_id, bank.packs, device=bank.base.device)
            with bank.forward(batch) as logits:
                values = sequence_log_probabilities(logits, batch).double().cpu()
            for i, value in zip(group, values, strict=True):
                client, row = keys[i]
                results[client][row] = value
    return [values.view(-1, 2) for values in results]


def margins_of(log_probabilities: Tensor, reference: Tensor) -> Tensor:
    """Return the margins (N) of pairs from their log-probabilities (N, 2) under the model and the reference."""
    ratios = log_probabilities - reference
    return ratios[:, 0] - ratios[:, 1]
