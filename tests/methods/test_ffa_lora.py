"""FFA-LoRA: one A that never trains and never travels; the average of the B's by hand."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.methods.by_hand import client, driven, full

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.record import Nothing
from fedamole.methods.fedit import FedIT
from fedamole.methods.ffa_lora import FfaLora
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.model.params import Adapter

SHAPES = {"m": (2, 3), "n": (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30), ClientInfo("c", 20))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)
A, B = ("m/shared/A", "n/shared/A"), ("m/shared/B", "n/shared/B")


def ups(value: float) -> SharedTensors:
    return SharedTensors({"m/shared/B": full(value, 3, 1), "n/shared/B": full(-value, 2, 1)})


def test_only_b_travels_and_it_begins_as_0() -> None:
    method = FfaLora(rank=3)
    state = method.init(SERVER)
    assert set(state.tensors) == set(B)
    assert not any(tensor.any() for tensor in state.tensors.values())
    assert all(method.message(state, info) is state for info in INFOS)


def test_a_is_one_draw_for_all_clients_and_rounds_and_frozen() -> None:
    method = FfaLora(rank=2)
    first = FedIT(rank=2).init(SERVER).tensors
    for name, round_ in (("a", 0), ("a", 5), ("b", 0)):
        adapter = method.adapter(client(SHAPES, name, round_), Nothing(), ups(1.0))
        assert set(adapter.frozen) == set(A)
        assert set(adapter.tensors) == {*A, *B}
        assert all(torch.equal(adapter.tensors[key], first[key]) for key in A)
        assert adapter.parameters() == 3 + 2  # the B's that were sent, of rank 1


def test_b_trains_and_goes_up_alone() -> None:
    work = FfaLora(rank=1).update(client(SHAPES), Nothing(), ups(2.0))
    (request,), (client_state, reply, _) = driven(work, {"m/shared/B": full(5.0, 3, 1)})
    assert (request.step_fraction, request.penalty) == (1.0, None)
    assert torch.equal(request.adapter.tensors["m/shared/B"], full(2.0, 3, 1))
    assert client_state == Nothing()
    assert set(reply.tensors) == set(B)
    assert torch.equal(reply.tensors["m/shared/B"], full(5.0, 3, 1))
    assert torch.equal(reply.tensors["n/shared/B"], full(-2.0, 2, 1))


@pytest.mark.parametrize(
    ("weighting", "answered", "mean"),
    [
        ("uniform", "abc", 3.0),  # (0 + 4 + 5) / 3
        ("uniform", "ab", 2.0),  # (0 + 4) / 2
        ("examples", "abc", 11 / 3),  # (10 * 0 + 30 * 4 + 20 * 5) / 60
        ("examples", "ab", 3.0),  # (10 * 0 + 30 * 4) / 40
    ],
)
def test_the_average_by_hand(weighting: Any, answered: str, mean: float) -> None:
    replies = {name: ups(value) for name, value in (("a", 0.0), ("b", 4.0), ("c", 5.0)) if name in answered}
    after = FfaLora(weighting=weighting).aggregate(SERVER, ups(100.0), replies)
    assert set(after.tensors) == set(B)
    torch.testing.assert_close(after.tensors["m/shared/B"], full(mean, 3, 1))
    torch.testing.assert_close(after.tensors["n/shared/B"], full(-mean, 2, 1))


def test_the_average_of_b_is_the_average_of_the_products() -> None:
    """Random B's: mean(B_i) A = mean(B_i A), which FedIT's mean(B_i) mean(A_i) is not where the A's differ."""
    method, g = FfaLora(rank=2), torch.Generator().manual_seed(0)
    replies = {name: SharedTensors({"m/shared/B": torch.randn(3, 2, generator=g)}) for name in "abc"}
    after = method.aggregate(SERVER, SharedTensors({}), replies)
    adapter = method.adapter(client(SHAPES), Nothing(), after)
    a, b = adapter.tensors["m/shared/A"], adapter.tensors["m/shared/B"]
    products = torch.stack([reply.tensors["m/shared/B"] @ a for reply in replies.values()])
    torch.testing.assert_close(b @ a, products.mean(0))


def test_the_personal_model_is_the_averaged_b_on_the_frozen_a() -> None:
    method = FfaLora(rank=1)
    mine = Adapter(method.spec(), ups(9.0).tensors)
    result = method.personal(client(SHAPES), Nothing(), ups(4.0), mine)
    assert result is not None
    assert torch.equal(result.tensors["m/shared/B"], full(4.0, 3, 1))
    assert torch.equal(result.tensors["m/shared/A"], FedIT(rank=1).init(SERVER).tensors["m/shared/A"])
    assert method.evaluates == "post_aggregation"


def test_in_a_real_run_a_is_constant_and_b_changes(runs: Any, facts: Any) -> None:
    """A of a q_proj of 32 x 32 at rank 2, as FedIT draws it in round 0; a message is B alone, half of FedIT's."""
    folder = runs("ffa_lora")
    shapes = {"model.layers.0.self_attn.q_proj": (32, 32)}
    saved = [load_file(path) for path in sorted(folder.glob("clients/*/adapter/adapter_model.safetensors"))]
    assert len(saved) == 4
    modules = {key.rpartition(".lora_")[0].removeprefix("base_model.model.") for key in saved[0]}
    assert modules == {f"model.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "qv"}
    all_shapes = {name: (32, 32 if name.endswith("q_proj") else 16) for name in modules}
    assert all_shapes.items() >= shapes.items()
    drawn = FedIT(rank=2).init(Server(BaseInfo(all_shapes), (), seed=0)).tensors
    for tensors in saved:
        for name in modules:
            assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], drawn[f"{name}/shared/A"])
            assert tensors[f"base_model.model.{name}.lora_B.weight"].abs().min() > 0

    def sent(method: str) -> int:
        return max(int(line["bytes_up"]) for line in facts(runs(method)) if line["split"] == "train")

    numbers_of_a = 4 * 2 * 32 * 4  # modules, rank, width, bytes
    assert numbers_of_a <= sent("fedit") - sent("ffa_lora") < 2 * numbers_of_a


def test_invalid_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="rank = 0"):
        FfaLora(rank=0)
    with pytest.raises(ConfigError, match="alpha = 0"):
        FfaLora(alpha=0.0)
