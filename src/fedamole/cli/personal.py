"""Commands that use one client's model after training. Heavy libraries are imported inside the commands."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from fedamole.cli.completion import complete_clients, complete_runs
from fedamole.terminal import Screen, printable_json, say, say_json, screen

if TYPE_CHECKING:
    from fedamole.data.settings import SourceSettings

MODEL = "Model"
"""Panel of the options that select and load a model."""

RunPath = Annotated[
    Path, typer.Argument(help="Folder of a run, or adapter folder of one personal model.", autocompletion=complete_runs)
]
ClientName = Annotated[
    str | None,
    typer.Option(
        "--client",
        help="Client whose model to use; optional if there is only one.",
        rich_help_panel=MODEL,
        autocompletion=complete_clients,
    ),
]
BaseName = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="Folder, GGUF file or hub id of the base, to use instead of the one that the run names.",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=MODEL)]
Variant = Annotated[
    str | None,
    typer.Option(
        "--variant",
        help="Which of the run's models, if it has several per client (fedit_ft besides fedit). "
        "Default: the run's method.",
        rich_help_panel=MODEL,
    ),
]
Finished = Annotated[
    bool,
    typer.Option("--finished", help="Fail if the run is not finished, instead of warning.", rich_help_panel=MODEL),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Maximum length of an answer, in tokens. Default: evaluation.max_new_tokens of the run, at most half of "
        "the base's positions.",
    ),
]
SetColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="COLUMN=TEXT: a column of one row, which the client's template turns into the prompt. Repeat for each "
        "column.",
    ),
]
Template = Annotated[
    str, typer.Option(help="Template that turns the rows into prompts; auto selects one by the columns.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column", help="NEW=OLD: rename a column, for example instruction=question. NAME= drops one. Repeatable."
    ),
]


def generate(
    run: RunPath,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts in quotes, used verbatim.")] = None,
    client: ClientName = None,
    file: Annotated[
        Path | None,
        typer.Option(help="File of prompts: .txt with one per line, or rows as .jsonl, .json, .csv or .parquet."),
    ] = None,
    columns: SetColumns = None,
    max_new_tokens: MaxNewTokens = None,
    out: Annotated[Path | None, typer.Option(help="New file for the answers; an existing one is an error.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One line of JSON per prompt: client, prompt, answer.")
    ] = False,
    variant: Variant = None,
    base: BaseName = None,
    device: Device = "auto",
    finished: Finished = False,
) -> None:
    """Answer prompts with a client's model, by greedy decoding.

    RUN is a run's folder, or the adapter folder of one model. Prompts come from quoted arguments, --set, --file, or
    standard input (one per line).

    In training, a template turned the rows of the client's data into prompts. --set fills in this template with the
    columns of one row, and --file with the rows of a data file (answers are not needed). All other prompts are used
    verbatim: quoted ones, lines of a .txt file or of standard input, and the `prompt` column of rows without the
    template's columns. They should look like the prompts of training. If the template has `chat`, they are user
    messages instead.

      fedamole generate RUN --client bank_city --set text="My card is gone."

      fedamole generate RUN --client shop_house --file orders.jsonl --json --out answers.jsonl

      fedamole generate RUN --client weather_coast "A prompt." "Another one."
    """
    from rich.progress import Progress

    from fedamole.files import new_file, write_atomic
    from fedamole.personal.generate import answer_prompts, evaluation_settings_of, prompt_format_of, read_prompts
    from fedamole.personal.saved_models import check_finished, find_model, open_bank, outside_reads

    with contextlib.nullcontext() if out is None else new_file(out):
        model = find_model(run, client, variant)
        check_finished(model, finished)
        prompt_format, notes = prompt_format_of(model), screen(error=True)
        note(notes, outside_reads(model, False, base))
        examples = read_prompts(prompts or [], file, columns or [], prompt_format, sys.stdin)
        with_line_ends = all(example.prompt.endswith("\n") for example in examples)
        verbatim = columns is None and prompt_format.chat is None and prompt_format.template != "plain"
        if verbatim and not with_line_ends:
            own = model.run is not None
            template = f"the template that {model.client} was trained with" if own else "a template by its columns"
            note(notes, f"prompts are used verbatim; --set applies {template}")
        bank, adapters = open_bank([model], device, base)
        bank.load(adapters)
        settings = evaluation_settings_of(model, bank.base.max_positions)
        with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
            generated = answer_prompts(bank, examples, max_new_tokens or settings.max_new_tokens, settings.batch_tokens)
            answers = list(progress.track(generated, total=len(examples), description="answering"))
        records = [
            {"client": model.client, "prompt": example.prompt, "answer": answer}
            for example, answer in zip(examples, answers, strict=True)
        ]
        if out is not None:
            lines = map(printable_json, records) if as_json else answers
            write_atomic(out, "".join(line + "\n" for line in lines))
        elif as_json:
            for record in records:
                say_json(record)
        else:
            for answer in answers:
                say(answer)


def chat(
    run: RunPath,
    client: ClientName = None,
    system: Annotated[str, typer.Option(help="System message, kept for the whole conversation.")] = "",
    max_new_tokens: MaxNewTokens = None,
    variant: Variant = None,
    base: BaseName = None,
    device: Device = "auto",
    finished: Finished = False,
) -> None:
    """Chat with a client's model on the terminal.

    RUN is a run's folder, or the adapter folder of one model. The conversation has the format of training data with
    `messages`, or the base's chat template if the client's template has `chat`. When it exceeds the positions of the
    base, the oldest turns are dropped.

    /new starts a new conversation; /quit, Ctrl-D and Ctrl-C end the chat. If standard input is a pipe, each of its
    lines is a message.

      fedamole chat RUN --client shop_house --system "Answer in one line."
    """
    from fedamole.personal.chat import NEW, QUIT, Chat, run_chat
    from fedamole.personal.generate import evaluation_settings_of, prompt_format_of
    from fedamole.personal.saved_models import check_finished, find_model, open_bank, outside_reads

    model = find_model(run, client, variant)
    check_finished(model, finished)
    console, notes, interactive = screen(), screen(error=True), sys.stdin.isatty()
    note(notes, outside_reads(model, False, base))
    bank, adapters = open_bank([model], device, base)
    bank.load(adapters)
    settings = evaluation_settings_of(model, bank.base.max_positions)
    conversation = Chat(bank, max_new_tokens or settings.max_new_tokens, system, prompt_format_of(model))

    def read_input() -> str:
        return console.input(Text.assemble(("you>", "bold"), " ")) if interactive else input()

    def print_text(text: str) -> None:
        console.print(text, end="", soft_wrap=True)

    def print_note(text: str) -> None:
        notes.print(text, style="dim", soft_wrap=True)

    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - line editing and history for input
        print_note(f"{model.client}'s model; {NEW} starts a new conversation, {QUIT} ends the chat")
    run_chat(conversation, read_input, print_text, print_note)


def adapt(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of a finished run, of a simulation or a coordinator.", autocompletion=complete_runs
        ),
    ],
    data: Annotated[Path, typer.Option(help="The new client's rows: .jsonl, .json, .csv (each also .gz) or .parquet.")],
    name: Annotated[str | None, typer.Option(help="Name of the new client. Default: the name of the file.")] = None,
    test: Annotated[Path | None, typer.Option(help="File of test rows. Default: a part of --data is held out.")] = None,
    template: Template = "auto",
    column: Columns = None,
    limit: Annotated[int | None, typer.Option(help="Use at most this many rows.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps; 0 disables training. Default: those of one round.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Parent folder of the new client's run folder.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
    base: BaseName = None,
    device: Device = "auto",
) -> None:
    """Create a personal model for a new client of a finished run. The run itself does not change.

    RUN is the folder of a finished run. With FedAMoLE, the experts choose among all clients again, with the new one,
    based on embeddings of their data. The new client then trains its experts for one round. Of its models before and
    after this training, the one with the lower validation loss is kept.

    Model, scores and settings are written to FOLDER/<run>-NAME, which is a run folder that all commands accept.

      fedamole adapt RUN --data rows.jsonl --name bank_island
    """
    from rich.table import Table

    from fedamole.personal.adapt import adapt as join

    settings = source_of_file(name or data.name.partition(".")[0], data, template, column, test=test, limit=limit)
    notes = screen(error=True)
    report = join(run, settings, folder, steps=steps, device=device, base=base, say=lambda text: note(notes, text))
    if as_json:
        say_json(report)
        return
    table = Table(title=f"{report['client']}: losses in nats per answer token, score 0 to 100")
    for heading in ("model", "validation loss", "test loss", "test score"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for model in dict.fromkeys(("base", "majority", *report["validation"])):
        test_scores = report["test"].get(model, {})
        losses = report["validation"].get(model), test_scores.get("loss")
        cells = ["" if loss is None else f"{loss:.3f}" for loss in losses]
        score = f"{test_scores['score']:.1f}" if test_scores else ""
        table.add_row(f"{model} *" if model == report["kept"] else model, *cells, score)
    screen(wide=80).print(table)
    if report["chosen_by"]:
        chosen = f"{report['chosen_by']} experts chose the client, over all modules"
        note(notes, f"{chosen}; {report['added']} were added to reach the minimum")
    note(notes, f"* is kept: {report['folder']}")


def note(console: Screen, text: str) -> None:
    """Print a remark about what a command does, if there is one."""
    if text:
        console.print(text, style="dim", soft_wrap=True)


def source_of_file(
    name: str, path: Path, template: str, column: list[str] | None, test: Path | None = None, limit: int | None = None
) -> "SourceSettings":
    """Return the rows of a file named on the command line as the data source of one client."""
    from fedamole.data.settings import SourceSettings
    from fedamole.errors import DataError

    for file in (path, test):
        if file is not None and not file.exists():
            raise DataError(f"there is no file {file}")
    return SourceSettings(
        name,
        str(path.resolve()),
        None if test is None else str(test.resolve()),
        template=template,
        columns=renamed(column),
        limit=limit,
    )


def renamed(column: list[str] | None) -> dict[str, str]:
    """Return the values of --column as new name -> old name, with "" for a dropped column.

    Raises ConfigError for values of another form.
    """
    from fedamole.errors import ConfigError

    columns = dict(word.partition("=")[::2] for word in column or [])
    if not all(columns) or not all("=" in word for word in column or []):
        raise ConfigError("--column: write new=old, for example instruction=question, or name= to drop a column")
    return columns
