"""Bases to measure on: the bundled one, a folder, or the shape of a larger model with random weights."""

from pathlib import Path

import torch

from fedamole.model.base import BUNDLED, Base, BaseSettings, load_base, locate, target_shapes
from fedamole.runs.identity import Identity

LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
"""Llama-3.2-1B's shape, written by hand: no download, random weights."""


def open_base(name: str) -> Base:
    """`llama-1b` (random weights; the default on a GPU), a folder, or the bundled base (the default on a CPU)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = name or ("llama-1b" if device.type == "cuda" else BUNDLED)
    if name != "llama-1b":
        return load_base(BaseSettings(model=name), device, Path.cwd())
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = LlamaConfig(**LLAMA_1B)
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(config, dtype=dtype).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(locate(BUNDLED, Path.cwd()))
    identity = Identity("random", "bundled", "default")
    return Base(model, tokenizer, target_shapes(model, ()), identity, name, device, 4096)
