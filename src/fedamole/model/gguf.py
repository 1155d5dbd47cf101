"""GGUF files as bases. Each file is converted once into a folder in Hugging Face layout, which stays in a cache."""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from fedamole.errors import BaseModelError, describe_os_error, how_to_install
from fedamole.model.causality import INSTEAD, auto_class, refuse_encoder_decoder

log = logging.getLogger(__name__)

SUFFIX = ".gguf"
MAGIC = b"GGUF"
CONVERSION = 1
"""Version of the conversion. A change to the files that it writes needs another number, and so another cache folder."""


def is_gguf(model: str) -> bool:
    """Whether a `base.model` setting names a GGUF file, by the ending of its name."""
    return model.lower().endswith(SUFFIX)


def cache_folder() -> Path:
    """Return the folder of the converted files, inside the cache of Hugging Face's libraries.

    It is `fedamole/gguf-VERSION` in HF_HOME, which is by default `huggingface` in XDG_CACHE_HOME or in `~/.cache`.
    """
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "fedamole" / f"gguf-{CONVERSION}"


def converted(path: Path) -> Path:
    """Return the folder with the contents of a GGUF file in Hugging Face layout; convert the file if there is none.

    The folder's name is the file's SHA-256. Of several processes, one converts and the others wait for it. The folder
    appears complete or not at all. An existing folder is used without the package gguf and from a read-only cache.

    Raises BaseModelError if the file cannot be converted (see `convert`) or the cache cannot be written.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise _unusable(path, "it is not a GGUF file; name a .gguf file, or a folder in Hugging Face layout")
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BaseModelError(f"base.model: {describe_os_error(error)}") from error
    target = cache_folder() / digest
    if target.is_dir():
        return target
    _require_gguf(path)
    from filelock import FileLock
    from safetensors import SafetensorError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The operating system releases this lock even if the process is killed.
        with FileLock(target.with_suffix(".lock")):
            if not target.is_dir():
                log.info("converting %s into %s; this happens once", path, target)
                unfinished = target.with_suffix(".unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
                try:
                    convert(path, unfinished)
                    unfinished.rename(target)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = describe_os_error(error) if isinstance(error, OSError) else " ".join(str(error).split())
        raise BaseModelError(
            f"base.model = {str(path)!r}: its conversion cannot be stored in the cache {target.parent} ({reason}); "
            "set HF_HOME to a folder that you can write to"
        ) from error
    return target


def convert(path: Path, target: Path) -> None:
    """Write the contents of a GGUF file as a new folder in Hugging Face layout.

    The folder contains config.json, safetensors weights in bfloat16 and the tokenizer. Quantised weights are
    dequantised, which does not restore their precision.

    Raises BaseModelError if the package gguf is missing, if the file is incomplete, or if transformers cannot load
    it as a decoder-only language model; OSError or SafetensorError if the folder cannot be written.
    """
    _require_gguf(path)
    _check_file(path)
    model, tokenizer = _load(path)
    target.mkdir(parents=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _drop_added_tokens(target / "tokenizer.json", model.get_input_embeddings().num_embeddings)


def _drop_added_tokens(path: Path, rows: int) -> None:
    """Remove the tokens with ids of `rows` or more: transformers adds GPT-2's `<|endoftext|>` to other vocabularies."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < rows]
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _require_gguf(path: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise _unusable(path, f"GGUF files need the package gguf; {how_to_install('gguf')}") from error


def _check_file(path: Path) -> None:
    """Raise BaseModelError if a GGUF file is incomplete or damaged, or has no weights."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        layers = max(
            (int(field.contents()) for name, field in reader.fields.items() if name.endswith(".block_count")), default=0
        )
    except Exception as error:  # the package raises errors of many kinds for damaged files
        raise _unusable(path, "the file is incomplete or damaged; download or copy it again") from error
    if not reader.tensors or "general.architecture" not in reader.fields:
        raise _unusable(path, f"it contains no language model; {INSTEAD}")
    # transformers builds all layers that the file announces before it reads their weights.
    if layers > len(reader.tensors):
        raise _unusable(path, f"it names {layers} layers but has {len(reader.tensors)} tensors; download it again")


def _load(path: Path) -> tuple[Any, Any]:
    """Return the model of a GGUF file, dequantised, in bfloat16, and its tokenizer."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    # Newer releases keep weights packed where they have kernels for it; older ones always dequantise.
    packing = getattr(transformers, "GgufConfig", None)
    unpacked = {} if packing is None else {"quantization_config": packing(dequantize=True)}
    folder = path.parent
    options: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        refuse_encoder_decoder(config, str(path))
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        kind = auto_class(config)
        loaded, report = kind.from_pretrained(
            folder, dtype=torch.bfloat16, output_loading_info=True, **unpacked, **options
        )
    except (BaseModelError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # code of many architectures
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise _unusable(
            path, f"transformers cannot load it as a causal language model ({reason}); {INSTEAD}"
        ) from error
    if report["missing_keys"]:
        missing = min(report["missing_keys"])
        raise _unusable(path, f"it has no weights for {missing!r}; download it again, or first merge all its parts")
    # A model loaded from GGUF may refuse to be saved, so its weights move to a new one.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = kind.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.load_state_dict(loaded.state_dict(), assign=True)
    return model, tokenizer


def _unusable(path: Path, reason: str) -> BaseModelError:
    return BaseModelError(f"base.model = {str(path)!r}: {reason}")
