"""How a base generates: with left-padded prompts or prompts of equal length, with or without a key-value cache.

Recurrent bases read padding as text, and some architectures lose the prompt when generation continues from a cache.
Both are detected by comparing generation with forward passes over the whole text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedamole.errors import BaseModelError
from fedamole.model.base import Base
from fedamole.model.batch import Ids, pad_left
from fedamole.model.causality import near
from fedamole.model.vision import trial_pairs

STEPS = 3
"""Number of tokens generated in the test."""


@dataclass(frozen=True)
class Continuation:
    """A way to generate that gives the same tokens as forward passes over the whole text."""

    pads: bool
    """Whether prompts of different lengths can be padded on the left and share a batch."""
    caches: bool
    """Whether a key-value cache is used; otherwise each token needs a pass over the whole text."""


WAYS = (Continuation(True, True), Continuation(False, True), Continuation(False, False))
"""From the fastest to the most general."""


def continuation_of(base: Base) -> Continuation:
    """Find the fastest correct way, on a base without adapters; raise BaseModelError if there is none."""
    rows = base.model.get_input_embeddings().weight.shape[0]
    prompts: list[Ids] = [
        tuple((rows // 2 + 5 * start + step) % rows for step in range(size)) for start, size in ((0, 6), (9, 3))
    ]
    if base.images is not None:
        prompts += [prompt for prompt, _ in trial_pairs(base.images)]
    for way in WAYS:
        groups = [prompts] if way.pads else [[prompt] for prompt in prompts]
        try:
            if all(_correct(base, group, way.caches) for group in groups):
                return way
        except torch.OutOfMemoryError:
            raise
        except Exception:  # raised by code of any architecture; try the next way
            continue
    raise BaseModelError(f"base {base.name!r} ({type(base.model).__name__}) cannot generate; choose another base")


def _correct(base: Base, prompts: Sequence[Ids], caches: bool) -> bool:
    """Whether the logits of generated tokens equal those of forward passes over the whole texts."""
    from transformers import GenerationConfig

    ids, mask = pad_left(prompts, base.pad_id, base.device)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=STEPS,
        use_cache=caches,
        pad_token_id=base.pad_id,
        output_logits=True,
        return_dict_in_generate=True,
        suppress_tokens=None if base.images is None else [base.images.token_id],
    )
    with torch.no_grad():
        out: Any = base.model.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings, **base.media(prompts)
        )
        generated = torch.stack(out.logits, dim=1).float()
        whole = []
        for prompt, row in zip(prompts, out.sequences, strict=True):
            text = torch.cat([torch.tensor(prompt, device=base.device), row[ids.shape[1] :]])[None]
            logits = base.model(input_ids=text, use_cache=False, **base.media([prompt])).logits
            whole.append(logits[0, len(prompt) - 1 : -1].float())
    return near(generated, torch.stack(whole), base.model.dtype)
