"""Key files: created once with private permissions, and read with errors that never quote their content."""

import base64
import hashlib
import os
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from fedamole.errors import ConfigError

MAX_BYTES = 64 * 1024
"""Maximum size in bytes of a file read here."""
PASSPHRASE = "FEDAMOLE_KEY_PASSPHRASE"
"""Environment variable with the passphrase of the private keys."""
MIN_PASSPHRASE = 12
"""Minimum length in characters. A key file slows down guessing only a little (PBKDF2 with 2048 rounds), so the
passphrase must be long."""


def new_key() -> ec.EllipticCurvePrivateKey:
    """Generate a key on the curve P-384, which Flower uses."""
    return ec.generate_private_key(ec.SECP384R1())


def write_private(
    path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat, passphrase: bytes | None = None
) -> None:
    """Write a private key with mode 0600 into a folder of mode 0700; PKCS8 for TLS, OpenSSH for Flower's nodes.

    A passphrase encrypts the key, always in PKCS8: OpenSSH's own encryption needs another package. Raises ConfigError
    if the file exists, if others can enter the folder and it is not empty, and if the passphrase is too short.
    """
    lock: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        if len(passphrase) < MIN_PASSPHRASE:
            raise ConfigError(
                f"the passphrase is too short: use at least {MIN_PASSPHRASE} characters, such as six words"
            )
        form, lock = serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(passphrase)
    content = key.private_bytes(serialization.Encoding.PEM, form, lock)
    _private_folder(path.parent)
    write(path, content, 0o600)


def write(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a new file, creating its folders with mode 0700; ConfigError if it exists."""
    _make_folder(path.parent)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists and is not overwritten; move it away") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
    with os.fdopen(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def replace(path: Path, content: bytes) -> None:
    """Replace a public file atomically: a reader sees the complete old file or the complete new one.

    The mode is 0644. After a crash the old file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.writing")
    temporary.unlink(missing_ok=True)
    write(temporary, content)
    try:
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be replaced ({error.strerror}); check that you may write it") from error


def replace_with_backup(path: Path, content: bytes) -> Path:
    """Like `replace`, after copying the old file to .old, .old.2, .old.3, ...; return the path of the copy."""
    backup = free_name(path.with_name(f"{path.name}.old"))
    write(backup, _read(path))
    replace(path, content)
    return backup


def free_name(path: Path) -> Path:
    """Return the path, or the first of PATH.2, PATH.3, ... that does not exist."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents with mode 0700; `mkdir(parents=True)` would apply the mode only to the last."""
    for missing in (*reversed(folder.parents), folder):
        if missing.is_dir():
            continue
        try:
            missing.mkdir(mode=0o700)
        except OSError as error:
            raise ConfigError(f"{missing}: cannot be created ({error.strerror}); choose another folder") from error


def _private_folder(folder: Path) -> None:
    _make_folder(folder)
    if not open_to_others(folder):
        return
    if any(folder.iterdir()):
        raise ConfigError(
            f"{folder}: other users can enter this folder, so no private key is written here; run "
            f"`chmod 700 {folder}`, or choose a folder that does not exist yet"
        )
    folder.chmod(0o700)


def open_to_others(path: Path) -> bool:
    """Return whether the group or others have any permission; False where the system has no such modes."""
    return os.name == "posix" and bool(path.stat().st_mode & 0o077)


def read_passphrase(file: Path | None) -> bytes | None:
    """Return the passphrase of the private keys: from the file, else from FEDAMOLE_KEY_PASSPHRASE, else None.

    Raises ConfigError if the file cannot be read, can be read by others, or does not hold exactly one line.
    """
    if file is None:
        return os.environb.get(PASSPHRASE.encode()) or None
    if file.exists() and (not file.is_file() or open_to_others(file)):
        raise ConfigError(f"{file}: a passphrase must be in a regular file with mode 0600; run `chmod 600 {file}`")
    content = _read(file)
    passphrase = content.removesuffix(b"\n").removesuffix(b"\r")
    if not passphrase or b"\n" in passphrase or b"\0" in passphrase:
        raise ConfigError(f"{file}: must hold exactly one line, the passphrase")
    return passphrase


def load_private(path: Path, passphrase: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """Return an EC P-384 private key in either format; ConfigError for anything else.

    The passphrase decrypts an encrypted key and is ignored for one that is not. Errors never contain it.
    """
    key = _parsed_private(path, passphrase)
    if not _is_p384(key):
        raise ConfigError(f"{path}: is not an EC P-384 private key; make a new pair in another folder")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def public_half(path: Path, passphrase: bytes | None = None) -> PublicKeyTypes:
    """Return the public key of a private key file of any kind; ConfigError as for `load_private`."""
    public_key: PublicKeyTypes = _parsed_private(path, passphrase).public_key()
    return public_key


def is_locked(path: Path) -> bool:
    """Return whether a private key is encrypted; ConfigError for a file that is not a private key."""
    try:
        _parse(path, _read(path), None)
    except TypeError:
        return True
    return False


def _parsed_private(path: Path, passphrase: bytes | None) -> "serialization.ssh.SSHPrivateKeyTypes":
    content = _read(path)
    try:
        return _parse(path, content, None)
    except TypeError as error:
        if passphrase is None:
            raise ConfigError(f"{path}: is encrypted: give --passphrase-file or set {PASSPHRASE}") from error
    return _parse(path, content, passphrase)


def _parse(path: Path, content: bytes, passphrase: bytes | None) -> "serialization.ssh.SSHPrivateKeyTypes":
    """Return the key; TypeError if it is encrypted and no passphrase is given."""
    try:
        if b"BEGIN OPENSSH PRIVATE KEY" in content:
            return serialization.load_ssh_private_key(content, passphrase)
        return serialization.load_pem_private_key(content, passphrase)  # type: ignore[return-value]
    except ValueError as error:
        if passphrase is not None:
            raise ConfigError(f"{path}: the passphrase is wrong") from error
        raise ConfigError(f"{path}: is not a readable private key; replace it with the right file") from error
    except UnsupportedAlgorithm as error:
        raise ConfigError(
            f"{path}: has an unsupported encryption or key type; convert it with `ssh-keygen -p -m PKCS8 -f {path}`"
        ) from error


def load_public(path: Path) -> ec.EllipticCurvePublicKey:
    """Return an EC P-384 public key in OpenSSH format; ConfigError for anything else, such as a private key."""
    content = _read(path)
    if b"PRIVATE KEY" in content:
        raise ConfigError(
            f"{path}: is a private key, which must never leave the machine where it was made. If somebody sent it, "
            "its owner must make a new pair and send node.pub"
        )
    try:
        key = serialization.load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path}: is not a public key in OpenSSH format (one line, ecdsa-sha2-nistp384 ...); ask for the node.pub "
            "that was made with the key"
        ) from error
    if not _is_p384(key):
        kind = content.split(b" ", 1)[0].decode("ascii", "replace")
        raise ConfigError(f"{path}: is a key of type {kind}, but EC P-384 (ecdsa-sha2-nistp384) is required")
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


def load_request(path: Path) -> x509.CertificateSigningRequest:
    """Return a certificate signing request (PKCS#10 in PEM) whose signature proves possession of the key.

    Raises ConfigError for anything else.
    """
    content = _read(path)
    try:
        request = x509.load_pem_x509_csr(content)
        genuine = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path}: is not a certificate signing request in PEM format; ask for the file again"
        ) from error
    if not genuine:
        raise ConfigError(f"{path}: the request's signature is invalid: it was damaged or changed; ask for it again")
    return request


def is_request(path: Path) -> bool:
    """Return whether a file claims to be a certificate signing request."""
    return b"BEGIN CERTIFICATE REQUEST" in _read(path) or b"BEGIN NEW CERTIFICATE REQUEST" in _read(path)


def requested_key(path: Path, request: x509.CertificateSigningRequest) -> ec.EllipticCurvePublicKey:
    """Return the public key of a request; ConfigError unless it is EC P-384."""
    key = request.public_key()
    if not _is_p384(key):
        raise ConfigError(f"{path}: its key is not EC P-384; make the request with `fedamole certs --own`")
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


def load_certificates(path: Path) -> list[x509.Certificate]:
    """Return the certificates of a PEM file, at least one; ConfigError for anything else."""
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError as error:
        raise ConfigError(
            f"{path}: is not a certificate in PEM format; convert it (`openssl x509 -inform der` reads "
            "DER, `openssl pkcs7 -print_certs` reads .p7b files)"
        ) from error


def public_line(key: ec.EllipticCurvePublicKey, comment: str) -> bytes:
    """Return a public key in OpenSSH format: type, key and comment on one line."""
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line + f" {comment}\n".encode()


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return a public key in PEM, which Flower uses to identify it."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def comment(path: Path) -> str:
    """Return the comment after the key in an OpenSSH public key file; ConfigError unless the file has one line."""
    try:
        (line,) = _read(path).decode().strip().splitlines()
    except ValueError as error:
        raise ConfigError(f"{path}: must be one line of text (ecdsa-sha2-nistp384 KEY COMMENT)") from error
    return "".join(line.split(None, 2)[2:])


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """Return the fingerprint of a public key, for people to compare; the same as `ssh-keygen -l` prints."""
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _is_p384(key: object) -> bool:
    return isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) and key.curve.name == "secp384r1"


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); choose another file, or correct its permissions"
        ) from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: is too large for a key or certificate; choose another file")
    return content
