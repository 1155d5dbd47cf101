"""FedPrompt and FedPTuning: what travels, how it begins, and the average by hand; how prompts act: tests/model."""

from typing import Any

import pytest
import torch
from tests.methods.by_hand import client, driven, full

from fedamole.errors import ConfigError
from fedamole.experiment import plan_without_data, prepare
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.record import Nothing
from fedamole.methods import METHODS
from fedamole.methods.fedprompt import FedPrompt
from fedamole.methods.fedptuning import FedPTuning
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.model.params import Adapter
from fedamole.model.prompt import MLP, PROMPT, PromptSpec

INFOS = (ClientInfo("a", 10), ClientInfo("b", 30), ClientInfo("c", 20))
SERVER = Server(BaseInfo({"m": (2, 2)}, 4, 0.5), INFOS, seed=0)
both = pytest.mark.parametrize("kind", [FedPrompt, FedPTuning])


def names(kind: type[FedPrompt]) -> tuple[str, ...]:
    return (PROMPT, *MLP) if kind is FedPTuning else (PROMPT,)


def spec(kind: type[FedPrompt], tokens: int) -> PromptSpec:
    return PromptSpec(tokens, mlp=True, hidden=1024) if kind is FedPTuning else PromptSpec(tokens)


def prompt(kind: type[FedPrompt], value: float) -> SharedTensors:
    """The embedding has the value, the MLP's six tensors twice, three times, ... seven times as much."""
    return SharedTensors({name: full(value * factor, 2, 4) for factor, name in enumerate(names(kind), start=1)})


def test_a_soft_prompt_begins_with_the_deviation_of_the_bases_embeddings() -> None:
    """500 tokens of width 200 drawn at 0.5: the deviation of 100,000 numbers is 0.5 +- 0.5 / sqrt(200,000) = 0.001."""
    server = Server(BaseInfo({}, 200, 0.5), INFOS, seed=0)
    tensors = FedPrompt(virtual_tokens=500).init(server).tensors
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {PROMPT: (500, 200)}
    assert float(tensors[PROMPT].std()) == pytest.approx(0.5, abs=0.005)
    assert float(tensors[PROMPT].mean()) == pytest.approx(0, abs=0.008)


def test_a_prompt_encoder_begins_as_pefts() -> None:
    """Embeddings from N(0, 1); weights and biases uniform within 1 / sqrt(d_in), as nn.Linear's: 64, then 256 twice."""
    server = Server(BaseInfo({}, 64, 0.5), INFOS, seed=0)
    tensors = FedPTuning(virtual_tokens=100, encoder_hidden_size=256).init(server).tensors
    shapes = dict(zip(MLP, [(256, 64), (1, 256), (256, 256), (1, 256), (64, 256), (1, 64)], strict=True))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {PROMPT: (100, 64), **shapes}
    assert float(tensors[PROMPT].std()) == pytest.approx(1.0, abs=0.04)
    for name, bound in zip(MLP, (1 / 8, 1 / 8, 1 / 16, 1 / 16, 1 / 16, 1 / 16), strict=True):
        assert 0.9 * bound < tensors[name].abs().max() <= bound
    assert len({float(tensor.flatten()[0]) for tensor in tensors.values()}) == 7, "each its own draw"


@pytest.mark.parametrize("wrong", [0, -3])
def test_a_network_without_hidden_units_is_refused(wrong: int) -> None:
    with pytest.raises(ConfigError, match=f"encoder_hidden_size = {wrong}: must be at least 1"):
        FedPTuning(encoder_hidden_size=wrong)


@both
def test_all_are_sent_the_same_and_the_seed_draws_it(kind: type[FedPrompt]) -> None:
    method = kind(virtual_tokens=3)
    state, again = method.init(SERVER), method.init(SERVER)
    other = method.init(Server(BaseInfo({}, 4, 0.5), INFOS, seed=1))
    assert set(state.tensors) == set(names(kind))
    for name, tensor in state.tensors.items():
        assert torch.equal(tensor, again.tensors[name])
        assert not torch.equal(tensor, other.tensors[name])
    assert all(method.message(state, info) is state for info in INFOS)
    assert method.spec() == spec(kind, 3)


@both
def test_everything_that_was_sent_trains_and_goes_up(kind: type[FedPrompt]) -> None:
    work = kind(virtual_tokens=2).update(client({}), Nothing(), prompt(kind, 1.0))
    (request,), (client_state, reply, _) = driven(work, {PROMPT: full(9.0, 2, 4)})
    assert (request.step_fraction, request.adapter.frozen, request.adapter.fixed) == (1.0, (), {})
    assert request.penalty is None
    assert request.adapter.spec == spec(kind, 2)
    assert {name: float(tensor[0, 0]) for name, tensor in request.adapter.tensors.items()} == {
        name: float(index) for index, name in enumerate(names(kind), start=1)
    }
    assert request.adapter.parameters() == 8 * len(names(kind))
    assert client_state == Nothing()
    assert set(reply.tensors) == set(names(kind))
    assert torch.equal(reply.tensors[PROMPT], full(9.0, 2, 4))
    for index, name in enumerate(names(kind)[1:], start=2):
        assert torch.equal(reply.tensors[name], full(float(index), 2, 4))


@both
@pytest.mark.parametrize(
    ("weighting", "answered", "mean"),
    [
        ("uniform", "abc", 4.0),  # (1 + 2 + 9) / 3
        ("uniform", "ac", 5.0),  # (1 + 9) / 2
        ("examples", "abc", 25 / 6),  # (10 * 1 + 30 * 2 + 20 * 9) / 60
        ("examples", "ac", 19 / 3),  # (10 * 1 + 20 * 9) / 30
    ],
)
def test_the_average_by_hand(kind: type[FedPrompt], weighting: Any, answered: str, mean: float) -> None:
    replies = {name: prompt(kind, value) for name, value in (("a", 1.0), ("b", 2.0), ("c", 9.0)) if name in answered}
    after = kind(weighting=weighting).aggregate(SERVER, prompt(kind, 100.0), replies)
    assert set(after.tensors) == set(names(kind))
    for index, name in enumerate(names(kind), start=1):
        torch.testing.assert_close(after.tensors[name], full(index * mean, 2, 4))


@both
def test_the_personal_model_is_the_average(kind: type[FedPrompt]) -> None:
    method = kind(virtual_tokens=2)
    mine = Adapter(method.spec(), prompt(kind, 9.0).tensors)
    result = method.personal(client({}), Nothing(), prompt(kind, 4.0), mine)
    assert result is not None
    assert torch.equal(result.tensors[PROMPT], full(4.0, 2, 4))
    assert method.personal(client({}), Nothing(), None, mine) is mine
    assert method.evaluates == "post_aggregation"


@pytest.mark.parametrize("name", ["fedprompt", "fedptuning"])
def test_ft_is_the_model_before_the_aggregation(name: str) -> None:
    ft: Any = METHODS[f"{name}_ft"]
    kind: Any = METHODS[name]
    assert ft.evaluates == "pre_aggregation"
    mine = Adapter(PromptSpec(2), prompt(kind, 9.0).tensors)
    assert ft(virtual_tokens=2).personal(client({}), Nothing(), prompt(kind, 4.0), mine) is mine
    assert ft(virtual_tokens=2).spec() == kind(virtual_tokens=2).spec()


@both
def test_no_virtual_token_is_refused(kind: type[FedPrompt]) -> None:
    for tokens in (0, -3):
        with pytest.raises(ConfigError, match=f"virtual_tokens = {tokens}: must be at least 1"):
            kind(virtual_tokens=tokens)


@pytest.mark.parametrize("name", ["fedprompt", "fedptuning"])
def test_virtual_tokens_and_text_must_fit_into_the_bases_positions(runs: Any, name: str) -> None:
    """The tiny base has 128 positions, the prompt 4 tokens: texts of 124 tokens fit, of 125 do not; a LoRA's do."""
    message = r"training.max_length = 125 and method.virtual_tokens = 4: this base has 128 positions; lower one of them"
    longer = runs.load(name, "training.max_length=125")
    for check in (prepare, plan_without_data):
        with pytest.raises(ConfigError, match=message):
            check(longer)
    assert prepare(runs.load(name, "training.max_length=124")).clients
    assert prepare(runs.load("fedit", "training.max_length=128")).clients
    with pytest.raises(ConfigError, match=r"training.max_length = 129: this base has 128 positions; lower it"):
        prepare(runs.load("fedit", "training.max_length=129"))
