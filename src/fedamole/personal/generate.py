"""Prompts in, answers out: a client's texts and rows as its model saw them in training, answered in batches."""

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from fedamole.config import load_run_config
from fedamole.data.examples import Example
from fedamole.data.layouts import Row, arrange, listed
from fedamole.data.manifest import read_manifest
from fedamole.data.settings import SourceSettings
from fedamole.data.sources import FORMATS, read_source
from fedamole.data.templates import BUILT_IN, TemplateSettings, columns_of, render, text_of
from fedamole.data.text_file import open_text
from fedamole.data.tokens import prompt_ids, tokenise, warn_of_text
from fedamole.errors import ConfigError, DataError
from fedamole.evaluation.generation import generate_answers
from fedamole.evaluation.personal import EvaluationSettings
from fedamole.model.bank import Bank
from fedamole.personal.saved_models import Place
from fedamole.runs.run_folder import MANIFEST

log = logging.getLogger(__name__)

AUTO = ("snli", "alpaca", "plain", "classification")
"""Templates that `auto` chooses among, in its order."""
TO_COME = "answer to come"
"""The column that stands for the answer of a row that has none yet."""
AT_ONCE = 64
"""Prompts handed over together; answers come back in such parts."""


@dataclass(frozen=True)
class Layout:
    """How a client's rows became prompts in training; as it stands, that of a model whose run is not here."""

    template: str = "auto"
    own: Mapping[str, TemplateSettings] = field(default_factory=dict)
    """The config's own templates by name."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Columns that were renamed, new = old, or dropped, new = empty."""


def layout_of(place: Place) -> Layout:
    """Find out how the rows of a model's client became prompts, from the run it came from."""
    if place.run is None:
        return Layout()
    data = load_run_config(place.run).data
    name = read_manifest(place.run.place(MANIFEST)).only(place.client).clients[0].source
    source = next((one for one in data.source if one.name == name), None)
    if source is None:
        raise DataError(f"{place.run.path}: config.toml has no source {name!r}, which the manifest names; restore it")
    return Layout(source.template, data.templates, source.columns)


def evaluation_of(place: Place, positions: int) -> EvaluationSettings:
    """How the run generated answers; answers take at most half of the base's `positions`."""
    found = EvaluationSettings() if place.run is None else load_run_config(place.run).evaluation
    return replace(found, max_new_tokens=min(found.max_new_tokens, max(1, positions // 2)))


def asked_for(
    words: Sequence[str], file: Path | None, columns: Sequence[str], layout: Layout, stdin: TextIO
) -> list[Example]:
    """Prompts from the one place that they come from: words, a file, COLUMN=TEXT of one row, or standard input.

    Raises ConfigError where there are several, or none and nobody to read from; DataError for what cannot be used.
    """
    if (bool(words), file is not None, bool(columns)).count(True) > 1:
        raise ConfigError("give prompts in quotes, or --file, or --set: only one of them")
    if any("=" not in word for word in columns):
        raise ConfigError('--set: write COLUMN=TEXT, for example --set instruction="Name a town."')
    if file is not None:
        found = read_prompts(file, layout)
    elif columns:
        found = rendered([dict(word.partition("=")[::2] for word in columns)], layout, "--set")
    elif words:
        found = [as_it_is(text) for text in words]
    elif stdin.isatty():
        raise ConfigError("no prompt: give it in quotes, by --set or --file, or through a pipe (--help)")
    else:
        found = lines(stdin.read())
    if not found:
        raise DataError(f"{file or 'standard input'}: there is no prompt in it")
    return found


def as_it_is(text: str) -> Example:
    """Make a prompt of a text; where it is too long it loses its beginning."""
    return Example(text, "", "", "")


def lines(text: str) -> list[Example]:
    """One prompt per line, without its end; blank lines are left out."""
    # `splitlines` would also cut at characters that belong to a prompt, such as U+2028.
    return [as_it_is(line) for line in re.split(r"\r\n|\r|\n", text) if line.strip()]


def read_prompts(path: Path, layout: Layout) -> list[Example]:
    """Prompts of a file: the lines of a .txt, or the rows of a file like those in training. Raises DataError."""
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if path.suffix == ".txt":
        with open_text(path, str(path), gzipped=False) as file:
            return lines(file.read())
    if not path.name.endswith(FORMATS):
        raise DataError(f"{path}: prompts come from .txt (one per line), or as rows from {', '.join(FORMATS)}")
    table, _ = read_source(SourceSettings("prompts", path=str(path)), Path.cwd())
    return rendered(table.rows, layout, path.name)


def rendered(rows: Sequence[Row], layout: Layout, where: str) -> list[Example]:
    """Put rows into the client's template; their answers, if they have any, are left aside.

    Rows with a `prompt` and without the template's columns are taken as they are. `where` names their origin in the
    DataError for a column that is missing, or holds no text.
    """
    columns, template_name = _as_in_training(layout, rows[0])
    if columns.get("input") == "" and all(row.get("context") == row.get("input") for row in rows):
        # Reading the file made the context of the input that is dropped here.
        rows = [{key: value for key, value in row.items() if key != "context"} for row in rows]
    arranged = [
        {"context": "" if row.get("input") is None else row["input"], **row} if "instruction" in row else row
        for row in arrange(rows, columns, where, template_name)
    ]
    have, template = set(arranged[0]), _template(layout, set(arranged[0]))
    wanted = [] if template is None else columns_of(template.prompt, "prompt")
    missing = [column for column in wanted if column not in have]
    if template is None or (missing and "prompt" in have):
        if "prompt" not in have:
            raise DataError(
                f"{where}: no template fits the columns {listed(have)}; give rows with the columns that the "
                "model was trained on, or with a `prompt`"
            )
        return [as_it_is(text_of(row["prompt"], "prompt", _name(where, at))) for at, row in enumerate(arranged)]
    if missing:
        raise DataError(
            f"{where}: the model was trained on prompts made of {', '.join(dict.fromkeys(wanted))}; "
            f"{missing[0]!r} is missing, there are {listed(have)}"
        )
    asked = replace(template, answer="{" + TO_COME + "}", options=(), options_from=None, labels={})
    found = [render(asked, (), {**row, TO_COME: TO_COME}, _name(where, at)) for at, row in enumerate(arranged)]
    return [replace(example, answer="") for example in found if example is not None]


def _as_in_training(layout: Layout, have: Collection[str]) -> tuple[dict[str, str], str]:
    """What of the client's `columns` and template applies to rows that have these columns, for `arrange`.

    A file with a `prompt` and no `messages` holds prompts to be taken as they are, so its `prompt` is not dropped.
    """
    columns = {new: old for new, old in layout.columns.items() if (old or new) in have}
    messages = "messages" in have or "messages" in columns
    if columns.get("prompt") == "" and not messages:
        del columns["prompt"]
    return columns, layout.template if messages else "auto"


def _name(where: str, at: int) -> str:
    return f"{where}, row {at + 1}"


def _template(layout: Layout, have: set[str]) -> TemplateSettings | None:
    """The client's template; where it was chosen by the columns, the first whose prompt has all of its columns."""
    if layout.template != "auto":
        return layout.own[layout.template] if layout.template in layout.own else BUILT_IN[layout.template]
    fitting = (BUILT_IN[name] for name in AUTO if set(columns_of(BUILT_IN[name].prompt, "prompt")) <= have)
    return next(fitting, None)


def room_for_prompts(bank: Bank, max_new_tokens: int) -> int:
    """Most tokens of a prompt, where the loaded adapters' virtual tokens and an answer need positions as well."""
    base, virtual = bank.base, len(bank.prefix(()))
    room = base.max_positions - virtual - max_new_tokens
    least = len(prompt_ids(as_it_is("a"), base.tokenizer))
    if room < least:
        raise ConfigError(
            f"--max-new-tokens = {max_new_tokens} leaves no room for a prompt: this base has {base.max_positions} "
            f"positions{f', {virtual} of them for virtual tokens' if virtual else ''}"
        )
    return room


def answers(bank: Bank, prompts: Sequence[Example], max_new_tokens: int, batch_tokens: int) -> Iterator[str]:
    """Yield the loaded model's greedy answer to each prompt, in their order.

    A prompt that is too long for the base's positions is cut as in training, which is a warning. Raises DataError for
    an empty prompt, and ConfigError where answers leave no room for prompts.
    """
    room = room_for_prompts(bank, max_new_tokens)
    tokens = tokenise(prompts, bank.base.tokenizer, room + 1)  # the empty answer is one token, its end
    if tokens.cut:
        log.warning("%d of %d prompts were cut to %d tokens", tokens.cut, len(prompts), room)
    warn_of_text("prompts", [tokens])
    ids = [row.prompt for row in tokens.rows]
    for place, prompt in enumerate(prompts):
        if not prompt.prompt:
            raise DataError(f"prompt {place + 1} of {len(prompts)} is empty")
    for start in range(0, len(ids), AT_ONCE):
        yield from generate_answers(bank, [ids[start : start + AT_ONCE]], max_new_tokens, batch_tokens)[0]
