"""How a base can generate: with prompts padded on the left or not, with what it keeps of the text before or without.

Recurrent bases read padding as text, and some architectures lose the prompt where transformers continues it from a
cache. Both are found by comparing generation with forward passes over the whole text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedamole.errors import BaseModelError
from fedamole.model.base import Base
from fedamole.model.batch import Ids, pad_left
from fedamole.model.causality import near

STEPS = 3
"""Tokens that are generated to find out."""


@dataclass(frozen=True)
class Continuation:
    """A way of generating that gives a base's own answers."""

    pads: bool
    """Whether prompts of different lengths may be padded on the left and generated together."""
    caches: bool
    """Whether the text before is kept in a cache; otherwise it is read anew for every token."""


WAYS = (Continuation(True, True), Continuation(False, True), Continuation(False, False))
"""From the fastest to the one that every causal model should allow."""


def continuation_of(base: Base) -> Continuation:
    """Find the fastest right way, on a base without adapters; BaseModelError if there is none."""
    rows = base.model.get_input_embeddings().weight.shape[0]
    prompts = [tuple((rows // 2 + 5 * start + step) % rows for step in range(size)) for start, size in ((0, 6), (9, 3))]
    for way in WAYS:
        groups = [prompts] if way.pads else [[prompt] for prompt in prompts]
        try:
            if all(_right(base, group, way.caches) for group in groups):
                return way
        except torch.OutOfMemoryError:
            raise
        except Exception:  # code of any of some two hundred architectures; the next way is tried
            continue
    raise BaseModelError(f"base {base.name!r} ({type(base.model).__name__}) cannot generate; choose another base")


def _right(base: Base, prompts: Sequence[Ids], caches: bool) -> bool:
    """Whether the logits of generated tokens are those of forward passes over the whole texts."""
    from transformers import GenerationConfig

    ids, mask = pad_left(prompts, base.pad_id, base.device)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=STEPS,
        use_cache=caches,
        pad_token_id=base.pad_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        out: Any = base.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        made = torch.stack(out.logits, dim=1).float()
        whole = []
        for prompt, row in zip(prompts, out.sequences, strict=True):
            text = torch.cat([torch.tensor(prompt, device=base.device), row[ids.shape[1] :]])[None]
            whole.append(base.model(input_ids=text, use_cache=False).logits[0, len(prompt) - 1 : -1].float())
    return near(made, torch.stack(whole), base.model.dtype)
