"""The training of autoencoders on the tiny base: what it reads, what it draws, and what it returns."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.training import random_lora

from fedamole.experiment import Prepared, prepare
from fedamole.federation.autoencoder import prompts_of, train_autoencoders
from fedamole.federation.autoencoder_request import AutoencoderRequest, AutoencoderResult
from fedamole.federation.local import DivergedError, LocalTask
from fedamole.federation.probe import ClientProbe, ProbeCounts
from fedamole.federation.settings import TrainingSettings
from fedamole.federation.synthesis import features
from fedamole.model.bank import Bank
from fedamole.synthesis.latents import AutoencoderSizes, autoencoder_loss, decode, encode, new_autoencoder

PROMPT = (5, -1, -2, 6, -3)


@pytest.fixture(scope="module")
def prepared(runs: Any) -> Prepared:
    return prepare(runs.load("fedit"))


@pytest.fixture(scope="module")
def bank(prepared: Prepared) -> Bank:
    return Bank(prepared.base)


@pytest.fixture(scope="module")
def request_(prepared: Prepared, bank: Bank) -> AutoencoderRequest:
    adapter, rows = random_lora(bank), prepared.clients["entail"].train.rows[:12]
    probe = ClientProbe(bank, [], "entail", 0, 100, ProbeCounts())
    hidden = probe.prompt_hidden(adapter, [row.prompt for row in rows])
    classes = torch.tensor([row.options.index(row.answer) for row in rows])
    tensors = new_autoencoder(AutoencoderSizes(16, 4, 3), prepared.base.width, torch.Generator().manual_seed(0))
    return AutoencoderRequest(tensors, adapter, hidden, classes, (7, 8, 9), PROMPT, learning_rate=0.02)


def run(bank: Bank, asked: AutoencoderRequest, steps: int = 6, **draws: Any) -> AutoencoderResult | DivergedError:
    settings = TrainingSettings(local_steps=steps, batch_size=2)
    task = LocalTask(draws.pop("client", "entail"), asked, [((1,), (2,))], 0.01)
    (result,) = train_autoencoders(bank, [task], settings, **{"seed": 0, "round_": 0, **draws})
    return result


def trained(bank: Bank, asked: AutoencoderRequest, steps: int = 6, **draws: Any) -> AutoencoderResult:
    result = run(bank, asked, steps, **draws)
    assert isinstance(result, AutoencoderResult)
    return result


def error(bank: Bank, asked: AutoencoderRequest, tensors: Any) -> tuple[float, float]:
    """The error of reconstruction, and the share of rows whose class the model gives what was decoded."""
    base = bank.base
    mean, _ = encode(tensors, asked.hidden)
    bank.load([asked.adapter])
    vectors = decode(tensors, mean, base.width, base.embedding_std)
    with torch.no_grad(), bank.virtual_vectors(vectors.flatten(0, 1).unsqueeze(0)):
        read = features(bank, prompts_of(PROMPT, len(mean)))
    right = read.logits[:, list(asked.tokens)].argmax(1) == asked.classes
    return float(autoencoder_loss(read.hidden, asked.hidden, mean, mean, 0.0)), float(right.float().mean())


def test_it_learns_to_reconstruct_hidden_states(bank: Bank, request_: AutoencoderRequest) -> None:
    before = {name: tensor.clone() for name, tensor in request_.tensors.items()}
    result = trained(bank, replace(request_, class_weight=0.0), 60)
    assert all(torch.equal(before[name], tensor) for name, tensor in request_.tensors.items())
    assert {name: it.shape for name, it in result.tensors.items()} == {name: it.shape for name, it in before.items()}
    assert error(bank, request_, result.tensors)[0] < 0.6 * error(bank, request_, before)[0]
    assert request_.adapter.trained_sizes() == {}, "the adapter is frozen"


def test_it_learns_to_keep_the_class(bank: Bank, request_: AutoencoderRequest) -> None:
    result = trained(bank, replace(request_, class_weight=5.0), 60)
    assert error(bank, request_, result.tensors)[1] > 0.8


def test_steps_and_tokens_are_counted(bank: Bank, request_: AutoencoderRequest) -> None:
    """Six rows of at most `batch_size`, five tokens and the answer's."""
    result = trained(bank, replace(request_, batch_size=4, step_fraction=0.5))
    assert (result.steps, result.tokens) == (3, 3 * 4 * 6)
    assert (result.teacher_examples, result.teacher_tokens) == (0, 0)
    assert trained(bank, request_).tokens == 6 * 12 * 6, "of no more rows than there are"


def test_draws_depend_on_seed_client_round_and_request_alone(bank: Bank, request_: AutoencoderRequest) -> None:
    first = trained(bank, request_).tensors
    shuffled = replace(request_, tensors=dict(reversed([*request_.tensors.items()])))
    again = trained(bank, shuffled).tensors
    assert all(torch.equal(first[name], again[name]) for name in first), "the order of the names is no input"
    for others in ({"seed": 1}, {"round_": 1}, {"fit_index": 1}, {"client": "mood"}):
        changed = trained(bank, request_, **others).tensors
        assert any(not torch.equal(first[name], changed[name]) for name in first)


def test_what_becomes_infinite_is_reported(bank: Bank, request_: AutoencoderRequest) -> None:
    result = run(bank, replace(request_, hidden=request_.hidden * torch.inf))
    assert isinstance(result, DivergedError)
    assert "client entail, round 0: its autoencoder is no longer finite after 1 steps" in str(result)
    assert "method.autoencoder_rate" in str(result)


def test_without_hidden_states_there_is_nothing_to_train_on(request_: AutoencoderRequest) -> None:
    with pytest.raises(ValueError, match="at least one hidden state"):
        replace(request_, hidden=torch.zeros(0, 32))


def test_prompts_have_virtual_tokens_of_their_own() -> None:
    assert prompts_of(PROMPT, 2) == [(5, -1, -2, 6, -3), (5, -4, -5, 6, -6)]
