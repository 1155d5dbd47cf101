"""What a base must be: a decoder-only causal language model, whose adapted linears a text passes through."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedamole.errors import BaseModelError

LENGTH, KEPT = 16, 4
"""Tokens of the texts that a base is probed with, and how many of them two texts have in common."""
INSTEAD = "choose a decoder-only model, such as Llama, Qwen, Gemma, Mistral or GPT-2"


def language_model(model: Any) -> nn.Module:
    """The part of a model that reads text: its decoder, without what it has for images and sound."""
    decoder, embeddings = model.get_decoder(), model.get_input_embeddings()
    # Some models call another module their decoder, such as the output head.
    found: nn.Module = decoder if any(module is embeddings for module in decoder.modules()) else model
    return found


def refuse_encoder_decoder(config: Any, name: str) -> None:
    """Raise BaseModelError for an encoder-decoder, such as BART and T5, by its config."""
    if config.is_encoder_decoder:
        raise BaseModelError(
            f"base {name!r} is an encoder-decoder ({config.model_type}), and only decoders can be adapted here; "
            f"{INSTEAD}"
        )


def modules_run_by_text(model: Any, name: str) -> set[str]:
    """Read two short texts with a model; return the names of the modules that ran.

    Raises BaseModelError for a model without an output head, that cannot read a text alone, that changes its own
    weights when it reads, or in which later tokens change the logits of earlier ones, as in an encoder.
    """
    what = f"base {name!r} ({type(model).__name__})"
    if model.get_output_embeddings() is None:
        raise BaseModelError(f"{what} has no output head for text; {INSTEAD}")
    weights = [] if getattr(model, "is_quantized", False) else list(model.parameters())
    before = sum(weight._version for weight in weights)
    with _modules_run(model) as ran:
        try:
            ahead = reads_ahead(model)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # code of any of some two hundred architectures
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BaseModelError(f"{what} cannot read a text alone: {reason}") from error
    if ahead:
        raise encoder_error(model, name)
    if sum(weight._version for weight in weights) != before:
        remedy = '; set "rescale_every": 0 in its config.json' if model.config.model_type == "rwkv" else ""
        raise BaseModelError(f"{what} changes its own weights when it reads, so adapters would not fit them{remedy}")
    return ran


def refuse_unreached(model: Any, name: str, targets: Sequence[str], ran: set[str]) -> None:
    """Raise BaseModelError if no text passes through some kind of the linears `targets`; `ran` are modules that ran.

    Of the experts of a mixture, a short text reaches only some: linears that differ by a number are one kind.
    """
    if unreached := sorted({_kind(target) for target in targets} - {_kind(one) for one in ran}):
        head = model.get_output_embeddings()
        linears = [one for one, module in model.named_modules() if one in ran and is_linear(module) and module != head]
        known = ", ".join(sorted({_kind(one).rpartition("*.")[2] for one in linears}))
        raise BaseModelError(
            f"base {name!r}: no text passes through {unreached[0]}, so nothing can be learned there; "
            f"name other linears in base.targets, of {known}"
        )


def reads_ahead(model: Any) -> bool:
    """Whether later tokens change the logits of earlier ones: texts that begin alike must have the same ones there."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = (rows // 2 + torch.arange(2 * LENGTH)) % rows  # from the middle: no special tokens
    found = []
    for start in (KEPT, LENGTH):
        text = torch.cat([ids[:KEPT], ids[start : start + LENGTH - KEPT]])[None].to(model.device)
        with torch.no_grad():
            found.append(model(input_ids=text, use_cache=False).logits[:, :KEPT].float())
    return bool(found[0].isfinite().all()) and not near(found[1], found[0], model.dtype)


def near(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits that were computed in `dtype` are the same but for rounding."""
    precise = dtype in (torch.float32, torch.float64)
    return bool((one - other).abs().max() <= (1e-4 if precise else 0.03) * other.abs().max())


def encoder_error(model: Any, name: str) -> BaseModelError:
    """What to raise for a model that reads ahead."""
    return BaseModelError(
        f"base {name!r} ({type(model).__name__}) is no causal language model: it predicts a token with the tokens "
        f"after it in sight, as encoders do; {INSTEAD}"
    )


@contextmanager
def _modules_run(model: nn.Module) -> Iterator[set[str]]:
    """Collect the names of the modules that run inside the block."""
    ran = set[str]()
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.add(name)) for name, module in model.named_modules()
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _kind(name: str) -> str:
    """A module's name with * for the numbers of layers and experts."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear that can be adapted: nn.Linear, a quantised one, or GPT-2's Conv1D."""
    return hasattr(module, "in_features") or type(module).__name__ == "Conv1D"
