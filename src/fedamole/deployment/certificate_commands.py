"""`fedamole certs`. Nothing heavy is imported before it is needed."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedamole.deployment.requirements import require_flower


def certs(
    folder: Annotated[Path, typer.Option(help="Where CA, certificates and keys are kept.")] = Path("certs"),
    host: Annotated[list[str] | None, typer.Option(help="Name or address by which clients reach the server.")] = None,
    client: Annotated[list[str] | None, typer.Option(help="Make a key for this client, to be handed over.")] = None,
    admit: Annotated[list[str] | None, typer.Option(help="NAME=FILE.pub: admit a key made by its client.")] = None,
    own: Annotated[str | None, typer.Option(help="At a client: make a key of one's own; send the .pub only.")] = None,
    renew: Annotated[bool, typer.Option("--renew", help="A new server certificate from the same CA.")] = False,
    days: Annotated[int, typer.Option(help="Days that the server certificate is valid.")] = 825,
) -> None:
    """Make what a secure federation needs: a CA, the server's certificate, a key for each client.

    Existing files are kept; run it again to add clients.  Hand certs/clients/NAME to the organisation NAME, and keep
    ca.key and server.key to yourself.
    """
    require_flower()
    from fedamole.deployment.certificates import admit as admit_key
    from fedamole.deployment.certificates import make_certificates, make_own_key
    from fedamole.errors import ConfigError

    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if own is not None:
        say(f"{make_own_key(folder, own)} is for the coordinator; node.key beside it never leaves this machine")
        return
    admitted = [word.partition("=")[::2] for word in admit or []]
    if not all(path for _, path in admitted):
        raise ConfigError("--admit: write NAME=FILE.pub")
    if both := sorted({name for name, _ in admitted} & set(client or [])):
        raise ConfigError(f"{both[0]}: --admit brings a key that it has, --client makes one; give one of the two")
    made = make_certificates(folder, host or [], client or [], days, renew)
    for path in made.written:
        say(f"written  {path}")
    for path in made.kept:
        say(f"kept     {path}")
    for name, public in admitted:
        say(f"admitted {admit_key(folder, name, Path(public))}")
