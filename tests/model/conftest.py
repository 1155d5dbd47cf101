"""Small models of several architectures with random weights, in the hub's layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamole.model.amole import AdapterSpec
from fedamole.model.base import Base, BaseSettings, load_base
from fedamole.model.params import Adapter, new_pool

ARCHITECTURES = ("llama", "qwen2", "gpt2", "gemma", "gemma3_text")


def write_tokenizer(folder: Path, vocabulary_size: int = 300, pad: bool = True, eos: bool = True) -> int:
    """A real byte-level BPE tokenizer; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<end>", "<pad>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(["a small text about a small cat on a mat, again and again and again"], trainer)
    special = {"eos_token": "<end>"} if eos else {}
    special |= {"pad_token": "<pad>"} if pad else {}
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)
    return raw.get_vocab_size()


def write_model(folder: Path, architecture: str = "llama", vocabulary: int = 320, seed: int = 0) -> None:
    """A model with random weights large enough to make a difference."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": vocabulary, "initializer_range": 0.15, "eos_token_id": 0, "pad_token_id": 1}
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "head_dim": 8,
    }
    if architecture == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    if architecture == "gemma3_text":
        shape |= {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    config = AutoConfig.for_model(architecture, **common, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a base by architecture, made once; read it, do not write to it."""
    created: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in created:
            created[architecture] = tmp_path_factory.mktemp(architecture)
            write_tokenizer(created[architecture])
            write_model(created[architecture], architecture)
        return created[architecture]

    return get


@pytest.fixture
def base(folder: Callable[[str], Path]) -> Callable[..., Base]:
    """A freshly loaded base by architecture, with settings."""

    def load(architecture: str = "llama", **settings: Any) -> Base:
        chosen = BaseSettings(model=str(folder(architecture)), **settings)
        return load_base(chosen, torch.device("cpu"), Path.cwd())

    return load


def mixture(base: Base, seed: int = 0, **spec: Any) -> Adapter:
    """An adapter with other experts, and numbers of experts, in every module; no tensor is zero."""
    g = torch.Generator().manual_seed(seed)
    chosen = AdapterSpec(**{"rank": 4, "alpha": 8.0, "dropout": 0.0, "balance_weight": 0.01, **spec})
    pool, held = new_pool(base.shapes, chosen.rank, 6, g), {}
    for index, module in enumerate(sorted(base.shapes)):
        ids = torch.randperm(6, generator=g)[: 2 + index % 4].tolist()
        for name, tensor in pool.items():
            owner = name.removeprefix(f"{module}/").split("/")[0]
            if name.startswith(f"{module}/") and (not owner.startswith("expert") or int(owner[-2:]) in ids):
                held[name] = torch.randn(tensor.shape, generator=g) * 0.1 if name.endswith("/B") else tensor
    return Adapter(chosen, held)
