"""Key files: written once and for their owner alone, read with errors that never quote them."""

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

LARGEST = 64 * 1024
"""Bytes; no file read here is longer."""
PASSPHRASE = "FEDAMOLE_KEY_PASSPHRASE"
"""Environment variable with the passphrase of the private keys."""
SHORTEST = 12
"""Characters. A key file slows guessing down very little (PBKDF2 with 2048 rounds), so the passphrase must be long."""


def new_key() -> ec.EllipticCurvePrivateKey:
    """A key on the curve P-384, the one that Flower's own keys are on."""
    return ec.generate_private_key(ec.SECP384R1())


def write_private(
    path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat, passphrase: bytes | None = None
) -> None:
    """Write a private key with mode 0600 into a folder of mode 0700; PKCS8 for TLS, OpenSSH for Flower's nodes.

    With a passphrase the key is encrypted, always in PKCS8: OpenSSH's own encryption needs one more package.
    Raises ConfigError where the file exists, where the folder is open to others and not empty, and for a passphrase
    that is too short.
    """
    lock: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        if len(passphrase) < SHORTEST:
            raise ConfigError(f"the passphrase is too short: use at least {SHORTEST} characters, such as six words")
        form, lock = serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(passphrase)
    content = key.private_bytes(serialization.Encoding.PEM, form, lock)
    _private_folder(path.parent)
    write(path, content, 0o600)


def write(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a new file, in folders that are made for their owner alone; ConfigError where it exists."""
    _make_folder(path.parent)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists, and no file is overwritten; move it away") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
    with os.fdopen(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def replace(path: Path, content: bytes) -> None:
    """Put new content into a public file in one step, so that a reader sees the old file or the new one, whole.

    The mode is 0644. A crash leaves the old file as it was.
    """
    temporary = path.with_name(f".{path.name}.writing")
    temporary.unlink(missing_ok=True)
    write(temporary, content)
    try:
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be replaced ({error.strerror}); is it a file that you may write?") from error


def replace_with_backup(path: Path, content: bytes) -> Path:
    """As `replace`, after a copy of the old file under the name that is returned: .old, .old.2, .old.3, ..."""
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
    """Make a folder and those above it; `mkdir(parents=True)` would give the mode to the last alone."""
    for place in (*reversed(folder.parents), folder):
        if place.is_dir():
            continue
        try:
            place.mkdir(mode=0o700)
        except OSError as error:
            raise ConfigError(f"{place}: cannot be made ({error.strerror}); choose another folder") from error


def _private_folder(folder: Path) -> None:
    _make_folder(folder)
    if not open_to_others(folder):
        return
    if any(folder.iterdir()):
        raise ConfigError(
            f"{folder}: a private key is to lie here, and others on this machine can enter this folder; "
            f"`chmod 700 {folder}`, or choose a folder that does not exist yet"
        )
    folder.chmod(0o700)


def open_to_others(path: Path) -> bool:
    """Whether the group or everybody may read, write or enter; never where modes mean nothing."""
    return os.name == "posix" and bool(path.stat().st_mode & 0o077)


def read_passphrase(file: Path | None) -> bytes | None:
    """Return the passphrase of the private keys: that of the file, else of FEDAMOLE_KEY_PASSPHRASE, else None.

    Raises ConfigError where the file cannot be read, can be read by others, or does not hold one line.
    """
    if file is None:
        return os.environb.get(PASSPHRASE.encode()) or None
    if file.exists() and (not file.is_file() or open_to_others(file)):
        raise ConfigError(f"{file}: a passphrase must be in a regular file with mode 0600; `chmod 600 {file}`")
    content = _read(file)
    passphrase = content.removesuffix(b"\n").removesuffix(b"\r")
    if not passphrase or b"\n" in passphrase or b"\0" in passphrase:
        raise ConfigError(f"{file}: must hold the passphrase on one line and nothing else")
    return passphrase


def load_private(path: Path, passphrase: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """Return a private key of kind EC P-384, in either form; anything else is a ConfigError.

    The passphrase opens a locked key and is not needed for one that is not locked. Errors never show it.
    """
    key = _parsed_private(path, passphrase)
    if not _is_p384(key):
        raise ConfigError(f"{path}: is no private key of kind EC P-384; make a new pair in another folder")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def public_half(path: Path, passphrase: bytes | None = None) -> PublicKeyTypes:
    """Return the public key of a private key file of any kind; ConfigError as `load_private`."""
    half: PublicKeyTypes = _parsed_private(path, passphrase).public_key()
    return half


def is_locked(path: Path) -> bool:
    """Whether a private key is locked by a passphrase; ConfigError for a file that is no private key."""
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
            raise ConfigError(
                f"{path}: is locked by a passphrase: give --passphrase-file or set {PASSPHRASE}"
            ) from error
    return _parse(path, content, passphrase)


def _parse(path: Path, content: bytes, passphrase: bytes | None) -> "serialization.ssh.SSHPrivateKeyTypes":
    """The key; TypeError where a passphrase is needed and none is given."""
    try:
        if b"BEGIN OPENSSH PRIVATE KEY" in content:
            return serialization.load_ssh_private_key(content, passphrase)
        return serialization.load_pem_private_key(content, passphrase)  # type: ignore[return-value]
    except ValueError as error:
        if passphrase is not None:
            raise ConfigError(f"{path}: the passphrase is wrong") from error
        raise ConfigError(f"{path}: is no private key that can be read; put the right file here") from error
    except UnsupportedAlgorithm as error:
        raise ConfigError(
            f"{path}: is encrypted in a form, or of a kind, that cannot be read here; "
            f"`ssh-keygen -p -m PKCS8 -f {path}` rewrites it in one that can"
        ) from error


def load_public(path: Path) -> ec.EllipticCurvePublicKey:
    """An OpenSSH public key of kind EC P-384; anything else is a ConfigError, a private key above all."""
    content = _read(path)
    if b"PRIVATE KEY" in content:
        raise ConfigError(
            f"{path}: is a private key, which must never leave the machine it was made on. If it came from elsewhere, "
            "its owner has to make a new pair; what is sent is node.pub"
        )
    try:
        key = serialization.load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path}: is no public key in OpenSSH format (one line, ecdsa-sha2-nistp384 ...); ask for the node.pub "
            "that was made with the key"
        ) from error
    if not _is_p384(key):
        kind = content.split(b" ", 1)[0].decode("ascii", "replace")
        raise ConfigError(f"{path}: is a key of kind {kind}, needed is EC P-384 (ecdsa-sha2-nistp384)")
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


def load_request(path: Path) -> x509.CertificateSigningRequest:
    """Return a certificate signing request (PKCS#10 in PEM) whose signature shows that its author has the key.

    Raises ConfigError for anything else.
    """
    content = _read(path)
    try:
        request = x509.load_pem_x509_csr(content)
        genuine = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: is no certificate signing request in PEM format; ask for the file again") from error
    if not genuine:
        raise ConfigError(f"{path}: the request's signature is not valid; it was damaged or changed, ask for it again")
    return request


def is_request(path: Path) -> bool:
    """Whether a file claims to be a certificate signing request."""
    return b"BEGIN CERTIFICATE REQUEST" in _read(path) or b"BEGIN NEW CERTIFICATE REQUEST" in _read(path)


def requested_key(path: Path, request: x509.CertificateSigningRequest) -> ec.EllipticCurvePublicKey:
    """Return the public key of a request; ConfigError unless it is of kind EC P-384."""
    key = request.public_key()
    if not _is_p384(key):
        raise ConfigError(f"{path}: is for a key of another kind than EC P-384; make it by `fedamole certs --own`")
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


def load_certificates(path: Path) -> list[x509.Certificate]:
    """The certificates of a PEM file, at least one; ConfigError for anything else."""
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError as error:
        raise ConfigError(
            f"{path}: is no certificate in PEM format; put the right file here (`openssl x509 -inform der` reads "
            "DER, `openssl pkcs7 -print_certs` reads .p7b files)"
        ) from error


def public_line(key: ec.EllipticCurvePublicKey, comment: str) -> bytes:
    """A public key as OpenSSH writes it: kind, key and comment on one line."""
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line + f" {comment}\n".encode()


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key in PEM, the form in which Flower names it."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def comment(path: Path) -> str:
    """Return what stands after the key on the one line of an OpenSSH public key file; ConfigError for several lines."""
    try:
        (line,) = _read(path).decode().strip().splitlines()
    except ValueError as error:
        raise ConfigError(f"{path}: must be one line of text (ecdsa-sha2-nistp384 KEY COMMENT)") from error
    return "".join(line.split(None, 2)[2:])


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """Return a short form of a public key, to be compared by people; the same as `ssh-keygen -l` shows."""
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _is_p384(key: object) -> bool:
    return isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) and key.curve.name == "secp384r1"


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name another file, or mend its mode") from error
    if len(content) > LARGEST:
        raise ConfigError(f"{path}: is far too long for a key or certificate; name another file")
    return content
