"""A run with secure aggregation equals the same run without it, up to the precision of fixed-point numbers."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedamole.federation.record import named_tensors, unpack
from fedamole.federation.secure.settings import SecureAggregationSettings
from fedamole.federation.secure.simulation import SimulatedSecureAggregation
from fedamole.methods import METHODS
from fedamole.runs import checkpoint
from fedamole.runs.run_folder import METRICS, RunFolder

ENABLED = "secure_aggregation.enabled=true"
FEDAMOLE = (
    "method.experts=8",
    "method.expert_choices=3",
    'secure_aggregation.unmasked=["token_embedding"]',
)


def server_tensors(folder: Path, method: str) -> dict[str, Tensor]:
    """The tensors of the server's last state."""
    latest = checkpoint.load_latest(RunFolder.open(folder))
    assert latest is not None
    return named_tensors(unpack(METHODS[method].records.state, latest[1]))


def farthest(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    assert set(first) == set(second)
    return max(float((first[key].double() - second[key].double()).abs().max()) for key in first)


@pytest.mark.parametrize(("method", "overrides"), [("fedit", ()), ("fedamole", FEDAMOLE), ("fdlora", ())])
def test_a_round_equals_a_plain_round(method: str, overrides: tuple[str, ...], runs: Any) -> None:
    """Server states differ by at most 2^-21 and the rounding of float32; without means they differ by far more."""
    clear = [text for text in overrides if not text.startswith("secure")]
    plain = runs(method, "federation.rounds=1", *clear)
    secure = runs(method, "federation.rounds=1", *overrides, ENABLED)
    distance = farthest(server_tensors(plain, method), server_tensors(secure, method))
    assert 0 < distance < 2**-21 + 2**-22


@pytest.mark.parametrize(("method", "overrides"), [("fedit", ()), ("fedamole", FEDAMOLE)])
def test_a_run_equals_a_plain_run(method: str, overrides: tuple[str, ...], runs: Any) -> None:
    """Three rounds: the same assignment, and losses that differ by what training makes of the rounding."""
    clear = [text for text in overrides if not text.startswith("secure")]
    plain, secure = RunFolder.open(runs(method, *clear)), RunFolder.open(runs(method, *overrides, ENABLED))
    losses = [
        {
            (line["round"], line["client"], line.get("method")): line["loss"]
            for line in folder.lines(METRICS)
            if line["split"] == "validation"
        }
        for folder in (plain, secure)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    held = [[{**line, "relevance": 0} for line in folder.lines("assignment.jsonl")] for folder in (plain, secure)]
    assert held[0] == held[1]


def test_a_killed_run_continues_with_the_same_result(crash: Any, remains: Any, runs: Any) -> None:
    """Keys and masks are new after the restart, and cancel as before."""
    from fedamole.experiment import resume
    from fedamole.federation.progress import ProgressListener

    folder = crash("round_done", 1, "fedit", ENABLED)
    resume(folder, ProgressListener())
    assert remains(folder) == remains(runs("fedit", ENABLED))


@dataclass(frozen=True)
class Reply:
    tensors: Mapping[str, Tensor]
    rows: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    alone: Mapping[str, Tensor] = field(default_factory=dict)


def secure(**values: Any) -> SimulatedSecureAggregation:
    settings = SecureAggregationSettings(enabled=True, **values)
    return SimulatedSecureAggregation(settings, ("tensors", "rows"), "abcd")


def test_means_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    """Key x has four holders, y three; z has two and is left out. A field that is not averaged stays as it is."""
    sent = {name: Reply({"x": torch.tensor([10.0]), "y": torch.tensor([1.0])}) for name in "abcd"}
    replies = {
        name: Reply(
            {"x": torch.tensor([10.0 + step]), **({} if name == "d" else {"y": torch.tensor([step])})},
            {"m": {"new": torch.tensor([step, -step])}, "n": {"z": torch.ones(1)} if name in "ab" else {}},
            {"own": torch.tensor([step])},
        )
        for name, step in zip("abcd", (1.0, 2.0, 4.5, 8.5), strict=True)
    }
    with caplog.at_level(logging.WARNING):
        means, clipped = secure()(0, sent, replies)
    assert clipped == {}
    for name in "abcd":
        assert means[name].tensors["x"].tolist() == [14.0]
        assert means[name].rows == {"m": {"new": pytest.approx(torch.tensor([4.0, -4.0]))}, "n": {}}
        assert means[name].alone is replies[name].alone
    assert [sorted(means[name].tensors) for name in "abcd"] == [["x", "y"]] * 3 + [["x"]]
    assert means["a"].tensors["y"].item() == 2.5
    assert "round 0: 1 of 4 tensors came from fewer than 3 clients; they keep their values" in caplog.text


def test_fewer_answers_than_a_group_leave_nothing(caplog: pytest.LogCaptureFixture) -> None:
    sent = dict.fromkeys("ab", Reply({"x": torch.zeros(2)}))
    means, _ = secure()(0, sent, {name: Reply({"x": torch.ones(2)}) for name in "ab"})
    assert means == {"a": Reply({}), "b": Reply({})}
    assert secure()(0, {}, {}) == ({}, {})


def test_a_change_above_the_clip_is_cut_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    """c changes one number by 9 and another by -9, where the bound is 1.5: the mean moves by 1.5 / 3."""
    sent = dict.fromkeys("abc", Reply({"x": torch.tensor([5.0, 5.0, 5.0])}))
    replies = {"a": sent["a"], "b": sent["b"], "c": Reply({"x": torch.tensor([14.0, -4.0, 5.0])})}
    aggregation = secure(clip=1.5)
    for round_ in range(2):
        means, _ = aggregation(round_, sent, replies)
    assert means["a"].tensors["x"].tolist() == [5.5, 4.5, 5.0]
    assert caplog.text.count("2 numbers changed by more than 1.5 and were cut to it") == 2


def test_values_of_a_key_that_was_sent_in_two_forms_are_summed_as_they_are() -> None:
    """a was sent 1 and the others 2: a common origin does not exist, so the values are summed."""
    sent = {name: Reply({"x": torch.tensor([1.0 if name == "a" else 2.0])}) for name in "abc"}
    replies = {name: Reply({"x": torch.tensor([value])}) for name, value in zip("abc", (1.0, 2.0, 6.0), strict=True)}
    means, _ = secure()(0, sent, replies)
    assert means["c"].tensors["x"].tolist() == [3.0]
