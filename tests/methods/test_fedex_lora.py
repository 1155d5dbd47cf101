"""FedEx-LoRA: residuals by hand, and exactness at every client whoever was absent when."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.methods.by_hand import client, driven
from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server, TrainingRequest
from fedamole.methods.fedex_lora import FedExLora, LoraAndResiduals, TrainedLora
from fedamole.methods.fedit import FedIT
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.methods.shared.stacks import Changes, Merged
from fedamole.model.params import delta_key, shared_keys

INFOS = (ClientInfo("a", 10), ClientInfo("b", 30), ClientInfo("c", 20))
SMALL = Server(BaseInfo({"m": (2, 2)}), INFOS, seed=0)
SERVER = Server(BaseInfo({"m": (3, 2), "n": (2, 4)}), INFOS, seed=0)
REPLIES = {
    "a": {"m/shared/A": torch.tensor([[1.0, 0.0]]), "m/shared/B": torch.tensor([[1.0], [2.0]])},
    "b": {"m/shared/A": torch.tensor([[0.0, 3.0]]), "m/shared/B": torch.tensor([[1.0], [0.0]])},
}


@pytest.mark.parametrize(
    ("weighting", "answered", "mean_a", "mean_b", "residual"),
    [
        # Mean of the products [[.5, 1.5], [1, 0]] less [1 1]^T [.5 1.5], times the scaling 2.
        ("uniform", "ab", [0.5, 1.5], [1.0, 1.0], [[0.0, 0.0], [1.0, -3.0]]),
        # [[.25, 2.25], [.5, 0]] less [1 .5]^T [.25 2.25], times 2.
        ("examples", "ab", [0.25, 2.25], [1.0, 0.5], [[0.0, 0.0], [0.75, -2.25]]),
        ("uniform", "b", [0.0, 3.0], [1.0, 0.0], [[0.0, 0.0], [0.0, 0.0]]),  # nothing is lost with one client
    ],
)
def test_the_residual_by_hand(
    weighting: Any, answered: str, mean_a: list[float], mean_b: list[float], residual: list[list[float]]
) -> None:
    method = FedExLora(rank=1, alpha=2.0, weighting=weighting)
    replies = {name: TrainedLora(tensors, 0) for name, tensors in reversed(REPLIES.items()) if name in answered}
    state = method.aggregate(SMALL, method.init(SMALL), replies)
    for info in INFOS:
        client_state = Merged.nothing(SMALL.shapes)
        personal = method.personal(client(SMALL.shapes, info.name), client_state, method.message(state, info), None)
        assert personal is not None
        assert personal.tensors["m/shared/A"].flatten().tolist() == mean_a
        assert personal.tensors["m/shared/B"].flatten().tolist() == mean_b
        torch.testing.assert_close(personal.fixed["m/delta"], torch.tensor(residual))
    assert state.log.changes.factors["0"]["m"]["A"].shape == (len(answered) + 1, 2), "of rank (C + 1) r"


def test_the_averages_are_fedits() -> None:
    means = FedIT(weighting="examples").aggregate(
        SMALL, SharedTensors({}), {name: SharedTensors(tensors) for name, tensors in REPLIES.items()}
    )
    method = FedExLora(weighting="examples")
    state = method.aggregate(SMALL, method.init(SMALL), {name: TrainedLora(t, 0) for name, t in REPLIES.items()})
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in means.tensors.items())


def test_begins_where_fedit_begins_with_no_residual() -> None:
    method = FedExLora(rank=2)
    state, first = method.init(SMALL), FedIT(rank=2).init(SMALL)
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in first.tensors.items())
    client_state = method.init_client_state(client(SMALL.shapes))
    adapter = method.adapter(client(SMALL.shapes), client_state, method.message(state, INFOS[0]))
    assert not adapter.fixed["m/delta"].any()
    assert client_state.count == 0


def test_the_lora_is_trained_on_the_changed_base_and_sent() -> None:
    """One residual is merged already, the other is [1 2]^T [1 1]."""
    factors = {
        "0": {"m": {"A": torch.ones(1, 2), "B": torch.full((2, 1), 100.0)}},
        "1": {"m": {"A": torch.ones(1, 2), "B": torch.tensor([[1.0], [2.0]])}},
    }
    client_state = Merged({"m/delta": torch.full((2, 2), 5.0)}, 1)
    method = FedExLora(rank=1)
    work = method.update(client(SMALL.shapes), client_state, LoraAndResiduals(REPLIES["a"], Changes(factors, 2)))
    (request,), (after, reply, _) = driven(work, REPLIES["b"])
    expected = torch.tensor([[6.0, 6.0], [7.0, 7.0]])
    assert request == TrainingRequest(request.adapter)
    assert request.adapter.frozen == ()
    assert torch.equal(request.adapter.fixed["m/delta"], expected)
    assert all(torch.equal(request.adapter.tensors[name], tensor) for name, tensor in REPLIES["a"].items())
    assert torch.equal(after.deltas["m/delta"], expected)
    assert after.count == reply.merged == 2
    assert all(torch.equal(reply.tensors[name], tensor) for name, tensor in REPLIES["b"].items())


def test_no_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank"):
        FedExLora(rank=0)


def random(shapes: Mapping[str, tuple[int, int]], seed: int) -> dict[str, Tensor]:
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for module, (d_in, d_out) in shapes.items():
        a, b = shared_keys(module)
        tensors[a], tensors[b] = torch.randn(2, d_in, generator=draw), torch.randn(d_out, 2, generator=draw)
    return tensors


COHORT = st.sets(st.sampled_from("abc"), min_size=1)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(COHORT, st.sets(st.sampled_from("abc"))), max_size=6), st.sampled_from(["uniform", "examples"])
)
def test_every_client_has_the_exact_mean_on_top_of_all_residuals(
    rounds: list[tuple[set[str], set[str]]], weighting: Any
) -> None:
    """In each round a cohort trains; some of its answers are lost, though the clients have merged what they were sent.

    After a round's answers each client's change of the base, residuals merged and pending plus the averaged LoRA, is
    the residuals before that round plus the weighted mean of the trained products, worked out densely.
    """
    method = FedExLora(rank=2, alpha=3.0, weighting=weighting)
    state = method.init(SERVER)
    client_state = {name: Merged.nothing(SERVER.shapes) for name in "abc"}
    weights = {"a": 10.0, "b": 30.0, "c": 20.0} if weighting == "examples" else dict.fromkeys("abc", 1.0)
    base = {module: torch.zeros(d_out, d_in, dtype=torch.float64) for module, (d_in, d_out) in SERVER.shapes.items()}
    changes = dict(base)
    for number, (cohort, lost) in enumerate(rounds):
        replies = {}
        for info in INFOS:
            if info.name in cohort:
                work = method.update(
                    client(SERVER.shapes, info.name, number), client_state[info.name], method.message(state, info)
                )
                trained = random(SERVER.shapes, 10 * number + ord(info.name))
                _, (client_state[info.name], replies[info.name], _) = driven(work, trained)
        answers = {name: reply for name, reply in replies.items() if name not in lost}
        if answers:
            total = sum(weights[name] for name in answers)
            state = method.aggregate(SERVER, state, answers)
            for module in SERVER.shapes:
                a, b = shared_keys(module)
                mean = sum(
                    weights[n] / total * r.tensors[b].double() @ r.tensors[a].double() for n, r in answers.items()
                )
                changes[module] = base[module] + 1.5 * mean
                base[module] = changes[module] - 1.5 * state.tensors[b].double() @ state.tensors[a].double()
        for info in INFOS:
            adapter = method.adapter(
                client(SERVER.shapes, info.name), client_state[info.name], method.message(state, info)
            )
            for module in SERVER.shapes:
                A, B = (adapter.tensors[key].double() for key in shared_keys(module))
                result = adapter.fixed[delta_key(module)].double() + 1.5 * B @ A
                torch.testing.assert_close(result, changes[module], rtol=1e-5, atol=1e-4)


def test_what_everybody_has_merged_is_logged_no_more_and_what_c_lacks_is() -> None:
    """c answers in the first round only, so nothing is dropped once two residuals are logged that it lacks."""
    method = FedExLora(rank=1)
    state, client_state = method.init(SMALL), {name: Merged.nothing(SMALL.shapes) for name in "abc"}
    seen = []
    for number, cohort in enumerate(("abc", "ab", "ab", "abc", "abc")):
        replies = {}
        for info in INFOS:
            if info.name in cohort:
                work = method.update(
                    client(SMALL.shapes, info.name), client_state[info.name], method.message(state, info)
                )
                _, (client_state[info.name], replies[info.name], _) = driven(work, random(SMALL.shapes, number))
        state = method.aggregate(SMALL, state, replies)
        seen.append([int(number) for number in sorted(state.log.changes.factors)])
    assert seen == [[0], [0, 1], [0, 1, 2], [3], [4]]
