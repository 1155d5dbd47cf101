"""`fedamole doctor`. Nothing heavy is imported before it is needed."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from fedamole.cli.personal import renamed
from fedamole.terminal import say_json, screen


def doctor(
    config: Annotated[Path | None, typer.Option(help="The run's config; at a client its templates are read.")] = None,
    server: Annotated[str | None, typer.Option(help="Client: host:port of the coordinator.")] = None,
    certs: Annotated[Path | None, typer.Option(help="Folder with certificates or keys.")] = None,
    base: Annotated[str | None, typer.Option(help="Client: its copy of the base model.")] = None,
    data: Annotated[Path | None, typer.Option(help="Client: its data file.")] = None,
    template: Annotated[str, typer.Option(help="Client: the template that it will name.")] = "auto",
    column: Annotated[list[str] | None, typer.Option(help="Client: as for `fedamole client`.")] = None,
    host: Annotated[str, typer.Option(help="Server: address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Server: port to listen on.")] = 9092,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of lines.")] = False,
) -> None:
    """Find out what is wrong with a set-up before it fails: a server's (default), or a client's (with --server).

    Looks at versions, ports, certificates, the way to the server (through a proxy too), base, data columns, disk and
    device; shows no content of data.
    """
    from dataclasses import asdict

    from fedamole.deployment.doctor import examine_client, examine_server

    at_client = server is not None or data is not None
    if at_client:
        found = examine_client(server, certs, base, data, template, renamed(column), config)
    else:
        found = examine_server(config, certs, host, port)
    if as_json:
        say_json([asdict(finding) for finding in found])
    else:
        console = screen()
        marks = {"ok": Text("ok", "green"), "warning": Text("!!", "yellow"), "problem": Text("no", "red")}
        for finding in found:
            console.print(marks[finding.state], end=" ")
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            console.print(f"{finding.what:<12} {finding.text}{remedy}", soft_wrap=True)
    if any(finding.state == "problem" for finding in found):
        raise typer.Exit(1)
