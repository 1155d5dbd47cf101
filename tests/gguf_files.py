"""Write a small GGUF file from a folder in Hugging Face layout, as llama.cpp's converter does for a Llama."""

import json
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformers import AutoModelForCausalLM

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(
    folder: Path,
    path: Path,
    *,
    architecture: str = "llama",
    quantised: bool = False,
    left_out: str = "",
    layers: int | None = None,
    chat_template: str | None = None,
) -> Path:
    """Write the Llama in `folder` as a GGUF file, without the tensors whose names contain `left_out`.

    `layers` is the number of layers that the metadata names; by default the model's.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config, tokenizer = model.config, json.loads((folder / "tokenizer.json").read_text())
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers if layers is None else layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([word for word, _ in vocabulary])
    writer.add_token_types([3 if word in special else 1 for word, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        gguf_name, kind = _name(name)
        if left_out and left_out in gguf_name:
            continue
        values = tensor.numpy()
        if kind in heads:  # llama.cpp interleaves the halves that rotary embeddings rotate
            halves = values.reshape(heads[kind], 2, -1, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if quantised and values.ndim == 2:
            data = quants.quantize(values, GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name, data, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _name(name: str) -> tuple[str, str]:
    """The name of a tensor in GGUF, and its kind."""
    module = name.removesuffix(".weight")
    if module in WHOLE:
        return f"{WHOLE[module]}.weight", WHOLE[module]
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{LAYER[part]}.weight", LAYER[part]
