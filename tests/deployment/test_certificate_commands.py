"""`fedamole certs` and `fedamole clients`, called through the command line."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedamole.deployment.security.inspection import inspect_client, inspect_server
from fedamole.deployment.security.keys import PASSPHRASE, fingerprint, is_locked, load_public
from tests.conftest import call_command
from tests.test_docs import blocks


@pytest.fixture
def fedamole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., tuple[int, str]]]:
    """Call the command in this process, in an empty folder; returns its exit code and output."""
    before = os.umask(0o022)  # the commands set their own, which the tests after these must not keep
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(PASSPHRASE, raising=False)

    def call(*arguments: object) -> tuple[int, str]:
        result = call_command(*arguments)
        return result.code, result.out + result.err

    yield call
    os.umask(before)


def day(days: int) -> str:
    return (datetime.now(UTC).date() + timedelta(days=days)).isoformat()


def test_a_federation_in_which_no_private_key_travels(fedamole: Any, tmp_path: Path) -> None:
    code, output = fedamole("certs", "--folder", "clinic", "--own", "clinic")
    assert (code, "Send clinic/node.csr to the coordinator" in output) == (0, True)
    own = fingerprint(load_public(tmp_path / "clinic" / "node.pub"))
    assert f"Fingerprint: {own}" in output
    assert fedamole("certs", "--host", "fl.example.org")[0] == 0
    code, output = fedamole("certs", "--admit", "clinic=clinic/node.csr", "--client-days", "90")
    assert code == 0
    assert f"admitted certs/nodes/clinic.pub until {day(90)}, fingerprint {own}" in output
    assert "Send clinic these two files: certs/ca.crt and certs/coordinator.pub" in output
    for name in ("ca.crt", "coordinator.pub"):
        shutil.copy(tmp_path / "certs" / name, tmp_path / "clinic" / name)
    assert inspect_client(tmp_path / "clinic") == []
    assert inspect_server(tmp_path / "certs", "fl.example.org") == []


def test_an_older_folder_is_given_an_order_key(fedamole: Any, tmp_path: Path) -> None:
    certs = tmp_path / "certs"
    fedamole("certs", "--client", "bank")
    for path in (certs / "coordinator.key", certs / "coordinator.pub", certs / "clients" / "bank" / "coordinator.pub"):
        path.unlink()
    faults = inspect_server(certs, "localhost")
    assert {fault.text.split("/")[-1] for fault in faults} == {
        "coordinator.key is missing",
        "coordinator.pub is missing",
    }
    assert all(fault.urgent for fault in faults)
    ca = (certs / "ca.crt").read_bytes()
    assert fedamole("certs")[0] == 0
    assert inspect_server(certs, "localhost") == []
    assert inspect_client(certs / "clients" / "bank") == []
    assert (certs / "ca.crt").read_bytes() == ca
    assert (certs / "coordinator.key").stat().st_mode & 0o777 == 0o600
    assert re.fullmatch(r"ecdsa-sha2-nistp384 \S+ coordinator\n", (certs / "coordinator.pub").read_text())
    fedamole("certs", "--folder", "other")
    shutil.copy(tmp_path / "other" / "coordinator.key", certs / "coordinator.key")
    (fault,) = inspect_server(certs, "localhost")
    assert "does not belong to coordinator.pub" in fault.text
    (certs / "coordinator.key").unlink()
    code, output = fedamole("certs")
    assert (code, "coordinator.pub exists without coordinator.key" in output) == (2, True)


def test_a_warning_says_that_the_coordinator_knows_a_key_it_made(fedamole: Any) -> None:
    code, output = fedamole("certs", "--client", "bank")
    assert code == 0
    assert "contains the private key of bank" in output
    assert "--own is safer" in output
    _, help_text = fedamole("certs", "--help")
    help_text = " ".join(re.sub(r"[^\w.,\-']+", " ", help_text).split())
    assert "With --client the coordinator makes and knows the client's private key" in help_text
    assert "Recommended each client runs --own" in help_text


def test_the_own_ca_of_an_organisation(fedamole: Any, tmp_path: Path) -> None:
    code, output = fedamole("certs", "--request", "--host", "fl.example.org")
    assert code == 0
    assert "Ask your CA to sign certs/server.csr" in output
    assert "fedamole certs --folder certs --install SIGNED.crt --ca CA.crt" in output
    assert not list((tmp_path / "certs").glob("ca.*"))
    code, output = fedamole("certs", "--client", "bank")
    assert (code, "waits for a certificate from the organisation's CA" in output) == (2, True)
    for arguments in (
        [
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            "o.key",
            "-out",
            "org-ca.crt",
            "-subj",
            "/CN=Org",
            "-addext",
            "keyUsage=critical,keyCertSign,cRLSign",
            "-days",
            "90",
        ],
        [
            "x509",
            "-req",
            "-in",
            "certs/server.csr",
            "-CA",
            "org-ca.crt",
            "-CAkey",
            "o.key",
            "-copy_extensions",
            "copy",
            "-days",
            "60",
            "-out",
            "signed.crt",
        ],
    ):
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)
    code, output = fedamole("certs", "--install", "signed.crt", "--ca", "org-ca.crt", "--host", "other.example.org")
    assert (code, "not for other.example.org" in output) == (2, True)
    code, output = fedamole("certs", "--install", "signed.crt", "--ca", "org-ca.crt")
    assert code == 0
    assert "without a restart" in output
    assert inspect_server(tmp_path / "certs", "fl.example.org") == []


def test_options_that_exclude_each_other(fedamole: Any, tmp_path: Path) -> None:
    for arguments in (
        ["--request", "--own", "a"],
        ["--request", "--renew"],
        ["--own", "a", "--client", "b"],
        ["--request", "--admit", "a=b"],
        ["--install", "x", "--ca", "y", "--request"],
    ):
        code, output = fedamole("certs", *arguments)
        assert (code, "give only one of these" in output) == (2, True), arguments
    for arguments in (["--install", "x"], ["--ca", "x"]):
        code, output = fedamole("certs", *arguments)
        assert (code, "must be given together" in output) == (2, True), arguments
    code, output = fedamole("certs", "--passphrase")
    assert (code, "needs a terminal: give --passphrase-file" in output) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_renewing_says_that_nothing_is_restarted(fedamole: Any, tmp_path: Path) -> None:
    fedamole("certs", "--host", "fl.example.org")
    key = (tmp_path / "certs" / "server.key").read_bytes()
    code, output = fedamole("certs", "--renew", "--host", "fl.example.org", "--host", "new.example.org", "--days", "90")
    assert code == 0
    assert "without a restart" in output
    assert "written  certs/server.crt.old" in output
    assert (tmp_path / "certs" / "server.key").read_bytes() == key
    assert inspect_server(tmp_path / "certs", "new.example.org") == []
    assert {path.name for path in (tmp_path / "certs").glob("*.writing")} == set()


def test_a_passphrase_from_a_file(fedamole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passphrase_file = tmp_path / "word"
    passphrase_file.write_text("six words that nobody would guess\n")
    passphrase_file.chmod(0o644)
    code, output = fedamole("certs", "--passphrase-file", passphrase_file)
    assert (code, "chmod 600" in output) == (2, True)
    assert not (tmp_path / "certs").exists()
    passphrase_file.chmod(0o600)
    code, output = fedamole("certs", "--passphrase-file", passphrase_file)
    assert code == 0
    assert "written  certs/ca.key (encrypted)" in output
    assert "written  certs/server.key\n" in output
    code, output = fedamole("certs", "--renew")
    assert (code, "ca.key: is encrypted: give --passphrase-file or set FEDAMOLE" in output) == (2, True)
    monkeypatch.setenv(PASSPHRASE, "six words that nobody would guess")
    assert fedamole("certs", "--renew")[0] == 0
    monkeypatch.setenv(PASSPHRASE, "six words that are wrong")
    code, output = fedamole("certs", "--renew")
    assert (code, "the passphrase is wrong" in output, "that are wrong" in output) == (2, True, False)
    monkeypatch.delenv(PASSPHRASE)
    assert fedamole("certs", "--folder", "own", "--own", "a", "--passphrase-file", passphrase_file)[0] == 0
    assert is_locked(tmp_path / "own" / "node.key")


def test_clients_are_listed(fedamole: Any, tmp_path: Path) -> None:
    code, output = fedamole("clients", "list")
    assert (code, "there is no folder certs" in output) == (2, True)
    fedamole("certs")
    assert "no key is admitted" in fedamole("clients", "list")[1]
    for name, days in (("bank", 400), ("clinic", 20), ("gone", 400)):
        fedamole("certs", "--client", name, "--client-days", days)
    fedamole("clients", "remove", "gone")
    (tmp_path / "certs" / "nodes" / "spoilt.pub").write_text("\x1b[31mrubbish")
    code, output = fedamole("clients", "list")
    assert code == 0
    print_of = {
        name: fingerprint(load_public(tmp_path / "certs" / "clients" / name / "node.pub"))
        for name in ("bank", "clinic", "gone")
    }
    assert [line.split(maxsplit=3) for line in output.splitlines() if "spoilt" not in line] == [
        ["bank", print_of["bank"], day(400), "valid"],
        ["clinic", print_of["clinic"], day(20), "ends soon"],
        ["gone", print_of["gone"], day(400), "removed"],
    ]
    rows = json.loads(fedamole("clients", "list", "--json")[1])
    assert [row["state"] for row in rows] == ["valid", "ends soon", "unreadable", "removed"]
    assert rows[0] == {"client": "bank", "fingerprint": print_of["bank"], "until": day(400), "state": "valid"}


def test_clients_are_extended_removed_and_replaced(fedamole: Any, tmp_path: Path) -> None:
    fedamole("certs", "--client", "bank", "--client", "clinic")
    code, output = fedamole("clients", "extend", "bank", "--days", "500")
    assert (code, f"bank is admitted until {day(500)}" in output) == (0, True)
    code, output = fedamole("clients", "extend", "bank", "--days", "3")
    assert (code, "clients remove bank" in output) == (2, True)
    fedamole("certs", "--folder", "new", "--own", "bank")
    code, output = fedamole("clients", "replace", "bank", "new/node.csr", "--days", "30")
    assert code == 0
    assert fingerprint(load_public(tmp_path / "new" / "node.pub")) in output
    assert f"valid until {day(30)}" in output
    assert "refuses the old key at once" in output
    code, output = fedamole("clients", "replace", "bank", "new/node.csr")
    assert (code, "'bank' already has this key" in output) == (2, True)
    code, output = fedamole("clients", "remove", "bank", "--certs", "certs")
    assert code == 0
    assert "A running server refuses this key at once" in output
    assert "after `fedamole server --resume`" in output
    code, output = fedamole("certs", "--admit", "bank=new/node.csr")
    assert (code, "this key was removed" in output, "nodes/removed/bank-" in output) == (2, True, True)
    assert fedamole("certs", "--admit", "bank=new/node.csr", "--again")[0] == 0
    assert [row["client"] for row in json.loads(fedamole("clients", "list", "--json")[1])] == ["bank", "clinic", "bank"]


PAGE = Path(__file__).parents[2] / "docs" / "certificates.md"


def test_the_steps_of_the_page_work_as_they_stand(
    fedamole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coordinator and client have separate folders; after each block the public files are sent as on the page."""
    coordinator, client = tmp_path / "coordinator", tmp_path / "client"
    for party in (coordinator, client):
        party.mkdir()
    monkeypatch.chdir(coordinator)
    _openssl(
        "req -x509 -newkey rsa:2048 -nodes -keyout org-ca.key -out org-ca.crt -subj /CN=Org "
        "-addext keyUsage=critical,keyCertSign,cRLSign -days 3000"
    )
    states = []
    private_word(tmp_path / "word")
    for block in blocks(PAGE):
        who, *lines = block.splitlines()
        working_folder = {"# coordinator": coordinator, "# client": client}[who]
        monkeypatch.chdir(working_folder)
        for line in lines:
            arguments = line.replace("--passphrase", f"--passphrase-file {tmp_path / 'word'}").split()
            if arguments[0] == "fedamole":
                code, text = fedamole(*arguments[1:])
                assert code == 0, (line, text)
            elif arguments[0] == "openssl":
                _openssl(" ".join(arguments[1:]))
            else:
                assert arguments[:4] == ["ssh-keygen", "-p", "-m", "PKCS8"]
                locking = [*arguments, "-P", "", "-N", "six words that nobody would guess"]
                subprocess.run(locking, check=True, capture_output=True)
        if working_folder == client:
            newest = max(client.rglob("node.csr"), key=lambda path: path.stat().st_mtime_ns)
            shutil.copy(newest, coordinator / "hospital-a.csr")
        elif (client / "certs").exists():
            for name in ("ca.crt", "coordinator.pub"):
                shutil.copy(coordinator / "certs" / name, client / "certs" / name)
        if "clients" in block:
            rows = json.loads(fedamole("clients", "list", "--certs", coordinator / "certs", "--json")[1])
            states.append([(row["client"], row["until"], row["state"]) for row in rows])
    assert inspect_server(coordinator / "certs", "fl.example.org") == []
    assert inspect_server(coordinator / "org-certs", "fl.example.org") == []
    assert inspect_client(client / "certs", b"six words that nobody would guess") == []
    for folder in ("certs", "locked"):
        assert is_locked(client / folder / "node.key")
    assert not is_locked(client / "new-certs" / "node.key")
    assert states == [
        [("bank-b", day(365), "valid"), ("hospital-a", day(730), "valid")],
        [("hospital-a", day(730), "valid"), ("bank-b", day(365), "removed")],
        [("bank-b", day(365), "valid"), ("hospital-a", day(365), "valid"), ("hospital-a", day(730), "removed")],
    ]
    table = PAGE.read_text().split("## Set up")[0]
    for party in (coordinator / "certs", coordinator / "org-certs", client / "certs"):
        for path in party.iterdir():
            assert f"`{path.name.removesuffix('.old')}" in table, path


def private_word(path: Path) -> None:
    path.write_text("six words that nobody would guess\n")
    path.chmod(0o600)


def _openssl(arguments: str) -> None:
    subprocess.run(["openssl", *arguments.split()], check=True, capture_output=True)
