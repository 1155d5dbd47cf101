"""Small bases with image parts and random weights, in the hub's layout: Idefics3 (as SmolVLM) and Gemma 3."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

BUNDLED = str(files("fedamole") / "bundled" / "base")
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 1,
}


def idefics3(folder: Path) -> None:
    """It splits an image into parts, each with tokens of its own around it: rows have different numbers of tokens."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    parts = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    names = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *parts]
    tokenizer.add_tokens(names, special_tokens=True)
    config = Idefics3Config(
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT},
        vision_config={**VISION, "initializer_range": 0.2},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=1,
        dtype=torch.float32,
    )
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    processor = Idefics3Processor(Idefics3ImageProcessorPil(**sizes), tokenizer, image_seq_len=4)
    _save(Idefics3ForConditionalGeneration, config, processor, folder)


def gemma3(folder: Path) -> None:
    """The tokens of an image attend to each other in both directions."""
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED, extra_special_tokens=names)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    config = Gemma3Config(
        text_config={"vocab_size": len(tokenizer), "sliding_window": 64, **TEXT},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=ids["image_token"],
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        dtype=torch.float32,
    )
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    _save(Gemma3ForConditionalGeneration, config, Gemma3Processor(images, tokenizer, image_seq_length=4), folder)


def _save(model_class: Any, config: Any, processor: Any, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        for weight in model.parameters():
            if not weight.any():  # Gemma's projector starts at 0
                weight.data.normal_(0, 0.2)
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
