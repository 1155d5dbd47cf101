"""The commands of a personal model's life after training. Nothing heavy is imported before one is used."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from fedamole.terminal import Screen, printable_json, say, say_json, screen

if TYPE_CHECKING:
    from fedamole.data.settings import SourceSettings

RunPath = Annotated[Path, typer.Argument(help="A run's folder, or a personal model's adapter folder.")]
ClientName = Annotated[str | None, typer.Option("--client", help="Whose model; may be left out where there is one.")]
BaseName = Annotated[str | None, typer.Option("--base", help="A copy of the base: folder or hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Row = Annotated[str | None, typer.Option("--row", help="Which of the run's models: fedit_ft beside fedit.")]
Finished = Annotated[bool, typer.Option("--finished", help="Fail if the run is not finished; else only warn.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens; else as in the run.")]


def generate(
    run: RunPath,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes, used as they are.")] = None,
    client: ClientName = None,
    file: Annotated[
        Path | None, typer.Option(help="Prompts: a .txt, or rows as .jsonl, .json, .csv, .parquet.")
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--set", help="COLUMN=TEXT of one row, for the template.")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    out: Annotated[Path | None, typer.Option(help="Write the answers here; nothing is overwritten.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each: client, prompt, answer.")] = False,
    row: Row = None,
    base: BaseName = None,
    device: Device = "auto",
    finished: Finished = False,
) -> None:
    """Let a client's model answer prompts, greedily.

    A prompt in quotes, a line of a .txt and a line of standard input are used as they are. What the client was trained
    on was made from rows by a template; --set makes such a prompt from the row's columns, and so does --file for the
    rows of a file (which need no answers; rows with a `prompt` alone are used as they are):

      fedamole generate RUN --client bank_city --set text="My card is gone."

      fedamole generate RUN --client shop_house --file orders.jsonl --json --out answers.jsonl
    """
    from rich.progress import Progress

    from fedamole.files import new_file, write_atomic
    from fedamole.personal.generate import answers, asked_for, evaluation_of, layout_of
    from fedamole.personal.saved_models import check_finished, find, open_bank, read_for

    with contextlib.nullcontext() if out is None else new_file(out):
        place = find(run, client, row)
        check_finished(place, finished)
        layout, notes = layout_of(place), screen(error=True)
        _note(notes, read_for(place, False, base))
        asked = asked_for(prompts or [], file, columns or [], layout, sys.stdin)
        if columns is None and layout.template != "plain" and any(not one.prompt.endswith("\n") for one in asked):
            told = f"used as it is; --set puts columns into the template that {place.client} was trained with (--help)"
            notes.print(told, style="dim", soft_wrap=True)
        bank, adapters = open_bank([place], device, base)
        bank.load(adapters)
        found = evaluation_of(place, bank.base.max_positions)
        with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
            told_by = answers(bank, asked, max_new_tokens or found.max_new_tokens, found.batch_tokens)
            said = list(progress.track(told_by, total=len(asked), description="answering"))
        pairs = zip(asked, said, strict=True)
        records = [{"client": place.client, "prompt": one.prompt, "answer": answer} for one, answer in pairs]
        if out is not None:
            write_atomic(out, "".join(line + "\n" for line in (map(printable_json, records) if as_json else said)))
        elif as_json:
            for record in records:
                say_json(record)
        else:
            for answer in said:
                say(answer)


def chat(
    run: RunPath,
    client: ClientName = None,
    system: Annotated[str, typer.Option(help="What the model is told first, and never forgets.")] = "",
    max_new_tokens: MaxNewTokens = None,
    row: Row = None,
    base: BaseName = None,
    device: Device = "auto",
    finished: Finished = False,
) -> None:
    """Talk to a client's model; answers come word by word.

    The conversation is laid out as in data with `messages`, and its oldest turns are forgotten when the base has no
    positions left. /new begins anew; /quit, Ctrl-D and Ctrl-C end it. Through a pipe, each line is what the user says.
    """
    from fedamole.personal.chat import NEW, QUIT, Chat, converse
    from fedamole.personal.generate import evaluation_of
    from fedamole.personal.saved_models import check_finished, find, open_bank, read_for

    place = find(run, client, row)
    check_finished(place, finished)
    _note(screen(error=True), read_for(place, False, base))
    bank, adapters = open_bank([place], device, base)
    bank.load(adapters)
    talk = Chat(bank, max_new_tokens or evaluation_of(place, bank.base.max_positions).max_new_tokens, system)
    console, notes, person = screen(), screen(error=True), sys.stdin.isatty()

    def say(text: str) -> None:
        console.print(text, end="", soft_wrap=True)

    def note(text: str) -> None:
        notes.print(text, style="dim", soft_wrap=True)

    if person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - arrows and history, wherever lines are asked for
        note(f"{place.client}'s model; {NEW} begins anew, {QUIT} ends")
    converse(talk, lambda: console.input(Text.assemble(("you>", "bold"), " ")) if person else input(), say, note)


def explain(
    run: RunPath,
    client: ClientName = None,
    prompt: Annotated[str | None, typer.Option(help="A text for the model, used as it is.")] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--set", help="COLUMN=TEXT of one row, for the template.")
    ] = None,
    answer: Annotated[str | None, typer.Option(help="The answer to look at, instead of the model's own.")] = None,
    experts: Annotated[
        bool, typer.Option("--experts", help="What each expert is for, from the client's own data.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="All clients of the run; also writes RUN/routing.json.")] = False,
    layer: Annotated[
        str | None,
        typer.Option(
            help="A module by its name or its ending, or `all`; left out: the one "
            "whose routing tells tokens apart best."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many tokens describe an expert.")] = 5,
    split: Annotated[Literal["validation", "train"], typer.Option(help="Which of the client's data.")] = "validation",
    html: Annotated[Path | None, typer.Option(help="Write a page here; an older one is replaced.")] = None,
    max_new_tokens: MaxNewTokens = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    row: Row = None,
    base: BaseName = None,
    device: Device = "auto",
    finished: Finished = False,
) -> None:
    """Show which experts a client's tokens use, token by token, and what each expert is for.

    Three questions: the tokens of a text on the colours of their experts (--prompt or --set; left out: the client's
    first validation example); what each expert is for, by who holds it and by the tokens of the client's own data that
    weigh it most (--experts); and how all clients' tokens are shared out (--all). Only models with experts have an
    answer. Nothing leaves this machine; but what --experts shows, on a page too, is text of the client's data.

      fedamole explain RUN --client bank_city --set text="My card is gone." --html routing.html

      fedamole explain RUN --client bank_city --experts
    """
    from rich.progress import Progress

    from fedamole.data.tokens import prompt_ids
    from fedamole.errors import ConfigError
    from fedamole.files import write_atomic
    from fedamole.personal import explain as told
    from fedamole.personal.explain_page import page
    from fedamole.personal.generate import asked_for, evaluation_of, layout_of
    from fedamole.personal.routing import greedy_answer, own_rows, plain_ids, write_routing
    from fedamole.personal.saved_models import check_finished, find, open_bank, places, read_for

    text = prompt is not None or bool(columns) or answer is not None
    if (text, experts, every).count(True) > 1:
        raise ConfigError("choose one: a text (--prompt, --set, --answer), --experts or --all")
    if every and (client is not None or layer is not None or html is not None):
        raise ConfigError("--all is of all clients and modules, and no page: leave --client, --layer and --html out")
    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--html {html}: name a file that ends in .html")
    console, notes = screen(wide=140), screen(error=True)
    found = places(run, row) if every else (find(run, client, row),)
    check_finished(found[0], finished)
    own_data = every or experts or not (prompt is not None or columns)
    for told_reads in dict.fromkeys(read_for(place, own_data, base) for place in found):
        _note(notes, told_reads)
    bank, adapters = open_bank(found, device, base)
    settings = evaluation_of(found[0], bank.base.max_positions)
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
        if every:
            tables = told.tables(found, bank, adapters, split, settings.batch_tokens, progress)
            write_routing(run, tables, split)
            say_json(tables) if as_json else console.print(told.tables_shown(tables))
            return
        (place,), teller = found, told.Teller(bank, adapters[0], found[0])
        if experts:
            rows, about = own_rows(place, bank, split), f"{place.client}'s {split} data"
            story = teller.experts(rows, about, layer, top, settings.batch_tokens, progress)
        else:
            if prompt is not None or columns:
                given = [prompt] if prompt is not None else []
                asked = asked_for(given, None, columns or [], layout_of(place), sys.stdin)
                ids = prompt_ids(asked[0], bank.base.tokenizer)
            else:
                ids = tuple(own_rows(place, bank, "validation")[0][0])
            said = greedy_answer(bank, ids, max_new_tokens or settings.max_new_tokens) if answer is None else None
            story = teller.text(ids, plain_ids(bank, answer or "") if said is None else said, layer)
    if html is not None:
        write_atomic(html, page(story))
        notes.print(f"written to {html}")
    say_json(told.as_json(story)) if as_json else console.print(told.shown(story, console))


def export(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="The new folder; nothing is overwritten.")],
    client: ClientName = None,
    to: Annotated[str, typer.Option(help="lora: a PEFT LoRA adapter; merged: a whole Hugging Face model.")] = "lora",
    rank: Annotated[
        int | None, typer.Option(help="Rank of the LoRA; else that of all experts together, at most 64.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Rows to watch the model on; else its client's training split.")
    ] = None,
    template: Annotated[str, typer.Option(help="How rows of --calibration become prompts.")] = "auto",
    column: Annotated[
        list[str] | None, typer.Option(help="A column under another name, instruction=question; prompt= drops one.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens to watch the model on.")] = 32768,
    ridge: Annotated[
        float, typer.Option(help="Penalty on the LoRA's size, relative to its inputs' mean square.")
    ] = 1e-4,
    tolerance: Annotated[float, typer.Option(help="Most nats per answer token that may be lost on validation.")] = 0.05,
    force: Annotated[bool, typer.Option("--force", help="Write it however much is lost.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")] = False,
    row: Row = None,
    base: BaseName = None,
    device: Device = "auto",
    finished: Finished = False,
) -> None:
    """Turn a client's model into an ordinary LoRA, or a whole model, that needs nothing of fedamole.

    A mixture chooses experts token by token; what is written is the LoRA that comes nearest to it on the client's own
    text. The validation losses of base, personal model and export are always shown, and nothing is written where the
    export loses more than --tolerance.

      fedamole export RUN --client bank_city --to lora --out bank_city-lora
    """
    from rich.table import Table

    from fedamole.personal.export import ExportSettings, LossyError
    from fedamole.personal.export import export as write
    from fedamole.personal.saved_models import check_finished, find, read_for

    settings = ExportSettings(to, rank, ridge, tokens, tolerance, force)
    text = None if calibration is None else _source("calibration", calibration, template, column)
    notes, refused = screen(error=True), None
    place = find(run, client, row)
    check_finished(place, finished)
    _note(notes, read_for(place, True, base))
    try:
        report = write(
            place, out, settings, calibration=text, device=device, base=base, say=lambda told: _note(notes, told)
        )
    except LossyError as error:
        report, refused = error.report, error
    if as_json:
        say_json({**report, "written": None if refused else str(out)})
    else:
        table = Table(title=f"{report['client']}: validation loss, nats per answer token")
        for heading in ("model", "loss", "above the personal model"):
            table.add_column(heading, justify="left" if heading == "model" else "right")
        for name, loss in report["losses"].items():
            table.add_row(name, f"{loss:.4f}", f"{loss - report['losses']['personal']:+.4f}")
        screen(wide=80).print(table)
    if refused is not None:
        raise refused
    how = "exact" if report["exact"] else f"fitted on {report['tokens']:,} tokens"
    _note(notes, f"{out}: rank {report['rank']}, {how}")


def adapt(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run (a simulation's, or a coordinator's).")],
    data: Annotated[Path, typer.Option(help="The new client's rows: .jsonl, .json, .csv (each also .gz) or .parquet.")],
    name: Annotated[str | None, typer.Option(help="Its name; else that of the file.")] = None,
    test: Annotated[Path | None, typer.Option(help="Its own test file; else test rows are cut from the data.")] = None,
    template: Annotated[str, typer.Option(help="How rows become prompts; auto chooses by the columns.")] = "auto",
    column: Annotated[
        list[str] | None, typer.Option(help="A column under another name, instruction=question; prompt= drops one.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most so many rows.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps; else those of a round; 0 trains nothing.")] = None,
    folder: Annotated[Path, typer.Option(help="Where its run folder is written.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")] = False,
    base: BaseName = None,
    device: Device = "auto",
) -> None:
    """Give a new client a model of its own from a finished federation, which stays as it is.

    The experts choose among the old clients and the new one, by what they make of its data; then it trains those it got
    for a round, and keeps what is better on its validation split. Its model, scores and settings lie in
    FOLDER/<run>-NAME, a run's folder like any other.

      fedamole adapt RUN --data rows.jsonl --name bank_island
    """
    from rich.table import Table

    from fedamole.personal.adapt import adapt as join

    settings = _source(name or data.name.partition(".")[0], data, template, column, test=test, limit=limit)
    notes = screen(error=True)
    report = join(run, settings, folder, steps=steps, device=device, base=base, say=lambda told: _note(notes, told))
    if as_json:
        say_json(report)
        return
    table = Table(title=f"{report['client']}: losses in nats per answer token, score 0 to 100")
    for heading in ("model", "validation loss", "test loss", "test score"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for one in dict.fromkeys(("base", "majority", *report["validation"])):
        scored = report["test"].get(one, {})
        losses = report["validation"].get(one), scored.get("loss")
        told = ["" if loss is None else f"{loss:.3f}" for loss in losses]
        score = f"{scored['score']:.1f}" if scored else ""
        table.add_row(f"{one} *" if one == report["kept"] else one, *told, score)
    screen(wide=80).print(table)
    if report["chosen_by"]:
        _note(notes, f"chosen by {report['chosen_by']} experts over all modules, {report['added']} were added")
    _note(notes, f"* is kept: {report['folder']}")


def _note(console: Screen, text: str) -> None:
    if text:
        console.print(text, style="dim", soft_wrap=True)


def _source(
    name: str, path: Path, template: str, column: list[str] | None, test: Path | None = None, limit: int | None = None
) -> "SourceSettings":
    """Rows of a file given on the command line, as a source of one client."""
    from fedamole.data.settings import SourceSettings
    from fedamole.errors import DataError

    for given in (path, test):
        if given is not None and not given.exists():
            raise DataError(f"there is no file {given}")
    return SourceSettings(
        name,
        str(path.resolve()),
        None if test is None else str(test.resolve()),
        template=template,
        columns=renamed(column),
        limit=limit,
    )


def renamed(column: list[str] | None) -> dict[str, str]:
    """What --column says: the old name by the new one, empty for a column to drop; ConfigError for another form."""
    from fedamole.errors import ConfigError

    columns = dict(word.partition("=")[::2] for word in column or [])
    if not all(columns) or not all("=" in word for word in column or []):
        raise ConfigError("--column: write new=old, for example instruction=question, or name= to drop a column")
    return columns
