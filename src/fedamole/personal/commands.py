"""The commands of a personal model's life after training. Nothing heavy is imported before one is used."""

from pathlib import Path
from typing import Annotated

import typer

RunPath = Annotated[Path, typer.Argument(help="A run's folder, or a personal model's adapter folder.")]
ClientName = Annotated[str | None, typer.Option("--client", help="Whose model; may be left out where there is one.")]
BaseName = Annotated[str | None, typer.Option("--base", help="A copy of the base: folder or hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
