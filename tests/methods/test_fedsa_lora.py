"""FedSA-LoRA: A is averaged by hand, B stays where it was trained."""

from typing import Any

import pytest
import torch
from tests.methods.by_hand import client, driven, full

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.methods.fedit import FedIT
from fedamole.methods.fedsa_lora import FedSaLora, OwnB
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.model.params import Adapter

SHAPES = {"m": (2, 3)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30), ClientInfo("c", 20))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)
A, B = "m/shared/A", "m/shared/B"


def down(value: float) -> SharedTensors:
    return SharedTensors({A: full(value, 1, 2)})


def test_begins_where_fedit_begins() -> None:
    method, first = FedSaLora(rank=2), FedIT(rank=2).init(SERVER).tensors
    state = method.init(SERVER)
    assert set(state.tensors) == {A}
    assert torch.equal(state.tensors[A], first[A])
    for name in "ab":
        client_state = method.init_client_state(client(SHAPES, name))
        assert set(client_state.tensors) == {B}
        assert torch.equal(client_state.tensors[B], torch.zeros(3, 2))
    assert all(method.message(state, info) is state for info in INFOS)


def test_both_train_a_goes_up_and_b_is_kept() -> None:
    """Sent A = 2, own B = 3; trained to A = 5, B = 7."""
    work = FedSaLora(rank=1).update(client(SHAPES), OwnB({B: full(3.0, 3, 1)}), down(2.0))
    (request,), (client_state, reply, trained) = driven(work, {A: full(5.0, 1, 2), B: full(7.0, 3, 1)})
    assert (request.step_fraction, request.adapter.frozen, request.penalty) == (1.0, (), None)
    assert torch.equal(request.adapter.tensors[A], full(2.0, 1, 2))
    assert torch.equal(request.adapter.tensors[B], full(3.0, 3, 1))
    assert {name: tensor.tolist() for name, tensor in client_state.tensors.items()} == {B: [[7.0]] * 3}
    assert {name: tensor.tolist() for name, tensor in reply.tensors.items()} == {A: [[5.0, 5.0]]}
    assert set(trained.adapter.tensors) == {A, B}


@pytest.mark.parametrize(
    ("weighting", "answered", "mean"),
    [
        ("uniform", "abc", 5.0),  # (1 + 4 + 10) / 3
        ("uniform", "ac", 5.5),  # (1 + 10) / 2
        ("examples", "abc", 5.5),  # (10 * 1 + 30 * 4 + 20 * 10) / 60
        ("examples", "ac", 7.0),  # (10 * 1 + 20 * 10) / 30
    ],
)
def test_the_average_by_hand(weighting: Any, answered: str, mean: float) -> None:
    replies = {name: down(value) for name, value in (("a", 1.0), ("b", 4.0), ("c", 10.0)) if name in answered}
    after = FedSaLora(weighting=weighting).aggregate(SERVER, down(100.0), replies)
    assert set(after.tensors) == {A}
    torch.testing.assert_close(after.tensors[A], full(mean, 1, 2))


def test_the_personal_model_is_the_averaged_a_with_the_own_b() -> None:
    method, client_state = FedSaLora(rank=1), OwnB({B: full(7.0, 3, 1)})
    mine = Adapter(method.spec(), {A: full(9.0, 1, 2), B: full(7.0, 3, 1)})
    result = method.personal(client(SHAPES), client_state, down(4.0), mine)
    assert result is not None
    assert {name: tensor.flatten().tolist() for name, tensor in result.tensors.items()} == {A: [4.0] * 2, B: [7.0] * 3}
    assert method.evaluates == "post_aggregation"


def test_in_a_real_run_clients_share_a_and_have_different_b(runs: Any) -> None:
    from safetensors.torch import load_file

    saved = [load_file(path) for path in sorted(runs("fedsa_lora").glob("clients/*/adapter/*.safetensors"))]
    assert len(saved) == 4
    for key, tensor in saved[0].items():
        for other in saved[1:]:
            assert torch.equal(tensor, other[key]) == ("lora_A" in key), key


def test_invalid_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="rank = 0"):
        FedSaLora(rank=0)
    with pytest.raises(ConfigError, match="dropout"):
        FedSaLora(dropout=1.0)
