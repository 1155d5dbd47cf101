"""Checks of a base: it must be a decoder-only causal language model that runs its adapted linears on text."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedamole.errors import BaseModelError

LENGTH, SHARED = 16, 4
"""Length of the test texts in tokens, and the length of their common beginning."""
INSTEAD = "choose a decoder-only model, such as Llama, Qwen, Gemma, Mistral or GPT-2"


def auto_class(config: Any, images: bool = False) -> Any:
    """The class of transformers that loads a base of this config with its language-model head.

    With `images` it has the image part too; BaseModelError for a config without one.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if images:
        if type(config) not in AutoModelForImageTextToText._model_mapping:
            raise BaseModelError(
                f"base.images = true: {type(config).__name__} has no image part; choose a base such as LLaVA, Idefics3 "
                "or SmolVLM, or remove base.images"
            )
        return AutoModelForImageTextToText
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    # Many multimodal models are listed here alone; of these, too, only the language model is adapted.
    multimodal = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if multimodal else AutoModelForCausalLM


def language_model(model: Any) -> nn.Module:
    """Return the decoder of a model, without its parts for images and sound."""
    decoder, embeddings = model.get_decoder(), model.get_input_embeddings()
    # get_decoder() returns another module in some models, such as the output head.
    contains_embeddings = any(module is embeddings for module in decoder.modules())
    part: nn.Module = decoder if contains_embeddings else model
    return part


def refuse_encoder_decoder(config: Any, name: str) -> None:
    """Raise BaseModelError if the config is that of an encoder-decoder, such as BART or T5."""
    if config.is_encoder_decoder:
        raise BaseModelError(
            f"base {name!r} is an encoder-decoder ({config.model_type}), but only decoder-only models are "
            f"supported; {INSTEAD}"
        )


def modules_run_by_text(model: Any, name: str) -> set[str]:
    """Run a model on two short texts; return the names of the modules that ran.

    Raises BaseModelError for a model without an output head, that does not run on text alone, that changes its own
    weights in a forward pass, or in which later tokens change the logits of earlier ones, as in an encoder.
    """
    label = f"base {name!r} ({type(model).__name__})"
    if model.get_output_embeddings() is None:
        raise BaseModelError(f"{label} has no output head for text; {INSTEAD}")
    weights = [] if getattr(model, "is_quantized", False) else list(model.parameters())
    before = sum(weight._version for weight in weights)
    with _modules_run(model) as ran:
        try:
            ahead = reads_ahead(model)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # code of any of some two hundred architectures
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BaseModelError(f"{label} cannot run on text alone: {reason}") from error
    if ahead:
        raise encoder_error(model, name)
    if sum(weight._version for weight in weights) != before:
        remedy = '; set "rescale_every": 0 in its config.json' if model.config.model_type == "rwkv" else ""
        raise BaseModelError(f"{label} changes its own weights in a forward pass, so adapters would not fit{remedy}")
    return ran


def refuse_unreached(model: Any, name: str, targets: Sequence[str], ran: set[str]) -> None:
    """Raise BaseModelError if some kind of the linears `targets` did not run on text; `ran` are the modules that did.

    A short text reaches only some experts of a mixture, so linears whose names differ only in numbers count as one
    kind.
    """
    if unreached := sorted({_kind(target) for target in targets} - {_kind(one) for one in ran}):
        head = model.get_output_embeddings()
        linears = [one for one, module in model.named_modules() if one in ran and is_linear(module) and module != head]
        known = ", ".join(sorted({_kind(one).rpartition("*.")[2] for one in linears}))
        raise BaseModelError(
            f"base {name!r}: {unreached[0]} does not run on text, so it cannot be trained; "
            f"name other linears in base.targets, of {known}"
        )


def reads_ahead(model: Any) -> bool:
    """Whether later tokens change the logits of earlier ones, tested on two texts with a common beginning."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = (rows // 2 + torch.arange(2 * LENGTH)) % rows  # from the middle: no special tokens
    found = []
    for start in (SHARED, LENGTH):
        text = torch.cat([ids[:SHARED], ids[start : start + LENGTH - SHARED]])[None].to(model.device)
        with torch.no_grad():
            found.append(model(input_ids=text, use_cache=False).logits[:, :SHARED].float())
    return bool(found[0].isfinite().all()) and not near(found[1], found[0], model.dtype)


def near(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors of logits, computed in `dtype`, are equal up to rounding."""
    precise = dtype in (torch.float32, torch.float64)
    return bool((one - other).abs().max() <= (1e-4 if precise else 0.03) * other.abs().max())


def encoder_error(model: Any, name: str) -> BaseModelError:
    """Return the error for a model in which later tokens change the logits of earlier ones."""
    return BaseModelError(
        f"base {name!r} ({type(model).__name__}) is not a causal language model: later tokens change the logits of "
        f"earlier ones, as in encoders; {INSTEAD}"
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
    """A module's name with the numbers of layers and experts replaced by *."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear that can be adapted: nn.Linear, a quantised linear, or GPT-2's Conv1D."""
    return hasattr(module, "in_features") or type(module).__name__ == "Conv1D"
