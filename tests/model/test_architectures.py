"""Architectures with traps: dropout in many forms, parts for images, encoders, recurrent layers."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedamole.errors import BaseModelError, ConfigError
from fedamole.federation.local import LocalTask, fit
from fedamole.federation.method import TrainingRequest
from fedamole.federation.settings import TrainingSettings
from fedamole.model.bank import Bank
from fedamole.model.base import Base, BaseSettings, load_base
from fedamole.model.layers import BankLinear
from fedamole.model.params import Adapter
from fedamole.model.pretrained import save_adapter
from fedamole.model.weightless import weightless_base
from fedamole.personal.export import merge, save_tokenizer

from .architectures import PARTS, write_tiny
from .test_peft import lora

IDS = torch.tensor([[30, 41, 52, 63, 74, 85]])
ROWS = [((30, 41, 52, 63), (70, 80, 0)), ((90, 31), (50, 0)), ((33, 34, 35), (51, 0))]


def load(folder: Path, **settings: Any) -> Base:
    return load_base(BaseSettings(model=str(folder), **settings), torch.device("cpu"), Path("/"))


def trained(bank: Bank) -> tuple[Adapter, Mapping[str, Tensor]]:
    """A LoRA after three steps, and its tensors."""
    task = LocalTask("a", TrainingRequest(lora(bank.base)), ROWS, 1e-2)
    (outcome,) = fit(bank, [task], TrainingSettings(local_steps=3, batch_size=2), seed=0, round_=0)
    assert not isinstance(outcome, Exception), outcome
    return outcome.adapter, outcome.adapter.tensors


# --- dropout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["opt", "xglm", "biogpt"])
def test_no_dropout_of_the_base_is_active_in_training(architecture: str, tmp_path: Path) -> None:
    """Dropout and layer dropout of 0.5 kept as numbers: two trainings are the same, with checkpointing and without."""
    write_tiny(tmp_path, architecture)
    results = []
    for checkpointing in (False, True):
        bank = Bank(load(tmp_path, gradient_checkpointing=checkpointing))
        passes = 0

        def count(*_: object) -> None:
            nonlocal passes
            passes += 1

        next(iter(bank.layers.values())).register_forward_pre_hook(count)
        results += [trained(bank)[1], trained(bank)[1]]
        assert passes == (12 if checkpointing else 6), "two trainings of three steps, each read twice or once"
        assert not any(module.training for module in bank.base.model.modules())
    for other in results[1:]:
        assert all(torch.equal(results[0][name], tensor) for name, tensor in other.items())


def test_layers_that_cannot_be_recomputed(tmp_path: Path) -> None:
    write_tiny(tmp_path, "openai-gpt")
    assert load(tmp_path, targets=("c_attn",)).recomputation is None
    for use in (load, lambda folder, **more: weightless_base(BaseSettings(str(folder), **more), Path("/"))):
        with pytest.raises(ConfigError, match=r"gradient_checkpointing = true: OpenAIGPTModel has no layers that can"):
            use(tmp_path, targets=("c_attn",), gradient_checkpointing=True)


# --- multimodal models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", sorted(PARTS))
def test_adapters_stay_in_the_language_model(architecture: str, tmp_path: Path) -> None:
    """The towers have linears of the same names, through which no text passes. PEFT and a merged model agree."""
    from peft import PeftModel

    base = load(write_tiny(tmp_path / "base", architecture))
    towers = [name for name, _ in base.model.named_modules() if "vision" in name and name.endswith("q_proj")]
    assert towers
    assert sorted(base.shapes) == [
        f"model.language_model.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "qv"
    ]
    assert weightless_base(BaseSettings(str(tmp_path / "base")), Path("/")).shapes == base.shapes
    with pytest.raises(BaseModelError, match="no linear is called"):
        load(tmp_path / "base", targets=(towers[0],))
    bank = Bank(base)
    before = lora(base).tensors
    adapter, tensors = trained(bank)
    assert all(not torch.equal(before[name], tensor) for name, tensor in tensors.items()), "every adapter learns"
    bank.load([adapter])
    with torch.no_grad():
        expected = bank.base.model(input_ids=IDS).logits
    save_adapter(adapter, tmp_path / "adapter", base.name, base.identity)
    fresh = load(tmp_path / "base")
    merge(tmp_path / "adapter", fresh, tmp_path / "merged")
    save_tokenizer(fresh, tmp_path / "merged")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of tensors that are missing or left over
        peft = PeftModel.from_pretrained(fresh.model, str(tmp_path / "adapter"))
        torch.testing.assert_close(peft(input_ids=IDS).logits, expected)
        torch.testing.assert_close(load(tmp_path / "merged").model(input_ids=IDS).logits, expected)


# --- what no base is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["roberta", "bert", "xlnet"])
def test_an_encoder_is_refused(architecture: str, tmp_path: Path) -> None:
    """Its logits see the tokens that they should predict. `plan --without-data` finds it out from the config."""
    write_tiny(tmp_path, architecture)
    settings = BaseSettings(str(tmp_path), targets=() if architecture == "xlnet" else ("query",))
    uses: list[Callable[[], Base]] = [lambda: load(tmp_path), lambda: weightless_base(settings, Path("/"))]
    for use in uses:
        with pytest.raises(BaseModelError, match=r"is not a causal language model: later tokens change the logits of"):
            use()


def test_an_encoder_that_is_a_decoder_is_not(tmp_path: Path) -> None:
    write_tiny(tmp_path, "roberta", is_decoder=True)
    assert load(tmp_path).shapes == weightless_base(BaseSettings(str(tmp_path)), Path("/")).shapes


@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_an_encoder_decoder_is_refused_by_name(architecture: str, tmp_path: Path) -> None:
    write_tiny(tmp_path, architecture)
    settings = BaseSettings(str(tmp_path))
    uses: list[Callable[[], Base]] = [lambda: load(tmp_path), lambda: weightless_base(settings, Path("/"))]
    for use in uses:
        with pytest.raises(BaseModelError, match=rf"is an encoder-decoder \({architecture}\).*; choose a decoder-only"):
            use()


@pytest.mark.parametrize(
    ("architecture", "target", "message"),
    [
        (
            "bart",
            "q_proj",
            r"model.decoder.layers.\*.encoder_attn.q_proj does not run .* of fc1, fc2, .*self_attn.q_proj",
        ),
        (
            "mamba",
            "dt_proj",
            r"backbone.layers.\*.mixer.dt_proj does not run .* of mixer.in_proj, mixer.out_proj",
        ),
    ],
)
def test_a_linear_that_no_text_passes_through(architecture: str, target: str, message: str, tmp_path: Path) -> None:
    """Cross-attention to an encoder that is not there; a linear whose weight is read, but which is never called."""
    write_tiny(tmp_path, architecture, decoder_alone=True)
    with pytest.raises(BaseModelError, match=message):
        load(tmp_path, targets=(target,))
    better = {"bart": "self_attn.q_proj", "mamba": "in_proj"}[architecture]
    trained(Bank(load(tmp_path, targets=(better,))))


def test_the_error_for_rwkv_names_the_setting_to_change(tmp_path: Path) -> None:
    """It divides weights of its own by powers of two when it is used, and not where it is trained."""
    write_tiny(tmp_path, "rwkv")
    with pytest.raises(BaseModelError, match=r'changes its own weights .*; set "rescale_every": 0 in its config.json'):
        load(tmp_path)
    write_tiny(tmp_path, "rwkv", rescale_every=0)
    for checkpointing in (False, True):
        trained(Bank(load(tmp_path, gradient_checkpointing=checkpointing)))


def test_a_wrapped_linear_shows_its_weight_and_bias(base: Callable[..., Base]) -> None:
    """Models look at the dtype and the device of a linear's weight."""
    loaded = base("gpt2")
    layer = loaded.model.transformer.h[0].attn.c_attn
    bank = Bank(loaded)
    wrapped = loaded.model.transformer.h[0].attn.c_attn
    assert isinstance(wrapped, BankLinear)
    assert wrapped is bank.layers["transformer.h.0.attn.c_attn"]
    assert wrapped.weight is layer.weight
    assert wrapped.bias is layer.bias


def test_an_expert_that_no_token_is_routed_to_gets_no_gradient(base: Callable[..., Base]) -> None:
    bank = Bank(base("llama"))
    bank.load([lora(bank.base)])
    (weights,) = bank.trainable()
    first = bank.parameters()[0]
    bank.backward(first.sum())
    assert weights.grad is not None
    assert int(weights.grad.count_nonzero()) == first.numel() < weights.numel()


def test_shapes_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    """A config.json that was changed by hand, against its weights and against itself."""
    config = write_tiny(tmp_path, "gemma3") / "config.json"
    text = config.read_text()
    for old, new in (('"intermediate_size": 48', '"intermediate_size": 40'), ('"full_attention"\n', '"nothing"\n')):
        assert old in text
        config.write_text(text.replace(old, new))
        with pytest.raises(BaseModelError, match=r"cannot be loaded: .+"):
            load(tmp_path)
