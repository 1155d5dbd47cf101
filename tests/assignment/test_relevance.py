"""Relevance and choice probabilities against numbers worked out by hand."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedamole.assignment.relevance import ScoreError, choice_probabilities, relevance
from fedamole.errors import FedamoleError

Values = npt.NDArray[np.float64]

EXPERTS = ("expert-0", "expert-1")
CLIENTS = ("ward", "lab", "clinic")
E = np.array([[2.0, 0.0, 0.0, 4.0], [0.0, 1.0, 1.0, 0.0]])
T = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 3.0, 1.0, 0.0], [5.0, 5.0, 5.0, 5.0]])


def score(
    e: npt.NDArray[Any] = E,
    t: npt.NDArray[Any] = T,
    experts_known: tuple[bool, ...] = (True, True),
    clients_known: tuple[bool, ...] = (True, True, True),
    rank: int = 4,
) -> Values:
    return relevance(
        e,
        t,
        rank=rank,
        experts_known=np.array(experts_known),
        clients_known=np.array(clients_known),
        module="layers.3.q_proj",
        expert_ids=EXPERTS,
        client_ids=CLIENTS,
    )


def test_scores_by_hand() -> None:
    """e_0 = (2,0,0,4), t_ward = (1,0,0,1): dot 6, over sqrt(4): 3. e_1 . t_lab = 3 + 1 = 4: 2."""
    S = score()
    assert S.dtype == np.float64
    np.testing.assert_allclose(S, [[3, 0, 15], [0, 2, 5]])


def test_client_never_heard_of_gets_the_rows_mean_over_known_clients() -> None:
    """Row 0 over ward and lab: (3 + 0) / 2; row 1: (0 + 2) / 2. What its embedding holds is not read."""
    t = T.copy()
    t[2] = np.nan
    np.testing.assert_allclose(score(t=t, clients_known=(True, True, False)), [[3, 0, 1.5], [0.0, 2, 1]])


def test_expert_without_embedding_is_uniform() -> None:
    e = E.copy()
    e[0] = np.inf
    S = score(e=e, experts_known=(False, True))
    np.testing.assert_allclose(S[1], [0, 2, 5])
    np.testing.assert_allclose(choice_probabilities(S)[0], [1 / 3] * 3)


@pytest.mark.parametrize(
    ("experts_known", "clients_known"),
    [((False, False), (True, True, True)), ((True, True), (False, False, False))],
)
def test_nothing_known_is_uniform(experts_known: tuple[bool, ...], clients_known: tuple[bool, ...]) -> None:
    S = score(experts_known=experts_known, clients_known=clients_known)
    np.testing.assert_allclose(choice_probabilities(S), np.full((2, 3), 1 / 3))


def test_float32_is_scored_in_float64() -> None:
    """1e30 * 1e30 overflows float32 but not float64."""
    S = score(e=np.full((2, 4), 1e30, np.float32), t=np.full((3, 4), 1e30, np.float32))
    np.testing.assert_allclose(S, 2e60, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_embeddings_are_named(bad: float) -> None:
    e, t = E.copy(), T.copy()
    e[1, 2], t[2, 0] = bad, bad
    with pytest.raises(ScoreError, match=r"layers\.3\.q_proj.*expert-1.*position 2"):
        score(e=e)
    with pytest.raises(ScoreError, match=r"layers\.3\.q_proj.*client clinic.*position 0"):
        score(t=t)
    # The name is right also where the known ones are not the first ones.
    with pytest.raises(ScoreError, match="client clinic"):
        score(t=t, clients_known=(False, True, True))
    with pytest.raises(ScoreError, match="expert-1"):
        score(e=e, experts_known=(False, True))


def test_overflowing_score_names_module_expert_and_client() -> None:
    e, t = E.copy(), T.copy()
    e[1, 1], t[1, 1] = 1e200, 1e200
    with pytest.raises(ScoreError, match=r"layers\.3\.q_proj.*expert-1.*client lab.*1e\+200"):
        score(e=e, t=t)
    assert issubclass(ScoreError, FedamoleError)


def test_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expert_embeddings has shape \(2, 4\)"):
        score(rank=8)


def test_choice_probabilities_by_hand() -> None:
    """exp(0) : exp(ln 3) = 1 : 3. The softmax is over the clients, and large scores do not overflow."""
    P = choice_probabilities(np.array([[0.0, np.log(3)], [1e5, 1e5], [-1e5, 1e5]]))
    np.testing.assert_allclose(P, [[0.25, 0.75], [0.5, 0.5], [0.0, 1]])
