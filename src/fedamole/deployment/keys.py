"""Key files: written once and for their owner alone, read with errors that never quote them."""

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


def new_key() -> ec.EllipticCurvePrivateKey:
    """A key on the curve P-384, the one that Flower's own keys are on."""
    return ec.generate_private_key(ec.SECP384R1())


def write_private(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    """Write a private key with mode 0600 into a folder of mode 0700; PKCS8 for TLS, OpenSSH for Flower's nodes.

    Raises ConfigError where the file exists, and where the folder is open to others and not empty.
    """
    content = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
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


def load_private(path: Path) -> ec.EllipticCurvePrivateKey:
    """A private key made here, in either form; anything else is a ConfigError."""
    key = _parsed_private(path)
    if not _is_p384(key):
        raise ConfigError(f"{path}: is no private key of kind EC P-384; make a new pair in another folder")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def public_half(path: Path) -> PublicKeyTypes:
    """The public key of a private key file of any kind; ConfigError for one that cannot be read without a password."""
    half: PublicKeyTypes = _parsed_private(path).public_key()
    return half


def _parsed_private(path: Path) -> "serialization.ssh.SSHPrivateKeyTypes":
    content = _read(path)
    try:
        if b"BEGIN OPENSSH PRIVATE KEY" in content:
            return serialization.load_ssh_private_key(content, None)
        return serialization.load_pem_private_key(content, None)  # type: ignore[return-value]
    except TypeError as error:
        raise ConfigError(f"{path}: is locked by a password, which a server cannot type; store it without") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: is no private key that can be read; put the right file here") from error


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


def load_certificates(path: Path) -> list[x509.Certificate]:
    """The certificates of a PEM file, at least one; ConfigError for anything else."""
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError as error:
        raise ConfigError(f"{path}: is no certificate in PEM format; put the right file here") from error


def public_line(key: ec.EllipticCurvePublicKey, comment: str) -> bytes:
    """A public key as OpenSSH writes it: kind, key and comment on one line."""
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line + f" {comment}\n".encode()


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key in PEM, the form in which Flower names it."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


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
