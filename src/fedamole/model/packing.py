"""Sequences packed into one row without padding; attention alone takes them apart again.

Everything in a decoder but attention treats tokens one by one, so many short sequences in one row cost what one long
sequence would, without its attention. The attention function is registered with transformers and told the lengths by
each forward call.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedamole.model.segments import Segments

ATTENTION = "fedamole_packed"
"""Name in transformers' registry of attention functions. It has no mask function there: no mask is ever built."""
_UNKNOWN = ("softcap", "s_aux")
"""What some architectures ask of attention that this function does not do."""


def register() -> None:
    """Make the function known to transformers (idempotent)."""
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
    """Causal attention inside each sequence of one packed row.

    Shapes: query (1, H, T, D), key and value (1, G, T, D) with H a multiple of G; returns (1, T, H, D). `sequences`
    gives the lengths. An architecture that asks for more than this does is a NotImplementedError.
    """
    if sequences is None or attention_mask is not None or any(options.get(name) is not None for name in _UNKNOWN):
        raise NotImplementedError(f"{type(module).__name__} cannot be packed")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(S, L, H, D) and twice (S, L, G, D) -> (S, L, H, D)."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mask = _window(q.shape[2], sliding_window, q.device)
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    lengths = sequences.lengths
    if sequences.equal:
        out = attend(*(rows.unflatten(0, (len(lengths), -1)) for rows in (q, k, v))).flatten(0, 1)
    elif q.device.type == "cpu":  # as for products: here padding costs more than a loop, on a GPU less
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        out = torch.cat([attend(*(rows.unsqueeze(0) for rows in part)).squeeze(0) for part in parts])
    else:
        padding = sequences.padding
        out = padding.unpad(attend(*(padding.pad(rows) for rows in (q, k, v))))
    return out.unsqueeze(0), None


def _window(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Mask (L, L) of a causal window, where sequences are longer than it."""
    if window is None or length <= window:
        return None
    back = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (back >= 0) & (back < window)
