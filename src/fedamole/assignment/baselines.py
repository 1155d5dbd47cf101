"""The paper's ablations of the assignment (arXiv 2411.19128): the same bounds, other reasons to choose.

Its third ablation, a static architecture, keeps the assignment of round 0 and needs no function of its own.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedamole.assignment.identity import sorted_place
from fedamole.assignment.min_cost_flow import Chosen
from fedamole.assignment.relevance import Scores
from fedamole.assignment.reverse_selection import Bounds, ceil_div, select_for_remaining


def random_probabilities(*, expert_ids: Sequence[str], client_ids: Sequence[str], rng: np.random.Generator) -> Scores:
    """Draw P uniformly at random: the ground of round 0, and of the random ablation in every round.

    Shapes: result (E, C). The draw belongs to the ids in sorted order, so their order does not matter.
    Source: arXiv 2411.19128, step 7 of the round.
    """
    P = np.empty((len(expert_ids), len(client_ids)))
    P[sorted_place(expert_ids, client_ids)] = rng.random(P.shape)
    return P


def homogeneous(P: Scores, bounds: Bounds, *, expert_ids: Sequence[str], client_ids: Sequence[str]) -> Chosen:
    """Give every client floor or ceil of E k_c / C experts, chosen by relevance: no client is larger.

    Shapes: P and result (..., E, C). Errors: as `select_for_remaining`; max_experts stays a hard limit when
    clients have left for good, and min_experts follows from the equal shares.
    Source: arXiv 2411.19128, the homogeneous ablation; floor and ceil serve E k_c that C does not divide.
    """
    # At least one client keeps the shares defined; that there is none is refused below, with its reason.
    E, C = len(expert_ids), max(len(client_ids), 1)
    given = E * min(bounds.expert_choices, C)
    equal = replace(
        bounds,
        min_experts=min(given // C, bounds.max_experts),
        max_experts=min(ceil_div(given, C), bounds.max_experts),
    )
    return select_for_remaining(P, equal, expert_ids=expert_ids, client_ids=client_ids)
