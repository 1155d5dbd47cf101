"""The frozen base: a causal language model and its tokenizer, from a hub id, a folder, a GGUF file, or bundled."""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch

from fedamole.errors import BaseModelError, ConfigError
from fedamole.model.causality import (
    auto_class,
    language_model,
    modules_run_by_text,
    refuse_encoder_decoder,
    refuse_unreached,
)
from fedamole.model.gguf import converted, is_gguf
from fedamole.model.media import media_of
from fedamole.model.recomputation import Recomputation
from fedamole.model.vision import ImageReader
from fedamole.received.images import check_pillow
from fedamole.runs.identity import BUNDLED as BUNDLED
from fedamole.runs.identity import Identity

log = logging.getLogger(__name__)


class NoSuchTargetError(BaseModelError):
    """No linear of a base has the name `target`."""

    def __init__(self, target: str, endings: Sequence[str]) -> None:
        """Keep the name; `endings` are those of the names that the base has."""
        super().__init__(f"base.targets: no linear is called {target!r}; there are {', '.join(endings)}")
        self.target = target


@dataclass(frozen=True)
class BaseSettings:
    """The `[base]` table: which model is fine-tuned, and how it is held in memory."""

    model: str = BUNDLED
    """`bundled` (tiny, runs anywhere), a folder in Hugging Face layout, a GGUF file such as models/llama.gguf, or a hub
    id such as meta-llama/Llama-3.2-1B."""
    targets: tuple[str, ...] = ()
    """Names (or endings of names) of the linears to adapt; empty = the usual ones of the architecture (q and v)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the frozen weights; auto = bfloat16 on a GPU, float32 on a CPU. Adapters are float32 always."""
    quantization: Literal["none", "4bit"] = "none"
    """4bit holds the base in 4 bits (needs a GPU and this package's extra `gpu`)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time, the same result."""
    images: bool = False
    """Load the base with its image processor, for templates with `image` (needs this package's extra `vision`). The
    base must have an image part, as LLaVA, Idefics3 and SmolVLM have; adapters change its language model only."""


@dataclass
class Base:
    """A frozen model, resident once, with what the rest of the program needs to know of it."""

    model: Any
    """The transformers model, frozen and always in eval mode, so that no dropout of its own is ever active."""
    tokenizer: Any
    shapes: dict[str, tuple[int, int]]
    """(d_in, d_out) of the target linears by module name."""
    identity: Identity
    name: str
    """Hub id or folder, for `from_pretrained`; written into adapters. For a GGUF file, the folder of its conversion."""
    device: torch.device
    max_positions: int
    """Longest sequence in tokens."""
    gradient_checkpointing: bool = False
    recomputation: Recomputation | None = None
    """What recomputes activations where `gradient_checkpointing` asks for it."""
    images: ImageReader | None = None
    """Preprocesses images, where `BaseSettings.images` asks for it. The tokenizer has it as `image_reader`."""

    def training(self, on: bool) -> None:
        """Enter or leave local training: activations are recomputed only there. The model stays in eval mode."""
        if self.recomputation is not None:
            self.recomputation.active = on

    def media(self, prompts: Iterable[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Return the inputs for the images of a batch of prompts, by name; empty without images."""
        return {} if self.images is None else media_of(prompts, self.device, self.model.dtype)

    @property
    def width(self) -> int:
        """Width d of the input embeddings."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def vocabulary(self) -> int:
        """Number of token ids that have an embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def embedding_std(self) -> float:
        """Standard deviation of the input embeddings' numbers."""
        return float(self.model.get_input_embeddings().weight.float().std())

    @property
    def pad_id(self) -> int:
        """Token used as padding: the tokenizer's own, else its end-of-text token."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)


def resolve_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:1` into a device; a device that is not there is a ConfigError."""
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"run.device = {name!r}: not a device; use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not available:
        raise ConfigError(f"run.device = {name!r}: no GPU is visible here; use run.device = 'cpu' or 'auto'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"run.device = {name!r}: there are {torch.cuda.device_count()} GPUs, numbered from 0")
    return device


def locate(model: str, folder: Path) -> str:
    """Turn the `base.model` setting into what `from_pretrained` takes; relative paths start at `folder`.

    A GGUF file is converted into a folder of the cache. Raises BaseModelError for a path that does not exist, and for
    a GGUF file that cannot be converted.
    """
    if model == BUNDLED:
        return str(files("fedamole") / "bundled" / "base")
    path = folder / Path(model).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if is_gguf(model):
        return str(converted(path.resolve()))
    if is_path(model) or model.count("/") > 1:
        raise BaseModelError(f"base.model = {model!r}: there is no folder {path.resolve()}")
    return model


def named_base(model: str) -> str:
    """Return the name under which a run stores a base: an absolute path for a folder or file; others stay as is."""
    path = Path(model).expanduser()
    return str(path.resolve()) if model != BUNDLED and (path.is_dir() or is_gguf(model)) else model


def is_path(model: str) -> bool:
    """Whether a base is named by a path, by its form alone; a folder's name without a slash may also be a hub id."""
    return model.startswith((".", "/", "~")) or is_gguf(model)


def is_elsewhere(model: str) -> bool:
    """Whether a base is named by a path of another machine; the bundled base's differs from one to the next."""
    return model.startswith("/") and not Path(model).exists()


def load_base(settings: BaseSettings, device: torch.device, folder: Path, local_only: bool = False) -> Base:
    """Load, check, hash and freeze a base.

    `folder` is where relative paths start. With `local_only` nothing is downloaded: a hub id must be in the cache.
    Only safetensors weights are read and no code of a model is run.
    Errors: BaseModelError for a base that cannot be found or read, is no causal language model, whose vocabulary does
    not fit its tokenizer, or without targets; ConfigError for settings that it cannot follow.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoTokenizer

    name = locate(settings.model, folder)
    options: dict[str, Any] = {
        "dtype": "auto",
        "use_safetensors": True,
        "trust_remote_code": False,
        "local_files_only": local_only,
    }
    if settings.quantization == "4bit":
        options |= _quantized(device)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=local_only)
        refuse_encoder_decoder(config, settings.model)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local_only)
        model_class = auto_class(config, settings.images)
        reader = _image_reader(settings.model, name, tokenizer, local_only) if settings.images else None
        model, report = model_class.from_pretrained(name, output_loading_info=True, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BaseModelError(f"base.model = {settings.model!r} cannot be loaded: {reason}") from error
    if report["missing_keys"]:
        # They would have been drawn at random, anew at every load.
        raise BaseModelError(
            f"base.model = {settings.model!r} has no weights for {min(report['missing_keys'])!r}; download it again"
        )
    check_vocabulary(model, tokenizer, settings.model)
    weights = _hash_weights(model)
    if settings.quantization == "none":
        model = model.to(device=device, dtype=_dtype(settings.dtype, device))
    _freeze(model)
    ran = modules_run_by_text(model, settings.model)
    shapes = target_shapes(model, settings.targets)
    refuse_unreached(model, settings.model, tuple(shapes), ran)
    identity = Identity(weights, _hash_tokenizer(tokenizer), _hash_json(sorted(shapes.items())))
    recomputation = Recomputation(language_model(model)) if settings.gradient_checkpointing else None
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    return Base(
        model,
        tokenizer,
        shapes,
        identity,
        name,
        device,
        int(positions),
        settings.gradient_checkpointing,
        recomputation,
        reader,
    )


def _image_reader(model: str, name: str, tokenizer: Any, local_only: bool) -> ImageReader:
    """Load the processor of a base, and attach it to the tokenizer, with which it encodes examples."""
    from transformers import AutoProcessor

    check_pillow()
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False, local_files_only=local_only)
    except (ImportError, AttributeError, TypeError) as error:  # some processors need further packages
        reason = " ".join(str(error).split())[:200]
        raise BaseModelError(f"base.model = {model!r}: its image processor cannot be loaded: {reason}") from error
    tokenizer.image_reader = ImageReader(processor, model)
    reader: ImageReader = tokenizer.image_reader
    return reader


def _quantized(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        raise ConfigError("base.quantization = '4bit' needs a GPU; use 'none' on a CPU")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": config, "device_map": {"": device}}


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


def _freeze(model: Any) -> None:
    """Freeze the weights, set eval mode for good, and drop the generation settings that come with a base.

    Only adapters learn, only adapters are regularised, and answers are greedy whatever the base recommends.
    """
    from transformers import GenerationConfig

    # Settings that come with a base (a repetition penalty, beams) would join those of every call to generate.
    model.generation_config = GenerationConfig()
    model.requires_grad_(False)
    model.eval()


def check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    """Raise BaseModelError when the tokenizer can produce ids that the model has no embedding for."""
    rows = model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise BaseModelError(
            f"base {name!r}: its tokenizer produces ids up to {largest}, its embedding has {rows} rows. "
            "Use the tokenizer that belongs to the model, or resize the model's embeddings and save it again"
        )
    if tokenizer.eos_token_id is None:
        raise BaseModelError(f"base {name!r}: its tokenizer has no end-of-text token; set eos_token in its config")


def _linears(model: Any) -> dict[str, tuple[int, int]]:
    """Shapes (d_in, d_out) of all linears of the language model; the output head is not one of them.

    The towers and projectors for images and sound of a multimodal model are left out.
    """
    head, inside = model.get_output_embeddings(), set(language_model(model).modules())
    linears = {}
    for name, module in model.named_modules():
        if module is head or module not in inside:
            continue
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            linears[name] = (int(module.in_features), int(module.out_features))
        elif type(module).__name__ == "Conv1D":
            linears[name] = (int(module.nx), int(module.nf))
    return linears


def target_shapes(model: Any, targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Shapes of the linears to adapt: those named (whole names or endings), else the architecture's usual ones."""
    linears = _linears(model)
    endings = sorted({name.rpartition(".")[2] for name in linears})
    model_type = model.config.get_text_config().model_type
    if not targets:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

        usual = USUAL.get(model_type, ["q_proj", "v_proj"])
        targets = tuple(usual) if isinstance(usual, list) else ("q_proj", "v_proj")
        if not set(targets) & set(endings):
            raise BaseModelError(
                f"no usual targets are known for the architecture {model_type!r}; "
                f"name some in base.targets, of {', '.join(endings)}"
            )
    chosen = {
        name: shape
        for name, shape in sorted(linears.items())
        if any(name == target or name.endswith(f".{target}") for target in targets)
    }
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in chosen):
            raise NoSuchTargetError(target, endings)
    return chosen


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _hash_weights(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _hash_tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary: Any = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        vocabulary = json.loads(backend.to_str())
        # These two remember how the tokenizer was last called, not what it is.
        vocabulary.pop("truncation", None)
        vocabulary.pop("padding", None)
    return _hash_json([vocabulary, {key: str(value) for key, value in tokenizer.special_tokens_map.items()}])
