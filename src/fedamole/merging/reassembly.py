"""Reassembly of models from layers: which layers compute alike, and which models can be built from them.

Source: Wang, Yang, Cui, Gai, Li, Zhang, Yan, "Towards Personalized Federated Learning via Heterogeneous Model
Reassembly" (pFedHR), NeurIPS 2023, https://arxiv.org/abs/2308.08643. The similarity of layers is the linear CKA of
Kornblith, Norouzi, Lee, Hinton, "Similarity of Neural Network Representations Revisited", ICML 2019,
https://arxiv.org/abs/1905.00414.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fedamole.model.params import Tensors, layer_of, layers_of

Labels = NDArray[np.int64]


def cka(states: Tensor) -> Tensor:
    """Return the linear CKA (P, P), float64, of P representations (P, n, d) of the same n examples.

    It is 1 for representations that are equal up to rotation and scale, and 0 beside one that is the same for all
    examples.
    """
    centred = states.double() - states.double().mean(1, keepdim=True)
    grams = centred @ centred.transpose(1, 2)
    unit = F.normalize(grams.flatten(1), dim=1)
    return unit @ unit.T


def layer_groups(similarities: Tensor, groups: int, seed: int) -> Labels:
    """Return the group of each of P layers by K-means on the rows of their similarities (P, P); at most P groups."""
    from sklearn.cluster import KMeans

    rows = similarities.numpy().round(9)  # sums of another order must not decide
    distinct = len(np.unique(rows, axis=0))
    labels: Labels = KMeans(min(groups, distinct), n_init=10, random_state=seed).fit_predict(rows).astype(np.int64)
    return labels


def candidates(
    groups: Mapping[str, Sequence[int]], client: str, count: int, rng: np.random.Generator
) -> list[tuple[str, ...]]:
    """Draw at most `count` different candidates for a client's teacher: a donor for each layer.

    `groups` has the groups of each client's layers. The donor of a layer is one of the other clients whose layer of
    this place is in the group of the client's own, or any other client if there is none. So a candidate has the groups
    of the client's own model, in their order.
    """
    own, others = groups[client], [name for name in sorted(groups) if name != client]
    donors = [[name for name in others if groups[name][place] == group] or others for place, group in enumerate(own)]
    drawn = [tuple(each[int(rng.integers(len(each)))] for each in donors) for _ in range(count)]
    return list(dict.fromkeys(drawn))


def reassembled(loras: Mapping[str, Tensors], donors: Sequence[str]) -> dict[str, Tensor]:
    """Return the LoRA whose tensors of each layer, the lowest first, are those of this layer's donor."""
    first = loras[donors[0]]
    donor_of = dict(zip(layers_of(first), donors, strict=True))
    return {name: loras[donor_of[layer_of(name)]][name] for name in first}


def mean_cosine(first: Tensor, second: Tensor) -> float:
    """Return the mean over n examples of the cosine of two models' logits (n, V)."""
    return float(F.cosine_similarity(first.double(), second.double(), dim=1).mean())


def nearest(logits: Tensor, others: Sequence[Tensor]) -> int:
    """Return the index of the first of the logits (n, V) whose mean cosine to a client's `logits` is the highest."""
    return int(torch.tensor([mean_cosine(logits, other) for other in others]).argmax())
