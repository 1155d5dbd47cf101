"""Virtual tokens of the bank against PEFT's own prompt tuning and p-tuning, on real tiny models."""

import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file

from fedamole.errors import BaseModelError, ConfigError
from fedamole.evaluation.generation import generate_answers
from fedamole.evaluation.likelihood import mean_losses, option_losses
from fedamole.federation.local import LocalTask, fit
from fedamole.federation.method import TrainingRequest, TrainingResult
from fedamole.federation.settings import TrainingSettings
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.batch import Ids, TokenPair, collate, token_losses
from fedamole.model.params import Adapter
from fedamole.model.pretrained import load_adapter, save_adapter
from fedamole.model.prompt import MLP, PROMPT, PromptSpec, new_prompt, plain_prompt
from tests.training import alone

from .conftest import mixture

ROWS: list[TokenPair] = [
    ((5, 9, 40, 33, 60, 12, 77, 8), (200, 31, 0)),
    ((11,), (90, 0)),
    ((5, 66, 67), (19, 20, 21, 22, 0)),
]
"""(prompt, answer) of three lengths."""
OPTIONS: tuple[Ids, ...] = ((20, 21, 0), (20, 22, 0), (20, 0), (7, 0))

every_base = pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "gemma3_text"])
both_kinds = pytest.mark.parametrize("mlp", [False, True], ids=["soft", "p-tuning"])
HIDDEN = 20
"""Width of p-tuning's hidden layers, another than that of the bases' embeddings."""


def prompt(
    base: Base, mlp: bool = False, seed: int = 0, tokens: int = 3, dtype: torch.dtype = torch.float32
) -> Adapter:
    """Virtual tokens about as large as these bases' embeddings."""
    spec = PromptSpec(tokens, mlp, HIDDEN if mlp else None)
    tensors = new_prompt(spec, base.width, 0.3, torch.Generator().manual_seed(seed))
    return Adapter(spec, {name: tensor.to(dtype) for name, tensor in tensors.items()})


def in_peft(base: Base, adapter: Adapter) -> tuple[PeftModel, dict[str, torch.nn.Parameter]]:
    """PEFT's model with this prompt on a base that no bank was opened on, and its parameters by our names."""
    assert isinstance(adapter.spec, PromptSpec)
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": adapter.spec.virtual_tokens}
    if adapter.spec.mlp:
        config = PromptEncoderConfig(**settings, encoder_reparameterization_type="MLP", encoder_hidden_size=HIDDEN)
    else:
        config = PromptTuningConfig(**settings)
    model = get_peft_model(base.model, config)
    encoder = model.prompt_encoder["default"].to(base.model.dtype)
    theirs = {PROMPT: encoder.embedding.weight}
    if adapter.spec.mlp:
        layers = [layer for layer in encoder.mlp_head if isinstance(layer, torch.nn.Linear)]
        theirs.update(zip(MLP, (part for layer in layers for part in (layer.weight, layer.bias)), strict=True))
    with torch.no_grad():
        for name, tensor in adapter.tensors.items():
            theirs[name].copy_(tensor.view_as(theirs[name]))
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == adapter.parameters()
    return model, theirs


def answers_of(logits: torch.Tensor, prompt: Ids, answer: Ids, before: int) -> torch.Tensor:
    """Those of a sequence's logits, `before` places of them virtual, that predict its answer."""
    end = before + len(prompt) + len(answer) - 1
    return logits[end - len(answer) : end]


def of_bank(bank: Bank, clients: Sequence[Sequence[TokenPair]], packed: bool) -> torch.Tensor:
    with bank.forward(collate(bank.prefixed(clients), bank.base.pad_id, packed)) as logits:
        return logits


def of_peft(model: PeftModel, rows: Sequence[TokenPair], tokens: int = 3) -> torch.Tensor:
    all_logits = [model(input_ids=torch.tensor([[*p, *a]])).logits[0] for p, a in rows]
    assert all(len(logits) == tokens + len(p) + len(a) for logits, (p, a) in zip(all_logits, rows, strict=True))
    return torch.cat([answers_of(logits, p, a, tokens) for logits, (p, a) in zip(all_logits, rows, strict=True)])


@every_base
@both_kinds
def test_logits_and_losses_equal_pefts(base: Callable[..., Base], architecture: str, mlp: bool) -> None:
    """Packed and padded, at every place that predicts an answer token."""
    bank = Bank(base(architecture))
    adapter = prompt(bank.base, mlp)
    model, _ = in_peft(base(architecture), adapter)
    bare = of_bank(bank, [ROWS], False).detach()
    bank.load([adapter])
    with torch.no_grad():
        expected = of_peft(model, ROWS)
        assert bank.packs
        for packed in (True, False):
            torch.testing.assert_close(of_bank(bank, [ROWS], packed), expected, rtol=0, atol=1e-5)
    assert (expected - bare).abs().max() > 0.1, "the prompt makes a difference"
    labels = torch.tensor([token for _, answer in ROWS for token in answer])
    mean = float(token_losses(expected, labels).mean())
    for at_once in (1, 10_000):
        assert mean_losses(bank, [ROWS], at_once) == [pytest.approx(mean, abs=1e-5)]
    bank.load([])
    torch.testing.assert_close(of_bank(bank, [ROWS], False), bare, rtol=0, atol=0)


@every_base
@both_kinds
def test_gradients_equal_pefts(base: Callable[..., Base], architecture: str, mlp: bool) -> None:
    bank, other = Bank(base(architecture)), base(architecture)
    bank.base.model.double()
    other.model.double()
    adapter = prompt(bank.base, mlp, dtype=torch.float64)
    model, theirs = in_peft(other, adapter)
    labels = torch.tensor([token for _, answer in ROWS for token in answer])
    token_losses(of_peft(model, ROWS), labels).sum().backward()
    for packed in (True, False):
        bank.load([adapter])
        bank.trainable()
        batch = collate(bank.prefixed([ROWS]), bank.base.pad_id, packed)
        with bank.forward(batch) as logits:
            bank.backward(token_losses(logits, batch.labels).sum())
        (result,) = bank.store.gradients
        reference = {name: weight.grad for name, weight in theirs.items() if weight.grad is not None}
        assert all(gradient.abs().max() > 1e-4 for gradient in reference.values())
        expected = bank.store.row(0, {name: grad.view_as(adapter.tensors[name]) for name, grad in reference.items()})
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)


@both_kinds
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_several_clients_at_once_equal_each_alone(base: Callable[..., Base], mlp: bool, packed: bool) -> None:
    """Uneven rows, every client its own prompt; and a part of the clients, as training passes take it."""
    bank = Bank(base("gpt2"))
    adapters = [prompt(bank.base, mlp, seed) for seed in range(3)]
    clients = [ROWS, ROWS[1:2], ROWS[::-1]]
    apart = []
    with torch.no_grad():
        for adapter, rows in zip(adapters, clients, strict=True):
            bank.load([adapter])
            apart.append(of_bank(bank, [rows], packed))
        bank.load(adapters)
        torch.testing.assert_close(of_bank(bank, clients, packed), torch.cat(apart), rtol=0, atol=1e-5)
        bank.select_clients(1, 3)
        torch.testing.assert_close(of_bank(bank, clients[1:], packed), torch.cat(apart[1:]), rtol=0, atol=1e-5)
        bank.select_clients(0, 3)
        for index, adapter in enumerate(adapters):
            back = bank.adapter(index).tensors
            assert back.keys() == adapter.tensors.keys()
            assert all(torch.equal(back[name], adapter.tensors[name]) for name in back)
    assert (apart[0][:3] - apart[2][-3:]).abs().max() > 0.1, "the same row under two prompts"


def plain_logits(base: Base, tokens: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """Logits of one forward pass over [prompt embeddings; text], without padding, cache or mask."""
    text = base.model.get_input_embeddings()(torch.tensor([ids]))
    with torch.no_grad():
        logits: torch.Tensor = base.model(inputs_embeds=torch.cat([tokens[None].to(text.dtype), text], 1)).logits[0]
        return logits


@every_base
@both_kinds
def test_option_likelihoods_equal_plain_forward_passes(base: Callable[..., Base], architecture: str, mlp: bool) -> None:
    """Two clients' prompts at once; Gemma 3's window of 8 is shorter than some sequences."""
    bank, bare = Bank(base(architecture)), base(architecture)
    adapters = [prompt(bank.base, mlp, seed) for seed in range(2)]
    bank.load(adapters)
    rows: list[list[tuple[Ids, Sequence[Ids]]]] = [[(p, OPTIONS) for p, _ in ROWS], [(ROWS[0][0], OPTIONS[:2])]]
    for at_once in (1, 10_000):
        for adapter, part, losses in zip(adapters, rows, option_losses(bank, rows, at_once), strict=True):
            for (p, options), result in zip(part, losses, strict=True):
                expected = []
                for option in options:
                    logits = plain_logits(bare, plain_prompt(adapter.tensors), [*p, *option])
                    expected.append(float(token_losses(answers_of(logits, p, option, 3), torch.tensor(option)).mean()))
                assert result == pytest.approx(expected, abs=1e-5)


@every_base
@both_kinds
def test_generation_is_greedy_after_prompt_and_text(base: Callable[..., Base], architecture: str, mlp: bool) -> None:
    """Token by token the likeliest of a plain forward pass over [prompt embeddings; text so far], to the end token."""
    bank, bare = Bank(base(architecture)), base(architecture)
    bank.base.tokenizer.batch_decode = lambda rows, **_: [" ".join(map(str, row)) for row in rows]
    adapters = [prompt(bank.base, mlp, seed) for seed in range(2)]
    bank.load(adapters)
    texts = [[p for p, _ in ROWS], [ROWS[0][0]]]
    answers, expected = generate_answers(bank, texts, 5, 10_000), list[list[str]]()
    for adapter, part in zip(adapters, texts, strict=True):
        expected.append([])
        for p in part:
            new: list[int] = []
            while len(new) < 5 and 0 not in new:
                new.append(int(plain_logits(bare, plain_prompt(adapter.tensors), [*p, *new])[-1].argmax()))
            expected[-1].append(" ".join(map(str, new)))
    assert until_end(answers) == until_end(generate_answers(bank, texts, 5, 1)) == until_end(expected)
    if not architecture.startswith("gemma"):  # whose random weights repeat the last token, whatever comes before it
        assert expected[0][0] != expected[1][0], "the same text under two prompts"


def until_end(clients: list[list[str]]) -> list[list[list[int]]]:
    """Ids up to the end token, 0, without what pads a batch after it."""
    rows = [[[int(token) for token in text.split()] for text in texts] for texts in clients]
    return [[row[: row.index(0)] if 0 in row else row for row in part] for part in rows]


@both_kinds
def test_generation_leaves_room_for_the_virtual_tokens(base: Callable[..., Base], mlp: bool) -> None:
    """GPT-2 has 128 positions and fails beyond: 3 virtual tokens, 120 of text, so at most 5 of the 50 new ones."""
    bank = Bank(base("gpt2"))
    bank.load([prompt(bank.base, mlp)])
    seen: list[int] = []
    inner = bank.base.tokenizer.batch_decode

    def decode(ids: Sequence[Ids], **options: Any) -> Any:
        seen.append(len(ids[0]))
        return inner(ids, **options)

    bank.base.tokenizer.batch_decode = decode
    generate_answers(bank, [[tuple(range(2, 122))]], 50, 1000)
    assert seen[0] <= 5


@both_kinds
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_saved_and_loaded_it_gives_the_same_logits(
    base: Callable[..., Base], tmp_path: Path, architecture: str, mlp: bool
) -> None:
    """By this package, and by PEFT, for which it is prompt tuning: of p-tuning the tokens that come out are saved."""
    bank = Bank(base(architecture))
    adapter = prompt(bank.base, mlp)
    bank.load([adapter])
    with torch.no_grad():
        expected = of_bank(bank, [ROWS], False)
        save_adapter(adapter, tmp_path, bank.base.name, bank.base.identity)
        assert {key: tuple(t.shape) for key, t in load_file(tmp_path / "adapter_model.safetensors").items()} == {
            "prompt_embeddings": (3, 32)
        }
        back = load_adapter(tmp_path, bank.base.identity)
        assert back.spec == PromptSpec(3)
        bank.load([back])
        torch.testing.assert_close(of_bank(bank, [ROWS], False), expected, rtol=0, atol=1e-6)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # PEFT warns of tensors that are missing or left over
            model = PeftModel.from_pretrained(base(architecture).model, tmp_path)
        torch.testing.assert_close(of_peft(model, ROWS), expected, rtol=0, atol=1e-5)


FRESH = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(base, sys.argv[2])
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.tensor([[3, 4, 5, 6]])).logits[0, 3:].contiguous()}, sys.argv[3])
assert "fedamole" not in sys.modules
"""


def test_a_fresh_process_without_this_package_gives_the_same_logits(base: Callable[..., Base], tmp_path: Path) -> None:
    bank = Bank(base())
    adapter = prompt(bank.base, mlp=True)
    save_adapter(adapter, tmp_path / "a", bank.base.name, bank.base.identity)
    command = [sys.executable, "-c", FRESH, bank.base.name, str(tmp_path / "a"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bank.load([adapter])
    with torch.no_grad():
        expected = bank.base.model(input_ids=torch.tensor([[*bank.prefix((3, 4, 5, 6))]])).logits[0, 3:]
    torch.testing.assert_close(load_file(tmp_path / "out")["logits"], expected, rtol=0, atol=1e-5)


def test_the_network_by_hand() -> None:
    """Width 2, one token (1, -2), no ReLU before the first layer or after the last.

    Layer 1: weight [[1, 0], [0, 1]], bias (0, 1) -> (1, -1), ReLU (1, 0).
    Layer 2: weight [[2, 5], [-3, 5]], bias (1, 1) -> (3, -2), ReLU (3, 0).
    Layer 3: weight [[1, 9], [-1, 9]], bias (0, 0) -> (3, -3).
    """
    layers = [
        [[1.0, 0.0], [0.0, 1.0]],
        [[0.0, 1.0]],
        [[2.0, 5.0], [-3.0, 5.0]],
        [[1.0, 1.0]],
        [[1.0, 9.0], [-1.0, 9.0]],
        [[0.0, 0.0]],
    ]
    tensors = {PROMPT: torch.tensor([[1.0, -2.0]]), **dict(zip(MLP, map(torch.tensor, layers), strict=True))}
    assert plain_prompt(tensors).tolist() == [[3.0, -3.0]]
    assert plain_prompt({PROMPT: tensors[PROMPT]}).tolist() == [[1.0, -2.0]]


def test_virtual_tokens_are_negative_ids_and_at_least_one() -> None:
    bank_ids = PromptSpec(3).prefix
    assert bank_ids == (-1, -2, -3)
    for tokens in (0, -1):
        with pytest.raises(ConfigError, match=f"virtual_tokens = {tokens}: must be at least 1"):
            PromptSpec(tokens)


@both_kinds
def test_a_prompt_for_another_width_is_refused(base: Callable[..., Base], mlp: bool) -> None:
    bank = Bank(base())
    spec = PromptSpec(3, mlp)
    wrong = Adapter(spec, new_prompt(spec, 48, 0.3, torch.Generator().manual_seed(0)))
    with pytest.raises(BaseModelError, match="the adapter: its virtual tokens must have 32 values each"):
        bank.load([wrong])


def test_prompts_of_different_kinds_share_no_bank(base: Callable[..., Base]) -> None:
    bank = Bank(base())
    for other in (prompt(bank.base, tokens=4), prompt(bank.base, mlp=True), mixture(bank.base)):
        with pytest.raises(ValueError, match="different kinds"):
            bank.load([prompt(bank.base), other])


def test_a_bank_goes_from_prompt_to_lora_and_back(base: Callable[..., Base]) -> None:
    bank = Bank(base())
    first, other, result = prompt(bank.base), mixture(bank.base), []
    for adapter in (first, other, first, other):
        bank.load([adapter])
        result.append(of_bank(bank, [ROWS], True).detach())
    assert torch.equal(result[0], result[2])
    assert torch.equal(result[1], result[3])
    assert (result[0] - result[1]).abs().max() > 0.1


@both_kinds
def test_training_lowers_the_loss_and_moves_nothing_else(base: Callable[..., Base], mlp: bool) -> None:
    bank = Bank(base())
    adapter = prompt(bank.base, mlp)
    before = {name: weight.clone() for name, weight in bank.base.model.state_dict().items()}
    sent = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
    settings = TrainingSettings(local_steps=30, batch_size=2, learning_rate=0.02)
    bank.load([adapter])
    (first,) = mean_losses(bank, [ROWS], 1000)
    trained = alone(bank, adapter, ROWS, settings)
    bank.load([trained.adapter])
    (last,) = mean_losses(bank, [ROWS], 1000)
    assert last < first - 0.5
    assert trained.adapter.tensors.keys() == sent.keys()
    for name, tensor in sent.items():
        assert torch.equal(adapter.tensors[name], tensor), "the adapter that was given is left alone"
        assert (trained.adapter.tensors[name] - tensor).abs().max() > 1e-3, f"{name} trains"
    for name, weight in bank.base.model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_a_frozen_part_of_a_prompt_encoder_stays(base: Callable[..., Base]) -> None:
    bank = Bank(base())
    adapter = replace(prompt(bank.base, mlp=True), frozen=(PROMPT,))
    trained = alone(bank, adapter, ROWS, TrainingSettings(local_steps=2, learning_rate=0.02))
    assert torch.equal(trained.adapter.tensors[PROMPT], adapter.tensors[PROMPT])
    assert all(not torch.equal(trained.adapter.tensors[name], adapter.tensors[name]) for name in MLP)


@both_kinds
def test_training_in_lock_step_equals_each_alone(base: Callable[..., Base], mlp: bool) -> None:
    bank = Bank(base())
    settings = TrainingSettings(local_epochs=2, batch_size=1, learning_rate=0.01)
    rows = {"a": ROWS, "b": ROWS[:1], "c": ROWS[1:]}
    tasks = [
        LocalTask(name, TrainingRequest(prompt(bank.base, mlp, seed)), part, 0.01)
        for seed, (name, part) in enumerate(rows.items())
    ]
    together = fit(bank, tasks, settings, seed=0, round_=0)
    for task, result in zip(tasks, together, strict=True):
        (lone,) = fit(bank, [task], settings, seed=0, round_=0)
        assert isinstance(result, TrainingResult)
        assert isinstance(lone, TrainingResult)
        assert result.steps == lone.steps == 2 * len(task.rows)
        assert result.loss == pytest.approx(lone.loss, abs=1e-5)
        for name, tensor in lone.adapter.tensors.items():
            torch.testing.assert_close(result.adapter.tensors[name], tensor, rtol=0, atol=1e-4)
