"""Consensus of several models on public prompts, after Fed-ET (https://arxiv.org/abs/2204.12703), equations 3 to 5."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedamole.data.tokens import TokenRow
from fedamole.model.batch import Ids


class PromptClasses(NamedTuple):
    """The tokens among which models choose after each of n prompts."""

    ids: Tensor
    """(n, C): token ids; id 0 fills a row with fewer classes."""
    valid: Tensor
    """(n, C), bool: which of them are classes."""


class Consensus(NamedTuple):
    """What K models agree on for n prompts with up to C classes."""

    weights: Tensor
    """(K, n): weight of each model on each prompt; they sum to 1 over the models."""
    logits: Tensor
    """(n, C): weighted mean of the models' logits; -inf at classes that a prompt does not have."""
    labels: Tensor
    """(n): class with the largest of these logits."""
    dissent: Tensor
    """(n, C): the diversity target, a distribution; all 0 where every model chooses the label."""


def ordered_rows(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Return one row for each different prompt, in the order in which `prompt_states` returns them."""
    unique: dict[Ids, TokenRow] = {}
    for row in rows:
        unique.setdefault(row.prompt, row)
    return sorted(unique.values(), key=lambda row: (len(row.prompt), row.prompt))


def prompt_classes(rows: Sequence[TokenRow], logits: Sequence[Tensor], free_text_tokens: int) -> PromptClasses:
    """Return the classes of n rows: the first tokens of their options.

    A row without two options of different first tokens has as classes the `free_text_tokens` tokens with the highest
    mean probability under the models, of which `logits` (n, V) holds one tensor each.
    """
    ids: list[list[int]] = []
    for i, row in enumerate(rows):
        tokens = list(dict.fromkeys(option[0] for option in row.options))
        if len(tokens) < 2:
            mean = torch.stack([each[i].softmax(0) for each in logits]).nan_to_num().mean(0)
            tokens = mean.topk(min(free_text_tokens, len(mean))).indices.tolist()
        ids.append(tokens)
    widest = max(len(tokens) for tokens in ids)
    padded = torch.tensor([tokens + [0] * (widest - len(tokens)) for tokens in ids])
    valid = torch.tensor([[i < len(tokens) for i in range(widest)] for tokens in ids])
    return PromptClasses(padded, valid)


def class_logits(logits: Tensor, classes: PromptClasses) -> Tensor:
    """Return the logits (n, C) of the classes, from those of all tokens (n, V); -inf where there is no class."""
    return logits.gather(1, classes.ids).masked_fill(~classes.valid, -torch.inf)


def consensus(logits: Tensor, valid: Tensor) -> Consensus:
    """Return the consensus of K models from their class logits (K, n, C); `valid` (n, C) says which classes exist.

    The weight of a model on a prompt is the variance over the classes of its log-softmax, divided by the sum over the
    models; equal weights where all variances are 0. A model whose logits are not finite has the weight 0. The diversity
    target is the softmax of the weighted mean of the logits of those models alone that do not choose the label.
    """
    precise = logits.double().masked_fill(~valid, 0.0)
    usable = precise.isfinite().all(2)
    precise = precise.masked_fill(~usable.unsqueeze(2), 0.0)
    counts = valid.sum(1)
    # The log-softmax differs from the logits by a constant, which does not change their variance.
    centred = (precise - precise.sum(2, keepdim=True) / counts.unsqueeze(1)).masked_fill(~valid, 0.0)
    variances = centred.square().sum(2) / (counts - 1)
    variances = torch.where(variances.sum(0) > 0, variances, usable.double())
    weights = variances / variances.sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    mean = (weights.unsqueeze(2) * precise).sum(0).masked_fill(~valid, -torch.inf)
    labels = mean.argmax(1)
    choices = precise.masked_fill(~valid, -torch.inf).argmax(2)
    dissenting = weights * (choices != labels)
    total = dissenting.sum(0).unsqueeze(1)
    other = (dissenting.unsqueeze(2) * precise).sum(0) / total.clamp(min=torch.finfo(torch.float64).tiny)
    dissent = other.masked_fill(~valid, -torch.inf).softmax(1).masked_fill(total == 0, 0.0)
    return Consensus(weights, mean, labels, dissent.float())
