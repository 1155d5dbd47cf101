"""Ablations of the assignment from the paper (arXiv 2411.19128), under the same bounds as reverse selection.

The third ablation, a static architecture, keeps the assignment of round 0 and needs no function here.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedamole.assignment.identity import sorted_index
from fedamole.assignment.min_cost_flow import Chosen
from fedamole.assignment.relevance import Scores
from fedamole.assignment.reverse_selection import Bounds, ceil_div, select_for_remaining


def random_probabilities(*, expert_ids: Sequence[str], client_ids: Sequence[str], rng: np.random.Generator) -> Scores:
    """Draw choice probabilities P uniformly at random, for round 0 and for every round of the random ablation.

    Shapes: result (E, C). Values are drawn in the order of sorted ids, so the order of the arguments does not matter.
    Source: arXiv 2411.19128, step 7 of the round.
    """
    P = np.empty((len(expert_ids), len(client_ids)))
    P[sorted_index(expert_ids, client_ids)] = rng.random(P.shape)
    return P


def homogeneous(P: Scores, bounds: Bounds, *, expert_ids: Sequence[str], client_ids: Sequence[str]) -> Chosen:
    """Give every client floor(E k_c / C) or ceil(E k_c / C) experts, chosen by relevance.

    Shapes: P and result (..., E, C). Errors: as `select_for_remaining`. max_experts remains a hard limit when clients
    have left permanently; min_experts follows from the equal numbers.
    Source: arXiv 2411.19128, the homogeneous ablation; floor and ceil for E k_c that is not a multiple of C.
    """
    # select_for_remaining raises the error for 0 clients; here C = 1 avoids a division by 0.
    E, C = len(expert_ids), max(len(client_ids), 1)
    choices = E * min(bounds.expert_choices, C)
    equal = replace(
        bounds,
        min_experts=min(choices // C, bounds.max_experts),
        max_experts=min(ceil_div(choices, C), bounds.max_experts),
    )
    return select_for_remaining(P, equal, expert_ids=expert_ids, client_ids=client_ids)
