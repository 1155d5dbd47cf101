"""Relevance of each domain expert for each client's data, computed from embeddings (arXiv 2411.19128)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedamole.errors import FedamoleError

Floats = npt.NDArray[np.floating]
Scores = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


class ScoreError(FedamoleError):
    """An embedding, relevance score or choice probability is not finite or outside its range."""


def relevance(
    expert_embeddings: Floats,
    client_embeddings: Floats,
    *,
    rank: int,
    experts_known: Mask,
    clients_known: Mask,
    module: str,
    expert_ids: Sequence[str],
    client_ids: Sequence[str],
) -> Scores:
    """Compute the relevance of every expert for every client in one module: S[i, c] = e_i . t_c / sqrt(rank).

    Shapes: embeddings (E, rank) and (C, rank); masks (E,) and (C,), False for experts and clients without an embedding,
    whose rows are not read; result (E, C) in float64, always finite. A client without an embedding gets, for each
    expert, the mean over the known clients; an expert without one gets a constant row, that is a uniform row of P. The
    ids are used in error messages.
    Errors: `ScoreError` if a known embedding or its score is not finite; `ValueError` for wrong shapes.
    Source: arXiv 2411.19128, relevance in reverse selection. The rules for unknown embeddings are this project's.
    """
    E, C = len(expert_ids), len(client_ids)
    _check_shape("expert_embeddings", expert_embeddings, (E, rank))
    _check_shape("client_embeddings", client_embeddings, (C, rank))
    _check_shape("experts_known", experts_known, (E,))
    _check_shape("clients_known", clients_known, (C,))
    e = np.asarray(expert_embeddings[experts_known], dtype=np.float64)
    t = np.asarray(client_embeddings[clients_known], dtype=np.float64)
    known_experts = [expert_ids[i] for i in np.flatnonzero(experts_known).tolist()]
    known_clients = [client_ids[c] for c in np.flatnonzero(clients_known).tolist()]
    _check_finite(e, [f"the embedding of expert {i}" for i in known_experts], module)
    _check_finite(t, [f"the token embedding of client {c}" for c in known_clients], module)

    S = np.zeros((E, C))
    if len(e) == 0 or len(t) == 0:
        return S
    # The check below reports an overflow with the pair that caused it.
    with np.errstate(over="ignore", invalid="ignore"):
        scores = e @ t.T / np.sqrt(rank)
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        i, c = bad[0]
        raise ScoreError(
            f"module {module}: the relevance of expert {known_experts[i]} for client {known_clients[c]} is "
            f"{scores[i, c]}, because their embeddings are too large (up to {np.abs(e[i]).max():.3g} and "
            f"{np.abs(t[c]).max():.3g}); lower the learning rate"
        )
    S[experts_known] = scores.mean(axis=1, keepdims=True)
    S[np.ix_(experts_known, clients_known)] = scores
    return S


def choice_probabilities(scores: Scores) -> Scores:
    """Convert relevance to the probability that an expert chooses a client: softmax of each row.

    Shapes: (E, C) -> (E, C) in float64; each row sums to 1.
    Source: arXiv 2411.19128, step 6 of the round; the softmax is over clients, as experts choose clients.
    """
    S = np.asarray(scores, dtype=np.float64)
    exponentials = np.exp(S - S.max(axis=1, keepdims=True))
    P: Scores = exponentials / exponentials.sum(axis=1, keepdims=True)
    return P


def _check_shape(name: str, array: npt.NDArray[np.generic], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, but the ids and the rank require {shape}")


def _check_finite(rows: Scores, owners: Sequence[str], module: str) -> None:
    bad = np.argwhere(~np.isfinite(rows))
    if len(bad):
        row, column = bad[0]
        raise ScoreError(
            f"module {module}: {owners[row]} is not finite ({rows[row, column]} at position {column}); "
            "training has diverged: lower the learning rate or check that client's data"
        )
