"""`fedamole clients`: the keys that a server admits. Large packages are imported only when a command runs."""

from pathlib import Path
from typing import Annotated

import typer

from fedamole.cli.options import AsJson
from fedamole.deployment.requirements import require_flower
from fedamole.deployment.security.dates import CLIENT_DAYS
from fedamole.terminal import say, say_json

app = typer.Typer(
    no_args_is_help=True,
    help="The client keys that a server admits: list, extend, remove or replace them.\n\n"
    "Admit new keys with `fedamole certs --admit`. A running server applies these changes.",
)

Name = Annotated[str, typer.Argument(help="The client's name.")]
Certs = Annotated[Path, typer.Option(help="The coordinator's folder made by `fedamole certs`.")]
Days = Annotated[int, typer.Option(help="Validity of the key in days from today.")]
FOLDER = Path("certs")


@app.command("list")
def show(
    certs: Certs = FOLDER,
    as_json: AsJson = False,
) -> None:
    """List every key: client, fingerprint, last valid day, state (valid, ends soon, expired, removed, unreadable)."""
    rows = _rows(_folder(certs))
    if as_json:
        say_json(rows)
        return
    widths = {column: max(len(row[column]) for row in rows) for column in (rows[0] if rows else ())}
    for row in rows:
        say("  ".join(value.ljust(widths[column]) for column, value in row.items()).rstrip())
    if not rows:
        say(f"{certs}: no key is admitted; admit one with `fedamole certs --admit NAME=FILE`")


@app.command()
def extend(name: Name, certs: Certs = FOLDER, days: Days = CLIENT_DAYS) -> None:
    """Extend a client's key: it is then valid for DAYS days from today. The client need not do anything."""
    from fedamole.deployment.security.client_keys import extend as extend_key

    key = extend_key(_folder(certs), name, days)
    say(f"{name} is admitted until {key.until}")


@app.command()
def remove(name: Name, certs: Certs = FOLDER) -> None:
    """Refuse a client's key from now on. Its file is moved to nodes/removed; nothing is deleted."""
    from fedamole.deployment.security.client_keys import remove as remove_key

    target = remove_key(_folder(certs), name)
    say(f"{name} is removed; its key was moved to {target}")
    say("A running server refuses this key at once, and it stays refused after `fedamole server --resume`.")


@app.command()
def replace(
    name: Name,
    file: Annotated[Path, typer.Argument(help="The client's new node.csr or node.pub.")],
    certs: Certs = FOLDER,
    days: Days = CLIENT_DAYS,
) -> None:
    """Replace a client's key by a new one in one step, after checking the new key."""
    from fedamole.deployment.security.client_keys import replace_key
    from fedamole.deployment.security.keys import fingerprint

    key, target = replace_key(_folder(certs), name, file, days)
    say(f"{name} has the key {fingerprint(key.key)}, valid until {key.until}; the old key was moved to {target}")
    say("A running server refuses the old key at once, and it stays refused after `fedamole server --resume`.")


def _folder(certs: Path) -> Path:
    from fedamole.errors import ConfigError

    require_flower()
    if not certs.is_dir():
        raise ConfigError(f"there is no folder {certs}; give the coordinator's folder with --certs")
    return certs


def _rows(folder: Path) -> list[dict[str, str]]:
    """Return a row for each admitted key, then one for each removed key that is not admitted again."""
    from fedamole.deployment.security.client_keys import key_files, removed

    rows = [_row(name, path) for name, path in key_files(folder).items()]
    admitted = {row["fingerprint"] for row in rows}
    gone = [_row(name, path, is_removed=True) for name, path in removed(folder)]
    return rows + [row for row in gone if row["fingerprint"] not in admitted]


def _row(name: str, path: Path, is_removed: bool = False) -> dict[str, str]:
    from fedamole.deployment.security.client_keys import read
    from fedamole.deployment.security.keys import fingerprint
    from fedamole.errors import ConfigError

    try:
        key = read(name, path, is_removed)
    except ConfigError:
        return {"client": name, "fingerprint": str(path), "until": "", "state": "unreadable"}
    until = "no expiry" if key.until is None else key.until.isoformat()
    return {"client": name, "fingerprint": fingerprint(key.key), "until": until, "state": key.state}
