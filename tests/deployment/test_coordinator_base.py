"""A coordinator keeps its base where the method trains at the server, and reads public prompts where it needs them."""

from pathlib import Path
from typing import Any

import pytest

from fedamole.config import load_config
from fedamole.deployment import server_run
from fedamole.deployment.flower.simulation import prepare_simulation
from fedamole.errors import DataError
from fedamole.runs.identity import Identity
from fedamole.runs.run_folder import RunFolder
from tests.conftest import small
from tests.deployment.test_moved_base import EmptyLink, ProcessEndedError


def servers_before_the_loop(monkeypatch: Any) -> list[Any]:
    """Make coordinators end before their first round; return the list to which each adds its server."""
    servers: list[Any] = []

    def stop(config: Any, engine: Any, server: Any, *_: Any) -> None:
        servers.append(server)
        raise ProcessEndedError

    monkeypatch.setattr(server_run, "loop_of", stop)
    return servers


@pytest.mark.parametrize(("method", "keeps"), [("feddm", True), ("fedit", False)])
def test_the_base_is_kept_for_training_at_the_server(
    method: str, keeps: bool, tiny: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    servers = servers_before_the_loop(monkeypatch)
    monkeypatch.chdir(tiny)
    prepare_simulation(load_config(tiny / "config.toml", [*small(method), "run.device=cpu"]), tmp_path / "run")
    with pytest.raises(ProcessEndedError):
        server_run.coordinate(EmptyLink(), tmp_path / "run")
    (server,) = servers
    assert (server.work is not None) == keeps
    if keeps:
        assert server.work.settings.learning_rate == 0.01
        assert server.work.bank.base.device.type == "cpu"


def test_a_second_base_is_loaded_at_the_coordinator_and_recorded(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    servers = servers_before_the_loop(monkeypatch)
    monkeypatch.chdir(tiny)
    overrides = [*small("fed_et"), "run.device=cpu", "method.server_base=base", "base.targets=['q_proj']"]
    prepare_simulation(load_config(tiny / "config.toml", overrides), tmp_path / "run")
    for _ in ("start", "resume"):
        with pytest.raises(ProcessEndedError):
            server_run.coordinate(EmptyLink(), tmp_path / "run")
    for server in servers:
        assert server.on_second_base().work is server.work.second
        assert server.on_second_base().shapes == server.shapes
        assert server.work.second.bank is not server.work.bank
    folder = RunFolder.open(tmp_path / "run")
    assert folder.second_base == Identity(**folder.about["base"])


def test_public_prompts_are_read_again_after_an_interruption_and_must_be_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    public, run = tmp_path / "own.jsonl", tmp_path / "run"
    public.write_text((tiny / "public.jsonl").read_text())
    servers = servers_before_the_loop(monkeypatch)
    monkeypatch.chdir(tiny)
    overrides = [*small("pfedhr"), "run.device=cpu", f"data.public.path={public}"]
    prepare_simulation(load_config(tiny / "config.toml", overrides), run)
    for _ in ("start", "resume"):
        with pytest.raises(ProcessEndedError):
            server_run.coordinate(EmptyLink(), run)
    assert [len(server.public) for server in servers] == [15, 15]
    public.write_text('{"prompt": "Another."}\n')
    with pytest.raises(DataError, match=r"data.public: own.jsonl is not what the run was started with: 1 rows"):
        server_run.coordinate(EmptyLink(), run)
