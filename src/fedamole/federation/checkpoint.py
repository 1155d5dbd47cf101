"""Save and resume: after each round, everything needed to go on as if nothing had happened.

`checkpoints/round-0003.json` is written last and commits the round. It names the server state and every client's
private state by file and hash. A file that does not match its hash makes the round before it the one to resume from.
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedamole.errors import RunError
from fedamole.federation.run_folder import RunFolder, write_atomic

log = logging.getLogger(__name__)

KEPT = 2
"""Checkpoints on disk: the last one, and the one before it in case the last is damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """The end of a round."""

    run: str
    """Id of the run it belongs to."""
    round: int
    server_sha256: str
    clients: dict[str, str]
    """SHA-256 of every private state by its path relative to the run's folder."""
    progress: dict[str, Any]
    """What the loop knows: best rounds and latest validation results."""


def _name(round_: int) -> str:
    return f"round-{round_:04d}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _checkpoints(folder: RunFolder) -> list[Path]:
    return sorted((folder.path / "checkpoints").glob("round-*.json"))


def state_path(folder: RunFolder, client: str, round_: int) -> Path:
    """File of a client's private state after a round."""
    return folder.client(client) / "state" / f"{_name(round_)}.safetensors"


def latest_state(folder: RunFolder, client: str) -> Path | None:
    """File of a client's last private state, or None before its first round."""
    return max((folder.client(client) / "state").glob("round-*.safetensors"), default=None)


def save(folder: RunFolder, round_: int, server_state: bytes, clients: list[str], progress: dict[str, Any]) -> None:
    """Commit a round, then remove what no kept checkpoint needs."""
    target = folder.path / "checkpoints" / f"{_name(round_)}.safetensors"
    write_atomic(target, server_state)
    states = [state for client in clients if (state := latest_state(folder, client)) is not None]
    hashes = {str(state.relative_to(folder.path)): _sha256(state.read_bytes()) for state in states}
    checkpoint = Checkpoint(folder.about["id"], round_, _sha256(server_state), hashes, progress)
    write_atomic(target.with_suffix(".json"), json.dumps(asdict(checkpoint)))
    _prune(folder, clients)


def _prune(folder: RunFolder, clients: list[str]) -> None:
    for path in _checkpoints(folder)[:-KEPT]:
        path.unlink()
        path.with_suffix(".safetensors").unlink(missing_ok=True)
    needed = {name for path in _checkpoints(folder) for name in json.loads(path.read_text())["clients"]}
    for client in clients:
        for state in (folder.client(client) / "state").glob("round-*.safetensors"):
            if str(state.relative_to(folder.path)) not in needed:
                state.unlink()


def load_latest(folder: RunFolder) -> tuple[Checkpoint, bytes] | None:
    """Return the last intact checkpoint and its server state, or None where no round was ever finished.

    States of clients that are newer than it are removed: those rounds are run again. Errors: RunError where no
    checkpoint is intact, or where one belongs to another run.
    """
    found = _checkpoints(folder)
    for path in reversed(found):
        try:
            checkpoint = Checkpoint(**json.loads(path.read_text()))
            state = path.with_suffix(".safetensors").read_bytes()
            damaged = _sha256(state) != checkpoint.server_sha256 or not _intact(folder, checkpoint)
        except (OSError, ValueError, TypeError):
            damaged = True
        if damaged:
            log.warning("%s is damaged; going back to the round before it", path)
            continue
        if checkpoint.run != folder.about["id"]:
            raise RunError(f"{path} belongs to another run ({checkpoint.run}); remove it and its .safetensors file")
        _forget_after(folder, checkpoint)
        return checkpoint, state
    if found:
        raise RunError(f"{folder.path}: no checkpoint is intact; start the run anew in another folder")
    _forget_after(folder, None)
    return None


def _intact(folder: RunFolder, checkpoint: Checkpoint) -> bool:
    return all(_sha256((folder.path / name).read_bytes()) == sha for name, sha in checkpoint.clients.items())


def _forget_after(folder: RunFolder, checkpoint: Checkpoint | None) -> None:
    """Remove checkpoints and private states of rounds after this one."""
    last = -1 if checkpoint is None else checkpoint.round
    states = (folder.path / "clients").glob("*/state/round-*.safetensors")
    for path in [*_checkpoints(folder), *(folder.path / "checkpoints").glob("*.safetensors"), *states]:
        if int(path.stem.removeprefix("round-")) > last:
            path.unlink()
