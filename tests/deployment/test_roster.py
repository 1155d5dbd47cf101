"""The registered clients: a folder of public keys that may change at any time."""

import logging
import os
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedamole.deployment.security.keys import new_key, public_line
from fedamole.deployment.security.roster import RESCAN_S, Roster

Add = Callable[..., bytes]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "nodes").mkdir()
    return tmp_path / "nodes"


@pytest.fixture
def add(folder: Path) -> Add:
    """Writes NAME.pub with a new key; returns the key as Flower sends it."""

    def added(name: str, comment: str | None = None) -> bytes:
        key = new_key().public_key()
        (folder / f"{name}.pub").write_bytes(public_line(key, name if comment is None else comment))
        return public_key_to_bytes(key)

    return added


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock for the roster that tests advance."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_keys_are_found_as_flower_sends_them(folder: Path, add: Add) -> None:
    anna, ben, stranger = add("anna"), add("ben", "ben until=2027-06-30"), new_key().public_key()
    roster = Roster(folder)
    assert len(roster) == 2
    first, other = roster.find(anna), roster.find(ben)
    assert first is not None
    assert other is not None
    assert (first.name, first.until, public_key_to_bytes(first.key)) == ("anna", None, anna)
    assert (other.name, other.until) == ("ben", date(2027, 6, 30))
    assert roster.find(public_key_to_bytes(stranger)) is None
    assert roster.find(b"") is None


def test_a_key_may_be_used_on_its_last_day(folder: Path, add: Add) -> None:
    ben = add("ben", "ben until=2027-06-30")
    anna = add("anna")
    first, other = Roster(folder).find(ben), Roster(folder).find(anna)
    assert first is not None
    assert other is not None
    assert not first.expired(date(2027, 6, 30))
    assert first.expired(date(2027, 7, 1))
    assert not other.expired(date(9999, 1, 1))


def test_changes_are_noticed(folder: Path, add: Add, clock: list[float]) -> None:
    anna, roster = add("anna"), Roster(folder)
    assert roster.find(anna)
    ben = add("ben")
    assert roster.find(ben) is None, "the folder is not looked at for every call"
    clock[0] += RESCAN_S
    assert roster.find(ben)
    (folder / "anna.pub").rename(folder / "anna.pub.removed")
    clock[0] += RESCAN_S
    assert roster.find(anna) is None
    replaced = add("ben")
    clock[0] += RESCAN_S
    assert roster.find(ben) is None
    assert roster.find(replaced)
    (folder / "ben.pub").write_bytes((folder / "ben.pub").read_bytes().replace(b" ben", b" ben until=2020-01-01"))
    clock[0] += RESCAN_S
    client = roster.find(replaced)
    assert client is not None
    assert client.until == date(2020, 1, 1)


def test_a_file_replaced_by_one_of_the_same_size_and_time_is_noticed(
    folder: Path, add: Add, clock: list[float]
) -> None:
    anna, roster = add("anna"), Roster(folder)
    old = (folder / "anna.pub").stat()
    (folder / "anna.pub").rename(folder / "kept")
    new = add("anna")
    os.utime(folder / "anna.pub", ns=(old.st_atime_ns, old.st_mtime_ns))
    clock[0] += RESCAN_S
    assert roster.find(anna) is None
    assert roster.find(new)


def test_without_the_folder_nobody_is_let_in(
    folder: Path, add: Add, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    anna, roster = add("anna"), Roster(folder)
    folder.rename(folder.with_name("away"))
    for _ in range(3):
        clock[0] += RESCAN_S
        assert roster.find(anna) is None
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 1
    folder.with_name("away").rename(folder)
    clock[0] += RESCAN_S
    assert roster.find(anna)


def line(comment: str = "eve") -> bytes:
    return public_line(new_key().public_key(), comment)


def other_curve() -> bytes:
    return public_line(ec.generate_private_key(ec.SECP256R1()).public_key(), "eve")


DAMAGED: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "two lines": lambda: line() + line(),
    "cut": lambda: line()[:90],
    "no key": lambda: b"ecdsa-sha2-nistp384\n",
    "no base64": lambda: b"ecdsa-sha2-nistp384 %%% eve\n",
    "another curve": other_curve,
    "another curve in this one's name": lambda: b"ecdsa-sha2-nistp384 " + other_curve().split(b" ", 1)[1],
    "a private key": lambda: b"-----BEGIN OPENSSH PRIVATE KEY-----\n",
    "no name": lambda: line(""),
    "a name with a space": lambda: line("eve adams"),
    "a name that is a path": lambda: line("../eve"),
    "an escape": lambda: line("eve\x1b[2J"),
    "not a date": lambda: line("eve until=soon"),
    "no such date": lambda: line("eve until=2027-02-30"),
    "more behind the date": lambda: line("eve until=2027-02-03 x"),
    "too long": lambda: line() + 20_000 * b" ",
    "bytes": lambda: bytes(range(256)),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files_are_skipped_with_one_line(
    folder: Path, add: Add, clock: list[float], what: str, caplog: pytest.LogCaptureFixture
) -> None:
    anna, content = add("anna"), DAMAGED[what]()
    (folder / "eve.pub").write_bytes(content)
    roster = Roster(folder)
    for _ in range(3):
        clock[0] += RESCAN_S
        assert len(roster) == 1
    assert roster.find(anna)
    (text,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "eve.pub is skipped: " in text
    assert not any(word in text for word in content.decode("latin-1").split()[1:2] if len(word) > 40)


def test_what_is_no_file_and_a_key_twice_are_skipped(folder: Path, add: Add, caplog: pytest.LogCaptureFixture) -> None:
    add("anna")
    (folder / "copy.pub").write_bytes((folder / "anna.pub").read_bytes().replace(b"anna", b"copy"))
    (folder / "folder.pub").mkdir()
    os.mkfifo(folder / "pipe.pub")
    (folder / "nothing.pub").symlink_to(folder / "missing")
    (folder / "note.txt").write_text("not a key")
    assert len(Roster(folder)) == 1
    text = " ".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert "copy.pub is skipped: anna has the same key" in text
    assert "folder.pub is skipped" in text
    assert "pipe.pub is skipped" in text
    assert "note.txt" not in text
