"""The optimisation of synthetic examples on the tiny base: what it reads, what it draws, and what it returns."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tests.training import random_lora

from fedamole.experiment import Prepared, prepare
from fedamole.federation.local import DivergedError, LocalTask
from fedamole.federation.randomness import torch_generator
from fedamole.federation.settings import TrainingSettings
from fedamole.federation.synthesis import features, greedy_answers, groups, perturbed, real_prompts, synthesise
from fedamole.federation.synthesis_request import SynthesisRequest, SynthesisResult
from fedamole.model.bank import Bank
from fedamole.model.batch import collate
from fedamole.synthesis.examples import VECTORS
from fedamole.synthesis.matching import DistributionMatching, Features, Objective
from fedamole.synthesis.outline import ClientOutline, ExampleSizes

SIZES = ExampleSizes(2, 4, 10, 16, 16, 1)
SETTINGS = TrainingSettings(local_steps=6, batch_size=2)


@pytest.fixture(scope="module")
def prepared(runs: Any) -> Prepared:
    return prepare(runs.load("fedit"))


@pytest.fixture(scope="module")
def bank(prepared: Prepared) -> Bank:
    return Bank(prepared.base)


def request(prepared: Prepared, bank: Bank, client: str = "entail", **options: Any) -> SynthesisRequest:
    data, base = prepared.clients[client], prepared.base
    outline = ClientOutline(data.train.rows, data.train.examples, base.tokenizer, base.width, base.embedding_std)
    examples = outline.new_examples(SIZES, torch_generator(0, "synthetic", client, 0))
    start = {"examples": examples, "adapter": random_lora(bank), "objective": DistributionMatching()}
    return SynthesisRequest(**{**start, "class_answers": outline.class_answers(), **options})


def run(
    prepared: Prepared, bank: Bank, asked: SynthesisRequest, client: str = "entail", seed: int = 0, index: int = 0
) -> SynthesisResult:
    task = LocalTask(client, asked, prepared.clients[client].train.pairs(), 0.01)
    (result,) = synthesise(bank, [task], SETTINGS, seed=seed, round_=0, fit_index=index)
    assert isinstance(result, SynthesisResult)
    return result


def distance(prepared: Prepared, bank: Bank, asked: SynthesisRequest, vectors: torch.Tensor) -> float:
    """The objective under the request's adapter over all real examples."""
    real = real_prompts(prepared.clients["entail"].train.pairs(), asked)
    bank.load([asked.adapter])
    with torch.no_grad():
        by_class = {label: features(bank, prompts) for label, prompts in real.items()}
        with bank.virtual_vectors(vectors.flatten(0, 1).unsqueeze(0)):
            made = features(bank, asked.examples.prompts())
    return float(asked.objective.loss(made, torch.tensor(asked.examples.classes), by_class))


def test_examples_come_nearer_to_the_real_ones_and_nothing_else_changes(prepared: Prepared, bank: Bank) -> None:
    asked = request(prepared, bank, learning_rate=0.05)
    before = asked.examples.vectors.clone()
    weights = {name: tensor.clone() for name, tensor in asked.adapter.tensors.items()}
    result = run(prepared, bank, asked)
    assert torch.equal(asked.examples.vectors, before)
    assert all(torch.equal(weights[name], tensor) for name, tensor in asked.adapter.tensors.items())
    assert replace(result.examples, tensors={}) == replace(asked.examples, tensors={})
    start, end = (distance(prepared, bank, asked, it.vectors) for it in (asked.examples, result.examples))
    assert end < 0.9 * start
    assert result.steps == 6
    assert result.loss > 0
    assert asked.adapter.trained_sizes() == {}


def test_what_it_reads_is_counted(prepared: Prepared, bank: Bank) -> None:
    """Three classes of four real examples in each of six steps, and the synthetic ones once per step."""
    asked = request(prepared, bank, real_examples=4)
    result = run(prepared, bank, asked)
    assert result.teacher_examples == 6 * 3 * 4
    assert result.teacher_tokens > 0
    assert result.tokens == 6 * sum(len(prompt) + 1 for prompt in asked.examples.prompts())
    half = replace(asked, step_fraction=0.5)
    assert run(prepared, bank, half).steps == 3


def test_draws_depend_on_seed_client_and_request_alone(prepared: Prepared, bank: Bank) -> None:
    asked = request(prepared, bank, toward=random_lora(bank, 1), noise=0.3, real_examples=3)
    first = run(prepared, bank, asked).examples.vectors
    shuffled = replace(asked, adapter=replace(asked.adapter, tensors=dict(reversed([*asked.adapter.tensors.items()]))))
    assert torch.equal(first, run(prepared, bank, shuffled).examples.vectors), "the order of the names is no input"
    for others in ({"seed": 1}, {"index": 1}):
        assert not torch.equal(first, run(prepared, bank, asked, **others).examples.vectors)  # type: ignore[arg-type]
    for changed in (replace(asked, noise=0.0), replace(asked, toward=None), replace(asked, real_examples=2)):
        assert not torch.equal(first, run(prepared, bank, changed).examples.vectors)


def test_noise_has_the_norm_that_is_asked_for(bank: Bank) -> None:
    start = random_lora(bank).tensors
    moved = perturbed(start, 0.7, torch.Generator().manual_seed(2))
    squares = sum(float((moved[name] - start[name]).double().square().sum()) for name in start)
    assert squares**0.5 == pytest.approx(0.7, rel=1e-5)
    assert all(float((moved[name] - start[name]).abs().max()) > 0 for name in start)


def test_real_examples_are_divided_by_their_answers(prepared: Prepared, bank: Bank) -> None:
    asked, rows = request(prepared, bank), prepared.clients["entail"].train.pairs()
    real = real_prompts(rows, asked)
    assert {label: len(prompts) for label, prompts in real.items()} == {
        label: sum(tuple(answer) == asked.class_answers[label] for _, answer in rows) for label in range(3)
    }
    single = replace(asked, examples=replace(asked.examples, classes=(1,) * 6))
    assert set(real_prompts(rows, single)) == {1}
    free = request(prepared, bank, "chat")
    chat = prepared.clients["chat"].train.pairs()
    assert real_prompts(chat, free) == {0: [prompt for prompt, _ in chat]}


def test_free_text_is_answered_by_the_clients_own_model(prepared: Prepared, bank: Bank) -> None:
    """Each answer is greedy: every token is the likeliest after what stands before it."""
    own = random_lora(bank, 2)
    asked = request(prepared, bank, "chat", answered_by=own, max_answer_tokens=3)
    result = run(prepared, bank, asked, "chat")
    rows, end = result.examples.rows(), prepared.base.tokenizer.eos_token_id
    bank.load([rows.read_by(own)])
    for prompt, answer in rows.rows:
        batch = collate([[(prompt, answer)]], prepared.base.pad_id, bank.packs)
        with torch.no_grad(), bank.forward(batch) as logits:
            assert logits.argmax(1).tolist() == list(answer)
        assert len(answer) == 3 or answer[-1] == end
    answers, read = greedy_answers(bank, [prompt for prompt, _ in rows.rows], 3)
    assert answers == [answer for _, answer in rows.rows]
    assert result.teacher_tokens > read > 0


def test_long_prompts_are_read_in_groups() -> None:
    prompts = [(1,) * length for length in (3, 4, 2, 9, 1)]
    assert [[len(prompt) for prompt in group] for group in groups(prompts, 6)] == [[3], [4, 2], [9], [1]]


def test_without_examples_there_is_nothing_to_do(prepared: Prepared, bank: Bank) -> None:
    asked = request(prepared, bank)
    none = replace(asked.examples, tensors={VECTORS: torch.zeros(0, 4, 32)}, answers=(), classes=())
    result = run(prepared, bank, replace(asked, examples=none))
    assert (len(result.examples), result.steps, result.tokens) == (0, 0, 0)


@dataclass(frozen=True)
class Broken(Objective):
    """Becomes infinite."""

    def loss(self, synthetic: Features, classes: torch.Tensor, real: Any) -> torch.Tensor:
        return synthetic.hidden.sum() * torch.inf


def test_one_that_diverges_is_named(prepared: Prepared, bank: Bank) -> None:
    task = LocalTask("entail", request(prepared, bank, objective=Broken()), [((1,), (2,))], 0.01)
    (result,) = synthesise(bank, [task], SETTINGS, seed=0, round_=3)
    assert isinstance(result, DivergedError)
    assert "client entail, round 3: its synthetic examples are no longer finite after 1 steps" in str(result)


@dataclass(frozen=True)
class Recorded(Objective):
    """Keeps the features that it gets; its loss is the sum of the other logits."""

    seen: list[tuple[Features, dict[int, Features]]]

    needs_layers = real_once = True

    def loss(self, synthetic: Features, classes: torch.Tensor, real: Any) -> torch.Tensor:
        self.seen.append((synthetic, real))
        assert synthetic.other is not None
        return synthetic.other.sum()


def test_layers_and_a_second_adapter(prepared: Prepared, bank: Bank) -> None:
    """All layers are those of the first adapter; gradients flow through the second; real examples are read once."""
    objective, other = Recorded([]), random_lora(bank, 1)
    asked = request(prepared, bank, objective=objective, against=other, real_examples=4)
    result = run(prepared, bank, asked)
    assert not torch.equal(result.examples.vectors, asked.examples.vectors)
    assert len(objective.seen) == 6
    assert all(real is objective.seen[0][1] for _, real in objective.seen)
    assert result.teacher_examples == 3 * 4
    assert result.tokens == 6 * 2 * sum(len(prompt) + 1 for prompt in asked.examples.prompts())
    first, real = objective.seen[0]
    for adapter, logits in ((asked.adapter, first.logits), (other, first.other)):
        bank.load([asked.examples.rows().read_by(adapter)])
        with torch.no_grad():
            alone = features(bank, asked.examples.prompts(), layers=True)
        assert logits is not None
        torch.testing.assert_close(alone.logits, logits.detach(), atol=1e-4, rtol=1e-4)
        assert len(alone.layers) == len(first.layers) == bank.base.model.config.num_hidden_layers
        torch.testing.assert_close(alone.layers[-1], alone.hidden)
        assert torch.allclose(alone.layers[0], first.layers[0], atol=1e-4) == (adapter is asked.adapter)
    assert {label: each.layers[0].shape for label, each in real.items()} == dict.fromkeys(
        range(3), (4, prepared.base.width)
    )
    with pytest.raises(ValueError, match="read once"):
        replace(asked, noise=0.1)
