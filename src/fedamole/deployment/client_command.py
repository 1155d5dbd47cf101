"""`fedamole client`. Nothing heavy is imported before it is needed."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedamole.deployment.commands import Insecure
from fedamole.deployment.requirements import require_flower
from fedamole.personal.commands import renamed


def client(
    server: Annotated[str, typer.Option(help="host:port of the coordinator.")],
    name: Annotated[str, typer.Option(help="This organisation's name, as in the server's deployment.clients.")],
    data: Annotated[Path, typer.Option(help="Its rows: .jsonl, .json, .csv (each also .gz) or .parquet.")],
    certs: Annotated[Path | None, typer.Option(help="Folder with ca.crt and node.key from the coordinator.")] = None,
    test: Annotated[Path | None, typer.Option(help="Its own test file; else test rows are cut from the data.")] = None,
    template: Annotated[str, typer.Option(help="How rows become prompts; auto chooses by the columns.")] = "auto",
    column: Annotated[list[str] | None, typer.Option(help="A column under another name: instruction=question.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most so many rows.")] = None,
    base: Annotated[str | None, typer.Option(help="This machine's copy of the base model: folder or hub id.")] = None,
    folder: Annotated[Path, typer.Option(help="Where its run folders are written.")] = Path("runs"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(help="PyTorch's threads on a CPU; 0: its own choice.")] = 0,
    share_labels: Annotated[bool, typer.Option("--share-labels", help="Tell the server how often each answer occurs.")]
    = False,
    insecure: Insecure = False,
) -> None:
    """Take part in a federation with data that stay here: only what the method sends leaves this machine.

    Only outgoing connections are made. Runs until Ctrl-C and reconnects by itself; for every run it takes part in there
    is a folder FOLDER/<run>-NAME, and in it the personal model: clients/NAME/adapter.
    """
    require_flower()
    from fedamole.deployment.client import Client, Connection, client_home
    from fedamole.deployment.processes import without_proxy
    from fedamole.errors import DataError

    for path in (data, test):
        if path is not None and not path.exists():
            raise DataError(f"there is no file {path}")
    columns = renamed(column)
    source = {"name": name, "path": str(data.resolve()), "template": template, "columns": columns}
    more = {"test": None if test is None else str(test.resolve()), "limit": limit}
    settings = {
        "source": source | {key: value for key, value in more.items() if value is not None},
        "folder": str(folder.resolve()), "device": device, "threads": threads, "share_labels": share_labels,
        **({} if base is None else {"base": base}),
    }
    console = Console(stderr=True)
    os.environ.update(without_proxy())
    Client(
        Connection(server, certs, insecure), name, settings, client_home(str(folder), name),
        lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True),
    ).run()
