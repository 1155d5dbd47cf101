"""`fedamole client` and `fedamole audit-log`. Large packages are imported only when a command runs."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fedamole.cli.deploy import Insecure
from fedamole.cli.options import AsJson
from fedamole.cli.personal import renamed
from fedamole.deployment.requirements import require_flower
from fedamole.terminal import say, say_json, screen


def _write_policy(path: Path | None) -> None:
    """Write the default policy and exit; callback of --write-policy."""
    if path is None:
        return
    from fedamole.deployment.security.policy import default_text
    from fedamole.errors import ConfigError

    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(default_text())
    except OSError as error:
        raise ConfigError(
            f"--write-policy {path}: cannot be written ({error.strerror}); existing files are not overwritten"
        ) from error
    say(f"{path}: the default policy; edit it and use it with --policy")
    raise typer.Exit


def client(
    server: Annotated[str, typer.Option(help="HOST:PORT of the coordinator.")],
    name: Annotated[str, typer.Option(help="This client's name, as in the server's deployment.clients.")],
    data: Annotated[Path, typer.Option(help="Data file: .jsonl, .json, .csv (each also .gz) or .parquet.")],
    certs: Annotated[Path | None, typer.Option(help="Folder with node.key, ca.crt and coordinator.pub.")] = None,
    test: Annotated[
        Path | None, typer.Option(help="Separate test file; default: test rows are split off the data.")
    ] = None,
    template: Annotated[
        str, typer.Option(help="Template that converts rows to prompts; auto: chosen by the columns.")
    ] = "auto",
    column: Annotated[
        list[str] | None, typer.Option(help="Rename a column, e.g. instruction=question; prompt= drops one.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum number of rows to use.")] = None,
    base: Annotated[str | None, typer.Option(help="Local copy of the base model: folder, GGUF file or hub id.")] = None,
    folder: Annotated[Path, typer.Option(help="Folder for run folders.")] = Path("runs"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, max=4096, help="PyTorch's CPU threads; 0: PyTorch's default.")] = 0,
    policy: Annotated[
        Path | None, typer.Option(help="TOML file with this client's limits (docs/consent.md); default: safe limits.")
    ] = None,
    agree: Annotated[
        str, typer.Option(help="Join only the run whose settings have this hash, as printed by the server.")
    ] = "",
    share_labels: Annotated[
        bool, typer.Option("--share-labels", help="Send the server the frequency of each answer; as in a policy.")
    ] = False,
    write_policy: Annotated[
        Path | None,
        typer.Option(
            help="Write the default policy with comments to this file, and exit.",
            callback=_write_policy,
            is_eager=True,
        ),
    ] = None,
    passphrase_file: Annotated[
        Path | None, typer.Option(help="File (mode 0600) with node.key's passphrase; or set FEDAMOLE_KEY_PASSPHRASE.")
    ] = None,
    insecure: Insecure = False,
) -> None:
    """Take part in a federation with data that stay on this machine: only the method's messages leave it.

    Prints what the coordinator requests, compared with the policy. Makes only outgoing connections. Runs until Ctrl-C
    and reconnects automatically. Each run gets a folder FOLDER/<run>-NAME with the personal model in
    clients/NAME/adapter. `fedamole audit-log FOLDER` shows what was sent.
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
    optional = {"test": None if test is None else str(test.resolve()), "limit": limit}
    home = client_home(str(folder), name)
    settings = {
        "source": source | {key: value for key, value in optional.items() if value is not None},
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
        Path, typer.Argument(help="The client's --folder, its home in that folder (.client-NAME), or an audit.jsonl.")
    ] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Show what this client sent, in total and by round, and verify that the log was not changed.

    Exits with 5 if a line is damaged or the chain of hashes is broken.
    """
    from dataclasses import asdict

    from fedamole.deployment.security.audit_log import audit_files, read_audit
    from fedamole.errors import RunError

    summaries = {path: read_audit(path) for path in audit_files(folder)}
    if as_json:
        say_json({str(path): asdict(summary) for path, summary in summaries.items()})
    else:
        from fedamole.cli.audit_table import show_audit

        for path, summary in summaries.items():
            show_audit(screen(wide=160), path, summary)
    if broken := [str(path) for path, summary in summaries.items() if summary.faults]:
        raise RunError(f"{', '.join(broken)}: the log is not intact; see the problems above")
