"""`fedamole doctor`. Large packages are imported only when the command runs."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from fedamole.cli.deploy import HOST, PORT, Port
from fedamole.cli.options import AsJson
from fedamole.cli.personal import renamed
from fedamole.terminal import say_json, screen


def doctor(
    config: Annotated[
        Path | None, typer.Option(help="The run's config; at a client only its templates are read.")
    ] = None,
    server: Annotated[str | None, typer.Option(help="Client: HOST:PORT of the coordinator.")] = None,
    certs: Annotated[Path | None, typer.Option(help="Folder with certificates or keys.")] = None,
    base: Annotated[str | None, typer.Option(help="Client: local copy of the base model.")] = None,
    data: Annotated[Path | None, typer.Option(help="Client: data file.")] = None,
    template: Annotated[str, typer.Option(help="Client: template of the data.")] = "auto",
    column: Annotated[list[str] | None, typer.Option(help="Client: as for `fedamole client`.")] = None,
    host: Annotated[str, typer.Option(help="Server: address to listen on.")] = HOST,
    port: Port = PORT,
    as_json: AsJson = False,
) -> None:
    """Check a set-up for problems before it is used: a server's (default), or a client's (with --server or --data).

    Checks versions, ports, certificates, the connection to the server (also through a proxy), base, data columns, disk
    and device. Prints no content of the data.
    """
    from dataclasses import asdict

    from fedamole.deployment.doctor import examine_client, examine_server

    at_client = server is not None or data is not None
    if at_client:
        findings = examine_client(server, certs, base, data, template, renamed(column), config)
    else:
        findings = examine_server(config, certs, host, port)
    if as_json:
        say_json([asdict(finding) for finding in findings])
    else:
        console = screen()
        marks = {"ok": Text("ok", "green"), "warning": Text("!!", "yellow"), "problem": Text("no", "red")}
        for finding in findings:
            console.print(marks[finding.state], end=" ")
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            console.print(f"{finding.what:<12} {finding.text}{remedy}", soft_wrap=True)
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(1)
