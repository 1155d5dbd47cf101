"""FedPTR: trajectory matching by hand and on a base, what clients are held near, and the error on real text."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.bundled_rounds import BundledRounds
from tests.methods.by_hand import client, driven, full
from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.penalties import Proximal
from fedamole.federation.record import Nothing
from fedamole.federation.server_work import ServerWork
from fedamole.federation.trajectory import TrajectoryRequest, TrajectoryResult
from fedamole.methods.fedptr import LOG_STEP, VECTORS, FedPtr, PtrState
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.synthesis.trajectory import Matched, Matching, match, unrolled

SHAPES = {"m": (2, 2)}
A, B = "m/shared/A", "m/shared/B"
HALF = torch.tensor(0.5).log()


def quadratic(weights: Tensor, rows: Tensor) -> Tensor:
    return 0.5 * (weights - rows).square().sum()


def test_a_step_that_must_reach_1_by_hand() -> None:
    """Loss (w - s)^2 / 2, one step of 0.5 from 0 must reach 1: s = 2. The same step from 1 leads to 1.5."""
    start, end = torch.zeros(1), torch.ones(1)
    matched = match(quadratic, start, end, torch.zeros(1), HALF, Matching(1, 400, 0.02, 1e-12))
    assert float(matched.rows) == pytest.approx(2.0, abs=0.05)
    assert float(unrolled(quadratic, end, torch.tensor([2.0]), HALF, 1, False).detach()) == pytest.approx(1.5)
    assert matched.errors[0] == 1.0, "with s = 0 it stays where it is"
    assert float(unrolled(quadratic, start, torch.tensor([2.0]), HALF, 2, False)) == pytest.approx(1.5), "two steps"


def test_the_step_size_is_learned_and_no_move_changes_nothing() -> None:
    start, end, rows = torch.zeros(1), torch.ones(1), torch.tensor([1.5])
    matched = match(quadratic, start, end, rows, HALF, Matching(1, 100, 1e-12, 0.02))
    assert float(matched.log_step.exp()) == pytest.approx(1 / 1.5, abs=0.03)
    still = match(quadratic, end, end, rows, HALF, Matching(1, 5, 1.0, 1.0))
    assert (still.rows.tolist(), float(still.log_step), still.errors) == ([1.5], float(HALF), ())


def both(value: float) -> dict[str, Tensor]:
    return {A: full(value, 1, 2), B: full(-value, 2, 1)}


class Projects(ServerWork):
    """Returns given rows, and a projected LoRA of 9."""

    def __init__(self) -> None:
        self.seen: list[TrajectoryRequest] = []

    def match(self, request: TrajectoryRequest) -> TrajectoryResult:
        self.seen.append(request)
        return TrajectoryResult(Matched(request.vectors + 1, request.log_step - 1, (1.0,)), both(9.0), 7)


def test_the_server_matches_the_last_move_and_goes_on_from_its_rows() -> None:
    method = FedPtr(rank=1, synthetic_rows=2, virtual_tokens=3, outer_steps=5)
    work = Projects()
    server = Server(BaseInfo(SHAPES, 4, 0.5, 10), (ClientInfo("a", 1), ClientInfo("b", 3)), 0, work=work)
    first = method.init(server)
    assert first.rows[VECTORS].shape == (2, 3, 4)
    state = PtrState(both(1.0), {}, first.rows)
    after = method.aggregate(server, state, {"a": SharedTensors(both(2.0)), "b": SharedTensors(both(4.0))})
    (request,) = work.seen
    assert torch.equal(request.start.tensors[A], full(1.0, 1, 2))
    assert torch.equal(request.end[A], full(3.0, 1, 2))
    assert request.matching == Matching(3, 5, 0.3 * 0.5, method.step_rate)
    assert all(0 <= label < 10 for label in request.labels)
    assert torch.equal(after.tensors[A], full(3.0, 1, 2))
    assert torch.equal(after.projected[A], full(9.0, 1, 2))
    assert torch.equal(after.rows[VECTORS], first.rows[VECTORS] + 1)
    assert float(after.rows[LOG_STEP]) == -5.0
    assert method.message(after, ClientInfo("a", 1)).rows == {}, "rows stay at the server"


def test_momentum_goes_on_by_a_part_of_the_last_move() -> None:
    """From 1 to 3, and a quarter of it on: 3.5."""
    method = FedPtr(rank=1, projection="momentum", momentum=0.25)
    server = Server(BaseInfo(SHAPES, 4), (ClientInfo("a", 1),), 0)
    after = method.aggregate(server, PtrState(both(1.0), {}, {}), {"a": SharedTensors(both(3.0))})
    assert torch.equal(after.projected[A], full(3.5, 1, 2))
    assert (method.init(server).rows, method.steps_at_server()) == ({}, 0)
    assert FedPtr(outer_steps=5).steps_at_server() == 5


def test_clients_are_held_near_the_projected_lora() -> None:
    def request(projected: Mapping[str, Tensor]) -> Any:
        method = FedPtr(rank=1, proximal=0.3)
        (asked,), (_, reply, _) = driven(
            method.update(client(SHAPES), Nothing(), PtrState(both(1.0), projected, {})), both(2.0)
        )
        assert torch.equal(reply.tensors[A], full(2.0, 1, 2))
        assert torch.equal(asked.adapter.tensors[A], full(1.0, 1, 2)), "training starts from the global LoRA"
        return asked

    penalty = request(both(5.0)).penalty
    assert isinstance(penalty, Proximal)
    assert (penalty.weight, penalty.anchor[A].tolist()) == (0.3, [[5.0, 5.0]])
    assert request({}).penalty is None, "the first round is FedIT's"


@pytest.mark.parametrize(("key", "value"), [("proximal", -1.0), ("inner_steps", 0), ("step_rate", 0.0)])
def test_wrong_values_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^method\.{key} = {value}: must be "):
        FedPtr(**{key: value})  # type: ignore[arg-type]


# --- on the bundled base --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> BundledRounds:
    return BundledRounds(tmp_path_factory.mktemp("rounds"), ("hospital_north", "bank_village"))


def matched(bundled: BundledRounds, outer_steps: int) -> tuple[TrajectoryResult, Mapping[str, Tensor], dict[str, Any]]:
    """The result for the move of FedIT's first round, the LoRA after it, and what the server counted."""
    results = list[TrajectoryResult]()

    class Kept(ServerWork):
        def match(self, request: TrajectoryRequest) -> TrajectoryResult:
            results.append(super().match(request))
            return results[-1]

    after = bundled.train("fedit", "training.local_steps=8", rounds=1)[0].tensors
    config, base = bundled.config("fedptr", 1), bundled.prepared.base
    work = Kept(bundled.bank, config.training, 4096, 0)
    server = Server(BaseInfo.of(base), (ClientInfo("a", 1),), 0, work=work)
    assert isinstance(config.method, FedPtr)
    method = replace(config.method, outer_steps=outer_steps)
    method.aggregate(server, method.init(server), {"a": SharedTensors(after)})
    return results[0], after, work.report()


def test_matching_runs_with_second_derivatives_and_is_counted(bundled: BundledRounds) -> None:
    result, after, report = matched(bundled, 4)
    assert result.matched.errors[-1] < result.matched.errors[0]
    assert set(result.projected) == set(after)
    assert not all(torch.equal(result.projected[name], after[name]) for name in after)
    assert report["steps"] == 4
    assert report["backward_tokens"] == (4 + 1) * 3 * 48 * 13, (
        "3 passes of 48 rows of 13 tokens, and for the projection"
    )


@pytest.mark.long
def test_the_relative_error_falls_below_0_6(bundled: BundledRounds) -> None:
    """What the mechanism is for: gradient steps on the rows make most of the last move."""
    result, _, _ = matched(bundled, 70)
    print(
        "relative matching error",
        [round(error, 3) for error in result.matched.errors[::10]],
        min(result.matched.errors),
    )
    assert min(result.matched.errors) < 0.6
