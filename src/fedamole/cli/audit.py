"""`fedamole audit`. Heavy packages are imported inside the command."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedamole.cli.options import AsJson
from fedamole.cli.personal import BaseName, Device, note
from fedamole.terminal import Screen, say_json, screen


def audit(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    client: Annotated[
        str | None, typer.Option(help="Audit this client only. Default: every client with a model.")
    ] = None,
    canaries: Annotated[
        int | None,
        typer.Option(
            min=10,
            max=1_000_000,
            help="Number of canaries. More take longer and give a better bound. Default: 1000, or as many as a client "
            "sends values.",
        ),
    ] = None,
    base: BaseName = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Attack a finished run: what do its updates and models reveal, compared with the epsilon that it claims?

    Canary bound: made-up gradients, each included by a fair coin, go through the training code of the run. The number
    of coins that an attacker guesses correctly gives a lower bound of epsilon, with a confidence of 95 %. A bound above
    the claimed epsilon proves that the claim is wrong; a low bound proves nothing.

    Membership: can an attacker distinguish training examples from test examples by the loss under a client's own model,
    and under the models of other clients? AUROC 0.5 is guessing; TPR is the share of training examples that are
    recognised with 1 % false alarms.

    Gradient inversion: which tokens did a client read in its first round? The share of them that a cheap attack on the
    first update finds, beside its share on random updates.

    Attribute inference: does the coordinator learn which category, source or task a client has from its mean token
    embeddings? Only for methods that send them, such as fedamole.

    The audits read the clients' data and repeat the training of a first round. They change nothing in the run but
    write RUN/audit.json, which the report shows too. docs/privacy.md explains the numbers.

    Examples:

      fedamole audit runs/mine
      fedamole audit runs/mine --client bank_city --canaries 5000
    """
    from rich.progress import Progress

    from fedamole.auditing.run import audit_run
    from fedamole.personal.saved_models import find_model, outside_reads, saved_models

    notes = screen(error=True)
    models = saved_models(run) if client is None else (find_model(run, client),)
    for reads in dict.fromkeys(outside_reads(model, True, base) for model in models):
        note(notes, reads)
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
        task = progress.add_task("loading", total=None)

        def on_progress(stage: str, done: int, total: int) -> None:
            progress.update(task, description=stage, completed=done, total=total)

        results = audit_run(run, client, canaries, device, base, on_progress)
    if as_json:
        say_json(results)
        return
    show_audits(screen(), results)
    notes.print(f"written to {run / 'audit.json'}", soft_wrap=True)


def show_audits(console: Screen, results: Mapping[str, Any]) -> None:
    """Print a table with a row for each client, and the verdicts."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from fedamole.auditing.verdicts import verdicts

    title = f"audits of a run of {results['method']}"
    table = Table(title=title, title_style="bold", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    head = (
        "client",
        "epsilon\nclaimed",
        "epsilon\nat least",
        "AUROC\nown",
        "TPR\nown",
        "AUROC\nothers",
        "tokens\nfound",
        "by\nchance",
    )
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for name, values in results["clients"].items():
        bound, membership = values["canaries"], values["membership"]
        claimed = "none" if bound.get("claimed", 0) is None else _number(bound, "claimed")
        own, others = membership.get("own", {}), membership.get("others", {})
        scores = (_number(own, "auroc"), _number(own, "tpr"), _number(others, "auroc"))
        tokens = (_number(values["inversion"], key) for key in ("recall", "chance"))
        table.add_row(name, claimed, _number(bound, "bound"), *scores, *tokens)
    console.print(table)
    for sentence in verdicts(results):
        console.print(sentence)


def _number(values: Mapping[str, Any], key: str) -> str:
    return f"{values[key]:.2f}" if key in values else "-"
