"""FedRep: which layers are private, head then body, and the average of the bodies, all by hand."""

from typing import Any

import pytest
import torch
from tests.methods.by_hand import client, driven, full

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.methods.fedit import FedIT
from fedamole.methods.fedrep import FedRep, Head
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.model.params import Adapter

LOW, HIGH = "model.layers.0.q", "model.layers.1.q"
SHAPES = {LOW: (2, 2), HIGH: (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30), ClientInfo("c", 20))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)


def half(module: str, value: float) -> dict[str, torch.Tensor]:
    return {f"{module}/shared/A": full(value, 1, 2), f"{module}/shared/B": full(-value, 2, 1)}


def values(tensors: Any) -> dict[str, float]:
    """The value of each A."""
    assert all(bool((tensor == tensor.flatten()[0]).all()) for tensor in tensors.values())
    return {name[: -len("/shared/A")]: float(tensor[0, 0]) for name, tensor in tensors.items() if name.endswith("/A")}


def llama(layers: int) -> list[str]:
    parts = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    return [f"model.layers.{layer}.{part}" for layer in range(layers) for part in parts]


def private_layers(share: float, modules: list[str]) -> list[int]:
    result = FedRep(private_share=share).private(modules)
    layers = sorted({int(name.split(".")[2]) for name in result})
    assert result == {name for name in modules if int(name.split(".")[2]) in layers}, "whole layers, all their modules"
    return layers


@pytest.mark.parametrize(
    ("share", "layers", "private"),
    [
        (0.5, 2, [1]),
        (0.5, 4, [2, 3]),
        (0.25, 4, [3]),
        (0.75, 4, [1, 2, 3]),
        (0.9, 4, [1, 2, 3]),  # 3.6 is 4, and one must be shared
        (0.01, 4, [3]),  # 0.04 is 0, and one must be private
        (0.99, 2, [1]),
        (0.2, 12, [10, 11]),  # 2.4 is 2; by their letters 8 and 9 would come last
        (0.25, 12, [9, 10, 11]),
        (1 / 3, 12, [8, 9, 10, 11]),
        (0.4, 3, [2]),  # 1.2 is 1
        (0.6, 3, [1, 2]),  # 1.8 is 2
    ],
)
def test_the_upper_layers_are_private(share: float, layers: int, private: list[int]) -> None:
    assert private_layers(share, llama(layers)) == private
    assert private_layers(share, llama(layers)[::-1]) == private


def test_other_names_of_layers() -> None:
    gpt2 = [f"transformer.h.{layer}.attn.c_attn" for layer in (8, 9, 10, 11)]
    assert FedRep().private(gpt2) == set(gpt2[2:])
    assert FedRep().private(["decoder.9.q", "decoder.100.q"]) == {"decoder.100.q"}
    sparse = ["model.layers.3.q", "model.layers.17.q", "model.layers.20.q"]  # not every layer is adapted
    assert FedRep(private_share=0.3).private(sparse) == {"model.layers.20.q"}


def test_one_layer_is_too_few() -> None:
    for modules in (["model.layers.0.q", "model.layers.0.v"], ["m"]):
        with pytest.raises(ConfigError, match=r"fedrep needs adapters in at least two layers.*base\.targets"):
            FedRep().private(modules)


def test_body_and_head_begin_as_the_two_parts_of_one_lora() -> None:
    method, first = FedRep(rank=2), FedIT(rank=2).init(SERVER).tensors
    state, client_state = method.init(SERVER), method.init_client_state(client(SHAPES))
    assert {name.split("/")[0] for name in state.tensors} == {LOW}
    assert {name.split("/")[0] for name in client_state.tensors} == {HIGH}
    together = {**state.tensors, **client_state.tensors}
    assert together.keys() == first.keys()
    assert all(torch.equal(together[key], first[key]) for key in first)
    assert all(method.message(state, info) is state for info in INFOS)


def test_the_head_trains_under_a_frozen_body_then_the_body_under_the_new_head() -> None:
    """Sent body 2, own head 3. First the head becomes 5, then, with that head frozen, the body becomes 7."""
    work = FedRep(rank=1).update(client(SHAPES), Head(half(HIGH, 3.0)), SharedTensors(half(LOW, 2.0)))
    (first, second), (client_state, reply, trained) = driven(work, half(HIGH, 5.0), half(LOW, 7.0))
    assert values(first.adapter.tensors) == {LOW: 2.0, HIGH: 3.0}
    assert set(first.adapter.frozen) == {f"{LOW}/shared/A", f"{LOW}/shared/B"}
    assert values(second.adapter.tensors) == {LOW: 2.0, HIGH: 5.0}
    assert set(second.adapter.frozen) == {f"{HIGH}/shared/A", f"{HIGH}/shared/B"}
    for requests in (first, second):
        assert (requests.step_fraction, requests.penalty) == (0.5, None)
    assert values(client_state.tensors) == {HIGH: 5.0}
    assert values(reply.tensors) == {LOW: 7.0}
    assert values(trained.adapter.tensors) == {LOW: 7.0, HIGH: 5.0}


@pytest.mark.parametrize(
    ("weighting", "answered", "mean"),
    [
        ("uniform", "abc", 4.0),  # (3 + 1 + 8) / 3
        ("uniform", "bc", 4.5),  # (1 + 8) / 2
        ("examples", "abc", 11 / 3),  # (10 * 3 + 30 * 1 + 20 * 8) / 60
        ("examples", "bc", 3.8),  # (30 * 1 + 20 * 8) / 50
    ],
)
def test_the_average_by_hand(weighting: Any, answered: str, mean: float) -> None:
    replies = {
        name: SharedTensors(half(LOW, v)) for name, v in (("a", 3.0), ("b", 1.0), ("c", 8.0)) if name in answered
    }
    after = FedRep(weighting=weighting).aggregate(SERVER, SharedTensors(half(LOW, 100.0)), replies)
    assert {name.split("/")[0] for name in after.tensors} == {LOW}
    torch.testing.assert_close(after.tensors[f"{LOW}/shared/A"], full(mean, 1, 2))
    torch.testing.assert_close(after.tensors[f"{LOW}/shared/B"], full(-mean, 2, 1))


def test_the_personal_model_is_the_averaged_body_with_the_own_head() -> None:
    method = FedRep(rank=1)
    mine = Adapter(method.spec(), {**half(LOW, 9.0), **half(HIGH, 5.0)})
    result = method.personal(client(SHAPES), Head(half(HIGH, 5.0)), SharedTensors(half(LOW, 4.0)), mine)
    assert result is not None
    assert values(result.tensors) == {LOW: 4.0, HIGH: 5.0}
    assert result.frozen == ()
    assert method.evaluates == "post_aggregation"


def test_in_a_real_run_the_lower_layer_is_shared_the_upper_one_is_not(runs: Any, facts: Any) -> None:
    from safetensors.torch import load_file

    saved = [load_file(path) for path in sorted(runs("fedrep").glob("clients/*/adapter/*.safetensors"))]
    assert len(saved) == 4
    for key, tensor in saved[0].items():
        for other in saved[1:]:
            assert torch.equal(tensor, other[key]) == (".layers.0." in key), key
    assert {line["steps"] for line in facts(runs("fedrep")) if line["split"] == "train"} == {3}


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 1.5])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=f"method.private_share = {share}: must be above 0 and below 1"):
        FedRep(private_share=share)


def test_no_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank = 0"):
        FedRep(rank=0)
