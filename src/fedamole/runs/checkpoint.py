"""Save and resume: after each round, everything needed to go on as if nothing had happened.

`checkpoints/round-0003.json` is written last and commits the round. It names the server state and every client's
private state by file and hash. A file that does not match its hash makes the round before it the one to resume from.
"""

import hashlib
import json
import logging
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fedamole.errors import RunError
from fedamole.files import write_atomic
from fedamole.received.files import inside, read_json
from fedamole.received.forms import check_form
from fedamole.runs.run_files import checkpoint_form
from fedamole.runs.run_folder import METRICS, RunFolder

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


_FILE = re.compile(r"round-(\d{4,6})\.(json|safetensors)")


def _rounds(folder: Path, kind: str) -> list[tuple[int, Path]]:
    """Files of a folder that are named by their round, in the order of their rounds; others are left alone."""
    found = [(match, path) for path in folder.glob("round-*") if (match := _FILE.fullmatch(path.name))]
    for _, path in found:
        if not path.is_file():
            raise RunError(f"{path} is no file, and one of that name was to be there: move it away")
    return sorted((int(match[1]), path) for match, path in found if match[2] == kind)


def _checkpoints(folder: RunFolder) -> list[Path]:
    return [path for _, path in _rounds(folder.place("checkpoints"), "json")]


def state_path(folder: RunFolder, client: str, round_: int) -> Path:
    """File of a client's private state after a round."""
    return folder.client(client) / "state" / f"{_name(round_)}.safetensors"


def latest_state(folder: RunFolder, client: str) -> Path | None:
    """File of a client's last private state, or None before its first round."""
    states = _rounds(inside(folder.path, folder.client(client) / "state"), "safetensors")
    return states[-1][1] if states else None


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
    needed = {name for path in _checkpoints(folder) for name in read(path).clients}
    for client in clients:
        for _, state in _rounds(inside(folder.path, folder.client(client) / "state"), "safetensors"):
            if str(state.relative_to(folder.path)) not in needed:
                state.unlink()


def read(path: Path) -> Checkpoint:
    """Read round-NNNN.json; RunError where it is damaged, or is of another round than its name says."""
    found = read_json(path)
    check_form(found, checkpoint_form, path, RunError)
    checkpoint = Checkpoint(**{field.name: found[field.name] for field in fields(Checkpoint)})
    if path.stem != _name(checkpoint.round):
        raise RunError(f"{path} is damaged: it is of round {checkpoint.round}; put it back from a copy")
    return checkpoint


def newest(folder: RunFolder) -> Path | None:
    """The file of the last round that was committed, unread."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def rounds_done(folder: RunFolder) -> int:
    """Rounds of a run that are finished: committed, or, in the folder of a deployment's client, scored."""
    if (path := newest(folder)) is not None:
        return int(path.stem.removeprefix("round-")) + 1
    return 1 + max((line["round"] for line in folder.lines(METRICS) if line["split"] == "validation"), default=-1)


def load_latest(folder: RunFolder) -> tuple[Checkpoint, bytes] | None:
    """Return the last intact checkpoint and its server state, or None where no round was ever finished.

    States of clients that are newer than it are removed: those rounds are run again. Errors: RunError where no
    checkpoint is intact, or where one belongs to another run.
    """
    found = _checkpoints(folder)
    for path in reversed(found):
        try:
            checkpoint = read(path)
            state = path.with_suffix(".safetensors").read_bytes()
            why = "" if _sha256(state) == checkpoint.server_sha256 else "the server's state has another hash"
            why = why or _changed(folder, checkpoint)
        except (OSError, RunError) as error:
            why = str(error)
        if why:
            log.warning("%s is damaged; going back to the round before it (%s)", path, why)
            continue
        if checkpoint.run != folder.about["id"]:
            raise RunError(f"{path} belongs to another run ({checkpoint.run}); remove it and its .safetensors file")
        _forget_after(folder, checkpoint)
        return checkpoint, state
    if found:
        raise RunError(f"{folder.path}: no checkpoint is intact; start the run anew in another folder")
    _forget_after(folder, None)
    return None


def _changed(folder: RunFolder, checkpoint: Checkpoint) -> str:
    """Which private state is not the one that was committed; empty where all are."""
    for name, sha in checkpoint.clients.items():
        if _sha256(folder.place(name).read_bytes()) != sha:
            return f"{name} has another hash"
    return ""


def _forget_after(folder: RunFolder, checkpoint: Checkpoint | None) -> None:
    """Remove checkpoints and private states of rounds after this one."""
    last = -1 if checkpoint is None else checkpoint.round
    states = [place for place in folder.place("clients").glob("*/state") if place.is_dir()]
    for place in (folder.place("checkpoints"), *states):
        for kind in ("json", "safetensors"):
            for round_, path in _rounds(place, kind):
                if round_ > last:
                    inside(folder.path, path).unlink()
