"""FedDPA: two trainings, and a model that is weighted anew for every prompt."""

import pytest
import torch
from tests.methods.by_hand import client, driven

from fedamole.errors import ConfigError
from fedamole.federation.method import ClientInfo, Server
from fedamole.methods.feddpa import FedDpa
from fedamole.methods.fedit import GlobalLora
from fedamole.model.params import REFERENCES, expert_keys

SHAPES = {"m": (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30))
SERVER = Server(SHAPES, INFOS, seed=0)
A, B = "m/shared/A", "m/shared/B"
LOCAL_A, LOCAL_B = expert_keys("m", 0)
GLOBAL_A, GLOBAL_B = expert_keys("m", 1)


def lora(value: float) -> GlobalLora:
    return GlobalLora({A: torch.full((1, 2), value), B: torch.full((2, 1), value)})


def test_the_global_lora_is_trained_and_sent_the_local_one_beside_it_kept() -> None:
    method, hidden = FedDpa(rank=1, local_weight=0.4), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    me = client(SHAPES, hidden=hidden)
    work = method.update(me, method.first_keep(me), lora(2.0))
    (first, second), (kept, reply, trained) = driven(work, lora(3.0).tensors, {LOCAL_A: torch.full((1, 2), 8.0)})
    assert first.share == second.share == 0.5
    assert first.adapter.spec.router == "embedding"
    assert set(first.adapter.tensors) == {A, B}
    assert (second.adapter.spec.router, second.adapter.spec.instance_weight) == ("instance", 0.4)
    assert second.adapter.frozen == (GLOBAL_A, GLOBAL_B)
    assert float(second.adapter.tensors[GLOBAL_A][0, 0]) == 2.0, "the one that was sent"
    assert not second.adapter.fixed
    assert float(reply.tensors[A][0, 0]) == 3.0
    assert set(kept.tensors) == {LOCAL_A, LOCAL_B}
    assert float(kept.tensors[LOCAL_A][0, 0]) == 8.0
    assert torch.equal(kept.references[REFERENCES], hidden)
    model = method.personal(me, kept, lora(5.0), trained.adapter)
    assert model is not None
    assert float(model.tensors[GLOBAL_A][0, 0]) == 5.0
    assert torch.equal(model.fixed[REFERENCES], hidden)


def test_the_global_lora_is_averaged() -> None:
    """(1 + 4) / 2, and (10 * 1 + 30 * 4) / 40."""
    replies = {"a": lora(1.0), "b": lora(4.0)}
    for weighting, mean in (("uniform", 2.5), ("examples", 3.25)):
        after = FedDpa(rank=1, weighting=weighting).aggregate(SERVER, lora(9.0), replies)  # type: ignore[arg-type]
        assert float(after.tensors[A][0, 0]) == mean


@pytest.mark.parametrize("wrong", [{"local_weight": 0.0}, {"local_weight": 1.5}, {"instances": 0}])
def test_wrong_values_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"method\.local_weight = "):
        FedDpa(**wrong)  # type: ignore[arg-type]
