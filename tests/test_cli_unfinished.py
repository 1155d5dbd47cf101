"""Runs that are not finished, and runs in which every update failed, are said to be such wherever they are used."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedamole import load_personal_model
from fedamole.errors import RunError
from fedamole.federation.summary import nothing_trained
from fedamole.reporting.page.content import content
from fedamole.reporting.page.reading import read_folders
from tests.test_cli import SMALL, own, refused

__all__ = ["own"]
TOLD = "is not finished (round 2 of 3)"


@pytest.fixture(scope="module")
def unfinished(crash: Any) -> Path:
    """A run that was killed in its third round."""
    folder: Path = crash("round_started", 3, "fedamole")
    return folder


USES: dict[str, tuple[str, ...]] = {
    "generate": ("--client", "mood", "x"),
    "explain": ("--client", "mood", "--prompt", "x"),
    "export": ("--client", "mood", "--out", "out"),
    "chat": ("--client", "mood"),
    "serve": ("--host", "0.0.0.0"),
}


@pytest.mark.parametrize("command", USES)
def test_a_model_of_an_unfinished_run(
    command: str, unfinished: Path, fedamole: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(fedamole(command, unfinished, *USES[command], "--finished"), 5, TOLD, f"fedamole resume {unfinished}")
    assert not Path("out").exists()
    caplog.clear()
    monkeypatch.setattr("builtins.input", lambda *_: "/quit")
    result = fedamole(command, unfinished, *USES[command])
    assert result.code == (2 if command == "serve" else 0), "serving strangers needs keys; the warning comes before"
    assert [record.levelno for record in caplog.records if TOLD in record.getMessage()] == [logging.WARNING]


def test_in_python(unfinished: Path, runs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RunError, match=r"round 2 of 3"):
        load_personal_model(unfinished, "mood", finished=True)
    adapter = unfinished / "clients" / "mood" / "adapter"
    with pytest.raises(RunError, match=r"round 2 of 3"):
        load_personal_model(adapter, finished=True)
    assert not caplog.records
    load_personal_model(unfinished, "mood")
    assert TOLD in caplog.text
    caplog.clear()
    load_personal_model(runs("fedamole"), "mood", finished=True)
    shutil.copytree(adapter, tmp_path / "mood")
    load_personal_model(tmp_path / "mood", finished=True)  # away from its run it tells nothing
    assert not caplog.records


def test_a_run_without_any_model_yet(crash: Any, fedamole: Any) -> None:
    refused(fedamole("generate", crash("group_started", 1, "fedit"), "x"), 5, "round 0 of 3", "no model yet")


def test_adapt_needs_a_finished_run(unfinished: Path, tiny: Path, fedamole: Any) -> None:
    refused(fedamole("adapt", unfinished, "--data", tiny / "mood.jsonl", "--name", "new"), 5, TOLD)


# --- every update failed --------------------------------------------------------------------------------------


def test_a_run_in_which_every_update_failed(own: Path, fedamole: Any, tmp_path: Path) -> None:
    overrides = [*SMALL, "method.name=fedit", "training.learning_rate=1e30", "federation.rounds=1", "run.name=lost"]
    result = fedamole("run", own, *overrides)
    lost = tmp_path / "runs" / "lost"
    message = "all 4 updates failed, so nothing was trained"
    refused(result, 5, str(Path("runs/lost")), message, "client chat, round 0: its loss became")
    assert message in result.out.splitlines()[0], "at the top of the table"
    refused(fedamole("resume", lost), 5, message)

    assert fedamole("run", own, *SMALL, "method.name=local_only", "federation.rounds=1", "run.name=fine").code == 0
    shown = fedamole("show", lost, tmp_path / "runs" / "fine", "--markdown")
    assert shown.code == 0
    assert message in shown.out.splitlines()[0]
    head, *lines = [line.split("|") for line in shown.out.splitlines() if line.startswith("|")]
    column = [cell.strip() for cell in head].index("lost")
    assert not [line for line in lines if "\\*" in line[column] or line[column].rstrip().endswith("*")]
    [table] = json.loads(fedamole("show", lost, "--json").out)
    assert message in table["warnings"][0]
    mark, text = content(read_folders([lost]))["states"][0]
    assert (mark, message in text) == ("Failed", True)
    for card in lost.glob("clients/*/adapter/README.md"):
        assert "**Not trained: all 4 updates" in card.read_text()


def test_runs_that_trained_are_not_reported_as_lost(runs: Any) -> None:
    summary = json.loads((runs("fedit") / "summary.json").read_text())
    assert (summary["updates"], summary["left_out"]) == (12, 0)
    assert not nothing_trained(summary)
    assert not nothing_trained({**summary, "left_out": 11})
    assert nothing_trained({**summary, "left_out": 12})
    assert not nothing_trained({}), "a folder of an earlier version"
    assert not content(read_folders([runs("fedit")])).get("states")
