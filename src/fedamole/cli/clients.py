"""`fedamole clients`: the keys that a server admits. Nothing heavy is imported before it is needed."""

from pathlib import Path
from typing import Annotated

import typer

from fedamole.deployment.requirements import require_flower
from fedamole.terminal import say_json, screen

app = typer.Typer(
    no_args_is_help=True,
    help="The client keys that a server admits: list them, let them end later, remove or replace them.\n\n"
    "New keys are admitted by `fedamole certs --admit`. A running server follows these changes.",
)

Name = Annotated[str, typer.Argument(help="The client's name.")]
Certs = Annotated[Path, typer.Option(help="The coordinator's folder made by `fedamole certs`.")]
Days = Annotated[int, typer.Option(help="Days from today for which the key is valid.")]
FOLDER = Path("certs")


@app.command("list")
def show(
    certs: Certs = FOLDER,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")] = False,
) -> None:
    """List every key: client, fingerprint, last valid day, state (valid, ends soon, expired, removed, unreadable)."""
    rows = _rows(_folder(certs))
    if as_json:
        say_json(rows)
        return
    widths = {column: max(len(row[column]) for row in rows) for column in (rows[0] if rows else ())}
    for row in rows:
        _say("  ".join(value.ljust(widths[column]) for column, value in row.items()).rstrip())
    if not rows:
        _say(f"{certs}: no key is admitted; `fedamole certs --admit NAME=FILE` admits one")


@app.command()
def extend(name: Name, certs: Certs = FOLDER, days: Days = 365) -> None:
    """Let a client's key end later: it is valid for DAYS days from today. The client need not do anything."""
    from fedamole.deployment.security.client_keys import extend as extend_key

    found = extend_key(_folder(certs), name, days)
    _say(f"{name} is admitted until {found.until}")


@app.command()
def remove(name: Name, certs: Certs = FOLDER) -> None:
    """Refuse a client's key from now on. Its file is moved to nodes/removed, nothing is deleted."""
    from fedamole.deployment.security.client_keys import remove as remove_key

    target = remove_key(_folder(certs), name)
    _say(f"{name} is removed; its key is now {target}")
    _say("A running server refuses this key at once, and it stays refused after `fedamole server --resume`.")


@app.command()
def replace(
    name: Name,
    file: Annotated[Path, typer.Argument(help="The client's new node.csr or node.pub.")],
    certs: Certs = FOLDER,
    days: Days = 365,
) -> None:
    """Take a client's new key in place of its old one, in one step. The new key is checked before."""
    from fedamole.deployment.security.client_keys import replace_key
    from fedamole.deployment.security.keys import fingerprint

    found, target = replace_key(_folder(certs), name, file, days)
    _say(f"{name} has the key {fingerprint(found.key)}, valid until {found.until}; the old key is now {target}")
    _say("A running server refuses the old key at once, and it stays refused after `fedamole server --resume`.")


def _folder(certs: Path) -> Path:
    from fedamole.errors import ConfigError

    require_flower()
    if not certs.is_dir():
        raise ConfigError(f"there is no folder {certs}; name the coordinator's folder by --certs")
    return certs


def _say(text: str) -> None:
    screen().print(text, soft_wrap=True)


def _rows(folder: Path) -> list[dict[str, str]]:
    """A row for each admitted key, then one for each removed key that is not admitted again."""
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
        found = read(name, path, is_removed)
    except ConfigError:
        return {"client": name, "fingerprint": str(path), "until": "", "state": "unreadable"}
    until = "no end" if found.until is None else found.until.isoformat()
    return {"client": name, "fingerprint": fingerprint(found.key), "until": until, "state": found.state}
