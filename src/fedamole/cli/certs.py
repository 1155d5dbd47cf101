"""`fedamole certs`. Large packages are imported only when the command runs."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedamole.deployment.requirements import require_flower
from fedamole.deployment.security.dates import CLIENT_DAYS, SERVER_DAYS
from fedamole.terminal import say

if TYPE_CHECKING:
    from fedamole.deployment.security.certificates import FileChanges


def certs(
    folder: Annotated[Path, typer.Option(help="Folder of CA, certificates and keys.")] = Path("certs"),
    host: Annotated[list[str] | None, typer.Option(help="Name or address by which clients reach the server.")] = None,
    own: Annotated[
        str | None, typer.Option(help="At the client NAME: make its key; send node.csr to the coordinator.")
    ] = None,
    admit: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: admit a client's key from its node.csr or node.pub.")
    ] = None,
    client: Annotated[
        list[str] | None,
        typer.Option(help="Make a client's key here and hand it over. You then know the key: --own is safer."),
    ] = None,
    client_days: Annotated[int, typer.Option(help="Validity of newly admitted client keys in days.")] = CLIENT_DAYS,
    again: Annotated[bool, typer.Option("--again", help="Admit a key that was removed before.")] = False,
    days: Annotated[int, typer.Option(help="Validity of the server certificate in days.")] = SERVER_DAYS,
    renew: Annotated[
        bool,
        typer.Option("--renew", help="Issue a new server certificate for the same key with the CA in this folder."),
    ] = False,
    request: Annotated[
        bool, typer.Option("--request", help="Your own CA, step 1: write server.key and server.csr; make no CA.")
    ] = False,
    install: Annotated[
        Path | None, typer.Option(help="Your own CA, step 2: check and install the signed certificate (PEM).")
    ] = None,
    ca: Annotated[Path | None, typer.Option(help="With --install: the CA certificates up to the root (PEM).")] = None,
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Prompt for a passphrase that encrypts new private keys.")
    ] = False,
    passphrase_file: Annotated[
        Path | None, typer.Option(help="Read the passphrase from this file (mode 0600).")
    ] = None,
) -> None:
    """Make what a secure federation needs: a CA, the server certificate, the order key, and admitted client keys.

    Existing keys are kept; run it again to add clients. ca.key, server.key and coordinator.key stay with the
    coordinator. Recommended: each client runs --own and the coordinator runs --admit, so no private key is sent. With
    --client the coordinator makes and knows the client's private key, and could act as that client.
    """
    require_flower()
    from fedamole.deployment.security.certificates import make_certificates
    from fedamole.deployment.security.signing_requests import install_server, request_server
    from fedamole.errors import ConfigError

    changes = {"--client": client, "--admit": admit, "--renew": renew}
    _one_of({"--request": request, "--install": install is not None, "--own": own is not None}, changes)
    if (install is None) != (ca is None):
        raise ConfigError("--install SIGNED.crt and --ca CA.crt must be given together")
    admitted = [argument.partition("=")[::2] for argument in admit or []]
    if not all(path for _, path in admitted):
        raise ConfigError("--admit: write NAME=FILE, where FILE is the client's node.csr or node.pub")
    if both := sorted({name for name, _ in admitted} & set(client or [])):
        raise ConfigError(f"{both[0]}: --admit uses the client's key, --client makes a new one; give one of the two")
    passphrase_bytes = _passphrase(passphrase, passphrase_file)
    hosts = host or []
    if own is not None:
        _own(folder, own, passphrase_bytes)
    elif request:
        _print_changes(request_server(folder, hosts, passphrase_bytes))
        say(f"Ask your CA to sign {folder / 'server.csr'} as a server certificate, then run")
        say(f"  fedamole certs --folder {folder} --install SIGNED.crt --ca CA.crt")
    elif install is not None and ca is not None:
        _print_changes(install_server(folder, install, ca, hosts, passphrase_bytes))
        say("A running server uses the new certificate for new connections, without a restart.")
        say("Each client needs ca.crt and coordinator.pub.")
    else:
        file_changes = make_certificates(
            folder, hosts, client or [], days, renew, client_days=client_days, again=again, passphrase=passphrase_bytes
        )
        _print_changes(file_changes)
        if renew:
            say("A running server uses the new certificate for new connections, without a restart.")
        for name in client or []:
            say(f"Send {folder / 'clients' / name} to {name} over a secure channel.")
            say(f"This folder contains the private key of {name}: anyone who has it can act as {name}. --own is safer.")
        for name, file in admitted:
            _admit(folder, name, Path(file), client_days, again)


def _one_of(modes: Mapping[str, bool], changes: Mapping[str, object]) -> None:
    """Refuse combinations of options that exclude each other."""
    from fedamole.errors import ConfigError

    given = [name for name, is_given in modes.items() if is_given]
    others = [name for name, value in changes.items() if value]
    if given and len(given) + len(others) > 1:
        raise ConfigError(f"{', '.join([*given, *others])}: give only one of these")


def _passphrase(ask: bool, file: Path | None) -> bytes | None:
    """Return the passphrase from the file, the environment, or the terminal if `ask`; None: no passphrase."""
    from fedamole.deployment.security.keys import PASSPHRASE, read_passphrase
    from fedamole.errors import ConfigError

    value = read_passphrase(file)
    if value is not None or not ask:
        return value
    if not sys.stdin.isatty():
        raise ConfigError(f"--passphrase needs a terminal: give --passphrase-file or set {PASSPHRASE} instead")
    return str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=True)).encode()


def _print_changes(changes: "FileChanges") -> None:
    """Print each file, and for each private key whether it is encrypted."""
    from fedamole.deployment.security.keys import is_locked

    for label, paths in (("written ", changes.written), ("kept    ", changes.kept)):
        for path in paths:
            locked = path.suffix == ".key" and is_locked(path)
            say(f"{label} {path}" + (" (encrypted)" if locked else ""))


def _own(folder: Path, name: str, passphrase: bytes | None) -> None:
    """Make a client's own key, and print the next steps."""
    from fedamole.deployment.security.client_keys import make_own_key
    from fedamole.deployment.security.keys import fingerprint, load_public

    path = make_own_key(folder, name, passphrase)
    say(f"Send {path} to the coordinator; node.key in the same folder must never leave this machine.")
    say(f"Fingerprint: {fingerprint(load_public(folder / 'node.pub'))}")
    say(f"The coordinator sends back ca.crt and coordinator.pub; put them into {folder}.")


def _admit(folder: Path, name: str, file: Path, days: int, again: bool) -> None:
    """Admit a client's key, and print which files the client needs."""
    from fedamole.deployment.security.client_keys import admit, read
    from fedamole.deployment.security.keys import fingerprint

    key = read(name, admit(folder, name, file, days, again))
    end = "without expiry" if key.until is None else f"until {key.until}"
    say(f"admitted {key.path} {end}, fingerprint {fingerprint(key.key)}")
    say(f"Send {name} these two files: {folder / 'ca.crt'} and {folder / 'coordinator.pub'}")
