"""Every method's real replies pass the check against the rehearsed ones, and spoiled ones do not."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fedamole.engine.in_process import InProcess
from fedamole.engine.reply_template import check_reply, dry_run, usual_norm
from fedamole.experiment import loop_of, prepare, server_of, worker_of
from fedamole.federation.method import Server
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import PayloadError, named_tensors, unpack
from fedamole.federation.robust import with_tensors
from fedamole.federation.worker import UpdateResult
from fedamole.methods import METHODS
from fedamole.model.bank import Bank
from fedamole.runs.run_folder import RunFolder

MOST = 1e4


class Checked(InProcess):
    """Checks every reply as the server of a deployment does, and keeps what was compared."""

    def rehearse_with(self, method: Any, server: Server) -> None:
        self.method, self.server, self.seen = method, server, list[Any]()

    def update(self, round_: int, messages: Mapping[str, bytes], exchange: int = 0) -> dict[str, UpdateResult]:
        answers = super().update(round_, messages, exchange)
        server = dataclasses.replace(self.server, round=round_)
        for info in self.clients:
            expected = dry_run(self.method, server, info, unpack(self.method.records.message, messages[info.name]))
            got = unpack(self.method.records.reply, answers[info.name].payload or b"")
            check_reply(self.method, expected, got, None)
            self.seen.append((expected, got))
        return answers


@pytest.fixture(scope="module")
def compared(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, list[Any]]]:
    """Three rounds of a method, each reply checked; returns the method and the pairs that were compared."""

    def of(name: str, *settings: str) -> tuple[Any, list[Any]]:
        config = runs.load(name, "federation.rounds=3", *settings)
        prepared = prepare(config)
        path = tmp_path_factory.mktemp(name) / "run"
        folder = RunFolder.create(path, "", "{}", name, prepared.base.identity)
        worker = worker_of(config, Bank(prepared.base), folder)
        engine, base = Checked(worker, prepared.clients, ProgressListener(), 4), prepared.base
        server = server_of(config, base, engine.clients, worker.bank, prepared.public)
        engine.rehearse_with(config.method, server)
        loop_of(config, engine, server, folder, ProgressListener()).run()
        return config.method, engine.seen

    return of


def spoiled(record: Any, change: Callable[[dict[str, Tensor]], None]) -> Any:
    """A reply whose first field of tensors is changed; None where it has none."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, dict) and value and isinstance(next(iter(value.values())), Tensor):
            tensors = dict(value)
            change(tensors)
            return dataclasses.replace(record, **{field.name: tensors})
    return None


def first(tensors: dict[str, Tensor]) -> str:
    return next(iter(tensors))


SPOILED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "NaN": lambda t: t.update({first(t): torch.full_like(t[first(t)], torch.nan)}),
    "infinity": lambda t: t.update({first(t): torch.full_like(t[first(t)], torch.inf)}),
    "shape": lambda t: t.update({first(t): torch.zeros(3, 5, 7)}),
    "dtype": lambda t: t.update({first(t): t[first(t)].double()}),
    "foreign": lambda t: t.update({"elsewhere/expert-07/A": torch.zeros(2)}),
    "missing": lambda t: t.pop(first(t)),
    "norm": lambda t: t.update({first(t): torch.full_like(t[first(t)], 2 * MOST)}),
}


def refused(method: Any, expected: Any, reply: Any, most: float | None = MOST) -> bool:
    try:
        check_reply(method, expected, reply, most)
    except PayloadError:
        return True
    return False


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, ()) for name in sorted(METHODS) if not name.endswith("_ft")), ("fedmap", ("method.prior=icnn",))],
)
def test_real_replies_pass_and_changed_ones_are_refused(name: str, settings: tuple[str, ...], compared: Any) -> None:
    method, seen = compared(name, *settings)
    assert len(seen) >= 6
    expected, got = seen[-1]
    for kind, change in SPOILED.items():
        bad = spoiled(got, change)
        if bad is None:
            assert name == "local_only"
            continue
        assert refused(method, expected, bad), f"{kind} went through"
    norms = [
        sum(float(tensor.double().square().sum()) for tensor in named_tensors(got).values()) ** 0.5 for _, got in seen
    ]
    assert (max(norms) > 0) == (name != "local_only")
    for (expected, got), norm in zip(seen, norms, strict=True):
        usual = usual_norm(method.expected_reply(expected, got))
        assert norm <= 0.2 * usual, "an honest reply comes near the bound that holds without max_norm"
        poisoned = with_tensors(got, {key: tensor * 0 + 500 for key, tensor in named_tensors(got).items()})
        sends_nothing = not named_tensors(got)  # local_only, and clients of FedAF without answer options
        assert sends_nothing or refused(method, expected, poisoned, None)
        assert sends_nothing or refused(method, expected, got, 0.99 * norm)
        assert not refused(method, expected, got, 1.01 * norm + 1e-9)


def test_fields_must_be_those_that_were_rehearsed(compared: Any) -> None:
    method, seen = compared("flora")
    expected, got = seen[-1]
    for merged in (99, -1, True):
        with pytest.raises(PayloadError, match="merged"):
            check_reply(method, expected, dataclasses.replace(got, merged=merged), MOST)
    method, seen = compared("ifca_lora")
    expected, got = seen[-1]
    for cluster in (3, -1):
        with pytest.raises(PayloadError, match="cluster"):
            check_reply(method, expected, dataclasses.replace(got, cluster=cluster), MOST)
