"""The organisation's own CA: a signing request is made, and only a valid certificate is installed."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedamole.deployment.security.certificate_names import names_of
from fedamole.deployment.security.certificates import make_certificates
from fedamole.deployment.security.inspection import check_server
from fedamole.deployment.security.keys import load_certificates, load_request, public_half
from fedamole.deployment.security.signing_requests import install_server, request_server
from fedamole.errors import ConfigError

HOST = "fl.example.org"


@dataclass
class Authority:
    """An organisation's CA, optionally below another one."""

    name: str
    above: "Authority | None" = None
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        signer = self.above or self
        self.certificate = (
            self._begun(self.name, self.key.public_key(), -10, 400, ca=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=False,
                    key_cert_sign=True,
                    crl_sign=True,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
            .sign(signer.key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def _begun(
        self, name: str, key: ec.EllipticCurvePublicKey, begin: int, end: int, ca: bool
    ) -> x509.CertificateBuilder:
        signer = (self.above or self) if ca else self
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder(
                x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, signer.name)]),
                x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
                key,
                x509.random_serial_number(),
            )
            .not_valid_before(now + timedelta(days=begin))
            .not_valid_after(now + timedelta(days=end))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), critical=False)
        )

    def sign(
        self,
        csr: Path,
        begin: int = -1,
        end: int = 90,
        ca: bool = False,
        server: bool = True,
        names: list[str] | None = None,
    ) -> bytes:
        request = load_request(csr)
        key = request.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        expected = names_of(request) if names is None else [x509.DNSName(name) for name in names]
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = self._begun(HOST, key, begin, end, ca).add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if expected:
            builder = builder.add_extension(x509.SubjectAlternativeName(expected), critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that waits for its certificate."""
    request_server(tmp_path / "certs", [HOST, "192.0.2.7"])
    return tmp_path / "certs"


@pytest.fixture
def install(folder: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`install(signed, ca)`: names of the files that were written."""

    def call(signed: bytes, ca: bytes, **more: Any) -> list[str]:
        (tmp_path / "signed.crt").write_bytes(signed)
        (tmp_path / "org.crt").write_bytes(ca)
        created = install_server(folder, tmp_path / "signed.crt", tmp_path / "org.crt", **more)
        return [str(path.relative_to(folder)) for path in created.written]

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_request_holds_the_names_and_no_ca_is_made(folder: Path) -> None:
    assert set(contents(folder)) == {"server.key", "server.csr", "coordinator.key", "coordinator.pub"}
    request = load_request(folder / "server.csr")
    assert request.is_signature_valid
    assert request.public_key() == public_half(folder / "server.key")
    assert [str(name.value) for name in names_of(request)] == [HOST, "192.0.2.7"]
    before = contents(folder)
    request_server(folder, ["192.0.2.7", HOST])
    assert contents(folder) == before, "the same hosts are the same request"
    request_server(folder, ["other.example.org"])
    after = contents(folder)
    assert after["server.csr.old"] == before["server.csr"] != after["server.csr"]
    assert after["server.key"] == before["server.key"]


def test_a_request_needs_a_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--host"):
        request_server(tmp_path / "c", [])
    assert not (tmp_path / "c").exists()


def test_a_waiting_folder_makes_no_ca_of_its_own(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(ConfigError, match=r"waits for a certificate.*--install"):
        make_certificates(folder, [HOST], ["clinic"])
    assert contents(folder) == before


def test_a_folder_with_its_own_ca_takes_no_other(tmp_path: Path) -> None:
    make_certificates(tmp_path / "c", [HOST], [])
    calls: tuple[Callable[[], object], ...] = (
        lambda: request_server(tmp_path / "c", [HOST]),
        lambda: install_server(tmp_path / "c", tmp_path / "c" / "server.crt", tmp_path / "c" / "ca.crt"),
    )
    for call in calls:
        with pytest.raises(ConfigError, match="has its own CA"):
            call()


def test_a_signed_certificate_is_installed_and_clients_are_admitted(
    folder: Path, install: Callable[..., list[str]]
) -> None:
    org = Authority("Clinic CA")
    assert install(org.sign(folder / "server.csr"), org.pem) == ["ca.crt", "server.crt"]
    assert check_server(folder, HOST) == ([], [])
    assert check_server(folder, "192.0.2.7") == ([], [])
    assert "not for other" in check_server(folder, "other.example.org")[0][0]
    created = make_certificates(folder, [], ["clinic"])
    assert folder / "clients" / "clinic" / "coordinator.pub" in created.written
    assert (folder / "clients" / "clinic" / "ca.crt").read_bytes() == org.pem
    assert not (folder / "ca.key").exists()
    with pytest.raises(ConfigError, match=r"ca\.key is missing.*--request and --install"):
        make_certificates(folder, [], [], renew_server=True)


@pytest.mark.parametrize("location", ["with the certificate", "with the root"])
def test_intermediates_may_be_in_either_file(folder: Path, install: Callable[..., list[str]], location: str) -> None:
    root = Authority("Root")
    middle = Authority("Middle", root)
    signed = middle.sign(folder / "server.csr")
    if location == "with the root":
        install(signed, middle.pem + root.pem)
    else:
        install(middle.pem + signed, root.pem)  # in the wrong order, too
    assert check_server(folder, HOST) == ([], [])
    assert load_certificates(folder / "ca.crt") == [root.certificate]
    assert [certificate.subject.rfc4514_string() for certificate in load_certificates(folder / "server.crt")] == [
        f"CN={HOST}",
        "CN=Middle",
    ]


def test_what_is_wrong_is_named_and_nothing_is_changed(
    folder: Path, install: Callable[..., list[str]], tmp_path: Path
) -> None:
    root, stranger = Authority("Root"), Authority("Root")
    middle = Authority("Middle", root)
    csr, signed = folder / "server.csr", root.sign(folder / "server.csr")
    request_server(tmp_path / "other", [HOST])
    wrong = {
        "does not belong to .*server.key": (root.sign(tmp_path / "other" / "server.csr"), root.pem),
        "issuer, 'CN=Root', is in neither file": (signed, stranger.pem),
        "issuer, 'CN=Middle', is in neither file": (middle.sign(csr), root.pem),
        "issuer, 'CN=Root', is in neither": (middle.sign(csr), middle.pem),
        "is only in .*signed.crt; it must be in --ca": (signed + root.pem, stranger.pem),
        "expired on": (root.sign(csr, -20, -1), root.pem),
        "is not valid before": (root.sign(csr, 1, 20), root.pem),
        "is a CA certificate": (root.sign(csr, ca=True), root.pem),
        "serverAuth": (root.sign(csr, server=False), root.pem),
        "not for 192.0.2.7, fl.example.org; ask the CA": (root.sign(csr, names=["a.example.org"]), root.pem),
        "is for no name, not for": (root.sign(csr, names=[]), root.pem),
        "not a certificate in PEM format": (b"rubbish", root.pem),
        "org.crt: is not a certificate in PEM": (signed, b"rubbish"),
    }
    before = contents(folder)
    for text, (crt, ca) in wrong.items():
        with pytest.raises(ConfigError, match=text):
            install(crt, ca)
        assert contents(folder) == before, text
    with pytest.raises(ConfigError, match=r"not for other\.example\.org"):
        install(signed, root.pem, hosts=["other.example.org"])
    install(signed, root.pem)


def test_a_ca_that_may_not_sign_is_found_by_the_handshake(folder: Path, install: Callable[..., list[str]]) -> None:
    """A certificate of a server signs another one: signature, names and dates are right, and TLS refuses the chain."""
    root = Authority("Root")
    server = Authority("Server", root)
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Server")])
    server.certificate = (
        x509.CertificateBuilder(root.certificate.subject, name, server.key.public_key(), 5)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=9))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(root.key, hashes.SHA256())
    )
    before = contents(folder)
    with pytest.raises(ConfigError, match=r"TLS clients would refuse this certificate: invalid CA"):
        install(server.sign(folder / "server.csr"), server.pem + root.pem)
    assert contents(folder) == before


def test_renewing_by_a_request_keeps_the_key_and_a_copy(folder: Path, install: Callable[..., list[str]]) -> None:
    org = Authority("Org")
    install(org.sign(folder / "server.csr"), org.pem)
    before = contents(folder)
    request_server(folder, [])
    assert contents(folder) == before, "the names that it has: the same request"
    assert install(org.sign(folder / "server.csr"), org.pem) == ["server.crt.old", "server.crt"]
    after = contents(folder)
    assert after["server.key"] == before["server.key"]
    assert after["server.crt.old"] == before["server.crt"] != after["server.crt"]
    assert check_server(folder, HOST) == ([], [])


def test_a_ca_may_write_a_name_in_capitals(folder: Path, install: Callable[..., list[str]]) -> None:
    org = Authority("Org")
    install(org.sign(folder / "server.csr", names=["FL.Example.ORG"]), org.pem, hosts=[HOST])
    assert check_server(folder, HOST) == ([], [])


def test_two_roots_while_one_follows_another(folder: Path, install: Callable[..., list[str]]) -> None:
    """Clients get both first, then the server's certificate may come from either."""
    old, new = Authority("Old"), Authority("New")
    install(old.sign(folder / "server.csr"), old.pem)
    make_certificates(folder, [], ["clinic"])
    install(new.sign(folder / "server.csr"), old.pem + new.pem)
    assert load_certificates(folder / "ca.crt") == [new.certificate, old.certificate]
    assert load_certificates(folder / "clients" / "clinic" / "ca.crt") == [new.certificate, old.certificate]
    assert check_server(folder, HOST) == ([], [])


def test_openssl_signs_a_request(folder: Path, tmp_path: Path) -> None:
    """The command in docs/certificates.md."""
    commands = [
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
            "-days",
            "29",
            "-addext",
            "keyUsage=critical,keyCertSign,cRLSign",
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
            "20",
            "-out",
            "signed.crt",
        ],
    ]
    for command in commands:
        done = subprocess.run(["openssl", *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    install_server(folder, tmp_path / "signed.crt", tmp_path / "org-ca.crt")
    errors, warnings = check_server(folder, HOST)
    assert errors == []
    assert sorted(text.split()[0].rpartition("/")[2] for text in warnings) == ["ca.crt", "server.crt"]
