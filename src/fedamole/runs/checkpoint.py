"""Checkpoints: after each round, everything that `fedamole resume` needs to continue as if nothing had happened.

`checkpoints/round-0003.safetensors` is the server's state after round 3. `checkpoints/round-0003.json` is written last
and commits the round: it holds the hashes of that state and of every client's private state. If a file does not match
its hash, the run resumes from the checkpoint before.
"""

import hashlib
import json
import logging
import re
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedamole.errors import RunError
from fedamole.files import write_atomic
from fedamole.received.files import inside, read_json
from fedamole.received.forms import check_form
from fedamole.runs.run_files import checkpoint_form
from fedamole.runs.run_folder import METRICS, RunFolder

log = logging.getLogger(__name__)

CHECKPOINTS_ON_DISK = 2
"""Number of checkpoints to keep: the last one, and the one before in case the last is damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """Content of round-NNNN.json."""

    run: str
    """Id of the run it belongs to."""
    round: int
    server_sha256: str
    clients: dict[str, str]
    """SHA-256 of every private state by its path relative to the run's folder."""
    progress: dict[str, Any]
    """The round loop's own records, such as best rounds and latest validation results."""


def _name(round_: int, exchange: int = 0) -> str:
    return f"round-{round_:04d}" + (f"-exchange-{exchange}" if exchange else "")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


_FILE = re.compile(r"round-(\d{4,6})(?:-exchange-(\d{1,2}))?\.(json|safetensors)")


def round_and_exchange(path: Path) -> tuple[int, int]:
    """Return the round and the exchange that a file is named by; the first exchange of a round (0) is not named."""
    match = _FILE.fullmatch(path.name)
    assert match is not None, path
    return int(match[1]), int(match[2] or 0)


def files_by_round(folder: Path, suffix: str) -> list[Path]:
    """Return the files named round-NNNN or round-NNNN-exchange-K with this suffix, oldest first.

    Other files are ignored. Raises RunError if something that is no file has such a name.
    """
    paths = [path for path in folder.glob("round-*") if _FILE.fullmatch(path.name)]
    for path in paths:
        if not path.is_file():
            raise RunError(f"{path} must be a file and is not: move it away")
    return sorted((path for path in paths if path.suffix == f".{suffix}"), key=round_and_exchange)


def _checkpoints(folder: RunFolder) -> list[Path]:
    return files_by_round(folder.place("checkpoints"), "json")


def state_path(folder: RunFolder, client: str, round_: int, exchange: int = 0) -> Path:
    """Return the path of a client's private state after an exchange of a round."""
    return folder.client(client) / "state" / f"{_name(round_, exchange)}.safetensors"


def answer_path(folder: RunFolder, client: str, round_: int, exchange: int = 0) -> Path:
    """Return the path of what a deployment's client answered in an exchange of a round."""
    return folder.client(client) / "answers" / f"{_name(round_, exchange)}.safetensors"


def latest_state(folder: RunFolder, client: str) -> Path | None:
    """Return the file of a client's last private state, or None before its first update."""
    states = _states(folder, client)
    return states[-1] if states else None


def _states(folder: RunFolder, client: str) -> list[Path]:
    """The files of a client's private states, oldest first."""
    return files_by_round(inside(folder.path, folder.client(client) / "state"), "safetensors")


def save(folder: RunFolder, round_: int, server_state: bytes, clients: list[str], progress: dict[str, Any]) -> None:
    """Commit a round, then remove the files that no kept checkpoint needs."""
    target = folder.path / "checkpoints" / f"{_name(round_)}.safetensors"
    write_atomic(target, server_state)
    states = [files for client in clients if (files := _states(folder, client))]
    hashes = {str(last.relative_to(folder.path)): _sha256(last.read_bytes()) for *_, last in states}
    checkpoint = Checkpoint(folder.about["id"], round_, _sha256(server_state), hashes, progress)
    write_atomic(target.with_suffix(".json"), json.dumps(asdict(checkpoint)))
    checkpoints = _checkpoints(folder)
    for path in checkpoints[:-CHECKPOINTS_ON_DISK]:
        path.unlink()
        path.with_suffix(".safetensors").unlink(missing_ok=True)
    kept = [round_and_exchange(path)[0] for path in checkpoints[-CHECKPOINTS_ON_DISK:]]
    for files in states:
        for state, following in pairwise(files):  # a checkpoint needs the last state up to its round
            first, end = round_and_exchange(state)[0], round_and_exchange(following)[0]
            if not any(first <= round_ < end for round_ in kept):
                state.unlink()


def read(path: Path) -> Checkpoint:
    """Read a round-NNNN.json; raises RunError if it is damaged, or if its round is not the one in its name."""
    content = read_json(path)
    check_form(content, checkpoint_form, path, RunError)
    checkpoint = Checkpoint(**{field.name: content[field.name] for field in fields(Checkpoint)})
    if path.stem != _name(checkpoint.round):
        raise RunError(f"{path} is damaged: it is of round {checkpoint.round}; put it back from a copy")
    return checkpoint


def newest(folder: RunFolder) -> Path | None:
    """Return the file of the last committed round, without reading it."""
    checkpoints = _checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def rounds_done(folder: RunFolder) -> int:
    """Return the number of finished rounds.

    A round counts once it is committed; in the folder of a deployment's client, which has no checkpoints, once it is
    scored.
    """
    if (path := newest(folder)) is not None:
        return round_and_exchange(path)[0] + 1
    return 1 + max((line["round"] for line in folder.lines(METRICS) if line["split"] == "validation"), default=-1)


def load_latest(folder: RunFolder) -> tuple[Checkpoint, bytes] | None:
    """Return the last intact checkpoint and its server state, or None before the first finished round.

    Removes the clients' states of later rounds, since those rounds will run again. Raises RunError if checkpoints
    exist and none is intact, or if one belongs to another run.
    """
    checkpoints = _checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            checkpoint = read(path)
            state = path.with_suffix(".safetensors").read_bytes()
            damage = "" if _sha256(state) == checkpoint.server_sha256 else "the server's state has another hash"
            damage = damage or _changed_state(folder, checkpoint)
        except (OSError, RunError) as error:
            damage = str(error)
        if damage:
            log.warning("%s is damaged; going back to the round before it (%s)", path, damage)
            continue
        if checkpoint.run != folder.about["id"]:
            raise RunError(f"{path} belongs to another run ({checkpoint.run}); remove it and its .safetensors file")
        _forget_after(folder, checkpoint)
        return checkpoint, state
    if checkpoints:
        raise RunError(f"{folder.path}: no checkpoint is intact; start the run anew in another folder")
    _forget_after(folder, None)
    return None


def _changed_state(folder: RunFolder, checkpoint: Checkpoint) -> str:
    """Describe the first private state that differs from the committed one; empty if there is none."""
    for name, sha in checkpoint.clients.items():
        if _sha256(folder.place(name).read_bytes()) != sha:
            return f"{name} has another hash"
    return ""


def _forget_after(folder: RunFolder, checkpoint: Checkpoint | None) -> None:
    """Remove checkpoints and private states of later rounds."""
    last = -1 if checkpoint is None else checkpoint.round
    states = [path for path in folder.place("clients").glob("*/state") if path.is_dir()]
    for directory in (folder.place("checkpoints"), *states):
        for suffix in ("json", "safetensors"):
            for path in files_by_round(directory, suffix):
                if round_and_exchange(path)[0] > last:
                    inside(folder.path, path).unlink()
