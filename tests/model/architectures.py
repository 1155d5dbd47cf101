"""Tiny models with random weights of architectures that have traps, in the hub's layout."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
)

from .conftest import write_tokenizer

COMMON = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 0}
"""Sizes of a text model by the names that most architectures use."""
TEXT = {**COMMON, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 128}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
FFN = {**COMMON, "ffn_dim": 48, "max_position_embeddings": 128, "dropout": 0.5, "init_std": 0.15}
ENCODER = {**COMMON, "intermediate_size": 48, "max_position_embeddings": 130, "pad_token_id": 1}
PARTS = {
    "gemma3": TEXT
    | {"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "llava": TEXT | {"model_type": "llama"},
}
TINY: dict[str, dict[str, Any]] = {
    "opt": FFN | {"word_embed_proj_dim": 32, "layerdrop": 0.5},
    "xglm": {**FFN, "d_model": 32, "num_layers": 2, "attention_heads": 4, "layerdrop": 0.5},
    "biogpt": ENCODER | {"hidden_dropout_prob": 0.5, "layerdrop": 0.5},
    "gemma3": {
        "text_config": PARTS["gemma3"],
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "eos_token_id": 0,
    },
    "llava": {"text_config": PARTS["llava"], "vision_config": VISION | {"model_type": "clip_vision_model"}},
    "roberta": ENCODER,
    "bert": ENCODER,
    "xlnet": {"vocab_size": 320, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "bart": {
        "vocab_size": 320,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    },
    "t5": {"vocab_size": 320, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
    "mamba": {
        "vocab_size": 320,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 4,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "initializer_range": 0.3,
    },
    "rwkv": {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 128, "eos_token_id": 0},
    "recurrent_gemma": TEXT | {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 16},
    "qwen3_5_text": TEXT
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "openai-gpt": {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


def write_tiny(folder: Path, architecture: str, decoder_alone: bool = False, **changes: Any) -> Path:
    """Write a tokenizer and a tiny model into a folder; `decoder_alone` takes the decoder of an encoder-decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as BOTH

    config: PreTrainedConfig = AutoConfig.for_model(architecture, **{"initializer_range": 0.15, **TINY[architecture]})
    for name, value in changes.items():
        setattr(config, name, value)
    auto: Any = AutoModelForSeq2SeqLM if architecture in BOTH and not decoder_alone else AutoModelForCausalLM
    if architecture == "llava":
        auto = AutoModelForImageTextToText
    folder.mkdir(exist_ok=True)
    write_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto.from_config(config).save_pretrained(folder)
    return folder
