"""Templates: turn a row of a data file into a prompt, an answer and the options to choose from."""

import difflib
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedamole.data.examples import Example, Literals
from fedamole.data.filling import Filled, Piece, fill, text_of
from fedamole.data.images import image_of
from fedamole.data.layouts import Conversation, Turn, listed, missing_column, shortened
from fedamole.errors import ConfigError, DataError


@dataclass(frozen=True)
class TemplateSettings:
    """`[data.templates.NAME]`: a template. A row's value replaces `{column}`; `{{` and `}}` are literal braces."""

    prompt: str
    """Text of the prompt. End it with a newline, because prompt and answer are tokenised separately; with `chat` this
    is not needed."""
    answer: str
    """Text of the answer, usually one column: `"{response}"`. It must contain at least one column."""
    rejected: str | None = None
    """Text of the answer that is not preferred, in preference data: `"{rejected}"`. The text of the preferred one is
    `answer`. It must contain a column. Not allowed with `options`, `options_from` and `labels`."""
    context: str | None = None
    """Column of the prompt that may be truncated if the prompt is too long. `prompt` must contain it exactly once."""
    prompt_without_context: str | None = None
    """Prompt of rows whose context is empty; it must not contain the context column. Requires `context`. Unset:
    `prompt`."""
    options: tuple[str, ...] = ()
    """Answers to choose from, at least two, each once (classification). Without `options`, `options_from` and `labels`
    answers are free text."""
    options_from: str | None = None
    """Column whose distinct values in the train and test rows, sorted, are the options. Not allowed with `options` or
    `labels`."""
    labels: dict[str, str] = field(default_factory=dict)
    """Answers as the data contain them, each mapped to the answer to write, for example `{"0" = "Yes", "1" = "No"}`.
    Rows mapped to `""` are left out. Without `options` the mapped answers are the options."""
    chat: bool = False
    """Whether the chat template of the base's tokenizer renders prompt and answer, as messages of the user and the
    assistant. With `messages` rows, `{prompt}` is the user's last message and the earlier turns precede it."""
    every_turn: bool = False
    """Whether every assistant turn of a `messages` row that follows a user's turn is trained on, not the last one
    alone: each becomes a training example, with the turns before it as its prompt. Embedding, validation and test use
    the last turn. Requires `chat = true`. Not allowed with options, `rejected` and `[privacy]`."""
    system: str | None = None
    """System message before the prompt, unless the row's `messages` have one. Requires `chat = true`. Unset: none,
    though some chat templates write their own."""
    category: str | None = None
    """Text of a row's category, usually one column: `"{topic}"`. The method `data_engine` compares the errors of
    categories. Unset: the answer option; all examples with free text are one category."""
    image: str | None = None
    """Column with the image of a row, as `"{picture}"`: a path relative to the data file, or the image itself in a
    Parquet file or Hub data set. It stands where `prompt` contains the base's placeholder, else before the prompt.
    Requires `base.images = true`."""

    @property
    def prompt_columns(self) -> list[str]:
        """Columns that the prompt reads, in order and with repeats."""
        return self._columns("prompt", "prompt_without_context", "image")

    @property
    def answer_columns(self) -> list[str]:
        """Columns that the answers, their options and the category read, in order and with repeats."""
        options = [] if self.options_from is None else [self.options_from]
        return [*self._columns("answer", "category", "rejected"), *options]

    def _columns(self, *keys: str) -> list[str]:
        texts = {key: getattr(self, key) for key in keys}
        return [column for key, text in texts.items() if text is not None for column in columns_of(text, key)]

    def __post_init__(self) -> None:
        prompt_columns = columns_of(self.prompt, "prompt")
        for key, example in {"answer": "{response}", "category": "{topic}", "rejected": "{rejected}"}.items():
            text = getattr(self, key)
            if text is not None and not columns_of(text, key):
                _refuse(key, text, f'it names no column; write one as "{example}"')
        if self.rejected is not None and (self.options or self.options_from is not None or self.labels):
            _refuse("rejected", self.rejected, "answers in pairs have no options; set either rejected or options")
        if self.context is not None and prompt_columns.count(self.context) != 1:
            _refuse(
                "context",
                self.context,
                "prompt must contain this column exactly once, as {" + self.context + "}",
            )
        if self.prompt_without_context is not None:
            if self.context is None:
                _refuse("prompt_without_context", self.prompt_without_context, "it requires context = <column>")
            if self.context in columns_of(self.prompt_without_context, "prompt_without_context"):
                _refuse(
                    "prompt_without_context",
                    self.prompt_without_context,
                    "it must not contain the context column",
                )
        if self.options_from is not None and (self.options or self.labels):
            _refuse("options_from", self.options_from, "set either options_from or options/labels, not both")
        if self.options and len(set(self.options)) < max(2, len(self.options)):
            _refuse("options", self.options, "set at least two different options")
        pieces = () if self.image is None else pieces_of(self.image, "image")
        if self.image is not None and (len(pieces) != 1 or pieces[0][0] or pieces[0][1] is None):
            _refuse("image", self.image, 'it must be one column, written as "{picture}"')
        if self.system is not None and not self.chat:
            _refuse("system", self.system, "it requires chat = true")
        choosing = self.options or self.options_from is not None or self.labels or self.rejected
        if self.every_turn and (choosing or not self.chat):
            _refuse("every_turn", True, "it requires chat = true, without options, labels and rejected")
        unknown = sorted({text for text in self.labels.values() if text} - set(self.options)) if self.options else []
        if unknown:
            _refuse("labels", unknown, f"every label must be mapped to one of the options {list(self.options)}")


def _refuse(key: str, value: object, remedy: str) -> None:
    raise ConfigError(f"data.templates.<name>.{key} = {value!r}: {remedy}")


@lru_cache(maxsize=256)
def pieces_of(text: str, key: str) -> tuple[Piece, ...]:
    """Split a template's text into literals and columns. Braces in the data are not interpreted."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(
            f"data.templates.<name>.{key} = {text!r}: {error}; write literal braces as {{{{ and }}}}"
        ) from error
    pieces: list[Piece] = []
    before = ""
    for literal, column, spec, conversion in parsed:
        if column is not None and (not column or spec or conversion):
            _refuse(
                key,
                text,
                "a column must be written as {column}, without format or conversion; write literal braces as {{ and }}",
            )
        # The parser splits a literal at a doubled brace. Join the parts again: a special token may contain a brace.
        before += literal
        if column is not None:
            pieces.append((before, column))
            before = ""
    return (*pieces, (before, None)) if before else tuple(pieces)


def columns_of(text: str, key: str) -> list[str]:
    """Return the columns in a template's text, in order and with repeats."""
    return [column for _, column in pieces_of(text, key) if column is not None]


BUILT_IN: dict[str, TemplateSettings] = {
    # The Alpaca format: an introduction, then the parts under headings. The wording is this project's own.
    "alpaca": TemplateSettings(
        prompt=(
            "The instruction below describes a task; the input after it gives further context. "
            "Write a response that fulfils the task.\n\n"
            "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
        ),
        prompt_without_context=(
            "The instruction below describes a task. Write a response that fulfils the task.\n\n"
            "### Instruction:\n{instruction}\n\n### Response:\n"
        ),
        context="context",
        answer="{response}",
    ),
    "snli": TemplateSettings(
        prompt="Premise: {premise}\nHypothesis: {hypothesis}\nDoes the premise imply it?\nAnswer:\n",
        answer="{label}",
        # -1 marks pairs on which SNLI's annotators did not agree. They have no answer.
        labels={
            "0": "Yes",
            "1": "Maybe",
            "2": "No",
            "-1": "",
            "entailment": "Yes",
            "neutral": "Maybe",
            "contradiction": "No",
        },
    ),
    "banking77": TemplateSettings(
        prompt="A customer of a bank writes: {text}\nWhich intent does the message have?\nIntent:\n",
        answer="{label_text}",
        options_from="label_text",
    ),
    "pubmedqa": TemplateSettings(
        prompt="Abstract: {context}\n\nQuestion: {question}\nAnswer with yes, no or maybe.\nAnswer:\n",
        context="context",
        answer="{label_text}",
        options=("yes", "no", "maybe"),
    ),
    "plain": TemplateSettings(prompt="{prompt}", answer="{completion}"),
    "preference": TemplateSettings(prompt="{prompt}", answer="{chosen}", rejected="{rejected}"),
    # The template "plain" for files that also have a prompt or completion column: `messages` is used instead.
    "messages": TemplateSettings(prompt="{prompt}", answer="{completion}"),
    "classification": TemplateSettings(
        prompt="Text: {text}\nWhich class does the text belong to?\nClass:\n",
        answer="{label_text}",
        options_from="label_text",
    ),
    # For files with `messages` or prompt and completion; `_chat_by_columns` selects the others.
    "chat": TemplateSettings(prompt="{prompt}", answer="{completion}", chat=True),
    "chat_turns": TemplateSettings(prompt="{prompt}", answer="{completion}", chat=True, every_turn=True),
}
CHAT_INSTRUCTION = TemplateSettings(
    prompt="{instruction}\n\n{context}",
    prompt_without_context="{instruction}",
    context="context",
    answer="{response}",
    chat=True,
)
"""The template "chat" for files with instruction and response."""
# The same for files without a column of label names: the labels themselves are the options.
_UNNAMED_CLASSIFICATION = TemplateSettings(
    prompt=BUILT_IN["classification"].prompt, answer="{label}", options_from="label"
)


def check_name(name: str, own: Mapping[str, TemplateSettings], table: str = "data.source") -> None:
    """Raise ConfigError if a template is neither built in nor defined in the config (`own`).

    `table` is the config's table that names it.
    """
    known = ["auto", *BUILT_IN, *own]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{table}.template = {name!r}: unknown template; known are {', '.join(known)}{guess}")


def choose(name: str, own: Mapping[str, TemplateSettings], columns: Iterable[str], where: str) -> TemplateSettings:
    """Return the template with this name for a file with these columns; "auto" selects one by the columns.

    Raises DataError if "auto" finds no template, or if the file lacks a column of the template.
    """
    check_name(name, own)
    have = set(columns)
    if name == "chat":
        template = _chat_by_columns(have, where)
    else:
        name = _by_columns(have, where) if name == "auto" else name
        template = own[name] if name in own else _built_in(name, have)
    check_columns(template, have, where)
    return template


def check_columns(template: TemplateSettings, columns: Iterable[str], where: str) -> None:
    """Raise DataError if a file lacks a column of the template."""
    have = set(columns)
    for column in (*template.prompt_columns, *template.answer_columns):
        if column not in have:
            raise missing_column(column, have, where)


def _built_in(name: str, have: set[str]) -> TemplateSettings:
    unnamed = name == "classification" and "label_text" not in have and "label" in have
    return _UNNAMED_CLASSIFICATION if unnamed else BUILT_IN[name]


def _chat_by_columns(have: set[str], where: str) -> TemplateSettings:
    """The template "chat" for a file: `messages`, else the template of "auto" without the headings around it."""
    name = "plain" if "messages" in have else _by_columns(have, where)
    known = {"plain": BUILT_IN["chat"], "alpaca": CHAT_INSTRUCTION}
    return known[name] if name in known else replace(_built_in(name, have), chat=True)


def _by_columns(have: set[str], where: str) -> str:
    if {"premise", "hypothesis", "label"} <= have:
        return "snli"
    if {"instruction", "response"} <= have:
        return "alpaca"
    if {"prompt", "completion"} <= have:
        return "plain"
    if {"prompt", "chosen", "rejected"} <= have:
        return "preference"
    if "text" in have and {"label", "label_text"} & have:
        return "classification"
    if "messages" in have:  # `arrange` did not use it, so the file has one of the two columns
        beside = "prompt" if "prompt" in have else "completion"
        raise DataError(
            f"{where}: both of the columns messages and {beside} could provide the prompts. In this "
            f'[[data.source]], set template = "messages" to use messages, or drop the other column with columns = '
            f'{{{beside} = ""}}; for a client\'s own file, --template messages or --column {beside}='
        )
    raise DataError(
        f"{where}: no template fits the columns {listed(have)}; rename them in this [[data.source]], as in "
        'columns = {instruction = "NAME", response = "NAME"} (for a client\'s own file, --column instruction=NAME), or '
        "write a template under [data.templates.<name>]. Known are instruction, context and response; prompt and "
        "completion; text and label; messages; prompt, chosen and rejected; premise, hypothesis and label"
    )


def render(
    template: TemplateSettings, options: Sequence[str], row: Mapping[str, Any], where: str, folder: Path | None = None
) -> Example | None:
    """Return the example of one row, or None if the row has no answer; `where` names file and row in errors.

    Paths of images start at `folder`; None: rows must contain the images. Raises DataError if a column of the prompt
    other than the context is empty, if the answer is not an option, if a pair of answers lacks the rejected one or has
    two equal ones, or if the image cannot be read.
    """
    answer, answer_literals = fill(pieces_of(template.answer, "answer"), row, where, missing="")
    if not answer.strip():
        return None
    known = template.labels or options
    if known and answer not in known:
        answer = answer.strip()
    if template.labels:
        if answer not in template.labels:
            raise DataError(
                f"{where}: the label {shortened(answer)} is outside the template's labels {list(template.labels)}; "
                f'correct the row, or add the label to labels (mapped to "", such rows are left out)'
            )
        answer = template.labels[answer]
        if not answer:
            return None
    if options and answer not in options:
        raise DataError(
            f"{where}: the label {shortened(answer)} is outside the template's options {list(options)}; correct the row"
        )
    rejected = None if template.rejected is None else _rejected(template.rejected, answer, row, where)
    # Options and labels of the template are its own text, even though the row selects one of them.
    own_options = bool(options) and template.options_from is None
    if options:
        answer_literals = ((0, len(answer)),) if own_options else ()
    example = render_prompt(template, row, where, folder)
    other, other_literals = rejected or (None, ())
    literals = replace(example.literals, answer=answer_literals, options=own_options, rejected=other_literals)
    category = None
    if template.category is not None:
        category = fill(pieces_of(template.category, "category"), row, where, missing="").text.strip()
    made = replace(example, answer=answer, options=tuple(options), literals=literals)
    return replace(made, category=category, rejected=other)


def render_prompt(
    template: TemplateSettings, row: Mapping[str, Any], where: str, folder: Path | None = None
) -> Example:
    """Return the example of one row with an empty answer and without options, which are not read; see `render`."""
    turns, row = _turns(template, row, where) if template.chat else (None, row)
    before, context, after = _prompt(template, row, where)
    literals = Literals(before.literals, after.literals)
    image = None
    if template.image is not None:
        (column,) = columns_of(template.image, "image")
        image = image_of(row[column], column, where, folder)
    return Example(before.text, context, after.text, "", (), literals, turns, image=image)


def _rejected(text: str, answer: str, row: Mapping[str, Any], where: str) -> Filled:
    """Return the rejected answer of a pair; DataError if it is empty or equals the preferred answer."""
    rejected = fill(pieces_of(text, "rejected"), row, where, missing="")
    if not rejected.text.strip():
        raise DataError(f"{where}: the pair has no rejected answer; fill in its column or remove the row")
    if rejected.text.strip() == answer.strip():
        raise DataError(f"{where}: both answers of the pair are {shortened(answer)}; correct or remove the row")
    return rejected


def _turns(
    template: TemplateSettings, row: Mapping[str, Any], where: str
) -> tuple[tuple[Turn, ...], Mapping[str, Any]]:
    """Return the turns before the user's last message, and the row with this message alone as its prompt."""
    earlier: tuple[Turn, ...] = ()
    prompt = row.get("prompt")
    if isinstance(prompt, Conversation) and "prompt" in columns_of(template.prompt, "prompt"):
        *before, last = prompt.turns
        earlier, row = tuple(before), {**row, "prompt": user_message(last, where)}
    return (*system_turns(template, earlier), *earlier), row


def user_message(last: Turn, where: str) -> str:
    """Return the text of the turn before an answer; DataError if it is not the user's."""
    role, text = last
    if role != "user":
        raise DataError(f"{where}: in a chat, the turn before the answer must be the user's, and it is the {role}'s")
    return text


def system_turns(template: TemplateSettings, turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Return the template's system message as a turn, or nothing if it has none or the conversation has its own."""
    if template.system is None or any(role == "system" for role, _ in turns):
        return ()
    return (("system", template.system),)


def _prompt(template: TemplateSettings, row: Mapping[str, Any], where: str) -> tuple[Filled, str, Filled]:
    """Return the prompt before the context, the context, and the prompt after it."""
    pieces = pieces_of(template.prompt, "prompt")
    empty = Filled("", ())
    if template.context is None:
        return fill(pieces, row, where), "", empty
    value = row[template.context]
    context = "" if value is None else text_of(value, template.context, where)
    if not context.strip() and template.prompt_without_context is not None:
        without = pieces_of(template.prompt_without_context, "prompt_without_context")
        return fill(without, row, where), "", empty
    index = [column for _, column in pieces].index(template.context)
    before = fill((*pieces[:index], (pieces[index][0], None)), row, where)
    return before, context, fill(pieces[index + 1 :], row, where)
