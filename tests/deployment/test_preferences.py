"""Preference pairs across organisations: the deployment equals the run in one process, and clients check their rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedamole.config import load_config
from fedamole.deployment.security.policy import PolicySettings, row_checks, settings_checks
from fedamole.engine import link as timing
from fedamole.engine.messages import Reply, Request, unpacked
from fedamole.errors import FedamoleError
from tests.conftest import small
from tests.deployment.direct import direct_deployment, in_one_process
from tests.pairs import pair_rows

CONFIG = """
[run]
threads = 1
device = "cpu"
group = 1
[base]
model = "{base}"
[federation]
rounds = 2
aggregation = "clipped"
[training]
objective = "preference"
local_steps = 3
batch_size = 2
learning_rate = 0.01
max_length = 96
[evaluation]
best_round = "client"
[data]
embedding_share = 0.2
[[data.source]]
name = "fond"
path = "fond.jsonl"
[[data.source]]
name = "stern"
path = "stern.jsonl"
"""


@pytest.fixture
def config(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(timing, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(timing, "POLL_SECONDS", 0.01)
    for group in ("fond", "stern"):
        (tmp_path / f"{group}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows([group])))
    (tmp_path / "config.toml").write_text(CONFIG.format(base=tiny / "base"))
    return tmp_path / "config.toml"


def rows(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text())["rows"]


@pytest.mark.parametrize("method", ["fedit", "steerable"])
def test_a_deployment_equals_the_run_in_one_process(method: str, config: Path, tmp_path: Path) -> None:
    there = direct_deployment(config, tmp_path / "there", *small(method))
    there.run()
    here = in_one_process(load_config(config, small(method)), tmp_path / "here")
    assert rows(there.server_folder) == rows(here)
    assert {"preference", "ranking_accuracy", "score", "loss"} <= set(rows(here)[method]["clients"]["fond"])


def test_a_client_whose_rows_are_no_pairs_does_not_join(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pair_rows(["stern"])]
    (tmp_path / "stern.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    there, answers = direct_deployment(config, tmp_path / "there", *small("fedit"), "deployment.max_wait=0.3"), []

    def read(name: str, request: Request, answer: bytes) -> bytes:
        answers.append((name, unpacked(Reply, answer).failed))
        return answer

    there.link.meddle = read
    with pytest.raises(FedamoleError, match="1 more clients; here are: fond"), caplog.at_level("WARNING"):
        there.run()
    assert {failed for name, failed in answers if name == "stern"} == {"config"}
    assert "the rows of client 'stern' have no rejected answers" in caplog.text
    assert not list((tmp_path / "there" / "stern").glob("*/clients/*/state/*"))


def test_a_policy_counts_both_answers_of_a_pair(config: Path) -> None:
    loaded = load_config(config)
    policy = PolicySettings(max_batch_tokens=2 * 96 * 2 - 1)
    checks = {check.setting: check for check in settings_checks(loaded, loaded.data.source[0], policy, "base")}
    assert (checks["tokens of a forward pass"].requested, checks["tokens of a forward pass"].passes) == ("384", False)
    assert row_checks(loaded, dict.fromkeys(("train", "embedding", "validation", "test"), 50), policy)
