"""Packing: several sequences in one row without padding, separated only in attention.

All other parts of a decoder treat tokens independently, so packed sequences cost no more than one sequence with as many
tokens. The attention function is registered with transformers; each forward call passes it the sequence lengths.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedamole.model.base import Base
from fedamole.model.batch import Batch, TokenPair, collate
from fedamole.model.causality import near
from fedamole.model.segments import Segments
from fedamole.model.vision import trial_pairs

ATTENTION = "fedamole_packed"
"""Name in transformers' registry of attention functions. No mask function has this name, so no mask is built."""
_UNSUPPORTED = ("softcap", "s_aux")
"""Attention options of some architectures that the packed attention function does not implement."""


@contextmanager
def packed_attention_enabled(base: Base, enabled: bool) -> Iterator[None]:
    """Use the packed attention function in the forward passes inside the block, if `enabled`."""
    config = base.model.config.get_text_config()
    attention = config._attn_implementation
    try:
        if enabled:
            config._attn_implementation = ATTENTION
        yield
    finally:
        config._attn_implementation = attention


def supports_packing(base: Base, forward: Callable[[Batch], AbstractContextManager[Tensor]]) -> bool:
    """Test whether packed sequences give the same logits as padded ones, and register the attention function.

    They do not in bases in which more than attention mixes tokens. `forward` yields the logits of a batch.
    """
    config = base.model.config.get_text_config()
    if config._attn_implementation != "sdpa" or getattr(config, "attention_chunk_size", None):
        return False  # the test's sequences are too short to show attention in chunks
    register()
    pairs: list[TokenPair] = [((1, 2, 3, 4), (5, 6)), ((7,), (8, 9, 10))]
    if base.images is not None:
        pairs += trial_pairs(base.images)
    results = []
    with torch.no_grad():
        for packed in (False, True):
            batch = collate([pairs], base.pad_id, packed, device=base.device)
            try:
                with forward(batch) as logits:
                    results.append(logits.float())
            except (NotImplementedError, TypeError):
                return False
    return near(results[1], results[0], base.model.dtype)


def register() -> None:
    """Register the attention function with transformers (idempotent)."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    sequences: Segments | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of one packed row.

    Shapes: query (1, H, T, D), key and value (1, G, T, D) with H a multiple of G; returns (1, T, H, D). `sequences`
    holds the lengths. Raises NotImplementedError for attention options that are not supported.
    """
    if sequences is None or attention_mask is not None or any(options.get(name) is not None for name in _UNSUPPORTED):
        raise NotImplementedError(f"{type(module).__name__} cannot be packed")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(S, L, H, D) and twice (S, L, G, D) -> (S, L, H, D)."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mask = _window_mask(q.shape[2], sliding_window, q.device)
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    lengths = sequences.lengths
    if sequences.equal:
        out = attend(*(rows.unflatten(0, (len(lengths), -1)) for rows in (q, k, v))).flatten(0, 1)
    elif q.device.type == "cpu":  # on a CPU padding costs more than a loop, on a GPU less
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        out = torch.cat([attend(*(rows.unsqueeze(0) for rows in part)).squeeze(0) for part in parts])
    else:
        padding = sequences.padding
        out = padding.unpad(attend(*(padding.pad(rows) for rows in (q, k, v))))
    return out.unsqueeze(0), None


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Mask (L, L) of causal attention within a sliding window; None if the sequence is not longer than the window."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)
