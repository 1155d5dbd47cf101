"""FDLoRA: a mean first, then Nesterov momentum; a fusion that is never worse than where its search begins."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from tests.methods.by_hand import CallProbe, client, driven

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, Client, ClientInfo, Server
from fedamole.methods.fdlora import BEGINNINGS, L1, FdLora, Outer, Shared
from fedamole.methods.local_only import OwnLora
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.model.params import Adapter

SHAPES = {"m": (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)
A = "m/shared/A"


def one(value: float) -> SharedTensors:
    return SharedTensors({A: torch.full((1, 2), value)})


def value(tensors: object) -> float:
    return float(tensors[A][0, 0])  # type: ignore[index]


def test_a_mean_first_then_the_outer_optimiser() -> None:
    """Personal LoRAs 1 and 3: the global one is 2. Clients return 4 and 2, a gradient of 2 - 3 = -1: momentum -1, step
    -1 + 0.5 * -1 = -1.5, so 2 + 1.5 = 3.5. Clients return 3 and 3: gradient 0.5, momentum -0.5 + 0.5 = 0, step 0.5: 3.
    """
    method = FdLora(rank=1)
    state = method.aggregate(SERVER, Outer(one(9.0).tensors, {}, False), {"a": one(1.0), "b": one(3.0)})
    assert (value(state.tensors), state.begun) == (2.0, True)
    state = method.aggregate(SERVER, state, {"a": one(4.0), "b": one(2.0)})
    assert value(state.tensors) == 3.5
    state = method.aggregate(SERVER, state, {"a": one(3.0), "b": one(3.0)})
    assert value(state.tensors) == 3.0


def test_the_outer_optimiser_is_torchs_sgd() -> None:
    draw = torch.Generator().manual_seed(0)
    method = FdLora(rank=1, outer_learning_rate=0.7, outer_momentum=0.9)
    weight = torch.randn(1, 2, generator=draw)
    state = Outer({A: weight}, {A: torch.zeros(1, 2)}, True)
    parameter = torch.nn.Parameter(weight.clone())
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(4):
        sent = torch.randn(1, 2, generator=draw)
        parameter.grad = parameter.detach() - sent
        sgd.step()
        state = method.aggregate(SERVER, state, {"a": SharedTensors({A: sent})})
        torch.testing.assert_close(state.tensors[A], parameter.detach())


@pytest.mark.parametrize(
    ("begun", "round_", "personal"),
    [(False, 0, 7.0), (True, 1, 7.0), (True, 2, 5.0), (True, 3, 7.0), (True, 4, 5.0), (False, 4, 7.0)],
)
def test_the_personal_lora_is_kept_until_it_is_synchronised(begun: bool, round_: int, personal: float) -> None:
    """First the personal LoRA (5) is trained; then the global one (2), which becomes personal in rounds 1, 3, 5, ..."""
    method = FdLora(rank=1, sync_every=2)
    work = method.update(client(SHAPES, round_=round_), OwnLora(one(5.0).tensors), Shared(one(2.0).tensors, begun))
    (request,), (client_state, reply, _) = driven(work, one(7.0).tensors)
    assert value(request.adapter.tensors) == (2.0 if begun else 5.0)
    assert value(client_state.tensors) == personal
    assert value(reply.tensors) == 7.0


def test_it_synchronises_every_fifth_round_first_in_round_1() -> None:
    method, synced = FdLora(rank=1), list[int]()
    for round_ in range(1, 13):
        work = method.update(client(SHAPES, round_=round_), OwnLora(one(5.0).tensors), Shared(one(2.0).tensors, True))
        _, (client_state, _, _) = driven(work, one(7.0).tensors)
        if value(client_state.tensors) == 7.0:
            synced.append(round_)
    assert synced == [1, 6, 11]


def searcher(best: tuple[float, float], seen: list[int]) -> Client:
    """A client whose loss is the squared distance of the fused numbers from those of some weights: A = (w1, w2)."""

    def losses(adapters: Sequence[Adapter], most: int) -> list[float]:
        seen.append(len(adapters))
        assert most == 16
        return [float(((adapter.tensors[A] - torch.tensor([best])) ** 2).sum()) for adapter in adapters]

    return client(SHAPES, probe=CallProbe(losses))


@pytest.mark.parametrize("best", [(0.9, -0.4), (-1.2, 1.3), (0.0, 1.0), (0.5, 0.5)])
def test_the_search_finds_the_weights(best: tuple[float, float]) -> None:
    client_state, message = OwnLora({A: torch.tensor([[1.0, 0.0]])}), Shared({A: torch.tensor([[0.0, 1.0]])}, True)
    for trials in (5, 20, 400):
        seen: list[int] = []
        method = FdLora(rank=1, fusion_trials=trials)
        me = searcher(best, seen)
        result = method.search(me, client_state, message)
        assert set(seen) == {5}
        assert sum(seen) == trials if trials < 400 else sum(seen) <= trials  # it may end where all five agree

        def score(weights: tuple[float, float], me: Client = me, method: FdLora = method) -> float:
            (loss,) = me.probe.losses([method.fused(client_state, message, weights)], 16)
            return loss + L1 * (abs(weights[0]) + abs(weights[1])) / 2

        assert score(result) <= min(map(score, BEGINNINGS)) + 1e-6
        if trials == 400:
            assert score(result) <= score(best) + 0.03


def test_the_model_is_the_fused_one_and_changes_nothing() -> None:
    client_state, message = OwnLora({A: torch.tensor([[1.0, 0.0]])}), Shared({A: torch.tensor([[0.0, 1.0]])}, True)
    method = FdLora(rank=1)
    model = method.personal(searcher((0.0, 1.0), []), client_state, message, None)
    assert model is not None
    torch.testing.assert_close(model.tensors[A], torch.tensor([[0.0, 1.0]]), rtol=0, atol=0.1)
    assert value(client_state.tensors) == 1.0


@pytest.mark.parametrize(
    "wrong", [{"sync_every": 0}, {"fusion_trials": 0}, {"outer_momentum": 1.0}, {"outer_learning_rate": 0.0}]
)
def test_wrong_values_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"method\.(outer_|sync_every = 0|fusion_trials = 0)"):
        FdLora(**wrong)  # type: ignore[arg-type]


def test_means_by_examples() -> None:
    """10 and 30 examples, 1 and 5: the first mean is 4. Then 4 and 8, mean 7: a gradient of -3, 4 + 1.5 * 3 = 8.5."""
    method = FdLora(rank=1, weighting="examples")
    state = method.aggregate(SERVER, Outer(one(9.0).tensors, {}, False), {"a": one(1.0), "b": one(5.0)})
    assert value(state.tensors) == 4.0
    assert value(method.aggregate(SERVER, state, {"a": one(4.0), "b": one(8.0)}).tensors) == 8.5
    assert value(method.aggregate(SERVER, state, {"b": one(4.0)}).tensors) == 4.0


@pytest.mark.parametrize("round_", [0, 3])
def test_a_late_client_starts_with_a_personal_lora(round_: int) -> None:
    """Nobody answered before: this is everybody's first round, whatever its number."""
    message = Shared(one(2.0).tensors, False)
    work = FdLora(rank=1).update(client(SHAPES, round_=round_), OwnLora(one(5.0).tensors), message)
    (request,), (client_state, _, _) = driven(work, one(7.0).tensors)
    assert value(request.adapter.tensors) == 5.0
    assert value(client_state.tensors) == 7.0


def test_the_weights_are_of_the_personal_and_the_global_lora_and_of_both_factors() -> None:
    """2 * 1 - 0.5 * 4 = 0 in A; 2 * 3 - 0.5 * 2 = 5 in B."""
    client_state = OwnLora({A: torch.full((1, 2), 1.0), "m/shared/B": torch.full((2, 1), 3.0)})
    message = Shared({A: torch.full((1, 2), 4.0), "m/shared/B": torch.full((2, 1), 2.0)}, True)
    fused = FdLora(rank=1).fused(client_state, message, (2.0, -0.5))
    assert fused.tensors[A].tolist() == [[0.0, 0.0]]
    assert fused.tensors["m/shared/B"].flatten().tolist() == [5.0, 5.0]


def landscape(loss: Callable[[float, float], float], trials: int, examples: int = 16) -> tuple[float, float]:
    """What the search finds where the loss is a function of the weights; every point it tries is within the bounds."""

    def losses(adapters: Sequence[Adapter], most: int) -> list[float]:
        assert most == examples
        points = [adapter.tensors[A][0].tolist() for adapter in adapters]
        assert all(max(map(abs, point)) <= 1.5 for point in points)
        return [loss(*point) for point in points]

    client_state, message = OwnLora({A: torch.tensor([[1.0, 0.0]])}), Shared({A: torch.tensor([[0.0, 1.0]])}, True)
    method = FdLora(rank=1, fusion_trials=trials, fusion_examples=examples)
    return method.search(client(SHAPES, probe=CallProbe(losses)), client_state, message)


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_the_search_keeps_a_beginning_that_is_the_best(beginning: tuple[float, float]) -> None:
    """A hole in a plain, so narrow that only this beginning falls into it."""
    result = landscape(lambda *point: 0.0 if math.dist(point, beginning) < 1e-6 else 9.0, 20, examples=7)
    assert result == pytest.approx(beginning, abs=1e-6)


def test_of_equal_losses_the_smaller_weights_win() -> None:
    """The loss is flat, so 0.05 mean |w| decides: nothing at all."""
    assert landscape(lambda own, shared: 1.0, 20) == (0.0, 0.0)


def test_the_regularised_minimum_by_hand() -> None:
    """(w1 - .8)^2 + (w2 + .4)^2 + .025 (|w1| + |w2|): 2 (w1 - .8) = -.025, 2 (w2 + .4) = .025, so .7875 and -.3875."""
    result = landscape(lambda own, shared: (own - 0.8) ** 2 + (shared + 0.4) ** 2, 2000)
    assert result == pytest.approx((0.7875, -0.3875), abs=0.02)


def test_the_model_that_is_scored() -> None:
    """After the aggregation the fused one; without a message what was trained."""
    method, trained = FdLora(rank=1), Adapter(FdLora(rank=1).spec(), one(3.0).tensors)
    assert method.evaluates == "post_aggregation"
    assert method.personal(client(SHAPES), OwnLora(one(1.0).tensors), None, trained) is trained
