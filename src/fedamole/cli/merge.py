"""The command `fedamole merge`. Heavy libraries are imported inside it."""

from pathlib import Path
from typing import Annotated

import typer

from fedamole.cli.completion import complete_runs
from fedamole.cli.personal import BaseName, Device, Finished, Variant, note
from fedamole.personal.merge_settings import RECIPES, MergeSettings
from fedamole.terminal import say_json, screen


def merge(
    models: Annotated[
        list[Path],
        typer.Argument(
            help="Folder of a finished run, or two or more LoRA folders of one base.", autocompletion=complete_runs
        ),
    ],
    out: Annotated[Path, typer.Option(help="New folder for the merged LoRA; an existing one is an error.")],
    clients: Annotated[
        str | None, typer.Option(help="Clients of the run whose models to merge, as a,b,c. Default: all.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="; ".join(f"{name}: {text}" for name, text in RECIPES.items()) + ".")
    ] = MergeSettings.recipe,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the merged LoRA. Default: the largest rank of the models.")
    ] = MergeSettings.rank,
    density: Annotated[
        float, typer.Option(help="ties and dare: share of the values of each change that is kept.")
    ] = MergeSettings.density,
    off_diagonal: Annotated[
        float, typer.Option(help="regmean: factor of the off-diagonal second moments; 1 is best with many tokens.")
    ] = MergeSettings.off_diagonal,
    examples: Annotated[
        int, typer.Option(help="regmean and selective: largest number of examples read of each client.")
    ] = MergeSettings.examples,
    tokens: Annotated[
        int, typer.Option(help="Maximum number of tokens on which a mixture of experts is turned into a LoRA.")
    ] = MergeSettings.tokens,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
    variant: Variant = None,
    base: BaseName = None,
    device: Device = "auto",
    finished: Finished = False,
) -> None:
    """Merge the personal models of a run, or several LoRA folders, into one LoRA adapter.

    MODELS is one run's folder, or two or more LoRA folders of one base that PEFT or fedamole wrote. In a run, a mixture
    of experts is first turned into a LoRA, as `fedamole export` does. The new folder loads with PEFT without fedamole.

    With a run, the command prints each client's validation loss under the untuned base, under its own model (before)
    and under the merged model (after). The report is saved in the new folder as merge.json. One model for all clients
    is nearly always worse for a client than its own: the table shows by how much.

      fedamole merge RUN --recipe regmean --out merged

      fedamole merge RUN --clients bank_city,bank_village --recipe svd --rank 8 --out banks

      fedamole merge lora-a lora-b --recipe ties --out merged
    """
    from rich.table import Table

    from fedamole.personal.merge import merge as write
    from fedamole.personal.merge import models_to_merge
    from fedamole.personal.saved_models import check_finished, outside_reads

    settings, notes = MergeSettings(recipe, rank, density, off_diagonal, examples, tokens), screen(error=True)
    names = None if clients is None else [name for name in clients.split(",") if name]
    chosen = models_to_merge(models, names, variant)
    for model in chosen.values():
        check_finished(model, finished)
    for text in dict.fromkeys(outside_reads(model, True, base) for model in chosen.values() if model.run is not None):
        note(notes, text)
    report = write(chosen, out, settings, device=device, base=base, notify=lambda text: note(notes, text))
    if as_json:
        say_json({**report, "written": str(out)})
    elif report["losses"]:
        table = Table(title=f"{recipe}: validation loss, nats per answer token")
        for heading in ("client", "untuned base", "before", "after", "change"):
            table.add_column(heading, justify="left" if heading == "client" else "right")
        rows = dict(report["losses"])
        if len(rows) > 1:
            rows["mean"] = {
                key: sum(row[key] for row in rows.values()) / len(rows) for key in ("base", "before", "after")
            }
        for name, row in rows.items():
            change = f"{row['after'] - row['before']:+.4f}"
            table.add_row(name, f"{row['base']:.4f}", f"{row['before']:.4f}", f"{row['after']:.4f}", change)
        screen(wide=80).print(table)
    if report.get("refused"):
        note(notes, f"not taken, because the loss would not fall: {', '.join(report['refused'])}")
    how = "" if report["losses"] else "; no validation loss, as the clients' data are not known of adapter folders"
    note(notes, f"{out}: rank {report['rank']}, of {len(chosen)} models{how}")
