"""Generate a personal model's answers to prompts, or to rows in the template that the client was trained with."""

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, TextIO

from fedamole.config import load_run_config
from fedamole.data.chat import stop_ids
from fedamole.data.examples import Example
from fedamole.data.filling import text_of
from fedamole.data.layouts import Row, Turn, arrange, conversation_prompt, listed
from fedamole.data.manifest import read_manifest
from fedamole.data.settings import SourceSettings
from fedamole.data.sources import FORMATS, read_source
from fedamole.data.templates import (
    BUILT_IN,
    CHAT_INSTRUCTION,
    TemplateSettings,
    columns_of,
    render,
    system_turns,
    user_message,
)
from fedamole.data.text_file import open_text
from fedamole.data.tokens import prompt_ids, tokenise, warn_of_text
from fedamole.errors import ConfigError, DataError
from fedamole.evaluation.generation import generate_answers, generate_tokens
from fedamole.evaluation.personal import EvaluationSettings
from fedamole.model.bank import Bank
from fedamole.model.batch import Ids
from fedamole.personal.saved_models import SavedModel
from fedamole.runs.run_folder import MANIFEST

log = logging.getLogger(__name__)

AUTO_TEMPLATES = ("snli", "alpaca", "plain", "classification")
"""Templates that `auto` tries, in this order."""
ANSWER_PLACEHOLDER = "answer to come"
"""Column that stands for the answer of a row without one."""
PROMPTS_AT_ONCE = 64
"""Number of prompts passed to generation at once, after which their answers are available."""


@dataclass(frozen=True)
class PromptFormat:
    """How a client's rows become prompts. The defaults are for a model whose run is not known."""

    template: str = "auto"
    templates: Mapping[str, TemplateSettings] = field(default_factory=dict)
    """Templates defined in the run's config, by name."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Renamed columns (new name -> old name) and dropped ones (name -> "")."""
    message_column: str | None = None
    """Column of the template that the user's last message of a conversation fills; None: conversations are rendered
    with the base's chat template or in the format of `messages` rows."""

    @property
    def chat(self) -> TemplateSettings | None:
        """The client's template if it uses the chat template of the base's tokenizer; else None."""
        template = self.templates.get(self.template) or BUILT_IN.get(self.template)
        return template if template is not None and template.chat else None

    def prompt(self, text: str) -> Example:
        """Return a prompt without a template: the user's message of a chat, or the text verbatim."""
        return raw_prompt(text) if self.chat is None else self.conversation([("user", text)])

    def conversation(self, turns: Sequence[Turn]) -> Example:
        """Return a prompt for the assistant's next turn, in the chat template or in the format of `messages` rows.

        With `message_column`, the last message fills this column of the client's template, and earlier turns are left
        out. Raises DataError if a chat does not end with a turn of the user.
        """
        if self.message_column is not None:
            return self._row_of_message(user_message(turns[-1], "messages"), self.message_column)
        if self.chat is None:
            return raw_prompt(conversation_prompt(turns))
        *earlier, last = turns
        text = user_message(last, "messages")
        return Example(text, "", "", "", turns=(*system_turns(self.chat, earlier), *earlier))

    def with_message_column(self, column: str) -> "PromptFormat":
        """Return the format in which the user's last message of a conversation fills a column of the template.

        Raises ConfigError if the template does not read the column, or reads others that cannot be empty.
        """
        known = _known_templates(self)
        read = {name for template in known for name in template.prompt_columns}
        if column not in read | {old for new, old in self.columns.items() if new in read}:
            names = ", ".join(sorted(read))
            raise ConfigError(f"the client's template {self.template!r} reads no column {column!r}; it reads {names}")
        mapped = replace(self, message_column=column)
        try:
            mapped.conversation([("user", "a")])
        except DataError as error:
            raise ConfigError(f"a chat message cannot fill the column {column!r} alone: {error}") from error
        return mapped

    def _row_of_message(self, text: str, column: str) -> Example:
        """Return the prompt of a row with this text in one column; the column that may be truncated can be empty."""
        named = self.templates.get(self.template) or BUILT_IN.get(self.template)
        context = None if named is None else named.context
        row = {column: text} if context is None else {context: "", column: text}
        return render_prompts([row], self, "messages")[0]


def prompt_format_of(model: SavedModel) -> PromptFormat:
    """Return how the rows of a model's client became prompts in training, from the run's config."""
    if model.run is None:
        return PromptFormat()
    data = load_run_config(model.run).data
    name = read_manifest(model.run.place(MANIFEST)).only(model.client).clients[0].source
    source = next((source for source in data.source if source.name == name), None)
    if source is None:
        raise DataError(f"{model.run.path}: config.toml has no source {name!r}, which the manifest names; restore it")
    return PromptFormat(source.template, data.templates, source.columns)


def evaluation_settings_of(model: SavedModel, positions: int | None = None) -> EvaluationSettings:
    """Return the run's evaluation settings, with answers limited to half of the base's `positions` if given."""
    settings = EvaluationSettings() if model.run is None else load_run_config(model.run).evaluation
    if positions is None:
        return settings
    return replace(settings, max_new_tokens=min(settings.max_new_tokens, max(1, positions // 2)))


def read_prompts(
    texts: Sequence[str], file: Path | None, columns: Sequence[str], prompt_format: PromptFormat, stdin: TextIO
) -> list[Example]:
    """Return prompts from exactly one source: `texts`, a file, the COLUMN=TEXT words of one row, or standard input.

    Raises ConfigError if several sources are given, or none while standard input is a terminal; DataError if a source
    has no valid prompt.
    """
    if (bool(texts), file is not None, bool(columns)).count(True) > 1:
        raise ConfigError("give prompts in quotes, or --file, or --set: only one of them")
    if any("=" not in word for word in columns):
        raise ConfigError('--set: write COLUMN=TEXT, for example --set instruction="Name a town."')
    if file is not None:
        prompts = read_prompt_file(file, prompt_format)
    elif columns:
        row = dict(word.partition("=")[::2] for word in columns)
        prompts = render_prompts([row], prompt_format, "--set", Path.cwd())
    elif texts:
        prompts = [prompt_format.prompt(text) for text in texts]
    elif stdin.isatty():
        raise ConfigError("no prompt: pass one in quotes, with --set or --file, or through a pipe (see --help)")
    else:
        prompts = prompts_from_lines(stdin.read(), prompt_format)
    if not prompts:
        raise DataError(f"{file or 'standard input'} contains no prompt")
    return prompts


def raw_prompt(text: str) -> Example:
    """Return an example that uses a text verbatim as its prompt; if it is too long, its beginning is cut."""
    return Example(text, "", "", "")


def prompts_from_lines(text: str, prompt_format: PromptFormat = PromptFormat()) -> list[Example]:
    """Return one prompt per line, without the line end; blank lines are skipped."""
    # `splitlines` would also split at characters that are part of a prompt, such as U+2028.
    return [prompt_format.prompt(line) for line in re.split(r"\r\n|\r|\n", text) if line.strip()]


def read_prompt_file(path: Path, prompt_format: PromptFormat) -> list[Example]:
    """Return the lines of a .txt file as prompts, or the rows of a data file in the template. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file")
    if path.suffix == ".txt":
        with open_text(path, str(path), gzipped=False) as file:
            return prompts_from_lines(file.read(), prompt_format)
    if not path.name.endswith(FORMATS):
        raise DataError(f"{path}: use .txt for one prompt per line, or {', '.join(FORMATS)} for rows")
    table, _ = read_source(SourceSettings("prompts", path=str(path)), Path.cwd())
    return render_prompts(table.rows, prompt_format, path.name, table.folder)


def render_prompts(
    rows: Sequence[Row], prompt_format: PromptFormat, where: str, folder: Path | None = None
) -> list[Example]:
    """Render rows with the client's template; answers in the rows are ignored.

    Rows with a `prompt` column that lack columns of the template are used verbatim. Paths of images start at `folder`.
    Raises DataError if a column is missing or is not text; `where` names the rows' origin in the message.
    """
    renames, template_name = _renames_and_template(prompt_format, rows[0])
    if renames.get("input") == "" and all(row.get("context") == row.get("input") for row in rows):
        # Reading the file has copied the dropped input to the context.
        rows = [{key: value for key, value in row.items() if key != "context"} for row in rows]
    arranged = [
        {"context": "" if row.get("input") is None else row["input"], **row} if "instruction" in row else row
        for row in arrange(rows, renames, where, template_name)
    ]
    available = set(arranged[0])
    template = _template(prompt_format, available)
    texts_of = () if template is None else ((template.prompt, "prompt"), (template.image or "", "image"))
    needed = [column for text, key in texts_of for column in columns_of(text, key)]
    missing = [column for column in needed if column not in available]
    if template is None or (missing and "prompt" in available):
        if "prompt" not in available:
            raise DataError(
                f"{where}: no template fits the columns {listed(available)}; give rows with the columns that the "
                "model was trained on, or with a `prompt` column"
            )
        texts = [text_of(row["prompt"], "prompt", _row_name(where, i)) for i, row in enumerate(arranged)]
        return [prompt_format.prompt(text) for text in texts]
    if missing:
        raise DataError(
            f"{where}: the model was trained on prompts made of {', '.join(dict.fromkeys(needed))}; "
            f"{missing[0]!r} is missing, the columns are {listed(available)}"
        )
    without_answer = replace(template, answer="{" + ANSWER_PLACEHOLDER + "}", options=(), options_from=None, labels={})
    examples = [
        render(without_answer, (), {**row, ANSWER_PLACEHOLDER: ANSWER_PLACEHOLDER}, _row_name(where, i), folder)
        for i, row in enumerate(arranged)
    ]
    return [replace(example, answer="") for example in examples if example is not None]


def _renames_and_template(prompt_format: PromptFormat, available: Collection[str]) -> tuple[dict[str, str], str]:
    """The client's column renames that apply to rows with these columns, and the template name for `arrange`.

    A file with a `prompt` column and no `messages` has prompts to be used verbatim, so its `prompt` is not dropped.
    """
    renames = {new: old for new, old in prompt_format.columns.items() if (old or new) in available}
    messages = "messages" in available or "messages" in renames
    if renames.get("prompt") == "" and not messages:
        del renames["prompt"]
    return renames, prompt_format.template if messages else "auto"


def _row_name(where: str, index: int) -> str:
    return f"{where}, row {index + 1}"


def _template(prompt_format: PromptFormat, available: set[str]) -> TemplateSettings | None:
    """The client's template; for `auto` and `chat`, the first one of which all columns are available."""
    known = _known_templates(prompt_format)
    if len(known) == 1:
        return known[0]
    return next((template for template in known if _prompt_columns(template) <= available), None)


def _known_templates(prompt_format: PromptFormat) -> list[TemplateSettings]:
    """The client's template; for `auto` and `chat`, those that they select from, in order."""
    name = prompt_format.template
    if name not in ("auto", "chat"):
        return [prompt_format.templates[name] if name in prompt_format.templates else BUILT_IN[name]]
    known = dict(BUILT_IN)
    if name == "chat":
        known = {other: replace(template, chat=True) for other, template in known.items()}
        known["alpaca"] = CHAT_INSTRUCTION
    return [known[one] for one in AUTO_TEMPLATES]


def _prompt_columns(template: TemplateSettings) -> set[str]:
    return set(columns_of(template.prompt, "prompt"))


def max_prompt_tokens(bank: Bank, max_new_tokens: int) -> int:
    """Return how many positions of the base remain for a prompt, besides the answer and virtual tokens.

    Raises ConfigError if not even the shortest prompt fits.
    """
    base, virtual = bank.base, len(bank.prefix(()))
    room = base.max_positions - virtual - max_new_tokens
    shortest = len(prompt_ids(raw_prompt("a"), base.tokenizer))
    if room < shortest:
        raise ConfigError(
            f"--max-new-tokens = {max_new_tokens} leaves no room for a prompt: this base has {base.max_positions} "
            f"positions{f', {virtual} of them for virtual tokens' if virtual else ''}"
        )
    return room


def answer_prompts(bank: Bank, prompts: Sequence[Example], max_new_tokens: int, batch_tokens: int) -> Iterator[str]:
    """Yield the loaded model's greedy answers to prompts, in order.

    Prompts that are too long for the base's positions are cut as in training, with a warning. Raises DataError for an
    empty prompt, and ConfigError if answers leave no room for prompts.
    """
    room = max_prompt_tokens(bank, max_new_tokens)
    tokens = tokenise(prompts, bank.base.tokenizer, room + 1)  # the end-of-text token of the empty answer
    if tokens.cut:
        log.warning("%d of %d prompts were cut to %d tokens", tokens.cut, len(prompts), room)
    warn_of_text("prompts", [tokens])
    ids = [row.prompt for row in tokens.rows]
    for index, prompt in enumerate(prompts):
        if not prompt.prompt:
            raise DataError(f"prompt {index + 1} of {len(prompts)} is empty")
    for start in range(0, len(ids), PROMPTS_AT_ONCE):
        yield from generate_answers(bank, [ids[start : start + PROMPTS_AT_ONCE]], max_new_tokens, batch_tokens)[0]


def generate_ids(bank: Bank, prompt: Ids, max_new_tokens: int, streamer: Any = None) -> Ids:
    """Return the token ids of the loaded model's greedy answer, without the token that ends it.

    `prompt` are the ids that the base reads, including virtual tokens; `streamer` is a transformers `BaseStreamer`.
    """
    answer = generate_tokens(bank, [prompt], (1,), max_new_tokens, streamer)[0].tolist()
    stops = stop_ids(bank.base.tokenizer)
    return tuple(takewhile(lambda token: token not in stops, answer))
