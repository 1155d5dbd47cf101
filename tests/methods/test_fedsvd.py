"""FedSVD: only B is trained and sent back; the server's re-factoring by hand, and that it changes no model."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.methods.by_hand import client, driven, full

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.record import Nothing
from fedamole.methods.fedit import FedIT
from fedamole.methods.fedsvd import FedSvd
from fedamole.methods.shared.averaging import SharedTensors

SHAPES = {"m": (2, 3), "n": (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)
A, B = ("m/shared/A", "n/shared/A"), ("m/shared/B", "n/shared/B")
STATE = SharedTensors(
    {
        "m/shared/A": torch.tensor([[3.0, 4.0]]),
        "m/shared/B": torch.zeros(3, 1),
        "n/shared/A": torch.tensor([[0.0, 2.0]]),
        "n/shared/B": torch.zeros(2, 1),
    }
)


def reply(*b: float) -> SharedTensors:
    """B of both modules; that of n has the first two values."""
    column = torch.tensor(b)[:, None]
    return SharedTensors({"m/shared/B": column, "n/shared/B": column[:2]})


def product(state: SharedTensors, module: str) -> torch.Tensor:
    return state.tensors[f"{module}/shared/B"] @ state.tensors[f"{module}/shared/A"]


def test_the_first_state_is_that_of_fedit_and_goes_to_all() -> None:
    method = FedSvd(rank=2)
    state = method.init(SERVER)
    expected = FedIT(rank=2).init(SERVER)
    assert all(torch.equal(state.tensors[key], expected.tensors[key]) for key in (*A, *B))
    assert all(method.message(state, info) is state for info in INFOS)


def test_b_trains_and_goes_up_alone() -> None:
    (request,), (_, answer, _) = driven(
        FedSvd(rank=1).update(client(SHAPES), Nothing(), STATE), {"m/shared/B": full(5.0, 3, 1)}
    )
    assert set(request.adapter.frozen) == set(A)
    assert torch.equal(request.adapter.tensors["m/shared/A"], STATE.tensors["m/shared/A"])
    assert set(answer.tensors) == set(B)
    assert torch.equal(answer.tensors["m/shared/B"], full(5.0, 3, 1))


def test_a_round_by_hand() -> None:
    """Mean B of m: ((0, 0, 0) + (2, 4, 4)) / 2 = (1, 2, 2), norm 3; A = (3, 4), norm 5. So B A = 15 u v^T with
    u = (1, 2, 2) / 3 and v = (3, 4) / 5: the new A is v^T, the new B 15 u = (5, 10, 10), up to one sign for both."""
    after = FedSvd(rank=1).aggregate(SERVER, STATE, {"a": reply(0.0, 0.0, 0.0), "b": reply(2.0, 4.0, 4.0)})
    a, b = after.tensors["m/shared/A"], after.tensors["m/shared/B"]
    sign = a[0, 0].sign()
    torch.testing.assert_close(sign * a, torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(sign * b, torch.tensor([[5.0], [10.0], [10.0]]))
    torch.testing.assert_close(product(after, "n"), torch.tensor([[0.0, 2.0], [0.0, 4.0]]))


def test_the_average_weights_by_examples_and_leaves_out_who_is_missing() -> None:
    """(10 * 0 + 30 * 4) / 40 = 3 in every value of B; without b it is that of a."""
    method, replies = FedSvd(rank=1, weighting="examples"), {"a": reply(0.0, 0.0, 0.0), "b": reply(4.0, 4.0, 4.0)}
    torch.testing.assert_close(
        product(method.aggregate(SERVER, STATE, replies), "m"), full(3.0, 3, 1) @ STATE.tensors["m/shared/A"]
    )
    del replies["a"]
    torch.testing.assert_close(
        product(method.aggregate(SERVER, STATE, replies), "m"), full(4.0, 3, 1) @ STATE.tensors["m/shared/A"]
    )


@pytest.mark.parametrize(("rank", "d_in", "d_out"), [(1, 6, 5), (3, 6, 5), (5, 6, 5), (4, 8, 2), (4, 2, 8)])
def test_the_product_is_unchanged_and_a_becomes_orthonormal(rank: int, d_in: int, d_out: int) -> None:
    """Random factors, also of a rank above a module's width: B A is the mean B times the old A."""
    generator = torch.Generator().manual_seed(rank)
    server = Server(BaseInfo({"m": (d_in, d_out)}), INFOS, seed=0)
    old = torch.randn(rank, d_in, generator=generator)
    state = SharedTensors({"m/shared/A": old, "m/shared/B": torch.zeros(d_out, rank)})
    sent = {name: torch.randn(d_out, rank, generator=generator) for name in "ab"}
    after = FedSvd(rank=rank).aggregate(
        server, state, {name: SharedTensors({"m/shared/B": b}) for name, b in sent.items()}
    )
    a, b = after.tensors["m/shared/A"], after.tensors["m/shared/B"]
    assert (a.shape, b.shape, a.dtype) == ((rank, d_in), (d_out, rank), torch.float32)
    torch.testing.assert_close(product(after, "m"), (sent["a"] + sent["b"]) / 2 @ old, rtol=1e-5, atol=1e-5)
    full_rows = min(rank, d_in)
    torch.testing.assert_close(a @ a.T, torch.diag((torch.arange(rank) < full_rows).float()), rtol=0, atol=1e-6)
    lengths = b.norm(dim=0)
    assert all(lengths[i] >= lengths[i + 1] for i in range(rank - 1)), "the singular values fall"


def test_a_round_without_any_change_leaves_the_product_at_zero() -> None:
    after = FedSvd(rank=1).aggregate(SERVER, STATE, {"a": reply(0.0, 0.0, 0.0)})
    assert not product(after, "m").any()
    assert all(tensor.isfinite().all() for tensor in after.tensors.values())


@pytest.mark.parametrize(("round_", "refactored"), [(0, False), (1, False), (2, True), (5, True)])
def test_every_nth_round_factors_anew(round_: int, refactored: bool) -> None:
    server = Server(BaseInfo(SHAPES), INFOS, seed=0, round=round_)
    after = FedSvd(rank=1, refactor_every=3).aggregate(server, STATE, {"a": reply(1.0, 2.0, 2.0)})
    assert torch.equal(after.tensors["m/shared/A"], STATE.tensors["m/shared/A"]) is not refactored
    torch.testing.assert_close(product(after, "m"), reply(1.0, 2.0, 2.0).tensors["m/shared/B"] @ STATE.tensors[A[0]])


def test_in_a_real_run_b_alone_goes_up_and_all_clients_end_with_one_orthonormal_a(runs: Any) -> None:
    folder = runs("fedsvd")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    train = [line for line in lines if line["split"] == "train" and line.get("steps")]
    assert all(1.5 < line["bytes_down"] / line["bytes_up"] < 3 for line in train)
    saved = [load_file(path) for path in sorted(folder.glob("clients/*/adapter/adapter_model.safetensors"))]
    assert len(saved) == 4
    for name, tensor in saved[0].items():
        assert all(torch.equal(tensor, other[name]) for other in saved)
        if ".lora_A." in name:
            torch.testing.assert_close(tensor @ tensor.T, torch.eye(len(tensor)), rtol=0, atol=1e-5)


def test_invalid_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method.refactor_every = 0: must be at least 1"):
        FedSvd(refactor_every=0)
    with pytest.raises(ConfigError, match="rank = 0"):
        FedSvd(rank=0)
