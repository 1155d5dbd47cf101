"""`fedamole certs`. Nothing heavy is imported before it is needed."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedamole.deployment.requirements import require_flower
from fedamole.terminal import screen

if TYPE_CHECKING:
    from fedamole.deployment.security.certificates import FileChanges

Say = Callable[[str], None]


def certs(
    folder: Annotated[Path, typer.Option(help="Where CA, certificates and keys are kept.")] = Path("certs"),
    host: Annotated[list[str] | None, typer.Option(help="Name or address by which clients reach the server.")] = None,
    own: Annotated[str | None, typer.Option(help="At a client: make its key here; node.csr is sent away.")] = None,
    admit: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: admit the key of a client's node.csr or node.pub.")
    ] = None,
    client: Annotated[
        list[str] | None,
        typer.Option(help="Make a client's key here, to be handed over. You then know its key: --own is safer."),
    ] = None,
    client_days: Annotated[int, typer.Option(help="Days that a newly admitted client key is valid.")] = 365,
    again: Annotated[bool, typer.Option("--again", help="Admit a key although it was removed before.")] = False,
    days: Annotated[int, typer.Option(help="Days that the server certificate is valid.")] = 825,
    renew: Annotated[
        bool, typer.Option("--renew", help="A new server certificate from the CA in this folder, for the same key.")
    ] = False,
    request: Annotated[
        bool, typer.Option("--request", help="Own CA, step 1: write server.key and server.csr; make no CA.")
    ] = False,
    install: Annotated[
        Path | None, typer.Option(help="Own CA, step 2: check and install the signed certificate (PEM).")
    ] = None,
    ca: Annotated[Path | None, typer.Option(help="With --install: the CA's certificates up to the root (PEM).")] = None,
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Ask for a passphrase; new private keys are locked by it.")
    ] = False,
    passphrase_file: Annotated[
        Path | None, typer.Option(help="Read the passphrase from this file, which must have mode 0600.")
    ] = None,
) -> None:
    """Make what a secure federation needs: a CA, the server's certificate, the order key, admitted client keys.

    Existing keys are kept; run it again to add clients. ca.key, server.key and coordinator.key stay with the
    coordinator. Recommended: each client runs --own, and the coordinator runs --admit, so that no private key travels.
    With --client the coordinator makes and knows the client's private key, and could act as that client.
    """
    require_flower()
    from fedamole.deployment.security.certificates import make_certificates
    from fedamole.deployment.security.signing_requests import install_server, request_server
    from fedamole.errors import ConfigError

    console = screen()

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    changes = {"--client": client, "--admit": admit, "--renew": renew}
    _one_of({"--request": request, "--install": install is not None, "--own": own is not None}, changes)
    if (install is None) != (ca is None):
        raise ConfigError("--install SIGNED.crt and --ca CA.crt belong together: give both")
    admitted = [word.partition("=")[::2] for word in admit or []]
    if not all(path for _, path in admitted):
        raise ConfigError("--admit: write NAME=FILE, where FILE is the client's node.csr or node.pub")
    if both := sorted({name for name, _ in admitted} & set(client or [])):
        raise ConfigError(f"{both[0]}: --admit brings a key that it has, --client makes one; give one of the two")
    word = _passphrase(passphrase, passphrase_file)
    hosts = host or []
    if own is not None:
        _own(folder, own, word, say)
    elif request:
        _tell(request_server(folder, hosts, word), say)
        say(f"Have your CA sign {folder / 'server.csr'} as a server certificate, then run")
        say(f"  fedamole certs --folder {folder} --install SIGNED.crt --ca CA.crt")
    elif install is not None and ca is not None:
        _tell(install_server(folder, install, ca, hosts, word), say)
        say("A running server shows the new certificate to new connections; it need not be restarted.")
        say("Each client needs ca.crt and coordinator.pub.")
    else:
        made = make_certificates(
            folder, hosts, client or [], days, renew, client_days=client_days, again=again, passphrase=word
        )
        _tell(made, say)
        if renew:
            say("A running server shows the new certificate to new connections; it need not be restarted.")
        for name in client or []:
            say(f"Hand {folder / 'clients' / name} to {name} on a safe way.")
            say(f"You know the private key of {name}: whoever has this folder can act as {name}. Safer: --own there.")
        for name, file in admitted:
            _admit(folder, name, Path(file), client_days, again, say)


def _one_of(modes: Mapping[str, bool], changes: Mapping[str, object]) -> None:
    """Refuse options of which each asks for something else."""
    from fedamole.errors import ConfigError

    given = [name for name, is_given in modes.items() if is_given]
    others = [name for name, value in changes.items() if value]
    if given and len(given) + len(others) > 1:
        raise ConfigError(f"{', '.join([*given, *others])}: give one of these at a time")


def _passphrase(ask: bool, file: Path | None) -> bytes | None:
    """From the file, else the environment, else the terminal if asked for; None: no passphrase."""
    from fedamole.deployment.security.keys import PASSPHRASE, read_passphrase
    from fedamole.errors import ConfigError

    found = read_passphrase(file)
    if found is not None or not ask:
        return found
    if not sys.stdin.isatty():
        raise ConfigError(f"--passphrase asks on a terminal, and there is none: give --passphrase-file or {PASSPHRASE}")
    return str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=True)).encode()


def _tell(made: "FileChanges", say: Say) -> None:
    """Each file, and of each private key whether it is locked."""
    from fedamole.deployment.security.keys import is_locked

    for what, paths in (("written ", made.written), ("kept    ", made.kept)):
        for path in paths:
            locked = path.suffix == ".key" and is_locked(path)
            say(f"{what} {path}" + (" (locked by a passphrase)" if locked else ""))


def _own(folder: Path, name: str, passphrase: bytes | None, say: Say) -> None:
    """Make a client's own key, and say what to do with it."""
    from fedamole.deployment.security.client_keys import make_own_key
    from fedamole.deployment.security.keys import fingerprint, load_public

    path = make_own_key(folder, name, passphrase)
    say(f"Send {path} to the coordinator; node.key beside it never leaves this machine.")
    say(f"Fingerprint: {fingerprint(load_public(folder / 'node.pub'))}")
    say(f"The coordinator sends back ca.crt and coordinator.pub, which belong into {folder}.")


def _admit(folder: Path, name: str, file: Path, days: int, again: bool, say: Say) -> None:
    """Admit a client's key, and say what the client needs."""
    from fedamole.deployment.security.client_keys import admit, read
    from fedamole.deployment.security.keys import fingerprint

    found = read(name, admit(folder, name, file, days, again))
    end = "without a last day" if found.until is None else f"until {found.until}"
    say(f"admitted {found.path} {end}, fingerprint {fingerprint(found.key)}")
    say(f"Send {name} these two files: {folder / 'ca.crt'} and {folder / 'coordinator.pub'}")
