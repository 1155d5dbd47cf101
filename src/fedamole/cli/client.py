"""`fedamole client` and `fedamole audit-log`. Nothing heavy is imported before it is needed."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fedamole.cli.deploy import Insecure
from fedamole.cli.personal import renamed
from fedamole.deployment.requirements import require_flower
from fedamole.terminal import say, say_json, screen


def _write_policy(path: Path | None) -> None:
    """Write the default policy and end; for the option of this name."""
    if path is None:
        return
    from fedamole.deployment.security.policy import default_text
    from fedamole.errors import ConfigError

    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(default_text())
    except OSError as error:
        raise ConfigError(
            f"--write-policy {path}: cannot be written ({error.strerror}); nothing is overwritten"
        ) from error
    say(f"{path}: the default policy; change what you want and give it by --policy")
    raise typer.Exit


def client(
    server: Annotated[str, typer.Option(help="host:port of the coordinator.")],
    name: Annotated[str, typer.Option(help="This organisation's name, as in the server's deployment.clients.")],
    data: Annotated[Path, typer.Option(help="Its rows: .jsonl, .json, .csv (each also .gz) or .parquet.")],
    certs: Annotated[Path | None, typer.Option(help="Folder with ca.crt and node.key from the coordinator.")] = None,
    test: Annotated[Path | None, typer.Option(help="Its own test file; else test rows are cut from the data.")] = None,
    template: Annotated[str, typer.Option(help="How rows become prompts; auto chooses by the columns.")] = "auto",
    column: Annotated[
        list[str] | None, typer.Option(help="A column under another name, instruction=question; prompt= drops one.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most so many rows.")] = None,
    base: Annotated[str | None, typer.Option(help="This machine's copy of the base model: folder or hub id.")] = None,
    folder: Annotated[Path, typer.Option(help="Where its run folders are written.")] = Path("runs"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, max=4096, help="PyTorch's threads on a CPU; 0: its own choice.")] = 0,
    policy: Annotated[
        Path | None, typer.Option(help="What it consents to, a TOML file (docs/consent.md); else the safe defaults.")
    ] = None,
    agree: Annotated[
        str, typer.Option(help="Take part only in the run whose settings have this hash, as the server prints it.")
    ] = "",
    share_labels: Annotated[
        bool, typer.Option("--share-labels", help="Tell the server how often each answer occurs; as in a policy.")
    ] = False,
    write_policy: Annotated[
        Path | None,
        typer.Option(
            help="Write the default policy with comments into this file, and end.",
            callback=_write_policy,
            is_eager=True,
        ),
    ] = None,
    passphrase_file: Annotated[
        Path | None, typer.Option(help="File (mode 0600) with node.key's passphrase; or set FEDAMOLE_KEY_PASSPHRASE.")
    ] = None,
    insecure: Insecure = False,
) -> None:
    """Take part in a federation with data that stay here: only what the method sends leaves this machine.

    What the coordinator asks is shown, and compared with the policy. Only outgoing connections are made. Runs until
    Ctrl-C and reconnects by itself; for every run it takes part in there is a folder FOLDER/<run>-NAME, and in it the
    personal model: clients/NAME/adapter. `fedamole audit-log FOLDER` shows what left.
    """
    require_flower()
    from dataclasses import replace

    from fedamole.config import plain
    from fedamole.deployment.client_processes import ClientProcesses, ServerConnection, client_home
    from fedamole.deployment.processes import without_proxy
    from fedamole.deployment.security.audit_log import AUDIT
    from fedamole.deployment.security.keys import read_passphrase
    from fedamole.deployment.security.policy import PolicySettings, read_policy
    from fedamole.deployment.shared_config import check_agree
    from fedamole.errors import DataError

    for path in (data, test):
        if path is not None and not path.exists():
            raise DataError(f"there is no file {path}")
    limits = PolicySettings() if policy is None else read_policy(policy)
    if share_labels:
        limits = replace(limits, share_labels=True)
    columns = renamed(column)
    source = {"name": name, "path": str(data.resolve()), "template": template, "columns": columns}
    more = {"test": None if test is None else str(test.resolve()), "limit": limit}
    home = client_home(str(folder), name)
    settings = {
        "source": source | {key: value for key, value in more.items() if value is not None},
        "folder": str(folder.resolve()),
        "device": device,
        "threads": threads,
        "policy": plain(limits),
        "agree": check_agree(agree) if agree else "",
        "audit": str(home / AUDIT),
        **({} if base is None else {"base": base}),
    }
    console = screen(error=True)
    os.environ.update(without_proxy())
    ClientProcesses(
        ServerConnection(server, certs, insecure),
        name,
        settings,
        home,
        lambda text: console.print(text, soft_wrap=True),
        read_passphrase(passphrase_file),
    ).run()


def audit_log(
    folder: Annotated[
        Path, typer.Argument(help="The client's --folder, its home in there (.client-NAME), or an audit.jsonl.")
    ] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")] = False,
) -> None:
    """Show what ever left this client, in totals and by round, and check that the log was not changed.

    Ends with 5 where a line is damaged or the chain of hashes is broken.
    """
    from dataclasses import asdict

    from fedamole.deployment.security.audit_log import audit_files, read_audit
    from fedamole.errors import RunError

    found = {path: read_audit(path) for path in audit_files(folder)}
    if as_json:
        say_json({str(path): asdict(one) for path, one in found.items()})
    else:
        from fedamole.cli.audit_table import show_audit

        for path, one in found.items():
            show_audit(screen(wide=160), path, one)
    if broken := [str(path) for path, one in found.items() if one.faults]:
        raise RunError(f"{', '.join(broken)}: the log is not whole; what is wrong with it is above")
