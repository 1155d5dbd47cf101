"""Adapters on the Hugging Face hub."""

import re
from pathlib import Path

from fedamole.errors import RunError
from fedamole.runs.adapter_folder import FILES

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def local_folder(path: str | Path) -> Path:
    """Return a path as it is, and for `user/repo` the folder of that adapter in the cache of the hub.

    The adapter is downloaded if the cache does not have its newest version; with `HF_HUB_OFFLINE=1`, the cached
    version is used. Only the files of an adapter folder are downloaded, and nothing of them is executed. A text whose
    first part is a folder here, such as `runs/mine`, is a path.

    Raises:
        RunError: The hub has no such adapter, or cannot be reached.
    """
    text = str(path)
    if not isinstance(path, str) or not HUB_ID.fullmatch(text) or Path(text.split("/")[0]).exists():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=list(FILES)))
    except Exception as error:  # errors of the hub, of the network and of the disk
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RunError(
            f"{text}: no such folder here, and not loaded from the Hugging Face hub ({reason[0]}); check the name, or "
            "log in with `hf auth login` if the repository is private"
        ) from error
