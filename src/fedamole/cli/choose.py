"""`fedamole choose`. Heavy packages are imported inside the command."""

from pathlib import Path
from typing import Annotated

import typer

from fedamole.cli.completion import complete_runs
from fedamole.cli.options import AsJson
from fedamole.cli.personal import Device
from fedamole.terminal import say_json, screen

Margin = Annotated[
    float,
    typer.Option(
        min=0.0,
        help="Leave training alone only for a validation loss that is lower by more than this number of standard "
        "errors of the paired difference. Above 0, the saved models are scored again on validation.",
    ),
]


def choose(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Finished runs, or folders with runs in them.", autocompletion=complete_runs
        ),
    ],
    alone: Annotated[str, typer.Option(help="The run or method that stands for training alone.")] = "local_only",
    margin: Margin = 0.0,
    out: Annotated[
        Path | None, typer.Option(help="New folder that names each client's model, for generate, serve and export.")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Let each client choose the best of the models of several runs by its own validation, training alone included.

    The runs must have the same partition and base. Every scored model of a run is a candidate. The value compared is
    the validation loss, or the score if that chose the best round (evaluation.select). Of equal models, training
    alone is chosen, then the cheaper.

    Examples:

      fedamole choose runs/demo            every run in the folder
      fedamole choose runs/alone runs/fedit --margin 1 --out mine
      fedamole generate mine --client bank_city "..."
    """
    from fedamole.cli.console import show_tables
    from fedamole.comparison.choice_table import as_json as choice_json
    from fedamole.comparison.choice_table import choice_table
    from fedamole.personal.paired_losses import PairedErrors
    from fedamole.reporting.choosing import choose as choose_models
    from fedamole.reporting.choosing import read_candidates

    candidates = read_candidates(runs, alone)
    choices = choose_models(candidates, margin, PairedErrors(device))
    if out is not None:
        from fedamole.personal.choice_folder import write_choice

        write_choice(out, choices)
    if as_json:
        say_json(choice_json(candidates, choices, alone, margin))
        return
    show_tables(screen(wide=160), [choice_table(candidates, choices, alone, margin)])
    if out is not None:
        screen(error=True).print(
            f"the chosen models are named in {out}, which generate, chat, explain, export and serve take",
            soft_wrap=True,
        )
