"""Admitted keys: expiry, removal, replacement; each change is atomic for readers of the folder."""

import re
import subprocess
import threading
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from fedamole.deployment.security import client_keys, dates
from fedamole.deployment.security.certificates import make_certificates
from fedamole.deployment.security.client_keys import (
    admit,
    admitted_keys,
    extend,
    make_own_key,
    remove,
    removed,
    replace_key,
)
from fedamole.deployment.security.inspection import check_server
from fedamole.deployment.security.keys import fingerprint, load_certificates, load_public, public_half
from fedamole.errors import ConfigError


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    make_certificates(tmp_path / "certs", (), ("clinic", "bank"))
    return tmp_path / "certs"


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`at(400)`: advance the clock by 400 days."""

    def move(days: int) -> None:
        moment = datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
        monkeypatch.setattr(dates, "now", lambda: moment)

    return move


def day(days: int) -> date:
    return datetime.now(UTC).date() + timedelta(days=days)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def request(folder: Path, name: str) -> Path:
    return make_own_key(folder, name)


def test_the_line_that_the_gateway_reads(certs: Path, tmp_path: Path) -> None:
    path = admit(certs, "shop", request(tmp_path / "own", "shop"), days=100)
    assert re.fullmatch(rf"ecdsa-sha2-nistp384 \S+ shop until={day(100).isoformat()}\n", path.read_text())
    assert admitted_keys(certs)["shop"].until == day(100)
    assert admitted_keys(certs)["clinic"].until == day(365)
    assert admitted_keys(certs)["clinic"].key == load_public(certs / "clients" / "clinic" / "node.pub")
    assert (certs / "nodes" / "clinic.pub").read_text().endswith(f" clinic until={day(365).isoformat()}\n")
    make_certificates(certs, (), ("late",), client_days=7)
    assert admitted_keys(certs)["late"].until == day(7)


@pytest.mark.parametrize("days", [0, -1, 1_000_001])
def test_days_that_cannot_be(certs: Path, tmp_path: Path, days: int) -> None:
    before = files(certs)
    own = request(tmp_path / "own", "shop")
    for call in (
        lambda: admit(certs, "shop", own, days=days),
        lambda: make_certificates(certs, (), ("shop",), client_days=days),
        lambda: make_certificates(certs, (), (), days=days, renew_server=True),
        lambda: extend(certs, "clinic", days),
    ):
        with pytest.raises(ConfigError, match="between 1 and"):
            call()
    assert files(certs) == before


def test_states(certs: Path, at: Callable[[int], None]) -> None:
    states = {0: "valid", 335: "valid", 336: "ends soon", 365: "ends soon", 366: "expired"}
    for days, state in states.items():
        at(days)
        assert admitted_keys(certs)["clinic"].state == state, days


def test_a_key_of_an_older_version_does_not_expire(certs: Path) -> None:
    path = certs / "nodes" / "clinic.pub"
    path.write_bytes((certs / "clients" / "clinic" / "node.pub").read_bytes())
    assert admitted_keys(certs)["clinic"].until is None
    assert admitted_keys(certs)["clinic"].state == "valid"
    errors, warnings = check_server(certs, "localhost")
    assert errors == []
    assert ["does not expire" in text for text in warnings] == [True]
    assert extend(certs, "clinic", 30).until == day(30)


@pytest.mark.parametrize(
    "end",
    [
        "until=2027-13-01",
        "until=tomorrow",
        "until=",
        "until=2027-01-01 until=2028-01-01",
        "until=2027-01-01T00:00",
        "until=20270101",
    ],
)
def test_an_unreadable_expiry_date_is_an_error_and_not_unlimited(certs: Path, end: str) -> None:
    path = certs / "nodes" / "clinic.pub"
    parts = path.read_text().split()
    path.write_text(f"{parts[0]} {parts[1]} clinic {end}\n")
    with pytest.raises(ConfigError, match=r"clinic\.pub.*until=YYYY-MM-DD"):
        admitted_keys(certs)
    assert any("until=YYYY-MM-DD" in text for text in check_server(certs, "localhost")[0])


@pytest.mark.parametrize(
    "stated", ["", "bank", "clinic laptop", "clinic  until=2099-01-01", "me@host until=2099-01-01"]
)
def test_a_file_says_the_name_that_it_has(certs: Path, stated: str) -> None:
    """The gateway takes the name from the line, so it must be the one of the file."""
    path = certs / "nodes" / "clinic.pub"
    path.write_text(" ".join(path.read_text().split()[:2]) + f" {stated}\n")
    with pytest.raises(ConfigError, match=r"clinic\.pub: the line must end with clinic until="):
        admitted_keys(certs)


def test_a_file_of_two_lines_is_no_key(certs: Path) -> None:
    path = certs / "nodes" / "clinic.pub"
    path.write_text(path.read_text() + (certs / "nodes" / "bank.pub").read_text())
    with pytest.raises(ConfigError, match="must be one line"):
        admitted_keys(certs)


def test_extend(certs: Path, at: Callable[[int], None]) -> None:
    key = admitted_keys(certs)["clinic"].key
    assert extend(certs, "clinic", 700).until == day(700)
    assert admitted_keys(certs)["clinic"].key == key
    before = files(certs)
    with pytest.raises(ConfigError, match=r"valid until .*clients remove clinic"):
        extend(certs, "clinic", 699)
    with pytest.raises(ConfigError, match=r"no key of 'nobody' is admitted \(admitted: bank, clinic\)"):
        extend(certs, "nobody", 10)
    assert files(certs) == before
    at(800)
    assert admitted_keys(certs)["clinic"].state == "expired"
    assert extend(certs, "clinic", 10).state == "ends soon"


def test_remove_moves_the_file_and_deletes_nothing(certs: Path, tmp_path: Path) -> None:
    content = (certs / "nodes" / "clinic.pub").read_bytes()
    target = remove(certs, "clinic")
    assert re.fullmatch(r"clinic-\d{8}T\d{6}Z\.pub", target.name)
    assert target.parent == certs / "nodes" / "removed"
    assert target.read_bytes() == content
    assert list(admitted_keys(certs)) == ["bank"]
    assert removed(certs) == [("clinic", target)]
    with pytest.raises(ConfigError, match="no key of 'clinic' is admitted"):
        remove(certs, "clinic")


def test_a_broken_key_can_be_removed(certs: Path, tmp_path: Path) -> None:
    (certs / "nodes" / "clinic.pub").write_text("rubbish")
    remove(certs, "clinic")
    admit(certs, "clinic", request(tmp_path / "new", "clinic"))
    assert list(admitted_keys(certs)) == ["bank", "clinic"]


@pytest.mark.parametrize("name", ["../ca", "nodes/clinic", "", "removed/x"])
def test_a_name_never_becomes_a_path(certs: Path, name: str) -> None:
    before = files(certs.parent)
    for call in (
        lambda: remove(certs, name),
        lambda: extend(certs, name, 900),
        lambda: replace_key(certs, name, certs),
    ):
        with pytest.raises(ConfigError, match="is invalid"):
            call()
    assert files(certs.parent) == before


def test_a_removed_key_comes_back_on_purpose_only(certs: Path, tmp_path: Path) -> None:
    own = request(tmp_path / "own", "shop")
    admit(certs, "shop", own)
    for name in ("shop", "clinic"):
        target = remove(certs, name)
    with pytest.raises(ConfigError, match=r"this key was removed \(.*removed/shop-.*\.pub\).*--again"):
        admit(certs, "shop", own)
    with pytest.raises(ConfigError, match="this key was removed"):
        admit(certs, "other", own.with_name("node.pub"))
    with pytest.raises(ConfigError, match=f"this key was removed .{target}"):
        make_certificates(certs, (), ("clinic",))
    with pytest.raises(ConfigError, match="this key was removed"):
        replace_key(certs, "bank", own.with_name("node.pub"))
    assert list(admitted_keys(certs)) == ["bank"]
    admit(certs, "shop", own, again=True)
    make_certificates(certs, (), ("clinic",), again=True)
    assert list(admitted_keys(certs)) == ["bank", "clinic", "shop"]


def test_replace(certs: Path, tmp_path: Path) -> None:
    old = (certs / "nodes" / "clinic.pub").read_bytes()
    new = request(tmp_path / "new", "clinic")
    result, target = replace_key(certs, "clinic", new, days=50)
    assert result.key == admitted_keys(certs)["clinic"].key == load_public(tmp_path / "new" / "node.pub")
    assert result.until == day(50)
    assert target.read_bytes() == old
    assert "bank" in admitted_keys(certs)


def test_a_replacement_that_is_wrong_changes_nothing(certs: Path, tmp_path: Path) -> None:
    missing = request(tmp_path / "gone", "clinic")
    replace_key(certs, "clinic", missing)
    replace_key(certs, "clinic", request(tmp_path / "now", "clinic"))
    (tmp_path / "rubbish").write_text("rubbish")
    wrong = {
        "'clinic' already has this key": tmp_path / "now" / "node.pub",
        "'bank' already has this key": certs / "nodes" / "bank.pub",
        "for the client 'shop', not for 'clinic'": request(tmp_path / "shop", "shop"),
        "this key was removed": missing,
        "OpenSSH format": tmp_path / "rubbish",
        "is a private key": tmp_path / "now" / "node.key",
        "cannot be read": tmp_path / "absent",
    }
    before = files(certs)
    for text, file in wrong.items():
        with pytest.raises(ConfigError, match=text):
            replace_key(certs, "clinic", file)
        assert files(certs) == before, text
    with pytest.raises(ConfigError, match="no key of 'shop' is admitted"):
        replace_key(certs, "shop", tmp_path / "shop" / "node.csr")


def other_request(name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return x509.CertificateSigningRequestBuilder(subject).sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def test_a_request_is_for_its_name_and_signed_by_its_key(certs: Path, tmp_path: Path) -> None:
    own = request(tmp_path / "own", "shop")
    with pytest.raises(ConfigError, match="for the client 'shop', not for 'store'"):
        admit(certs, "store", own)
    # Somebody who has another client's public key alone cannot make a request for it: the signature tells.
    mine, theirs = x509.load_pem_x509_csr(own.read_bytes()), request(tmp_path / "other", "shop")
    forged = mine.public_bytes(Encoding.DER).replace(
        mine.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint),
        load_public(theirs.with_name("node.pub")).public_bytes(Encoding.X962, PublicFormat.UncompressedPoint),
    )
    (tmp_path / "forged.csr").write_bytes(x509.load_der_x509_csr(forged).public_bytes(Encoding.PEM))
    with pytest.raises(ConfigError, match="signature is invalid"):
        admit(certs, "shop", tmp_path / "forged.csr")
    (tmp_path / "cut.csr").write_bytes(own.read_bytes()[:200])
    with pytest.raises(ConfigError, match="not a certificate signing request in PEM"):
        admit(certs, "shop", tmp_path / "cut.csr")
    (tmp_path / "p256.csr").write_bytes(other_request("shop", ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(ConfigError, match="key is not EC P-384"):
        admit(certs, "shop", tmp_path / "p256.csr")
    assert "shop" not in admitted_keys(certs)


def test_openssl_reads_a_clients_request(tmp_path: Path) -> None:
    own = request(tmp_path / "own", "shop")
    done = subprocess.run(
        ["openssl", "req", "-verify", "-noout", "-subject", "-in", str(own)], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "CN = shop" in done.stdout
    assert "verify OK" in done.stdout + done.stderr


def test_the_fingerprint_is_the_one_of_openssh(certs: Path) -> None:
    path = certs / "nodes" / "clinic.pub"
    shown = subprocess.run(["ssh-keygen", "-l", "-f", str(path)], capture_output=True, text=True).stdout
    assert fingerprint(load_public(path)) == shown.split()[1]


def test_a_reader_sees_a_whole_key_of_each_client_at_any_moment(certs: Path, tmp_path: Path) -> None:
    """Reads the folder repeatedly, as the gateway of a running server does."""
    pairs = [request(tmp_path / str(number), "clinic") for number in range(12)]
    wrong: list[object] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            try:
                if list(admitted_keys(certs)) != ["bank", "clinic"]:
                    wrong.append(list(admitted_keys(certs)))
            except Exception as error:
                wrong.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    for number, pair in enumerate(pairs):
        replace_key(certs, "clinic", pair, days=10)
        extend(certs, "clinic", 20 + number)
    stop.set()
    thread.join()
    assert wrong == []
    assert len(removed(certs)) == 12


def test_a_renewed_certificate_is_whole_and_fits_the_key_at_any_moment(certs: Path) -> None:
    wrong: list[object] = []
    seen: set[int] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            try:
                (certificate,) = load_certificates(certs / "server.crt")
                seen.add(certificate.serial_number)
                if certificate.public_key() != public_half(certs / "server.key"):
                    wrong.append("another key")
            except Exception as error:
                wrong.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(40):
        make_certificates(certs, (), (), renew_server=True)
    stop.set()
    thread.join()
    assert wrong == []
    assert len(seen) > 2
    assert (certs / "server.crt.old.40").exists()


def test_a_crash_while_replacing_leaves_the_old_key(
    certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (certs / "nodes" / "clinic.pub").read_bytes()
    new = request(tmp_path / "new", "clinic")

    def crash(path: Path, content: bytes) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as then:
        then.setattr(client_keys, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            replace_key(certs, "clinic", new)
    assert (certs / "nodes" / "clinic.pub").read_bytes() == before
    replace_key(certs, "clinic", new)
    assert admitted_keys(certs)["clinic"].key == load_public(tmp_path / "new" / "node.pub")
