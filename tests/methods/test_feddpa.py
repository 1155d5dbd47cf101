"""FedDPA: two trainings, and a model that is weighted anew for every prompt."""

import pytest
import torch
from tests.methods.by_hand import CallProbe, client, driven
from tests.training import lora_spec

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.methods.feddpa import FedDpa, LocalLora
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.model.amole import EmbeddingRouter
from fedamole.model.mixer import InstanceWeights
from fedamole.model.params import REFERENCES, Adapter, expert_keys

SHAPES = {"m": (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)
A, B = "m/shared/A", "m/shared/B"
LOCAL_A, LOCAL_B = expert_keys("m", 0)
GLOBAL_A, GLOBAL_B = expert_keys("m", 1)


def lora(value: float) -> SharedTensors:
    return SharedTensors({A: torch.full((1, 2), value), B: torch.full((2, 1), value)})


def test_the_global_lora_is_trained_and_sent_the_local_one_beside_it_kept() -> None:
    method, hidden = FedDpa(rank=1, local_weight=0.4), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    me = client(SHAPES, hidden=hidden)
    work = method.update(me, method.init_client_state(me), lora(2.0))
    (first, second), (client_state, reply, trained) = driven(
        work, lora(3.0).tensors, {LOCAL_A: torch.full((1, 2), 8.0)}
    )
    assert first.step_fraction == second.step_fraction == 0.5
    assert lora_spec(first.adapter.spec).router == EmbeddingRouter()
    assert set(first.adapter.tensors) == {A, B}
    weighed = lora_spec(second.adapter.spec)
    assert weighed.router == InstanceWeights(0.4)
    assert second.adapter.frozen == (GLOBAL_A, GLOBAL_B)
    assert float(second.adapter.tensors[GLOBAL_A][0, 0]) == 2.0, "the one that was sent"
    assert not second.adapter.fixed
    assert float(reply.tensors[A][0, 0]) == 3.0
    assert set(client_state.tensors) == {LOCAL_A, LOCAL_B}
    assert float(client_state.tensors[LOCAL_A][0, 0]) == 8.0
    assert torch.equal(client_state.references[REFERENCES], hidden)
    model = method.personal(me, client_state, lora(5.0), trained.adapter)
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


def test_absent_clients_do_not_count() -> None:
    after = FedDpa(rank=1).aggregate(SERVER, lora(9.0), {"b": lora(4.0)})
    assert float(after.tensors[A][0, 0]) == 4.0


def test_the_local_lora_is_trained_with_fixed_weights_and_what_prompts_look_like_is_found_anew() -> None:
    """In a second round there are references already: the training knows nothing of them, and new ones are found under
    the LoRA that has just been trained, on as many prompts as asked.
    """
    method, looks = FedDpa(rank=1, instances=3), list[tuple[Adapter, int]]()

    def last_hidden(adapter: Adapter, most: int) -> torch.Tensor:
        looks.append((adapter, most))
        return torch.full((most, 4), 2.0)

    me = client(SHAPES, probe=CallProbe(hidden=last_hidden))
    client_state = LocalLora(
        {LOCAL_A: torch.full((1, 2), 6.0), LOCAL_B: torch.zeros(2, 1)}, {REFERENCES: torch.ones(3, 4)}
    )
    work = method.update(me, client_state, lora(2.0))
    (_, second), (after, _, _) = driven(work, lora(3.0).tensors, {LOCAL_A: torch.full((1, 2), 8.0)})
    assert not second.adapter.fixed
    assert float(second.adapter.tensors[LOCAL_A][0, 0]) == 6.0
    ((seen, most),) = looks
    assert most == 3
    assert float(seen.tensors[LOCAL_A][0, 0]) == 8.0
    assert torch.equal(after.references[REFERENCES], torch.full((3, 4), 2.0))


def test_before_its_first_training_a_client_weighs_both_alike_for_every_prompt() -> None:
    """Nothing to compare with: no references, and the local LoRA is still one that does nothing."""
    method, me = FedDpa(rank=1), client(SHAPES)
    model = method.personal(me, method.init_client_state(me), lora(5.0), None)
    assert model is not None
    assert not model.fixed
    assert not model.tensors[LOCAL_B].any()
    assert float(model.tensors[GLOBAL_A][0, 0]) == 5.0
