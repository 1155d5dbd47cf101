"""The command `fedamole explain`. Heavy libraries are imported inside it."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedamole.cli.personal import (
    BaseName,
    ClientName,
    Device,
    Finished,
    MaxNewTokens,
    RunPath,
    SetColumns,
    Variant,
    note,
)
from fedamole.terminal import say_json, screen


def explain(
    run: RunPath,
    client: ClientName = None,
    prompt: Annotated[str | None, typer.Option(help="A prompt, used verbatim.")] = None,
    columns: SetColumns = None,
    answer: Annotated[
        str | None, typer.Option(help="Explain this answer instead of the one that the model generates.")
    ] = None,
    experts: Annotated[
        bool, typer.Option("--experts", help="Describe each expert, by the tokens of the client's data that use it.")
    ] = False,
    all_clients: Annotated[
        bool, typer.Option("--all", help="Summarise the routing of all clients, and write it to RUN/routing.json.")
    ] = False,
    layer: Annotated[
        str | None,
        typer.Option(
            help="Module to explain, by its name or the end of its name, or `all`. Default: the module with the "
            "largest mutual information between token and expert."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="With --experts: number of example tokens per expert.")] = 5,
    split: Annotated[
        Literal["validation", "train"], typer.Option(help="With --experts and --all: the split to read.")
    ] = "validation",
    html: Annotated[
        Path | None, typer.Option(help="Also write an HTML page to this file; an existing file is replaced.")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text and tables.")] = False,
    variant: Variant = None,
    base: BaseName = None,
    device: Device = "auto",
    finished: Finished = False,
) -> None:
    """Show which experts of a client's mixture the tokens of a text use, and what each expert is for.

    RUN is a run's folder, or the adapter folder of one model. Only models with experts can be explained: those of
    fedamole, fedmoe, fedlease, adaptive_experts, fedalt and feddpa. There are three modes:

    A text (default): each token of a prompt and its answer, coloured by the expert with the largest weight. The prompt
    comes from --prompt or --set; without them, it is the client's first validation example.

    --experts: for each expert, the clients that hold it, how much it is used on the client's own data, and the tokens
    with the largest weights.

    --all: the mean weight of each expert for every client.

    Nothing is sent anywhere. The output of --experts, including the HTML page, contains excerpts of the client's data.

      fedamole explain RUN --client bank_city --set text="My card is gone." --html routing.html

      fedamole explain RUN --client bank_city --experts
    """
    from rich.progress import Progress

    from fedamole.data.tokens import prompt_ids
    from fedamole.errors import ConfigError
    from fedamole.files import write_atomic
    from fedamole.personal.explain import RoutingExplainer, mean_weights_of_clients
    from fedamole.personal.explain import as_json as explanation_json
    from fedamole.personal.explain_page import page
    from fedamole.personal.explain_terminal import clients_table, explanation_view
    from fedamole.personal.generate import evaluation_settings_of, prompt_format_of, read_prompts
    from fedamole.personal.routing import answer_ids, client_rows, greedy_answer, write_routing
    from fedamole.personal.saved_models import check_finished, find_model, open_bank, outside_reads, saved_models

    text = prompt is not None or bool(columns) or answer is not None
    if (text, experts, all_clients).count(True) > 1:
        raise ConfigError("choose one of: a text (--prompt, --set, --answer), --experts, --all")
    if all_clients and (client is not None or layer is not None or html is not None):
        raise ConfigError(
            "--all covers all clients and modules and writes no page: leave out --client, --layer, --html"
        )
    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--html {html}: the file name must end in .html")
    console, notes = screen(wide=140), screen(error=True)
    models = saved_models(run, variant) if all_clients else (find_model(run, client, variant),)
    check_finished(models[0], finished)
    own_data = all_clients or experts or not (prompt is not None or columns)
    for reads in dict.fromkeys(outside_reads(model, own_data, base) for model in models):
        note(notes, reads)
    bank, adapters = open_bank(models, device, base)
    settings = evaluation_settings_of(models[0], bank.base.max_positions)
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
        if all_clients:
            tables = mean_weights_of_clients(models, bank, adapters, split, settings.batch_tokens, progress)
            write_routing(run, tables, split)
            say_json(tables) if as_json else console.print(clients_table(tables))
            return
        (model,) = models
        explainer = RoutingExplainer(bank, adapters[0], model)
        if experts:
            rows, about = client_rows(model, bank, split), f"{model.client}'s {split} data"
            explanation = explainer.explain_experts(rows, about, layer, top, settings.batch_tokens, progress)
        else:
            if prompt is not None or columns:
                texts = [prompt] if prompt is not None else []
                (example,) = read_prompts(texts, None, columns or [], prompt_format_of(model), sys.stdin)
                ids = prompt_ids(example, bank.base.tokenizer)
            else:
                ids = tuple(client_rows(model, bank, "validation")[0][0])
            if answer is None:
                answer_tokens = greedy_answer(bank, ids, max_new_tokens or settings.max_new_tokens)
            else:
                answer_tokens = answer_ids(bank, answer)
            explanation = explainer.explain_text(ids, answer_tokens, layer)
    if html is not None:
        write_atomic(html, page(explanation))
        notes.print(f"written to {html}")
    say_json(explanation_json(explanation)) if as_json else console.print(explanation_view(explanation, console))
