"""The first training of a client whose result leaves it, as in round 0 of a run."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from fedamole.config import Config
from fedamole.data.manifest import Manifest
from fedamole.experiment import server_of
from fedamole.federation.client_data import ClientData
from fedamole.federation.client_factory import ClientFactory
from fedamole.federation.method import ClientInfo
from fedamole.federation.probe import ProbeCounts
from fedamole.federation.request import TrainingRequest, TrainingResult
from fedamole.model.bank import Bank
from fedamole.runs.run_folder import Kind


class NotApplicableError(Exception):
    """An audit cannot be done for a run; the text is the reason."""


@dataclass(frozen=True)
class Release:
    """A training, and the work of the method that waits for its result."""

    request: TrainingRequest
    work: Generator[Any, Any, tuple[Any, Any, TrainingResult]]

    def reply(self, result: TrainingResult) -> Any:
        """Return the client's reply after this result; later trainings of the round change nothing."""
        try:
            while True:
                request = self.work.send(result)
                if not isinstance(request, TrainingRequest):
                    raise NotApplicableError("its clients also send what is not a trained adapter")
                result = request.unchanged()
        except StopIteration as end:
            return end.value[1]


def first_release(config: Config, bank: Bank, data: ClientData, manifest: Manifest, kind: Kind) -> Release:
    """Return the first training of a client in round 0 whose result leaves it; NotApplicableError if there is none."""
    method = config.method
    if method.communicates == "nothing":
        raise NotApplicableError("nothing leaves a client with this method")
    if kind != "simulation":
        raise NotApplicableError("a deployment's folders do not have what is needed to repeat the first message")
    if method.trains_at_server or method.second_base() or method.exchanges() > 1:
        raise NotApplicableError("the first message of this method depends on work at its server")
    if config.training.objective != "answer":
        raise NotApplicableError("its clients train on preference pairs")
    infos = [ClientInfo(record.client, len(record.train.rows)) for record in manifest.clients]
    state = method.init(server_of(config, bank.base, sorted(infos, key=lambda info: info.name)))
    factory = ClientFactory(bank, config.evaluation.batch_tokens, config.run.seed)
    client = factory.client(data, 0, ProbeCounts())
    work = method.update(client, method.init_client_state(client), method.message(state, data.info))
    request = next(work)
    while isinstance(request, TrainingRequest) and request.stays_local:
        request = work.send(request.unchanged())
    if not isinstance(request, TrainingRequest) or not request.own_rows:
        raise NotApplicableError("its clients first compute something else than an adapter from their examples")
    if request.teacher is not None or request.partner is not None or request.extra is not None:
        raise NotApplicableError("its clients train with a teacher, a partner or synthetic examples")
    return Release(request, work)


def sent_tensors(reply: Any, trained: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of the trained tensors that a reply contains as they are."""
    values = list(_tensors(reply))
    return tuple(
        name
        for name, tensor in trained.items()
        if any(value.shape == tensor.shape and torch.equal(value.to(tensor.dtype), tensor) for value in values)
    )


def _tensors(value: Any) -> Generator[Tensor, None, None]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
