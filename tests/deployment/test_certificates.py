import argparse
import os
import re
import socket
import ssl
import stat
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedamole.deployment.security import dates
from fedamole.deployment.security.certificates import make_certificates, make_loopback
from fedamole.deployment.security.client_keys import admit, admitted_keys, extend, make_own_key
from fedamole.deployment.security.inspection import check_server, inspect_client
from fedamole.deployment.security.keys import load_public, write
from fedamole.deployment.server_processes import ListenSettings
from fedamole.errors import ConfigError

HOSTS = ("fed.example.org", "192.0.2.7", "2001:db8::7")


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    """A folder of certificates for HOSTS and two clients."""
    make_certificates(tmp_path / "certs", HOSTS, ("clinic", "bank"))
    return tmp_path / "certs"


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`at(-900)`: set the clock for certificates to 900 days ago."""

    def move(days: int) -> None:
        moment = datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
        monkeypatch.setattr(dates, "now", lambda: moment)

    return move


@pytest.fixture
def greeting(certs: Path) -> Iterator[Callable[..., str]]:
    """`greeting(ca, name)`: a TLS handshake on loopback with a server that shows server.crt; its TLS version."""
    slots: list[socket.socket] = []

    def serve(slot: socket.socket, crt: Path, key: Path) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(crt, key)
        try:
            with slot.accept()[0] as stream, context.wrap_socket(stream, server_side=True) as secured:
                secured.recv(1)
        except OSError:
            pass  # the client did not like the certificate

    def greet(ca: Path, name: str, crt: Path = certs / "server.crt", key: Path = certs / "server.key") -> str:
        slot = socket.create_server(("127.0.0.1", 0))
        slots.append(slot)
        threading.Thread(target=serve, args=(slot, crt, key), daemon=True).start()
        context = ssl.create_default_context(cafile=ca)
        context.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
        with (
            socket.create_connection(slot.getsockname(), timeout=5) as stream,
            context.wrap_socket(stream, server_hostname=name) as secured,
        ):
            return str(secured.version())

    yield greet
    for slot in slots:
        slot.close()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def errors(folder: Path, host: str) -> list[str]:
    return check_server(folder, host)[0]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def server_crt(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())


@pytest.mark.parametrize("name", [*HOSTS, "localhost", "127.0.0.1"])
def test_a_client_trusts_the_server_by_every_name(certs: Path, greeting: Callable[..., str], name: str) -> None:
    assert greeting(certs / "clients" / "clinic" / "ca.crt", name) == "TLSv1.3"


@pytest.mark.parametrize(("name", "code"), [("other.example.org", 62), ("192.0.2.8", 64), ("127.0.0.2", 64)])
def test_a_name_that_is_not_in_the_certificate_is_refused(
    certs: Path, greeting: Callable[..., str], name: str, code: int
) -> None:
    with pytest.raises(ssl.SSLCertVerificationError) as refused:
        greeting(certs / "ca.crt", name)
    assert refused.value.verify_code == code


def test_another_authority_is_refused(certs: Path, greeting: Callable[..., str], tmp_path: Path) -> None:
    make_certificates(tmp_path / "other", HOSTS, ())
    with pytest.raises(ssl.SSLCertVerificationError) as refused:
        greeting(tmp_path / "other" / "ca.crt", "localhost")
    assert refused.value.verify_code in (19, 20)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_the_processes_of_a_server_trust_its_loopback_certificate_alone(
    certs: Path, greeting: Callable[..., str], tmp_path: Path, name: str
) -> None:
    crt, key = make_loopback(tmp_path / "server")
    assert mode(key) == 0o600
    assert greeting(crt, name, crt, key) == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        greeting(crt, name)  # shows server.crt
    before = key.read_bytes()
    crt, key = make_loopback(tmp_path / "server")
    assert key.read_bytes() != before
    assert greeting(crt, name, crt, key) == "TLSv1.3"


def test_an_expired_certificate_is_refused_until_it_is_renewed(
    certs: Path, greeting: Callable[..., str], at: Callable[[int], None]
) -> None:
    at(-900)
    make_certificates(certs, HOSTS, (), renew_server=True)  # valid for 825 days from then
    with pytest.raises(ssl.SSLCertVerificationError) as refused:
        greeting(certs / "ca.crt", "localhost")
    assert refused.value.verify_code == 10
    at(0)
    assert any("expired on" in problem for problem in errors(certs, "localhost"))
    make_certificates(certs, HOSTS, (), renew_server=True)
    assert greeting(certs / "ca.crt", "localhost") == "TLSv1.3"


def test_what_the_certificates_say(certs: Path) -> None:
    authority = x509.load_pem_x509_certificate((certs / "ca.crt").read_bytes())
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = authority.extensions.get_extension_for_class(x509.KeyUsage)
    assert constraints.critical
    assert constraints.value.ca
    assert usage.critical
    assert usage.value.key_cert_sign
    assert 3649 <= (authority.not_valid_after_utc - datetime.now(UTC)).days <= 3650
    server = server_crt(certs)
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    purposes = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert 824 <= (server.not_valid_after_utc - datetime.now(UTC)).days <= 825
    key = server.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp384r1"


def test_the_server_never_outlives_its_authority(tmp_path: Path) -> None:
    make_certificates(tmp_path / "c", (), (), days=100_000)
    authority = x509.load_pem_x509_certificate((tmp_path / "c" / "ca.crt").read_bytes())
    assert server_crt(tmp_path / "c").not_valid_after_utc == authority.not_valid_after_utc


def test_flower_loads_the_keys(certs: Path, tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    own = make_own_key(tmp_path / "own", "shop")
    admitted = admit(certs, "shop", own)
    for key_file, pub in (
        (certs / "clients" / "clinic" / "node.key", certs / "nodes" / "clinic.pub"),
        (tmp_path / "own" / "node.key", admitted),
    ):
        pair = _try_setup_client_authentication(
            argparse.Namespace(auth_supernode_private_key=str(key_file), auth_supernode_public_key=None)
        )
        assert pair is not None
        assert bytes_to_public_key(try_load_public_key(pub)) == pair[1]


def test_private_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)  # with the laxest setting a user can have
    try:
        make_certificates(tmp_path / "deep" / "certs", (), ("clinic",))
        make_own_key(tmp_path / "own", "bank")
    finally:
        os.umask(before)
    private = [path for path in tmp_path.rglob("*.key")]
    assert sorted(path.name for path in private) == ["ca.key", "coordinator.key", "node.key", "node.key", "server.key"]
    for path in private:
        assert mode(path) == 0o600, path
    for folder in (path for path in tmp_path.rglob("*") if path.is_dir()):
        assert mode(folder) == 0o700, folder


def test_writing_never_replaces(tmp_path: Path) -> None:
    (tmp_path / "node.pub").write_text("mine")
    with pytest.raises(ConfigError, match="is not overwritten"):
        write(tmp_path / "node.pub", b"theirs")
    assert (tmp_path / "node.pub").read_text() == "mine"


def test_a_folder_others_can_enter_gets_no_key(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="chmod 700"):
        make_own_key(tmp_path / "open", "clinic")
    assert [path.name for path in (tmp_path / "open").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir(mode=0o755)
    make_own_key(tmp_path / "empty", "clinic")
    assert mode(tmp_path / "empty") == 0o700


def test_adding_clients_changes_no_other_file(certs: Path) -> None:
    before = snapshot(certs)
    created = make_certificates(certs, HOSTS, ("clinic", "bank", "shop"))
    after = snapshot(certs)
    assert {name: after[name] for name in before} == before
    own = {f"clients/shop/{name}" for name in ("ca.crt", "coordinator.pub", "node.key", "node.pub")}
    new = {*own, "nodes/shop.pub"}
    assert set(after) - set(before) == new
    assert {str(path.relative_to(certs)) for path in created.written} == new
    assert {str(path.relative_to(certs)) for path in created.kept} == set(before)
    assert list(admitted_keys(certs)) == ["bank", "clinic", "shop"]
    assert make_certificates(certs, HOSTS, ("clinic",)).written == []


def test_first_making_lists_every_file(tmp_path: Path) -> None:
    created = make_certificates(tmp_path / "c", HOSTS, ("clinic",))
    assert {str(path.relative_to(tmp_path / "c")) for path in created.written} == set(snapshot(tmp_path / "c"))
    assert created.kept == []


def test_other_hosts_are_an_error_that_names_the_remedy(certs: Path) -> None:
    before = snapshot(certs)
    with pytest.raises(ConfigError, match=r"fed\.example\.org.*but .*new\.example\.org.* is requested.*--renew"):
        make_certificates(certs, ("new.example.org",), ())
    assert snapshot(certs) == before
    # The same names in another order and spelling, or nothing said, is no change.
    assert make_certificates(certs, ("2001:DB8:0::7", "FED.example.org", "192.0.2.7"), ()).written == []
    assert make_certificates(certs, (), ()).written == []


def test_renewing_issues_the_server_certificate_alone(certs: Path, greeting: Callable[..., str]) -> None:
    before = snapshot(certs)
    make_certificates(certs, ("new.example.org",), (), renew_server=True)
    after = snapshot(certs)
    assert after["server.crt.old"] == before["server.crt"] != after["server.crt"]
    assert {name: after[name] for name in before if name != "server.crt"} == {
        name: content for name, content in before.items() if name != "server.crt"
    }
    # Clients go on with the ca.crt that they have.
    assert greeting(certs / "clients" / "clinic" / "ca.crt", "new.example.org") == "TLSv1.3"
    make_certificates(certs, (), (), renew_server=True)
    assert snapshot(certs)["server.crt.old"] == before["server.crt"]
    assert snapshot(certs)["server.crt.old.2"] == after["server.crt"]
    assert errors(certs, "new.example.org") == []  # nothing said: the names it had


def test_an_authority_without_its_key_still_takes_clients(certs: Path) -> None:
    (certs / "ca.key").rename(certs.parent / "ca.key")
    make_certificates(certs, HOSTS, ("shop",))
    assert "shop" in admitted_keys(certs)
    before = snapshot(certs)
    with pytest.raises(ConfigError, match=r"ca\.key is missing"):
        make_certificates(certs, HOSTS, (), renew_server=True)
    assert snapshot(certs) == before


def test_the_key_of_another_authority_signs_nothing(certs: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path / "other", (), ())
    (certs / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    before = snapshot(certs)
    with pytest.raises(ConfigError, match=r"ca\.key does not belong to ca\.crt"):
        make_certificates(certs, HOSTS, (), renew_server=True)
    assert snapshot(certs) == before


@pytest.mark.parametrize("left", ["ca.key", "server.crt", "clients/clinic/node.pub"])
def test_half_a_pair_is_an_error(certs: Path, left: str) -> None:
    other = {"ca.key": "ca.crt", "server.crt": "server.key", "clients/clinic/node.pub": "clients/clinic/node.key"}
    (certs / other[left]).unlink()
    if left.endswith(".pub"):
        (certs / "nodes" / "clinic.pub").unlink()
    with pytest.raises(ConfigError, match="exists without"):
        make_certificates(certs, HOSTS, ("clinic",))


def test_a_broken_off_making_is_completed(certs: Path) -> None:
    before = snapshot(certs)
    for name in ("server.crt", "nodes/clinic.pub", "clients/clinic/node.pub", "clients/clinic/ca.crt"):
        (certs / name).unlink()
    make_certificates(certs, HOSTS, ("clinic",))
    after = snapshot(certs)
    assert set(after) == set(before)
    assert {name: after[name] for name in before if name != "server.crt"} == {
        name: content for name, content in before.items() if name != "server.crt"
    }
    assert errors(certs, HOSTS[0]) == []


@pytest.mark.parametrize(
    "host",
    [
        "https://fed.example.org",
        "fed.example.org:8443",
        "[::1]",
        "0.0.0.0",
        "::",
        "",
        "fed..org",
        "10.0.0.300",
        "münchen.de",
        "-fed.org",
        "a b",
    ],
)
def test_hosts_that_cannot_be_used(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="host "):
        make_certificates(tmp_path / "c", (host,), ())
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["../x", "", ".x", "a/b", "a b", "-a", "ä"])
def test_names_that_cannot_be_used(tmp_path: Path, certs: Path, name: str) -> None:
    before = snapshot(tmp_path)
    for call in (
        lambda: make_certificates(tmp_path / "c", (), (name,)),
        lambda: make_own_key(tmp_path / "c", name),
        lambda: admit(certs, name, certs / "nodes" / "clinic.pub"),
    ):
        with pytest.raises(ConfigError, match=r"client: the name .* is invalid"):
            call()
    assert snapshot(tmp_path) == before


def test_names_that_are_one(certs: Path) -> None:
    for names in (("shop", "shop"), ("shop", "Shop"), ("Clinic",)):
        with pytest.raises(ConfigError, match=r"given twice|the same file"):
            make_certificates(certs, HOSTS, names)
    with pytest.raises(ConfigError, match="the same file"):
        admit(certs, "CLINIC", make_own_key(certs.parent / "own", "CLINIC"))


def test_an_own_key_is_admitted_and_never_travels(certs: Path, tmp_path: Path) -> None:
    request = make_own_key(tmp_path / "shop", "shop")
    assert request == tmp_path / "shop" / "node.csr"
    pub = tmp_path / "shop" / "node.pub"
    assert re.fullmatch(r"ecdsa-sha2-nistp384 \S+ shop\n", pub.read_text())
    before = snapshot(tmp_path / "shop")
    assert set(before) == {"node.key", "node.pub", "node.csr"}
    assert make_own_key(tmp_path / "shop", "shop") == request
    assert snapshot(tmp_path / "shop") == before
    placed = admit(certs, "shop", request)
    assert admitted_keys(certs)["shop"].path == placed == certs / "nodes" / "shop.pub"
    assert admitted_keys(certs)["shop"].key == load_public(pub)
    line = placed.read_bytes()
    assert admit(certs, "shop", pub, days=900) == placed
    # Asked for among the others it is handed the coordinator's public files, and no second key.
    make_certificates(certs, HOSTS, ("shop",))
    assert sorted(path.name for path in (certs / "clients" / "shop").iterdir()) == ["ca.crt", "coordinator.pub"]
    assert placed.read_bytes() == line


def test_one_key_has_one_name_and_one_name_one_key(certs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'clinic' already has this key"):
        admit(certs, "shop", certs / "clients" / "clinic" / "node.pub")
    with pytest.raises(ConfigError, match=r"admitted with another key.*clients replace clinic"):
        admit(certs, "clinic", make_own_key(tmp_path / "own", "clinic"))
    assert list(admitted_keys(certs)) == ["bank", "clinic"]


def other_keys() -> dict[str, bytes]:
    kinds: dict[str, Any] = {
        "ssh-ed25519": ed25519.Ed25519PrivateKey.generate(),
        "ssh-rsa": rsa.generate_private_key(65537, 2048),
        "ecdsa-sha2-nistp256": ec.generate_private_key(ec.SECP256R1()),
    }
    return {kind: key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) for kind, key in kinds.items()}


def test_only_public_keys_of_the_right_kind_are_admitted(certs: Path, tmp_path: Path) -> None:
    make_own_key(tmp_path / "own", "shop")
    pem = (
        ec.generate_private_key(ec.SECP384R1())
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    refused = {kind: (content, kind) for kind, content in other_keys().items()} | {
        "private": ((tmp_path / "own" / "node.key").read_bytes(), "is a private key.*must never leave"),
        "pem": (pem, "OpenSSH format"),
        "rubbish": (b"hello", "OpenSSH format"),
        "long": (b"x" * 100_000, "too large"),
    }
    for name, (content, text) in refused.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=text) as error:
            admit(certs, "shop", tmp_path / name)
        assert "BEGIN" not in str(error.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        admit(certs, "shop", tmp_path / "absent.pub")
    with pytest.raises(ConfigError, match="there is no folder"):
        admit(tmp_path / "elsewhere", "shop", tmp_path / "own" / "node.pub")
    assert "shop" not in admitted_keys(certs)


def test_check_server_finds_nothing_wrong(certs: Path) -> None:
    for host in (*HOSTS, "localhost", "FED.example.org", "0.0.0.0", ""):
        assert errors(certs, host) == []


def test_check_server_finds_what_is_wrong(certs: Path, tmp_path: Path, at: Callable[[int], None]) -> None:
    assert [text for text in errors(certs, "other.example.org") if "not for other.example.org" in text]
    assert [text for text in errors(certs, "a:1") if "host 'a:1'" in text]
    at(826)
    assert any("server.crt expired" in text for text in errors(certs, "localhost"))
    at(-1)
    assert any("not valid before" in text for text in errors(certs, "localhost"))
    at(0)
    (certs / "server.key").chmod(0o640)
    assert ["server.key can be read by other users" in text for text in errors(certs, "localhost")] == [True]
    (certs / "server.key").chmod(0o600)
    make_certificates(tmp_path / "other", HOSTS, ())
    right = (certs / "server.key").read_bytes()
    (certs / "server.key").write_bytes((tmp_path / "other" / "server.key").read_bytes())
    assert ["server.key does not belong" in text for text in errors(certs, "localhost")] == [True]
    (certs / "server.key").write_bytes(right)
    (certs / "ca.crt").write_bytes((tmp_path / "other" / "ca.crt").read_bytes())
    assert ["not signed by ca.crt" in text for text in errors(certs, "localhost")] == [True]
    (certs / "ca.crt").write_text("rubbish")
    assert ["not a certificate in PEM" in text for text in errors(certs, "localhost")] == [True]
    (certs / "server.key").unlink()
    (certs / "ca.crt").unlink()
    assert sum("is missing" in text for text in errors(certs, "localhost")) == 2


def test_a_server_starts_with_a_warning_and_not_with_an_error(
    certs: Path, at: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    ListenSettings("localhost", 9092, certs)
    assert not caplog.records
    extend(certs, "clinic", 2000)
    extend(certs, "bank", 2000)
    at(825 - 29)
    ListenSettings("localhost", 9092, certs)
    assert ["server.crt expires within 30 days" in text for text in caplog.messages] == [True]
    at(826)
    with pytest.raises(ConfigError, match=r"server\.crt expired on"):
        ListenSettings("localhost", 9092, certs)


def test_a_server_reads_the_passphrase_of_the_order_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_certificates(tmp_path / "c", (), (), passphrase=b"six words that nobody knows")
    with pytest.raises(ConfigError, match=r"coordinator\.key: is encrypted"):
        ListenSettings("localhost", 9092, tmp_path / "c")
    monkeypatch.setenv("FEDAMOLE_KEY_PASSPHRASE", "six words that nobody knows")
    ListenSettings("localhost", 9092, tmp_path / "c")


def test_dates_near_the_end_are_warnings_and_stop_nothing(tmp_path: Path, at: Callable[[int], None]) -> None:
    certs = tmp_path / "c"
    make_certificates(certs, HOSTS, ("clinic",), days=825, client_days=2000)
    at(825 - 31)
    assert check_server(certs, "localhost") == ([], [])
    at(825 - 29)
    assert check_server(certs, "localhost")[0] == []
    assert ["server.crt expires within 30 days" in text for text in check_server(certs, "localhost")[1]] == [True]
    make_certificates(certs, (), (), days=9000, renew_server=True)
    at(1971)
    assert ["clinic.pub expires soon" in text for text in check_server(certs, "localhost")[1]] == [True]
    at(2001)
    assert check_server(certs, "localhost")[0] == []
    assert ["clinic.pub expired after" in text for text in check_server(certs, "localhost")[1]] == [True]


def test_a_key_of_another_making_is_checked_too(certs: Path) -> None:
    """An organisation's own certificates may be RSA, and their key encrypted."""
    key = rsa.generate_private_key(65537, 2048)
    (certs / "server.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    assert ["does not belong" in text for text in errors(certs, "localhost")] == [True]
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (certs / "server.key").write_bytes(locked)
    assert ["is encrypted, but the server" in text for text in errors(certs, "localhost")] == [True]


def test_what_an_organisation_holds(certs: Path, tmp_path: Path) -> None:
    own = certs / "clients" / "clinic"
    assert inspect_client(own) == []
    (own / "node.key").chmod(0o644)
    assert ["read by other users" in fault.text for fault in inspect_client(own)] == [True]
    (own / "node.key").chmod(0o600)
    (own / "node.pub").write_bytes((certs / "clients" / "bank" / "node.pub").read_bytes())
    assert ["does not belong" in fault.text for fault in inspect_client(own)] == [True]
    assert [fault.text.split()[-1] for fault in inspect_client(tmp_path / "nothing")] == ["missing"] * 3


def test_a_chain_through_another_authority_is_followed(tmp_path: Path) -> None:
    """server.crt may hold its certificate and the one that signed it, which ca.crt has signed."""
    make_certificates(tmp_path / "c", (), ())
    make_certificates(tmp_path / "d", (), ())
    both = (tmp_path / "c" / "server.crt").read_bytes() + (tmp_path / "c" / "ca.crt").read_bytes()
    (tmp_path / "c" / "server.crt").write_bytes(both)
    assert errors(tmp_path / "c", "localhost") == []
    (tmp_path / "c" / "ca.crt").write_bytes((tmp_path / "d" / "ca.crt").read_bytes())
    assert ["not signed by ca.crt" in text for text in errors(tmp_path / "c", "localhost")] == [True]


def test_a_file_in_the_way_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be created"):
        make_certificates(tmp_path / "file" / "c", (), ())
