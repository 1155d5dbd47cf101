"""A base without weights: its shapes from config.json, on PyTorch's meta device.

Nothing is downloaded and no memory is allocated, so a run with a base of any size can be planned on any machine.
"""

import contextlib
import copy
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from fedamole.errors import BaseModelError
from fedamole.model.base import Base, BaseSettings, locate, target_shapes
from fedamole.model.causality import (
    LENGTH,
    auto_class,
    encoder_error,
    language_model,
    reads_ahead,
    refuse_encoder_decoder,
)
from fedamole.model.recomputation import Recomputation
from fedamole.runs.identity import Identity

KNOWN = {"meta-llama/Llama-3.2-1B": "llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct": "llama-3.2-1b"}
"""Hub ids whose published shapes come with the package, as bundled/shapes/<value>.json."""
LARGEST_PROBED = 20_000_000
"""Largest number of weights of the one layer that is built to detect encoders; few encoders have larger layers."""
BYTES_IN_4BIT = 0.5 + 4 / 64
"""Bytes per weight in 4-bit quantisation: each block of 64 weights has a scale of 4 bytes."""


class WeightlessBase(Base):
    """A base that has only shapes: no weights, no tokenizer, no identity."""

    @property
    def embedding_std(self) -> float:
        """Standard deviation of the embeddings' initialisation, in place of the measured one."""
        return float(getattr(self.model.config.get_text_config(), "initializer_range", None) or 0.02)


def weightless_base(settings: BaseSettings, folder: Path) -> WeightlessBase:
    """Build the shapes of a base as it would be loaded on a GPU; relative paths start at `folder`.

    Errors: BaseModelError for a hub id whose shapes are not in the package, and for a config.json that is missing or
    not that of a causal language model; ConfigError for settings that the base does not support. Whether a model is
    causal is tested on one layer with random weights.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = locate(settings.model, folder)
    try:
        facts = json.loads(_config_text(name))
        config = CONFIG_MAPPING[facts["model_type"]].from_dict(facts)
        refuse_encoder_decoder(config, settings.model)
        dtype = torch.float32 if settings.dtype == "float32" else torch.bfloat16
        with torch.device("meta"):
            model = auto_class(config, settings.images).from_config(config, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BaseModelError(
            f"base.model = {settings.model!r}: cannot read shapes from its config.json "
            f"({type(error).__name__}: {reason}); "
            "it must be the config of a causal language model of transformers"
        ) from error
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 2048
    if _one_layer_reads_ahead(config):
        raise encoder_error(model, settings.model)
    if settings.gradient_checkpointing:
        Recomputation(language_model(model))  # for its error
    shapes = target_shapes(model, settings.targets)
    return WeightlessBase(
        model,
        None,
        shapes,
        Identity("", "", ""),
        settings.model,
        torch.device("meta"),
        int(positions),
        settings.gradient_checkpointing,
    )


def _one_layer_reads_ahead(config: Any) -> bool:
    """Whether later tokens change the logits of earlier ones in one layer of an architecture with random weights.

    Returns False if such a layer is too large or cannot be built; `load_base` tests the model itself.
    """
    with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]):  # configs of many architectures
        small = copy.deepcopy(config)
        text = small.get_text_config()
        text.num_hidden_layers, text.vocab_size = 1, 4 * LENGTH
        with torch.device("meta"):
            model = auto_class(config).from_config(small, dtype=torch.float32, trust_remote_code=False)
        if sum(weight.numel() for weight in model.parameters()) > LARGEST_PROBED:
            return False
        model = auto_class(config).from_config(small, dtype=torch.float32, trust_remote_code=False)
        return reads_ahead(model.eval())
    return False


def weight_bytes(base: Base, quantization: str) -> int:
    """Return the bytes of the frozen weights; with 4bit, all matrices except embeddings are quantised."""
    tables = (base.model.get_input_embeddings(), base.model.get_output_embeddings())
    whole = {id(weight) for table in tables if table is not None for weight in table.parameters()}

    def size(weight: torch.nn.Parameter) -> float:
        small = quantization == "4bit" and weight.ndim == 2 and id(weight) not in whole
        return weight.numel() * (BYTES_IN_4BIT if small else weight.element_size())

    return round(sum(size(weight) for weight in base.model.parameters()))


def _config_text(name: str) -> str:
    if Path(name).is_dir():
        return (Path(name) / "config.json").read_text(encoding="utf-8")
    if name not in KNOWN:
        raise BaseModelError(
            f"base.model = {name!r}: its shapes are not in this package, which has {', '.join(KNOWN)}; "
            "set base.model to a folder with its config.json"
        )
    return (files("fedamole") / "bundled" / "shapes" / f"{KNOWN[name]}.json").read_text(encoding="utf-8")
