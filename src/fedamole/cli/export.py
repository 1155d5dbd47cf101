"""The command `fedamole export`. Heavy libraries are imported inside it."""

from pathlib import Path
from typing import Annotated

import typer

from fedamole.cli.personal import (
    BaseName,
    ClientName,
    Columns,
    Device,
    Finished,
    RunPath,
    Template,
    Variant,
    note,
    source_of_file,
)
from fedamole.personal.export_settings import MAX_DEFAULT_RANK, ExportSettings
from fedamole.terminal import say_json, screen


def export(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="New folder for the export; an existing one is an error.")],
    client: ClientName = None,
    to: Annotated[
        str, typer.Option(help="lora: a LoRA adapter for PEFT; merged: a whole model for Hugging Face transformers.")
    ] = ExportSettings.to,
    rank: Annotated[
        int | None,
        typer.Option(
            help=f"Rank of the LoRA. Default: the total rank of a module's experts, at most {MAX_DEFAULT_RANK}."
        ),
    ] = ExportSettings.rank,
    calibration: Annotated[
        Path | None, typer.Option(help="File of rows to fit the LoRA on. Default: the client's training split.")
    ] = None,
    template: Template = "auto",
    column: Columns = None,
    tokens: Annotated[int, typer.Option(help="Maximum number of tokens to fit the LoRA on.")] = ExportSettings.tokens,
    ridge: Annotated[
        float, typer.Option(help="Ridge penalty of the fit, relative to the mean square of a module's inputs.")
    ] = ExportSettings.ridge,
    tolerance: Annotated[
        float,
        typer.Option(help="Maximum increase of the validation loss over the personal model's, in nats per token."),
    ] = ExportSettings.tolerance,
    force: Annotated[bool, typer.Option("--force", help="Write the export even above the tolerance.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
    variant: Variant = None,
    base: BaseName = None,
    device: Device = "auto",
    finished: Finished = False,
) -> None:
    """Export a client's model as a LoRA adapter or a merged model that can be used without fedamole.

    RUN is a run's folder, or the adapter folder of one model. A mixture selects experts for each token, so no LoRA is
    equivalent to it. The export is the LoRA that is closest to the mixture on the client's training text. A model that
    is a LoRA already is exported unchanged.

    The command prints the validation losses of the untuned base, the personal model and the export. If the export's
    loss exceeds the personal model's by more than --tolerance, nothing is written and the exit code is 1.

      fedamole export RUN --client bank_city --to lora --out bank_city-lora

      fedamole export RUN --client bank_city --to merged --out bank_city-model
    """
    from rich.table import Table

    from fedamole.personal.export import LossyError
    from fedamole.personal.export import export as write
    from fedamole.personal.saved_models import check_finished, find_model, outside_reads

    settings = ExportSettings(to, rank, ridge, tokens, tolerance, force)
    source = None if calibration is None else source_of_file("calibration", calibration, template, column)
    notes, lossy = screen(error=True), None
    model = find_model(run, client, variant)
    check_finished(model, finished)
    note(notes, outside_reads(model, True, base))
    try:
        report = write(
            model,
            out,
            settings,
            calibration=source,
            device=device,
            base=base,
            notify=lambda text: note(notes, text),
        )
    except LossyError as error:
        report, lossy = error.report, error
    if as_json:
        say_json({**report, "written": None if lossy else str(out)})
    else:
        table = Table(title=f"{report['client']}: validation loss, nats per answer token")
        for heading in ("model", "loss", "above the personal model"):
            table.add_column(heading, justify="left" if heading == "model" else "right")
        for name, loss in report["losses"].items():
            table.add_row(name, f"{loss:.4f}", f"{loss - report['losses']['personal']:+.4f}")
        screen(wide=80).print(table)
    if lossy is not None:
        raise lossy
    how = "exact" if report["exact"] else f"fitted on {report['tokens']:,} tokens"
    note(notes, f"{out}: rank {report['rank']}, {how}")
