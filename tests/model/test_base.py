"""The frozen base: what it is identified by, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from fedamole.errors import BaseModelError, ConfigError, RunError
from fedamole.federation.settings import TrainingSettings
from fedamole.model.bank import Bank
from fedamole.model.base import Base, BaseSettings, load_base, resolve_device
from fedamole.model.pretrained import load_adapter, save_adapter
from tests.training import alone, lora_spec

from .conftest import mixture, write_model, write_tokenizer

CPU = torch.device("cpu")


def load(folder: Path, **settings: Any) -> Base:
    return load_base(BaseSettings(model=str(folder), **settings), CPU, Path.cwd())


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A folder of a base that a test may change."""
    write_tokenizer(tmp_path)
    write_model(tmp_path)
    return tmp_path


def test_identity_is_of_content_not_of_dtype(base: Callable[..., Base]) -> None:
    assert base("llama").identity == base("llama").identity == base("llama", dtype="bfloat16").identity
    assert base("llama").identity.weights != base("qwen2").identity.weights


@pytest.mark.parametrize("part", ["weights", "tokenizer", "targets"])
def test_an_adapter_on_another_base_is_refused(
    fresh: Path, part: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    original = load(fresh)
    adapter = tmp_path_factory.mktemp("adapter") / "a"
    save_adapter(mixture(original), adapter, original.name, original.identity)
    assert lora_spec(load_adapter(adapter, original.identity).spec).rank == 4
    settings: dict[str, Any] = {}
    if part == "weights":
        write_model(fresh, seed=1)
    elif part == "tokenizer":
        write_tokenizer(fresh, vocabulary_size=262)
    else:
        settings = {"targets": ("q_proj",)}
    with pytest.raises(BaseModelError, match=f"its {part} hash is"):
        load_adapter(adapter, load(fresh, **settings).identity)


def test_calling_a_tokenizer_does_not_change_its_identity(fresh: Path) -> None:
    before = load(fresh)
    before.tokenizer("a text", truncation=True, max_length=3, padding="max_length")
    assert load(fresh).identity == before.identity


def test_an_adapter_without_files_or_damaged_is_refused(base: Callable[..., Base], tmp_path: Path) -> None:
    loaded = base()
    with pytest.raises(RunError, match="no personal adapter"):
        load_adapter(tmp_path)
    save_adapter(mixture(loaded), tmp_path / "a", loaded.name, loaded.identity)
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(RunError, match="damaged"):
        load_adapter(tmp_path / "a")
    (tmp_path / "a" / "base_identity.json").unlink()
    save_adapter(mixture(loaded), tmp_path / "b", loaded.name, loaded.identity)
    (tmp_path / "b" / "base_identity.json").unlink()
    with pytest.raises(BaseModelError, match="base_identity"):
        load_adapter(tmp_path / "b", loaded.identity)


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    write_model(tmp_path, vocabulary=200)
    with pytest.raises(BaseModelError, match=r"ids up to \d+, its embedding has 200 rows"):
        load(tmp_path)


def test_a_tokenizer_without_padding_token_works_and_without_end_token_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, pad=False)
    write_model(tmp_path)
    assert load(tmp_path).pad_id == 0
    write_tokenizer(tmp_path, eos=False)
    with pytest.raises(BaseModelError, match="no end-of-text token"):
        load(tmp_path)


def test_named_targets(base: Callable[..., Base]) -> None:
    loaded = base("llama", targets=("o_proj", "model.layers.0.mlp.up_proj"))
    assert sorted(loaded.shapes) == [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
    ]
    assert loaded.shapes["model.layers.0.mlp.up_proj"] == (32, 48)
    with pytest.raises(BaseModelError, match=r"no linear is called 'nope'; there are .*q_proj"):
        base("llama", targets=("nope",))


def test_the_output_head_is_not_a_target(base: Callable[..., Base]) -> None:
    with pytest.raises(BaseModelError, match="lm_head"):
        base("llama", targets=("lm_head",))


def test_an_unknown_architecture_asks_for_targets(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM, GPTBigCodeConfig, GPTBigCodeForCausalLM

    write_tokenizer(tmp_path)
    BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    assert all(name.endswith("query_key_value") for name in load(tmp_path).shapes)
    config = GPTBigCodeConfig(vocab_size=320, n_embd=32, n_layer=1, n_head=2)
    GPTBigCodeForCausalLM(config).save_pretrained(tmp_path)
    assert all(name.endswith("c_attn") for name in load(tmp_path).shapes)


def test_dropout_of_the_base_itself_is_off(base: Callable[..., Base]) -> None:
    loaded = base("gpt2", gradient_checkpointing=True)
    ids = torch.tensor([[3, 4, 5]])
    loaded.training(True)
    assert torch.equal(loaded.model(input_ids=ids).logits, loaded.model(input_ids=ids).logits)
    assert not any(weight.requires_grad for weight in loaded.model.parameters())


def test_a_missing_base_device_or_gpu_is_reported(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="there is no folder"):
        load(tmp_path / "nothing")
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="not a device"):
        resolve_device("quantum")
    write_tokenizer(tmp_path)
    write_model(tmp_path)
    with pytest.raises(ConfigError, match="needs a GPU"):
        load(tmp_path, quantization="4bit")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_missing_gpu_is_reported() -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        resolve_device("cuda")


def test_pickled_weights_are_never_read(fresh: Path) -> None:
    """A pytorch_model.bin in place of safetensors: reading it would unpickle."""
    from safetensors.torch import load_file

    weights = load_file(fresh / "model.safetensors")
    (fresh / "model.safetensors").unlink()
    torch.save(weights, fresh / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load(fresh)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and bitsandbytes")


@pytest.mark.parametrize(("device", "quantization"), [pytest.param("cuda", "4bit", marks=needs_gpu), ("cpu", "none")])
def test_a_4bit_base_trains(folder: Callable[[str], Path], device: str, quantization: Literal["none", "4bit"]) -> None:
    """On a CPU the same calls with whole weights, so that they are run where there is no GPU."""
    if quantization == "4bit":
        pytest.importorskip("bitsandbytes")
    settings = BaseSettings(model=str(folder("llama")), quantization=quantization)
    bank = Bank(load_base(settings, torch.device(device), Path.cwd()))
    training = TrainingSettings(local_steps=5, learning_rate=1e-2)
    adapter = mixture(bank.base)
    trained = alone(bank, adapter, [((3, 4), (5, 0))], training)
    assert trained.steps == 5
    assert all(torch.isfinite(tensor).all() for tensor in trained.adapter.tensors.values())
    assert any(not torch.equal(tensor, adapter.tensors[name]) for name, tensor in trained.adapter.tensors.items())
