"""Checkpoints by themselves: what is committed, what is pruned, what is gone back to."""

import json
from pathlib import Path

import pytest

from fedamole.errors import RunError
from fedamole.files import write_atomic
from fedamole.runs.checkpoint import latest_state, load_latest, save, state_path
from fedamole.runs.identity import Identity
from fedamole.runs.run_folder import RunFolder

CLIENTS = ["a", "b"]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", "", "{}", "fedit", Identity("w", "t", "x"))


def commit(folder: RunFolder, round_: int, trained: list[str] = CLIENTS) -> None:
    for client in trained:
        write_atomic(state_path(folder, client, round_), f"state {client} {round_}")
    save(folder, round_, f"server {round_}".encode(), CLIENTS, {"seen": round_})


def files(folder: RunFolder, kind: str) -> list[str]:
    return sorted(path.name for path in folder.path.glob(kind))


def test_nothing_saved_nothing_loaded(folder: RunFolder) -> None:
    assert load_latest(folder) is None


def test_the_last_round_comes_back(folder: RunFolder) -> None:
    commit(folder, 0)
    commit(folder, 1)
    checkpoint, state = load_latest(folder) or pytest.fail("nothing found")
    assert (checkpoint.round, state, checkpoint.progress) == (1, b"server 1", {"seen": 1})
    assert set(checkpoint.clients) == {f"clients/{name}/state/round-0001.safetensors" for name in CLIENTS}


def test_disk_stays_bounded(folder: RunFolder) -> None:
    for round_ in range(12):
        commit(folder, round_, ["a"] if round_ % 3 else CLIENTS)
    assert files(folder, "checkpoints/*") == [
        f"round-00{round_}.{kind}" for round_ in (10, 11) for kind in ("json", "safetensors")
    ]
    assert files(folder, "clients/a/state/*") == ["round-0010.safetensors", "round-0011.safetensors"]
    # b trained last in round 9: both checkpoints need that one state.
    assert files(folder, "clients/b/state/*") == ["round-0009.safetensors"]
    assert not list(folder.path.rglob("*.writing"))


DAMAGED = [
    "checkpoints/round-0001.json",
    "checkpoints/round-0001.safetensors",
    "clients/b/state/round-0001.safetensors",
]


@pytest.mark.parametrize("victim", DAMAGED)
@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "empty"])
def test_a_damaged_round_goes_back_to_the_one_before(folder: RunFolder, victim: str, damage: str) -> None:
    commit(folder, 0)
    commit(folder, 1)
    path = folder.path / victim
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()  # without its json, a round was never committed
    else:
        flipped = content[:3] + bytes([content[3] ^ 255]) + content[4:]
        path.write_bytes({"cut": content[: len(content) // 2], "flip": flipped, "empty": b""}[damage])
    checkpoint, state = load_latest(folder) or pytest.fail("nothing found")
    assert (checkpoint.round, state) == (0, b"server 0")
    # What belongs to the damaged round is gone: that round is run again.
    assert files(folder, "checkpoints/*") == ["round-0000.json", "round-0000.safetensors"]
    assert latest_state(folder, "b") == state_path(folder, "b", 0)


def test_states_of_a_round_that_was_never_committed_are_removed(folder: RunFolder) -> None:
    commit(folder, 0)
    write_atomic(state_path(folder, "a", 1), "half a round")
    write_atomic(folder.path / "checkpoints" / "round-0001.safetensors", "server 1")
    checkpoint, _ = load_latest(folder) or pytest.fail("nothing found")
    assert checkpoint.round == 0
    assert latest_state(folder, "a") == state_path(folder, "a", 0)
    assert files(folder, "checkpoints/*.safetensors") == ["round-0000.safetensors"]


def test_states_of_a_first_round_that_was_never_committed_are_removed(folder: RunFolder) -> None:
    write_atomic(state_path(folder, "a", 0), "half a round")
    assert load_latest(folder) is None
    assert latest_state(folder, "a") is None


def test_no_intact_checkpoint(folder: RunFolder) -> None:
    commit(folder, 0)
    commit(folder, 1)
    for path in folder.path.glob("checkpoints/*.safetensors"):
        path.write_bytes(b"rubbish")
    with pytest.raises(RunError, match="no checkpoint is intact"):
        load_latest(folder)
    assert len(files(folder, "checkpoints/*")) == 4, "nothing is removed where nothing can be restored"


def test_another_runs_checkpoint(folder: RunFolder) -> None:
    commit(folder, 0)
    path = folder.path / "checkpoints" / "round-0000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "run": "stranger"}))
    with pytest.raises(RunError, match=r"belongs to another run \(stranger\)"):
        load_latest(folder)


def test_a_later_state_counts_in_the_order_of_rounds(folder: RunFolder) -> None:
    for round_ in (2, 9, 10):
        write_atomic(state_path(folder, "a", round_), "x")
    assert latest_state(folder, "a") == state_path(folder, "a", 10)
