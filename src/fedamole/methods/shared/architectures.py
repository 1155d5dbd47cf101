"""Assignment of experts to clients, for all modules of a mixture: reverse selection or one of its ablations."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedamole.assignment.baselines import homogeneous, random_probabilities
from fedamole.assignment.relevance import Floats, Mask, Scores, choice_probabilities, relevance
from fedamole.assignment.reverse_selection import Bounds, select_for_remaining
from fedamole.federation.method import Server
from fedamole.federation.randomness import numpy_generator
from fedamole.model.params import Tensors, expert_name

Assignment = Literal["reverse", "random", "static", "homogeneous"]
Held = dict[str, dict[str, list[int]]]
"""Experts of each client, by module."""

Embeddings = Mapping[str, Mapping[str, Tensor]]
"""Embeddings (r) by module, and in it by expert or client."""


def by_expert_name(rows: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Return the embeddings of a module's experts with their names as keys instead of global ids."""
    return {expert_name(expert): row for expert, row in rows.items()}


def next_architectures(
    server: Server,
    expert_embeddings: Embeddings,
    client_embeddings: Embeddings,
    *,
    kind: Assignment,
    rank: int,
    experts: int,
    bounds: Bounds,
    round_: int,
) -> tuple[Held, dict[str, Tensor]]:
    """Solve the assignment of every module for a round; return the experts of each client and P (E, C), by module.

    P is random in round 0, when no embeddings exist, and for the kind "random". Errors: as
    `select_for_remaining` and `relevance`.
    """
    names = sorted(client.name for client in server.clients)
    ids = [expert_name(expert) for expert in range(experts)]

    P: dict[str, Scores] = {}
    for module in sorted(server.shapes):
        if round_ > 0 and kind != "random":
            e, experts_known = _rows(expert_embeddings.get(module, {}), ids, rank)
            t, clients_known = _rows(client_embeddings.get(module, {}), names, rank)
            scores = relevance(
                e,
                t,
                rank=rank,
                experts_known=experts_known,
                clients_known=clients_known,
                module=module,
                expert_ids=ids,
                client_ids=names,
            )
            P[module] = choice_probabilities(scores)
        else:
            rng = numpy_generator(server.seed, f"assignment/{module}", "server", round_)
            P[module] = random_probabilities(expert_ids=ids, client_ids=names, rng=rng)
    solve = homogeneous if kind == "homogeneous" else select_for_remaining
    chosen = solve(np.stack([*P.values()]), bounds, expert_ids=ids, client_ids=names)
    held = {
        module: {name: np.flatnonzero(X[:, c]).tolist() for c, name in enumerate(names)}
        for module, X in zip(P, chosen, strict=True)
    }
    return held, {module: torch.from_numpy(p) for module, p in P.items()}


def add_most_relevant(
    chosen: Mapping[str, Sequence[int]], probabilities: Mapping[str, Tensor], client: int, min_experts: int
) -> dict[str, list[int]]:
    """Add the most relevant experts of a client, by module, until it holds `min_experts`; return sorted experts.

    `probabilities` are P (E, C) by module, and `client` is the client's column.
    """
    held = {}
    for module, experts in chosen.items():
        relevance_of = probabilities[module][:, client].tolist()
        others = sorted(set(range(len(relevance_of))) - set(experts), key=lambda i: (-relevance_of[i], i))
        held[module] = sorted([*experts, *others[: max(0, min_experts - len(experts))]])
    return held


def _rows(known: Tensors, ids: Sequence[str], rank: int) -> tuple[Floats, Mask]:
    """Stack the last known embeddings of these experts or clients; the mask is False for those without any."""
    rows = [known.get(name, torch.zeros(rank)) for name in ids]
    return torch.stack(rows).numpy(), np.array([name in known for name in ids])
