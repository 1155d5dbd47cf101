"""Private keys encrypted with a passphrase, and the errors if they cannot be decrypted."""

import fcntl
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from fedamole.deployment.doctor import examine_client
from fedamole.deployment.security.certificates import make_certificates
from fedamole.deployment.security.client_keys import admit, make_own_key
from fedamole.deployment.security.inspection import check_server, inspect_client
from fedamole.deployment.security.keys import (
    PASSPHRASE,
    is_locked,
    load_private,
    load_public,
    public_half,
    read_passphrase,
)
from fedamole.deployment.security.signing_requests import request_server
from fedamole.errors import ConfigError

WORD = b"six words that nobody would guess"
WRONG = b"six words that somebody guessed"


def private(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(0o600)
    return path


def test_a_locked_key_opens_with_its_passphrase_alone(tmp_path: Path) -> None:
    make_own_key(tmp_path, "clinic", WORD)
    key = tmp_path / "node.key"
    assert is_locked(key)
    assert b"ENCRYPTED" in key.read_bytes()
    assert load_private(key, WORD).public_key() == load_public(tmp_path / "node.pub") == public_half(key, WORD)
    with pytest.raises(ConfigError, match="is encrypted: give --passphrase-file or set FEDAMOLE_KEY_PASS"):
        load_private(key)
    with pytest.raises(ConfigError, match=r"node\.key: the passphrase is wrong$") as error:
        load_private(key, WRONG)
    assert WRONG.decode() not in str(error.value) + repr(error.value.__cause__)
    # Whoever runs the command again needs the passphrase, and gets the same files.
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert make_own_key(tmp_path, "clinic", WORD) == tmp_path / "node.csr"
    with pytest.raises(ConfigError, match="is encrypted"):
        make_own_key(tmp_path, "clinic")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_passphrase_for_a_key_that_has_none(tmp_path: Path) -> None:
    make_own_key(tmp_path, "clinic")
    assert not is_locked(tmp_path / "node.key")
    load_private(tmp_path / "node.key", WORD)  # such as one in the environment, for another key
    with pytest.raises(ConfigError, match=r"exists and is not encrypted.*ssh-keygen -p -m PKCS8"):
        make_own_key(tmp_path, "clinic", WORD)


@pytest.mark.parametrize("form", ["OpenSSH", "PKCS8"])
def test_openssh_locks_and_unlocks_a_key_as_the_errors_say(tmp_path: Path, form: str) -> None:
    make_own_key(tmp_path / "own", "clinic")
    make_certificates(tmp_path / "certs", (), ())
    key = {"OpenSSH": tmp_path / "own" / "node.key", "PKCS8": tmp_path / "certs" / "coordinator.key"}[form]
    public = public_half(key)
    for old, new in (("", WORD.decode()), (WORD.decode(), "")):
        arguments = ["ssh-keygen", "-p", "-m", "PKCS8", "-f", str(key), "-P", old, "-N", new]
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert is_locked(key) == bool(new)
        assert load_private(key, WORD if new else None).public_key() == public


def test_a_short_passphrase_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 12 characters") as error:
        make_own_key(tmp_path / "own", "clinic", b"swordfish")
    assert "swordfish" not in str(error.value)
    assert not (tmp_path / "own").exists()


def test_the_coordinators_keys(tmp_path: Path) -> None:
    certs = tmp_path / "certs"
    make_certificates(certs, ("fl.example.org",), ("bank",), passphrase=WORD)
    locked = {path.name: is_locked(path) for path in certs.glob("*.key")}
    assert locked == {"ca.key": True, "coordinator.key": True, "server.key": False}
    assert not is_locked(certs / "clients" / "bank" / "node.key")
    assert check_server(certs, "localhost", WORD) == ([], [])
    assert ["coordinator.key: is encrypted" in text for text in check_server(certs, "localhost")[0]] == [True]
    assert ["the passphrase is wrong" in text for text in check_server(certs, "localhost", WRONG)[0]] == [True]
    make_certificates(certs, (), ("shop",))  # signs nothing
    with pytest.raises(ConfigError, match=r"ca\.key: is encrypted"):
        make_certificates(certs, (), (), renew_server=True)
    make_certificates(certs, (), (), renew_server=True, passphrase=WORD)
    request_server(tmp_path / "own", ("fl.example.org",), WORD)
    assert is_locked(tmp_path / "own" / "coordinator.key")
    assert not is_locked(tmp_path / "own" / "server.key")


def test_messages_to_a_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_certificates(tmp_path / "certs", (), ())
    own = tmp_path / "own"
    admit(tmp_path / "certs", "clinic", make_own_key(own, "clinic", WORD))
    remedies = [fault.remedy for fault in inspect_client(own, WORD) if "coordinator.pub is missing" in fault.text]
    assert remedies == ["ask the coordinator for coordinator.pub"]
    for name in ("ca.crt", "coordinator.pub"):
        (own / name).write_bytes((tmp_path / "certs" / name).read_bytes())
    assert inspect_client(own, WORD) == []
    assert ["is encrypted" in fault.text for fault in inspect_client(own)] == [True]
    assert ["passphrase is wrong" in fault.text for fault in inspect_client(own, WRONG)] == [True]
    # `fedamole doctor` reads the environment.
    monkeypatch.setenv(PASSPHRASE, WORD.decode())
    assert [finding.state for finding in examine_client(None, own, None, None) if finding.what == "certificates"] == [
        "ok"
    ]
    monkeypatch.delenv(PASSPHRASE)
    assert [finding.state for finding in examine_client(None, own, None, None) if finding.what == "certificates"] == [
        "problem"
    ]


def test_where_a_passphrase_is_read_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSPHRASE, raising=False)
    assert read_passphrase(None) is None
    monkeypatch.setenv(PASSPHRASE, "")
    assert read_passphrase(None) is None
    monkeypatch.setenv(PASSPHRASE, "from the environment ü")
    assert read_passphrase(None) == "from the environment ü".encode()
    for content in (b"from a file", b"from a file\n", b"from a file\r\n"):
        assert read_passphrase(private(tmp_path / "word", content)) == b"from a file"
    for content in (b"", b"\n", b"two\nlines\n", b"a\0b"):
        with pytest.raises(ConfigError, match="exactly one line"):
            read_passphrase(private(tmp_path / "word", content))
    private(tmp_path / "word", b"from a file").chmod(0o640)
    with pytest.raises(ConfigError, match=r"mode 0600; run `chmod 600"):
        read_passphrase(tmp_path / "word")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_passphrase(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="regular file"):
        read_passphrase(tmp_path / "pipe")


def test_the_prompt_asks_twice_and_shows_nothing(tmp_path: Path) -> None:
    """Runs in a pseudo-terminal, from which the prompt reads."""
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-m", "fedamole", "certs", "--own", "clinic", "--passphrase"]
    process = subprocess.Popen(
        arguments,
        cwd=tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=_controlling_terminal,
    )
    os.close(theirs)
    shown = b""
    for prompt in (b"Passphrase: ", b"Repeat for confirmation: "):
        while prompt not in shown:
            shown += os.read(ours, 1024)
        os.write(ours, WORD + b"\n")
    try:
        while piece := os.read(ours, 1024):
            shown += piece
    except OSError:
        pass  # the terminal is closed
    assert process.wait(20) == 0, shown
    os.close(ours)
    assert WORD not in shown
    assert load_private(tmp_path / "certs" / "node.key", WORD)


def _controlling_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
