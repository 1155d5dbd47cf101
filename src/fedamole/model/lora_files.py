"""Read a LoRA folder that any tool wrote with PEFT: adapter_config.json and adapter_model.safetensors.

Unlike `load_adapter`, which accepts only what fedamole writes, this reads ranks and alphas that differ between modules,
rank-stabilised scaling and any choice of modules. Which modules are adapted is read from the tensors. A setting with
which the change of a weight is more than the product B A is an error. The folder is not trusted: nothing is unpickled
and no module that the config names is imported.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedamole.errors import BaseModelError, ConfigError, RunError
from fedamole.model.adapter_files import DTYPES, PREFIX
from fedamole.received.files import read_json
from fedamole.received.forms import (
    Form,
    FormError,
    boolean,
    either,
    mapping,
    nothing,
    number,
    record,
    text,
    whole,
)
from fedamole.received.names import quoted
from fedamole.runs.adapter_folder import CONFIG, MOST_RANK, WEIGHTS

PICKLED = "adapter_model.bin"
SOFT_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING")
"""PEFT types of virtual tokens."""
MOST_QUANTIFIERS = 2
"""Largest number of *, + and ? in a pattern, so that matching it takes a short time."""

_pattern = text(500, re.compile(r"[A-Za-z0-9_.^$\\|()\[\]*+?-]+"))
_rank, _alpha = whole(1, MOST_RANK), number(1e-9)


def _or_null(form: Form) -> Form:
    return either(nothing, form)


_form = record(
    {"peft_type": text(100)},
    {
        "base_model_name_or_path": _or_null(text(4096)),
        "revision": _or_null(text(200)),
        "task_type": _or_null(text(100)),
        "r": _rank,
        "lora_alpha": _alpha,
        "use_rslora": _or_null(boolean),
        "rank_pattern": _or_null(mapping(_rank, _pattern)),
        "alpha_pattern": _or_null(mapping(_alpha, _pattern)),
        "init_lora_weights": either(nothing, boolean, text(100)),
    },
)

_HARMLESS = {
    *(
        "peft_type",
        "auto_mapping",
        "peft_version",
        "task_type",
        "inference_mode",
        "base_model_name_or_path",
        "revision",
    ),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("eva_config", "corda_config", "lora_ga_config", "runtime_config"),
}
"""Settings that are read here, or that do not alter what the saved A and B do: B A is the change of any linear layer,
also of one that stores its weight transposed (fan_in_fan_out)."""
_UNUSED = {"bias": "none", "megatron_core": "megatron.core", "qalora_group_size": 16}
"""Values that PEFT writes for other settings that are not used."""
_MORE = {
    "use_dora": "DoRA also rescales the columns of each weight",
    "bias": "the biases of the base are trained too",
    "lora_bias": "B has a bias",
    "modules_to_save": "whole modules of the base are trained too",
    "trainable_token_indices": "embeddings are trained too",
    "target_parameters": "parameters are adapted that are no linear layer",
    "layer_replication": "layers of the base are repeated",
    "alora_invocation_tokens": "it is active only after certain tokens",
}
"""Why the change is more than B A, by setting."""
_SAME_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base as it is."""


@dataclass(frozen=True)
class LoraFolder:
    """A LoRA as it is stored in a folder."""

    folder: Path
    base: str | None
    """Hub id or path of its base, as the config names it; None if it names none."""
    revision: str | None
    """Version of the base on the hub, if the config names another than the newest."""
    factors: dict[str, tuple[Tensor, Tensor]]
    """A (r, d_in) and B (d_out, r) by module, float32, with the scaling multiplied into B."""

    def check_fits(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise BaseModelError unless the linear layers of a base, (d_in, d_out) by name, have these sizes."""
        for module, (a, b) in self.factors.items():
            sizes = a.shape[1], b.shape[0]
            if shapes.get(module) != sizes:
                expected = "{} values to {}".format(*shapes[module]) if module in shapes else "nothing"
                raise BaseModelError(
                    f"{self.folder} is a LoRA of another base: its {quoted(module, 200)} maps {sizes[0]} values to "
                    f"{sizes[1]}, and that of this base {expected}; name the right base with --base"
                )


def read_lora(folder: Path) -> LoraFolder:
    """Read a LoRA folder.

    Raises:
        RunError: A file is missing, damaged or not of the expected form, or the weights are in a pickle file.
        ConfigError: The adapter is no LoRA, or does more than a LoRA can express.
    """
    config = _read_config(folder)
    settings, factors = _peft_settings(config), {}
    for module, (a, b) in _read_factors(folder).items():
        rank, scaling = _scaling(settings, module)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise RunError(
                f"{folder / WEIGHTS}: A and B of {quoted(module, 200)} have the shapes {tuple(a.shape)} and "
                f"{tuple(b.shape)}, but {CONFIG} gives it the rank {rank}; copy both files again"
            )
        factors[module] = a, b * scaling
    revision = config.get("revision")
    return LoraFolder(
        folder, config.get("base_model_name_or_path"), None if revision in (None, "", "main") else revision, factors
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    config: dict[str, Any] = read_json(path)
    try:
        _form(config, "")
    except FormError as mismatch:
        raise RunError(f"{path} is no config of a LoRA: {mismatch}; save the adapter again with PEFT") from mismatch
    kind = config["peft_type"]
    if kind in SOFT_PROMPTS:
        raise ConfigError(f"{folder} is a soft prompt, which changes no weights: it cannot be merged")
    if kind == "AMOLE":
        raise ConfigError(f"{folder} is no plain LoRA: export it as one first (fedamole export --to lora)")
    if kind != "LORA":
        raise ConfigError(
            f"{folder} is an adapter of the type {quoted(kind)}, and only LoRAs are merged: convert it with PEFT's "
            "save_as_lora, or leave it out"
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ConfigError(
            f"{folder} is an adapter for the task {quoted(config['task_type'])}, and only those of causal language "
            "models (CAUSAL_LM) are merged: leave it out"
        )
    _check_settings(config, path)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or {}:
            _check_pattern(pattern, f"{path}: {key}")
    return config


def _check_settings(config: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError for settings with which the change of a weight is not B A alone."""
    for key, value in config.items():
        if key in _HARMLESS or not value or value == _UNUSED.get(key):
            continue
        reason = _MORE.get(key, "this setting is not known here, and may change what the adapter does")
        raise ConfigError(
            f"{path}: {quoted(key)} is {quoted(value)}: {reason}. A merge takes only what B A changes: train the "
            f"adapter again without {quoted(key)}, or leave it out"
        )
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial not in _SAME_BASE:
        raise ConfigError(
            f"{path}: init_lora_weights is {quoted(initial)}, which also changes the base. Convert the adapter to a "
            "LoRA on the unchanged base (path_initial_model_for_weight_conversion of PEFT's save_pretrained), or leave "
            "it out"
        )


def _check_pattern(pattern: str, where: str) -> None:
    """Raise RunError for a regular expression that cannot be compiled, or may take long to match."""
    quantifiers = len(re.findall(r"(?<!\\)[*+?]", pattern))
    try:
        re.compile(pattern)
    except re.error as error:
        raise RunError(f"{where} has the invalid pattern {quoted(pattern)} ({error}): correct it") from error
    if quantifiers > MOST_QUANTIFIERS or re.search(r"\)[*+?]", pattern):
        raise RunError(
            f"{where} has the pattern {quoted(pattern)}, which may take too long to match: name the modules, or use at "
            f"most {MOST_QUANTIFIERS} of *, + and ?, none of them after a parenthesis"
        )


def _peft_settings(config: Mapping[str, Any]) -> Any:
    """Return PEFT's config with the settings that ranks and scalings depend on, or their defaults."""
    from peft import LoraConfig

    names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    return LoraConfig(**{name: config[name] for name in names if config.get(name) is not None})


def _scaling(settings: Any, module: str) -> tuple[int, float]:
    """Return the rank of a module and the factor of its B A, as PEFT computes them."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = settings.rank_pattern, settings.alpha_pattern
    rank = ranks.get(get_pattern_key(ranks, module), settings.r)
    alpha = alphas.get(get_pattern_key(alphas, module), settings.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if settings.use_rslora else rank)


def _read_factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B by module as float32; nothing but pairs of matrices may be in the file."""
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLED).exists():
            raise RunError(
                f"{folder} has its weights in {PICKLED}, a pickle file, which fedamole never reads. Convert it where "
                f'you trust it: peft.AutoPeftModelForCausalLM.from_pretrained("{folder}").save_pretrained(NEW_FOLDER)'
            )
        raise RunError(f"{folder}: {WEIGHTS} is missing; copy it again, or save the adapter again with PEFT")
    found = dict[str, dict[str, Tensor]]()
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                module, factor = _module_of(name, path)
                dtype, shape = file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape())
                if dtype not in DTYPES or len(shape) != 2 or not all(shape):
                    raise RunError(
                        f"{path}: the tensor {quoted(name, 200)} has the shape {shape} and is of {dtype}; expected a "
                        f"matrix of {', '.join(DTYPES)}"
                    )
                tensor = file.get_tensor(name).float()
                if not tensor.isfinite().all():
                    raise ConfigError(f"{folder} holds NaN or infinity: leave this model out of the merge")
                found.setdefault(module, {})[factor] = tensor
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error}); copy it again") from error
    if not found:
        raise RunError(f"{path} holds no LoRA; save the adapter again with PEFT")
    for module, pair in sorted(found.items()):
        if len(pair) != 2:
            raise RunError(f"{path}: {quoted(module, 200)} has only one of A and B; copy the file again")
    return {module: (pair["A"], pair["B"]) for module, pair in sorted(found.items())}


def _module_of(name: str, path: Path) -> tuple[str, str]:
    """Return the module of a tensor, and A or B."""
    match = re.fullmatch(re.escape(PREFIX) + r"([A-Za-z0-9_][A-Za-z0-9_.]{0,499})\.lora_([AB])\.weight", name)
    if match is None:
        raise ConfigError(
            f"{path} holds {quoted(name, 200)} besides the A and B of linear layers (such as trained embeddings or "
            "whole modules): a merge would lose it; train the adapter without it, or leave it out"
        )
    return match[1], match[2]
