"""A client's session in one run: settings, worker, data, and its files in the run folder."""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from fedamole.config import Config
from fedamole.data.settings import SourceSettings
from fedamole.deployment.security.policy import PolicyError, PolicySettings
from fedamole.engine.messages import LONGEST_LABEL, MOST_LABELS, Reply, Request, unpacked
from fedamole.evaluation.personal import score_name
from fedamole.federation.client_data import ClientData
from fedamole.federation.evaluator import Scores
from fedamole.federation.record import PayloadError
from fedamole.federation.worker import Worker
from fedamole.files import write_atomic
from fedamole.runs.checkpoint import answer_path, files_by_round, round_and_exchange, state_path
from fedamole.runs.run_folder import METRICS, RunFolder

log = logging.getLogger(__name__)

REQUEST_COUNTS = "work.json"
"""File in the client's folder: numbers of trainings and validations done for this run, whether they counted or not."""
RELEASED = "released.safetensors"
"""File in the client's folder: what it has released with noise, which happens once in a run."""
DISK_COPIES = 4
"""Copies of a message on the client's disk: reply, state, model, and one being written."""


@dataclass(frozen=True)
class ClientSettings:
    """The settings that an organisation chooses for itself."""

    source: SourceSettings
    """The client's data. The source's name is the client's name, unless the client is one part of a source."""
    folder: str = "runs"
    """Folder for the client's run folders."""
    base: str | None = None
    """The client's own copy of the base model, a folder, GGUF file or hub id; unset: the one that the server names."""
    device: str = "auto"
    threads: int = 0
    name: str = ""
    """Name of a client that is one part of a source; `manifest` then defines the part."""
    manifest: str | None = None
    """File of a stored partition of the source, which lists this client's rows."""
    policy: PolicySettings = field(default_factory=PolicySettings)
    """What the client consents to."""
    agree: str = ""
    """Hash of the settings of the only run to take part in; empty: any run."""
    audit: str = ""
    """Path of the audit log; empty: no log, for clients that belong to the coordinator."""


@dataclass(frozen=True)
class StoredReply:
    """A reply on disk, with the hash of its request: the message and the last round that counted."""

    digest: str
    reply: Reply


@dataclass
class RunSession:
    """A client's session in one run."""

    config: Config
    worker: Worker
    data: ClientData
    labels: dict[str, int]
    lock: ExitStack = field(default_factory=ExitStack)
    """Holds the lock of the run folder."""

    def __post_init__(self) -> None:
        """Give the methods keys that the coordinator, which knows the seed, cannot compute (`Client.new_key`)."""
        self.worker.factory.new_key = lambda _: os.urandom(32)
        self.worker.factory.once = partial(computed_once, self.folder.client(self.name) / RELEASED)

    @property
    def folder(self) -> RunFolder:
        """The client's own run folder."""
        return self.worker.folder

    @property
    def name(self) -> str:
        """The client's name."""
        return self.data.info.name

    @property
    def test_reply_path(self) -> Path:
        """Path of the stored reply to the test request."""
        return self.folder.client(self.name) / "test.safetensors"

    def answer_path(self, round_: int, exchange: int = 0) -> Path:
        """Path of the stored reply of an exchange of a round."""
        return answer_path(self.folder, self.name, round_, exchange)

    def read_stored(self, path: Path) -> StoredReply | None:
        """Return the stored reply in a file, or None if it is missing or damaged."""
        try:
            return unpacked(StoredReply, path.read_bytes()) if path.exists() else None
        except PayloadError as error:
            log.warning("%s is damaged (%s); that round is repeated", path, error)
            return None

    def round_files(self) -> tuple[list[Path], list[Path]]:
        """Return the files of private states and of replies, each ordered by round and exchange."""
        states, answers = state_path(self.folder, self.name, 0).parent, self.answer_path(0).parent
        return files_by_round(states, "safetensors"), files_by_round(answers, "safetensors")

    def prune(self, rounds: int) -> None:
        """Delete the private states and the replies of all but the last `rounds` rounds that have any."""
        for paths in self.round_files():
            kept = sorted({round_and_exchange(path)[0] for path in paths})[-rounds:]
            for path in paths:
                if round_and_exchange(path)[0] not in kept:
                    path.unlink()

    def count_request(self, operation: str, most: int) -> None:
        """Count a training or validation before it is done; PolicyError if it exceeds `most`.

        After a restart a coordinator may repeat a round with another message. Each reply reveals something, so replies
        are counted rather than rounds.
        """
        path = self.folder.client(self.name) / REQUEST_COUNTS
        counts = self.folder.read_json(str(path.relative_to(self.folder.path))) if path.exists() else {}
        if counts.get(operation, 0) >= most:
            raise PolicyError(
                f"the coordinator has requested {operation} {most} times in this run, the maximum that the policy "
                "allows (max_rounds)"
            )
        write_atomic(path, json.dumps({**counts, operation: counts.get(operation, 0) + 1}))

    def discard_after(self, request: Request) -> None:
        """Delete everything done after the last update that counted."""
        last = request.last, request.last_exchange
        for path in chain(*self.round_files()):
            if round_and_exchange(path) > last:
                log.info("%s is discarded: that update did not count", path.name)
                path.unlink()

        def counted(line: dict[str, Any]) -> bool:
            if line["split"] == "validation" and self.worker.variants.get(line["method"]) == "post_aggregation":
                return (line["round"], line["method"] == request.variant) < (request.round, True)
            return (line["round"], line.get("exchange", 0)) <= last

        self.folder.cut(METRICS, counted)

    def save_best_models(self, request: Request) -> None:
        """Save the current model of every variant whose best round is new."""
        path = self.folder.client(self.name) / "best.json"
        saved = self.folder.read_json(str(path.relative_to(self.folder.path))) if path.exists() else {}
        for variant, round_ in request.best.items():
            if variant in self.worker.variants and saved.get(variant) != round_:
                self.worker.evaluator.save_best(self.data, variant)
                saved[variant] = round_
                write_atomic(path, json.dumps(saved))

    def log(self, lines: list[dict[str, Any]]) -> None:
        """Append lines to the client's metrics."""
        self.folder.append(METRICS, ({"round": line.pop("round"), "client": self.name, **line} for line in lines))

    def append_validation(self, round_: int, scores: dict[str, Scores], exchange: int = 0) -> None:
        """Append validation scores by variant to the client's metrics."""
        line = {"round": round_, "split": "validation", **({"exchange": exchange} if exchange else {})}
        self.log([{**line, "method": variant, **values} for variant, values in scores.items()])


def count_labels(config: Config, data: ClientData) -> dict[str, int]:
    """Count the answers among the training rows; empty if answers are free text."""
    examples = data.train.examples
    if score_name(examples[0], config.evaluation) != "accuracy":
        return {}
    labels = Counter(example.answer for example in examples)
    if len(labels) > MOST_LABELS or max(map(len, labels)) > LONGEST_LABEL:
        log.warning("labels are not shared: there are more than %d, or some are too long", MOST_LABELS)
        return {}
    return dict(labels)


def check_disk(settings: ClientSettings, name: str, message: int) -> None:
    """Raise PolicyError if the client's run folders would exceed max_disk_mib with a message of this many bytes."""
    limit = settings.policy.max_disk_mib
    client_folders = [path.parent for path in Path(settings.folder).glob(f"*/clients/{name}")]
    used = sum(
        path.stat().st_size
        for client_folder in client_folders
        for path in client_folder.parent.rglob("*")
        if path.is_file()
    )
    if used + DISK_COPIES * message > limit * 2**20:
        raise PolicyError(
            f"the client's run folders in {settings.folder} take {used / 2**20:.0f} MiB and the message "
            f"{message / 2**20:.0f} MiB; the policy allows {limit} MiB (max_disk_mib): remove old runs or raise it"
        )


def computed_once(path: Path, compute: Callable[[], bytes]) -> bytes:
    """Return the contents of a file; the first time, compute and write them."""
    if not path.exists():
        write_atomic(path, compute())
    return path.read_bytes()
