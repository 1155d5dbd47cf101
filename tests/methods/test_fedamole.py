"""FedAMoLE's server, with every number worked out by hand.

The setting of most tests: one module m (2 -> 2), rank 1, three experts, three clients a, b, c; every expert chooses
2 clients and every client holds exactly 2 experts. Held before the round:

    expert 0 by a, b      expert 1 by b, c      expert 2 by a, c
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from fedamole.assignment.reverse_selection import Bounds
from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.record import pack
from fedamole.methods.fedamole import Experts, FedAmole, Pool, TrainedExperts
from fedamole.methods.shared.architectures import Embeddings
from fedamole.methods.shared.holders import limit_norms
from fedamole.model.layers import MeanEmbeddings

INFOS = (ClientInfo("a", 10), ClientInfo("b", 30), ClientInfo("c", 20))
HELD = {"a": [0, 2], "b": [0, 1], "c": [1, 2]}
METHOD = FedAmole(rank=1, experts=3, expert_choices=2, min_experts=2, max_experts=2, top_k=1)


def server(round_: int = 0, modules: tuple[str, ...] = ("m",), asked: tuple[str, ...] = ()) -> Server:
    return Server(BaseInfo(dict.fromkeys(modules, (2, 2))), INFOS, seed=0, round=round_, asked=asked)


def pool(**known: Embeddings) -> Pool:
    """A pool in which every tensor of expert i holds the number 100 + i, the shared ones 200, W_t 300."""
    tensors = {"m/router/W": torch.full((1, 2), 300.0)}
    for owner, value in (("expert-00", 100.0), ("expert-01", 101.0), ("expert-02", 102.0), ("shared", 200.0)):
        tensors |= {f"m/{owner}/A": torch.full((1, 2), value), f"m/{owner}/B": torch.full((2, 1), value)}
    embeddings = known.get("expert_embeddings", {}), known.get("client_embeddings", {})
    return Pool(tensors, *embeddings, {"m": torch.zeros(3, 3)}, {"m": HELD})


def reply(value: float, t: float, **e: float) -> TrainedExperts:
    """All tensors a client holds set to `value`; its mean embeddings t and e_i (rank 1)."""
    tensors = {"m/router/W": torch.full((1, 2), value)}
    for owner in (*(name.replace("_", "-") for name in e), "shared"):
        tensors |= {f"m/{owner}/A": torch.full((1, 2), value), f"m/{owner}/B": torch.full((2, 1), value)}
    means = {name.replace("_", "-"): torch.tensor([row]) for name, row in e.items()}
    return TrainedExperts(tensors, {"m": torch.tensor([t])}, {"m": means})


REPLIES = {
    "a": reply(1.0, 0.0, expert_00=0.5, expert_02=1.0),
    "b": reply(2.0, math.log(2), expert_00=1.5, expert_01=-2.0),
    "c": reply(6.0, math.log(3), expert_01=0.0, expert_02=3.0),
}
"""t = (0, ln 2, ln 3), so that softmax over the clients of e * t is (1, 2^e, 3^e), normalised."""


def number(tensors: Mapping[str, torch.Tensor], key: str) -> float:
    values = tensors[key].unique()
    assert len(values) == 1, key
    return float(values)


def test_a_round_by_hand() -> None:
    """Means over the holders, uniform:

        expert 0 (a, b): (1 + 2) / 2 = 1.5     expert 1 (b, c): (2 + 6) / 2 = 4     expert 2 (a, c): (1 + 6) / 2 = 3.5
        shared and W_t (a, b, c): (1 + 2 + 6) / 3 = 3
        e_0 = (0.5 + 1.5) / 2 = 1              e_1 = (-2 + 0) / 2 = -1              e_2 = (1 + 3) / 2 = 2

    Relevance S = e t / sqrt(1); P = softmax of each row = (1, 2^e, 3^e) / sum:

        e_0: (1, 2, 3) / 6            = (0.167, 0.333, 0.500)
        e_1: (1, 1/2, 1/3) / (11/6)   = (0.545, 0.273, 0.182)
        e_2: (1, 4, 9) / 14           = (0.071, 0.286, 0.643)

    Each expert leaves out one client and each client is left out once (2 of 3 everywhere). What is left out should
    sum to least: 0 leaves b (.333), 1 leaves c (.182), 2 leaves a (.071) = .587; the next best is 0 without a (.167),
    1 without c (.182), 2 without b (.286) = .634. So 0 goes to a, c; 1 to a, b; 2 to b, c.
    """
    after = METHOD.aggregate(server(), pool(), REPLIES)
    for owner, mean in (("expert-00", 1.5), ("expert-01", 4.0), ("expert-02", 3.5), ("shared", 3.0)):
        assert number(after.tensors, f"m/{owner}/A") == mean
        assert number(after.tensors, f"m/{owner}/B") == mean
    assert number(after.tensors, "m/router/W") == 3.0
    assert {key: float(row) for key, row in after.expert_embeddings["m"].items()} == {
        "expert-00": 1.0,
        "expert-01": -1.0,
        "expert-02": 2.0,
    }
    assert {key: float(row) for key, row in after.client_embeddings["m"].items()} == {
        "a": 0.0,
        "b": pytest.approx(math.log(2)),
        "c": pytest.approx(math.log(3)),
    }
    P = np.array([[1 / 6, 2 / 6, 3 / 6], [6 / 11, 3 / 11, 2 / 11], [1 / 14, 4 / 14, 9 / 14]])
    np.testing.assert_allclose(after.probabilities["m"].numpy(), P, atol=1e-6)
    assert after.held == {"m": {"a": [0, 1], "b": [1, 2], "c": [0, 2]}}


def test_weighting_by_examples() -> None:
    """Examples 10, 30, 20: expert 0 = (10 * 1 + 30 * 2) / 40 = 1.75, 1 = (30 * 2 + 20 * 6) / 50 = 3.6,
    2 = (10 * 1 + 20 * 6) / 30 = 13/3, shared = (10 + 60 + 120) / 60 = 19/6; e_0 = (10 * .5 + 30 * 1.5) / 40 = 1.25.
    """
    method = FedAmole(rank=1, experts=3, min_experts=2, max_experts=2, top_k=1, weighting="examples")
    after = method.aggregate(server(), pool(), REPLIES)
    assert number(after.tensors, "m/expert-00/A") == 1.75
    assert number(after.tensors, "m/expert-01/B") == pytest.approx(3.6)
    assert number(after.tensors, "m/expert-02/A") == pytest.approx(13 / 3)
    assert number(after.tensors, "m/shared/A") == pytest.approx(19 / 6)
    assert number(after.tensors, "m/router/W") == pytest.approx(19 / 6)
    assert float(after.expert_embeddings["m"]["expert-00"]) == 1.25


def test_experts_that_no_client_returned_keep_weights_and_embedding() -> None:
    """Only a was drawn: expert 1, which it does not hold, keeps 101 and its old embedding; t of b and c stay."""
    known = pool(
        expert_embeddings={"m": {"expert-01": torch.tensor([9.0]), "expert-00": torch.tensor([8.0])}},
        client_embeddings={"m": {"b": torch.tensor([7.0]), "a": torch.tensor([6.0])}},
    )
    after = METHOD.aggregate(server(asked=("a",)), known, {"a": REPLIES["a"]})
    assert number(after.tensors, "m/expert-01/A") == number(after.tensors, "m/expert-01/B") == 101.0
    assert number(after.tensors, "m/expert-00/A") == 1.0
    assert {key: float(row) for key, row in after.expert_embeddings["m"].items()} == {
        "expert-00": 0.5,
        "expert-01": 9.0,
        "expert-02": 1.0,
    }
    assert {key: float(row) for key, row in after.client_embeddings["m"].items()} == {"a": 0.0, "b": 7.0}


def test_the_unknown() -> None:
    """Only a and b were drawn, and c was never heard of: its score is each row's mean over a and b.

    Expert 0 has e = 1, t = (0, ln 2), so scores (0, ln 2, ln 2 / 2) and P = (1, 2, sqrt 2) / (3 + sqrt 2).
    Of expert 1, b alone tells e = -2: (1, 1/4, 1/2) / 1.75. With all of c's replies missing nothing is known of an
    expert that only c holds: its row would be uniform (second half).
    """
    after = METHOD.aggregate(server(asked=("a", "b")), pool(), {name: REPLIES[name] for name in ("a", "b")})
    root = math.sqrt(2)
    np.testing.assert_allclose(after.probabilities["m"][0], np.array([1, 2, root]) / (3 + root), atol=1e-6)
    np.testing.assert_allclose(after.probabilities["m"][1], np.array([1, 0.25, 0.5]) / 1.75, atol=1e-6)
    assert {len(held) for held in after.held["m"].values()} == {2}, "c is served as well"
    only_a = METHOD.aggregate(server(asked=("a",)), pool(), {"a": REPLIES["a"]})
    np.testing.assert_allclose(only_a.probabilities["m"][1], np.full(3, 1 / 3))


def brute_force(P: np.ndarray, bounds: Bounds) -> float:
    """The best sum of P * X over all X that keep the bounds."""
    best = -1.0
    for rows in itertools.product(itertools.combinations(range(P.shape[1]), bounds.expert_choices), repeat=len(P)):
        held = np.bincount([c for row in rows for c in row], minlength=P.shape[1])
        if held.min() >= bounds.min_experts and held.max() <= bounds.max_experts:
            best = max(best, sum(P[i, c] for i, row in enumerate(rows) for c in row))
    return best


def chosen_sum(state: Pool, module: str) -> float:
    names = sorted(state.held[module])
    return sum(float(state.probabilities[module][i, names.index(n)]) for n in names for i in state.held[module][n])


@pytest.mark.parametrize("seed", range(5))
def test_the_next_assignment_is_the_optimum(seed: int) -> None:
    """Five experts, random embeddings, bounds 1 .. 4: compared with all 3^5 assignments."""
    generator = torch.Generator().manual_seed(seed)
    method = FedAmole(rank=2, experts=5, expert_choices=2, min_experts=1, max_experts=4, top_k=1)
    state = method.init(server(modules=("m", "n")))
    replies = {}
    for info in INFOS:
        tensors = method.message(state, info).tensors
        experts = {
            module: {f"expert-{i:02d}": 3 * torch.randn(2, generator=generator) for i in state.held[module][info.name]}
            for module in ("m", "n")
        }
        tokens = {module: torch.randn(2, generator=generator) for module in ("m", "n")}
        replies[info.name] = TrainedExperts(tensors, tokens, experts)
    after = method.aggregate(server(modules=("m", "n")), state, replies)
    for module in ("m", "n"):
        best = brute_force(after.probabilities[module].numpy(), Bounds(2, 1, 4))
        assert chosen_sum(after, module) == pytest.approx(best, abs=1e-8)


def test_modules_are_assigned_each_on_its_own() -> None:
    state = FedAmole(rank=1).init(server(modules=("m", "n")))
    assert state.held["m"] != state.held["n"]


def test_the_message_holds_what_is_assigned_and_no_more() -> None:
    message = METHOD.message(pool(), INFOS[1])
    assert type(message) is Experts
    owners = ("router/W", "shared/A", "shared/B", "expert-00/A", "expert-00/B", "expert-01/A", "expert-01/B")
    assert set(message.tensors) == {f"m/{owner}" for owner in owners}


def test_experts_begin_each_with_its_own_draw_the_same_for_all_holders() -> None:
    state = METHOD.init(server())
    first = [state.tensors[f"m/expert-0{i}/A"] for i in range(3)]
    assert not torch.equal(first[0], first[1])
    assert all(not state.tensors[f"m/expert-0{i}/B"].any() for i in range(3))
    for info in INFOS:
        for i in state.held["m"][info.name]:
            assert torch.equal(METHOD.message(state, info).tensors[f"m/expert-0{i}/A"], first[i])


# --- the ablations --------------------------------------------------------------------------------------------


def after_round(assignment: Any, replies: Mapping[str, TrainedExperts], round_: int = 0) -> Pool:
    method = FedAmole(rank=1, experts=3, min_experts=1, max_experts=3, top_k=1, assignment=assignment)
    return method.aggregate(server(round_), pool(), replies)


def test_random_draws_anew_each_round_and_reads_no_embedding() -> None:
    swapped = {"a": REPLIES["a"], "b": reply(2.0, -5.0, expert_00=1.5, expert_01=4.0), "c": REPLIES["c"]}
    first, other = after_round("random", REPLIES), after_round("random", swapped)
    assert first.held == other.held
    assert torch.equal(first.probabilities["m"], other.probabilities["m"])
    assert not torch.equal(first.probabilities["m"], after_round("random", REPLIES, 1).probabilities["m"])
    assert after_round("reverse", REPLIES).held != after_round("reverse", swapped).held
    # Drawn or not, the experts themselves are averaged as ever.
    assert first.tensors["m/expert-00/A"].equal(after_round("reverse", REPLIES).tensors["m/expert-00/A"])


def test_static_keeps_round_0() -> None:
    assert after_round("static", REPLIES).held == {"m": HELD}
    assert number(after_round("static", REPLIES).tensors, "m/expert-01/A") == 4.0


@pytest.mark.parametrize(("round_", "renewed"), [(0, False), (1, False), (2, True), (3, False), (5, True)])
def test_the_assignment_is_renewed_every_third_round(round_: int, renewed: bool) -> None:
    """In between, clients keep their experts, and the experts are averaged as ever."""
    method = dataclasses.replace(METHOD, assign_every=3)
    after, usual = method.aggregate(server(round_), pool(), REPLIES), METHOD.aggregate(server(round_), pool(), REPLIES)
    assert usual.held != {"m": HELD}
    assert after.held == (usual.held if renewed else {"m": HELD})
    assert pack(dataclasses.replace(after, held=usual.held, probabilities=usual.probabilities)) == pack(usual)


def test_an_assignment_is_not_renewed_every_0_rounds() -> None:
    with pytest.raises(ConfigError, match=r"method.assign_every = 0: must be at least 1"):
        dataclasses.replace(METHOD, assign_every=0).check(3)


def test_a_new_client_is_chosen_whatever_the_round() -> None:
    """A finished run's round is no multiple of `assign_every`; the new client d gets experts all the same."""
    info, embedding = ClientInfo("d", 10), MeanEmbeddings(torch.tensor([1.0]), {})
    state, joined = METHOD.aggregate(server(), pool(), REPLIES), dataclasses.replace(server(4), clients=(*INFOS, info))
    lazy = dataclasses.replace(METHOD, assign_every=50)
    results = [method.newcomer(joined, state, info, lambda adapter: {"m": embedding}) for method in (METHOD, lazy)]
    assert pack(results[0].message) == pack(results[1].message)
    assert results[0].report == results[1].report


def test_three_holders_per_expert_and_two_experts_per_client_are_one_setting() -> None:
    """k_c = 3 and E = 2 C for any number of clients: the traffic of E = 3 C, k_c = 2, in groups of three."""
    for clients in (3, 10, 25):
        method = FedAmole(min_holders=3)
        method.check(clients)
        assert (method.pool_size(clients), method.bounds(clients).expert_choices) == (2 * clients, 3)
        explicit = FedAmole(experts=2 * clients, expert_choices=3)
        explicit.check(clients)
        assert explicit.bounds(clients) == method.bounds(clients)


def test_homogeneous_gives_floor_or_ceil_by_relevance() -> None:
    """8 experts x 2 choices over 3 clients: 5, 5 and 6 each, though reverse selection may give 2 to 8.

    All experts want b and c (P = (1, 2, 3) / 6): reverse gives c 8 and b 6, a its least, 2.
    """
    cases: list[tuple[Any, list[int]]] = [("homogeneous", [5, 5, 6]), ("reverse", [2, 6, 8])]
    for assignment, sizes in cases:
        method = FedAmole(rank=1, experts=8, assignment=assignment)
        state = method.init(server())
        ids = [f"expert-{i:02d}" for i in range(8)]
        replies = {
            info.name: TrainedExperts(
                {},
                {"m": REPLIES[info.name].token_embedding["m"]},
                {"m": {name: torch.tensor([1.0]) for name in ids}},
            )
            for info in INFOS
        }
        held = method.aggregate(server(), state, replies).held["m"]
        assert sorted(len(experts) for experts in held.values()) == sizes
        assert len(held["a"]) == min(sizes)
    assert len(held["c"]) == 8


def test_round_0_is_drawn_and_depends_on_the_seed() -> None:
    """No embeddings exist yet: P is random, and the bounds hold."""
    draws = []
    for seed in range(4):
        state = FedAmole(rank=1, experts=9).init(Server(BaseInfo({"m": (2, 2)}), INFOS, seed))
        counts = [len(experts) for experts in state.held["m"].values()]
        assert sum(counts) == 18
        assert min(counts) >= 2
        assert max(counts) <= 8
        draws.append(state.held)
    assert len({str(draw) for draw in draws}) > 1


def test_the_journal_tells_who_holds_what_for_which_relevance() -> None:
    lines = list(METHOD.assignment_log(METHOD.aggregate(server(), pool(), REPLIES)))
    assert [(line["module"], line["client"], line["experts"]) for line in lines] == [
        ("m", "a", [0, 1]),
        ("m", "b", [1, 2]),
        ("m", "c", [0, 2]),
    ]
    assert lines[0]["relevance"] == pytest.approx([1 / 6, 6 / 11], abs=1e-6)


# --- numbers of experts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clients", "experts", "choices"), [(1, 3, 1), (2, 6, 2), (10, 30, 2)])
def test_defaults_follow_the_number_of_clients(clients: int, experts: int, choices: int) -> None:
    """E = 3 C and k_c = min(2, C): with two clients or more each holds 6 on average, alone 3."""
    method = FedAmole()
    assert method.pool_size(clients) == experts
    assert method.bounds(clients) == Bounds(choices, 2, 8)
    method.check(clients)


CASES: list[tuple[dict[str, Any], int, str, dict[str, Any]]] = [
    # 4 clients x at least 2 = 8 > 3 x 2 = 6
    (
        {"experts": 3},
        4,
        r"min_experts x clients <= experts x expert_choices fails: 2 x 4 = 8 > 3 x 2 = 6",
        {"experts": 4},
    ),
    # 20 x 2 = 40 > 8 x 4 = 32
    (
        {"experts": 20},
        4,
        r"experts x expert_choices <= max_experts x clients fails: 20 x 2 = 40 > 8 x 4 = 32",
        {"experts": 16},
    ),
    ({"expert_choices": 5}, 4, r"expert_choices <= clients fails: 5 > 4", {"expert_choices": 2}),
    ({"min_experts": 5, "max_experts": 4}, 4, r"min_experts <= max_experts fails: 5 > 4", {"max_experts": 6}),
]


@pytest.mark.parametrize(("numbers", "clients", "inequality", "remedy"), CASES)
def test_infeasible_numbers_name_the_inequality_and_a_value_that_works(
    numbers: dict[str, Any], clients: int, inequality: str, remedy: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=inequality) as caught:
        FedAmole(**numbers).check(clients)
    [(name, value)] = remedy.items()
    assert f"{name} to {value}" in str(caught.value)
    FedAmole(**{**numbers, **remedy}).check(clients)


def test_more_experts_asked_of_a_token_than_a_client_holds() -> None:
    with pytest.raises(ConfigError, match=r"top_k = 3 .* only .*2: set top_k to 2 or .*min_experts to 3"):
        FedAmole(top_k=3).check(4)
    FedAmole(top_k=2).check(4)
    FedAmole(top_k=3, min_experts=3).check(4)


def test_the_spec_carries_the_routers_settings() -> None:
    spec = FedAmole(rank=3, alpha=5.0, dropout=0.1, top_k=1, balance_weight=0.5).spec()
    assert (spec.rank, spec.alpha, spec.dropout, spec.top_k, spec.balance_weight) == (3, 5.0, 0.1, 1, 0.5)


# --- groups of holders -----------------------------------------------------------------------------------------


def client_state(after: Pool) -> set[str]:
    """Owners of tensors that have the value from before the round."""
    before = pool().tensors
    return {key.split("/")[1] for key, tensor in after.tensors.items() if torch.equal(tensor, before[key])}


@pytest.mark.parametrize(
    ("min_holders", "asked", "answered", "unchanged"),
    [
        (None, "abc", "abc", set()),
        # b fails: 0 (a, b) and 1 (b, c) would be handed on as a's and c's alone; 2 (a, c) and the shared ones have two
        (None, "abc", "ac", {"expert-00", "expert-01"}),
        (2, "abc", "ac", {"expert-00", "expert-01"}),
        # only a is left of three
        (None, "abc", "a", {"expert-00", "expert-01", "expert-02", "shared", "router"}),
        # a and c were drawn, so that 0 and 1 have one holder each in this round, and both answer
        (None, "ac", "ac", set()),
        (2, "ac", "ac", {"expert-00", "expert-01"}),
        (None, "ac", "a", {"expert-01", "expert-02", "shared", "router"}),
        (3, "abc", "abc", {"expert-00", "expert-01", "expert-02"}),
        (1, "abc", "a", {"expert-01"}),
    ],
)
def test_no_update_is_handed_out_alone(min_holders: int | None, asked: str, answered: str, unchanged: set[str]) -> None:
    """Held: expert 0 by a, b; expert 1 by b, c; expert 2 by a, c; shared and router by all."""
    known = {f"expert-0{i}": torch.tensor([float(70 + i)]) for i in range(3)}
    method = FedAmole(
        rank=1, experts=3, expert_choices=2, min_experts=2, max_experts=2, top_k=1, min_holders=min_holders
    )
    after = method.aggregate(
        server(asked=tuple(asked)), pool(expert_embeddings={"m": known}), {name: REPLIES[name] for name in answered}
    )
    assert client_state(after) == unchanged
    same = {key for key, row in after.expert_embeddings["m"].items() if torch.equal(row, known[key])}
    assert same == {owner for owner in unchanged if owner.startswith("expert")}
    assert set(after.client_embeddings["m"]) == set(answered)


def test_the_mean_is_over_the_clients_that_answered() -> None:
    """b fails: expert 2 = (1 + 6) / 2 = 3.5, shared = (1 + 6) / 2 = 3.5, and expert 0 stays 100: not a's 1."""
    after = METHOD.aggregate(server(), pool(), {name: REPLIES[name] for name in "ac"})
    assert number(after.tensors, "m/expert-02/A") == number(after.tensors, "m/shared/B") == 3.5
    assert number(after.tensors, "m/expert-00/A") == 100.0


def test_organisations_hold_experts_by_three() -> None:
    """2 experts per client and 3 holders: 6 held on average, as with 3 and 2. With two clients one has to say so."""
    method = FedAmole().for_deployment()
    assert method.min_holders == 3
    assert FedAmole(min_holders=2).for_deployment().min_holders == 2
    for clients in (3, 4, 10):
        assert (method.pool_size(clients), method.bounds(clients)) == (2 * clients, Bounds(3, 2, 8))
        method.check(clients)
    with pytest.raises(ConfigError, match=r"min_holders = 3, but there are 2 clients .*min_holders = 2 if you"):
        method.check(2)
    FedAmole(min_holders=2).check(2)
    with pytest.raises(ConfigError, match=r"expert_choices = 2 is below .*min_holders = 3 .*raise expert_choices to 3"):
        FedAmole(expert_choices=2).for_deployment().check(4)
    with pytest.raises(ConfigError, match=r"9 x 3 = 27 > 8 x 3 = 24"):
        FedAmole(experts=9).for_deployment().check(3)
    with pytest.raises(ConfigError, match="must be at least 1"):
        FedAmole(min_holders=0).check(3)
    with pytest.raises(ConfigError, match=r"assign_every = 0: must be at least 1"):
        FedAmole(assign_every=0).check(3)
    FedAmole(expert_choices=1).check(3)  # in a simulation nobody is protected by more
    state = method.init(server())
    assert all(len(experts) == 6 for experts in state.held["m"].values())


LIE = TrainedExperts(
    reply(6.0, 0.0, expert_01=0.0, expert_02=3.0).tensors,
    {"m": torch.tensor([1e3])},
    {"m": {"expert-01": torch.tensor([1e3]), "expert-02": torch.tensor([1e3])}},
)
"""What c says when it wants every expert: that its tokens, and the experts' of them, are large and alike."""


def test_who_says_that_all_experts_fit_does_not_get_them() -> None:
    """c lies with t = 1000 and e = 1000; t of a, b is 1 and 2, and their largest e is 1 and 2.

    The median of (1, 2, 1000) is 2, so that the limit of both is 4 x 2 = 8, and c counts with t = 8 and e = 8:

        e_0 = (0.5 + 1.5) / 2 = 1         e_1 = (-2 + 8) / 2 = 3          e_2 = (1 + 8) / 2 = 4.5
        t = (1, 2, 8): a's share of a's and b's is 1 / (1 + exp(e)), as it is without c's lie for these e

    Without the limit c's scores would be a thousand times and more above the others', whose P would all be 0, so that
    who else gets an expert would be chosen by hashes. c holds `max_experts` at most, in either case.
    """
    replies = {
        "a": reply(1.0, 1.0, expert_00=0.5, expert_02=1.0),
        "b": reply(2.0, 2.0, expert_00=1.5, expert_01=-2.0),
        "c": LIE,
    }
    method = FedAmole(rank=1, experts=3, min_experts=1, max_experts=2, top_k=1)
    after = method.aggregate(server(), pool(), replies)
    assert {key: float(row) for key, row in after.client_embeddings["m"].items()} == {"a": 1.0, "b": 2.0, "c": 8.0}
    assert {key: float(row) for key, row in after.expert_embeddings["m"].items()} == {
        "expert-00": 1.0,
        "expert-01": 3.0,
        "expert-02": 4.5,
    }
    P = after.probabilities["m"].numpy()
    for row, e in zip(P, (1.0, 3.0, 4.5), strict=True):
        np.testing.assert_allclose(row, np.exp(e * np.array([1, 2, 8])) / np.exp(e * np.array([1, 2, 8])).sum())
        assert row[0] / row[1] == pytest.approx(math.exp(-e)), "a and b stand to each other as their data say"
    assert {name: len(experts) for name, experts in after.held["m"].items()} == {"a": 2, "b": 2, "c": 2}
    generous = FedAmole(rank=1, experts=3, min_experts=1, max_experts=3, top_k=1).aggregate(server(), pool(), replies)
    assert len(generous.held["m"]["c"]) == 3, "up to its bound, and no further"
    assert len(generous.held["m"]["b"]) > len(generous.held["m"]["a"]) >= 0


def test_honest_embeddings_are_not_touched() -> None:
    """Up to four times the median they are what was sent, to the bit; with two clients there is no median to trust."""
    values = {"a": [0.1, 0.2], "b": [0.1, 0.1], "c": [0.5, 0.6]}
    rows = {name: {"m": torch.tensor(row)} for name, row in values.items()}
    result = limit_norms(rows)
    assert all(result[name]["m"] is rows[name]["m"] for name in rows)
    louder = limit_norms({**rows, "c": {"m": torch.tensor([3.0, 4.0])}})["c"]["m"]
    assert float(louder.norm()) == pytest.approx(4 * math.sqrt(0.05))
    assert float(louder[0] / louder[1]) == pytest.approx(0.75), "the direction stays"
    two = {"a": rows["a"], "b": {"m": torch.tensor([1e9, 0.0])}}
    assert limit_norms(two)["b"]["m"] is two["b"]["m"]


def test_each_module_has_its_own_limit() -> None:
    """c's embeddings of module n are 1e6; those of m stay."""
    replies = {
        name: TrainedExperts({}, {"m": torch.tensor([1.0]), "n": torch.tensor([1e6 if name == "c" else 1.0])}, {})
        for name in "abc"
    }
    after = METHOD.aggregate(
        server(modules=("m", "n")), dataclasses.replace(pool(), held={"m": HELD, "n": HELD}), replies
    )
    results = {
        module: {name: float(row) for name, row in rows.items()} for module, rows in after.client_embeddings.items()
    }
    assert results == {"m": {"a": 1.0, "b": 1.0, "c": 1.0}, "n": {"a": 1.0, "b": 1.0, "c": 4.0}}


# --- what others can compute -----------------------------------------------------------------------------------


def test_the_exposure_to_co_holders_is_computed_from_the_config() -> None:
    """Two layers of width 128 with q and v: rank 8, 6 experts held, so 8 x (1 + 6) = 56 equations per linear and round,
    112 of the two that read the words' embeddings: 128 unknowns in two rounds. At width 2048: 19.
    """

    def said(clients: int | None, width: int = 128, **numbers: Any) -> str:
        linears = ("self_attn.q_proj", "self_attn.v_proj")
        shapes = {f"model.layers.{layer}.{linear}": (width, 64) for layer in (0, 1) for linear in linears}
        return " ".join(FedAmole(**numbers).exposes(clients, shapes))

    assert "held by 2 clients" in said(8)
    assert "min_holders" not in said(8)
    assert "Either of the two can subtract its own and has the other's update" in said(8)
    assert "7 clients together can compute the last one's part" in said(8)
    assert "held by 3 clients" in said(8, min_holders=3)
    assert "2 of them together can subtract theirs" in said(8, min_holders=3)
    assert "method.min_holders = 3" in said(None, min_holders=3)
    assert "means over all" not in said(None, min_holders=3)
    assert "one client alone can compute" in said(2)
    assert "held by one client alone" in said(8, expert_choices=1)
    assert "about 56 linear equations per adapted linear" in said(8)
    assert "2 of them have the same input of width 128) these determine it after 2 rounds at the earliest" in said(8)
    assert "after 19 rounds" in said(8, width=2048)
    assert "after 1 round at" in said(8, width=112)


# --- a partial cohort, through a real run ---------------------------------------------------------------------


def test_the_assignment_is_solved_over_all_clients_not_only_the_cohort(runs: Any) -> None:
    import json

    folder = runs("fedamole", "federation.cohort=0.5", "federation.rounds=4")
    lines = [json.loads(line) for line in (folder / "assignment.jsonl").read_text().splitlines()]
    by_round: dict[tuple[int, str], dict[str, list[int]]] = {}
    for line in lines:
        by_round.setdefault((line["round"], line["module"]), {})[line["client"]] = line["experts"]
    assert {round_ for round_, _ in by_round} == {0, 1, 2, 3}
    for held in by_round.values():
        assert sorted(held) == ["chat", "entail", "mood", "plain"]
        assert sum(map(len, held.values())) == 24  # 12 experts x 2 choices
        assert all(2 <= len(experts) <= 8 for experts in held.values())


def test_one_state_for_whatever_order_clients_are_named_in() -> None:
    turned = Server(BaseInfo({"m": (2, 2)}), INFOS[::-1], seed=0)
    assert pack(METHOD.aggregate(turned, pool(), REPLIES)) == pack(METHOD.aggregate(server(), pool(), REPLIES))
