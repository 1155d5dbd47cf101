"""A misbehaving client: its worker does real work, then sends a reply changed according to a file.

`dishonest_client.py client ...` is `fedamole client ...` with this worker; `dishonest_client.py SETTINGS.json` is the
worker. The file named by the environment variable LIE contains a key of LIES or SAYINGS, and is read at every request.
"""

import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from fedamole.deployment import client_processes as client
from fedamole.deployment import warm_worker
from fedamole.deployment.client_handler import ClientHandler
from fedamole.engine.messages import JOIN, UPDATE, Reply, read_request
from fedamole.federation.record import bytes_as_tensor, pack, tensor_as_bytes, unpack

SECRET = "the patient's name is Ann"
"""Text in a client's error that must not reach anyone else."""
LATE = 40.0
"""Extra seconds that a slow client takes."""


class DishonestClient(ClientHandler):
    """Handles requests, and changes the updates, the scores or the information about itself."""

    def answer(self, payload: bytes) -> bytes:
        """Return the reply, changed according to the file."""
        kind = Path(os.environ["LIE"]).read_text()
        if kind in SAYINGS:
            answer = unpack(Reply, super().answer(payload))
            return pack(answer if answer.failed else SAYINGS[kind](answer))
        if read_request(payload).operation != UPDATE or kind == "honest":
            return super().answer(payload)
        return LIES[kind](self, payload)

    def honest(self, payload: bytes) -> bytes:
        """Return an honest client's reply."""
        return super().answer(payload)

    def with_changed_tensors(self, payload: bytes, change: Callable[[dict[str, torch.Tensor]], None]) -> bytes:
        """Return a reply whose first table of tensors is changed."""
        assert self.session is not None
        answer = unpack(Reply, self.honest(payload))
        inner = unpack(self.session.config.method.records.reply, tensor_as_bytes(answer.reply) or b"")
        name = next(field.name for field in fields(inner) if getattr(inner, field.name))
        tensors = {key: tensor.clone() for key, tensor in getattr(inner, name).items()}
        change(tensors)
        return pack(replace(answer, reply=bytes_as_tensor(pack(replace(inner, **{name: tensors})))))


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] = torch.nan


def _huge(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).mul_(0).add_(1e30)


def _wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    key = next(iter(tensors))
    tensors[key] = tensors[key].repeat(2, 1)


def _foreign_expert(tensors: dict[str, torch.Tensor]) -> None:
    key = next(key for key in tensors if "/expert-" in key)
    module, _, rest = key.partition("/expert-")
    own = {key.partition("/expert-")[2][:2] for key in tensors if key.startswith(f"{module}/expert-")}
    other = next(f"{number:02d}" for number in range(100) if f"{number:02d}" not in own)
    tensors[f"{module}/expert-{other}{rest[2:]}"] = tensors[key].clone()


def _poison(tensors: dict[str, torch.Tensor]) -> None:
    """Random numbers as large as max_norm may let through: five times the reply's own norm."""
    generator = torch.Generator().manual_seed(1)
    own = sum(float(tensor.double().square().sum()) for tensor in tensors.values())
    drawn = {key: torch.randn(tensor.shape, generator=generator) for key, tensor in sorted(tensors.items())}
    norm = sum(float(tensor.double().square().sum()) for tensor in drawn.values())
    tensors.update({key: tensor * (5 * (own / norm) ** 0.5) for key, tensor in drawn.items()})


def _flip(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({key: -5 * tensor for key, tensor in tensors.items()})


def _zero(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({key: torch.zeros_like(tensor) for key, tensor in tensors.items()})


def _scored(loss: float) -> Callable[[Reply], Reply]:
    return lambda answer: replace(
        answer,
        scores={row: {**values, "loss": loss} if "loss" in values else values for row, values in answer.scores.items()},
    )


def _many_examples(answer: Reply) -> Reply:
    if answer.operation != JOIN:
        return answer
    return replace(answer, report={**answer.report, "examples": dict.fromkeys(answer.report["examples"], 10**9)})


def _no_time(answer: Reply) -> Reply:
    return replace(answer, report={**answer.report, "seconds": -1e15}) if answer.operation == UPDATE else answer


SAYINGS: dict[str, Callable[[Reply], Reply]] = {
    "false loss": _scored(-1e15),
    "lowest loss": _scored(0.0),
    "examples": _many_examples,
    "seconds": _no_time,
}
"""Changes of the numbers in a reply; the tensors are unchanged."""


def _raise(host: DishonestClient, payload: bytes) -> bytes:
    assert host.session is not None
    worker = host.session.worker
    train = worker.update

    def update(*arguments: Any) -> Any:
        worker.update = train  # type: ignore[method-assign]
        raise ValueError(SECRET)

    setattr(worker, "update", update)  # noqa: B010
    return host.honest(payload)


def _full_disk(host: DishonestClient, payload: bytes) -> bytes:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        return host.honest(payload)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _slow(host: DishonestClient, payload: bytes) -> bytes:
    time.sleep(LATE)
    return host.honest(payload)


def _truncated(host: DishonestClient, payload: bytes) -> bytes:
    answer = host.honest(payload)
    return answer[: len(answer) // 2]


def _too_large(host: DishonestClient, payload: bytes) -> bytes:
    answer = host.honest(payload)
    return answer + b"\0" * (10 * (len(answer) + (1 << 20)))


LIES: dict[str, Callable[[DishonestClient, bytes], bytes]] = {
    "nan": lambda host, payload: host.with_changed_tensors(payload, _nan),
    "poison": lambda host, payload: host.with_changed_tensors(payload, _poison),
    "flip": lambda host, payload: host.with_changed_tensors(payload, _flip),
    "zero": lambda host, payload: host.with_changed_tensors(payload, _zero),
    "huge": lambda host, payload: host.with_changed_tensors(payload, _huge),
    "wrong shape": lambda host, payload: host.with_changed_tensors(payload, _wrong_shape),
    "foreign expert": lambda host, payload: host.with_changed_tensors(payload, _foreign_expert),
    "raise": _raise,
    "full disk": _full_disk,
    "slow": _slow,
    "truncated": _truncated,
    "too large": _too_large,
}


def _lying_client() -> None:
    from fedamole.cli.main import main

    init = client.ClientProcesses.__init__

    def lying(self: client.ClientProcesses, *arguments: Any) -> None:
        init(self, *arguments)
        assert self.worker.arguments[1:3] == ["-m", "fedamole.deployment.warm_worker"]
        self.worker.arguments[1:3] = [__file__]

    setattr(client.ClientProcesses, "__init__", lying)  # noqa: B010
    main()


if __name__ == "__main__":
    if sys.argv[1] == "client":
        _lying_client()
    else:
        setattr(warm_worker, "ClientHandler", DishonestClient)  # noqa: B010
        warm_worker.main()
