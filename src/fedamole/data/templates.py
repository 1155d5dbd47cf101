"""Task templates: how a row of columns becomes a prompt, an answer and the options to choose from."""

import difflib
import logging
import string
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import tomli_w

from fedamole.data.examples import Example, Literals, Span
from fedamole.data.layouts import listed, missing_column, shortened
from fedamole.errors import ConfigError, DataError

log = logging.getLogger(__name__)

Piece = tuple[str, str | None]
"""Literal text and the column whose value follows it (None: nothing follows)."""


@dataclass(frozen=True)
class TemplateSettings:
    """A `[data.templates.<name>]` table; `{column}` stands for the row's value, `{{` and `}}` for braces."""

    # The prompt; end it with a newline, because prompt and answer are turned into tokens apart.
    prompt: str
    # The answer, usually one column: "{response}".
    answer: str
    # The column of the prompt that may be shortened where the prompt is too long for the base.
    context: str | None = None
    # The prompt of rows whose context is empty; unset: `prompt` serves them too.
    prompt_without_context: str | None = None
    # The answers there are, for classification; none here, nor by the next two: free text.
    options: tuple[str, ...] = ()
    # The column whose distinct values, sorted, over train and test rows, are the options.
    options_from: str | None = None
    # From the answer in the data to the answer as written; "" leaves such rows out. Without `options` they
    # are these.
    labels: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = columns_of(self.prompt, "prompt")
        if not columns_of(self.answer, "answer"):
            _refuse("answer", self.answer, 'it names no column; write one as "{response}"')
        if self.context is not None and wanted.count(self.context) != 1:
            _refuse(
                "context",
                self.context,
                "prompt must hold this column exactly once, as {" + self.context + "}",
            )
        if self.prompt_without_context is not None:
            if self.context is None:
                _refuse("prompt_without_context", self.prompt_without_context, "it needs context = <column>")
            if self.context in columns_of(self.prompt_without_context, "prompt_without_context"):
                _refuse(
                    "prompt_without_context",
                    self.prompt_without_context,
                    "it must not hold the context column",
                )
        if self.options_from is not None and (self.options or self.labels):
            _refuse("options_from", self.options_from, "give either options_from or options/labels, not both")
        if self.options and len(set(self.options)) < max(2, len(self.options)):
            _refuse("options", self.options, "give at least two, each once")
        strangers = sorted({text for text in self.labels.values() if text} - set(self.options)) if self.options else []
        if strangers:
            _refuse("labels", strangers, f"every written label must be one of the options {list(self.options)}")


def _refuse(key: str, value: object, remedy: str) -> None:
    raise ConfigError(f"data.templates.<name>.{key} = {value!r}: {remedy}")


@lru_cache(maxsize=256)
def pieces_of(text: str, key: str) -> tuple[Piece, ...]:
    """A template's text cut into literals and columns; read once, so braces in the data stay plain text."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"data.templates.<name>.{key} = {text!r}: {error}; write a literal brace twice") from error
    pieces: list[Piece] = []
    before = ""
    for literal, column, spec, conversion in parsed:
        if column is not None and (not column or spec or conversion):
            _refuse(
                key,
                text,
                "a place must be {column}, without format or conversion; write a literal brace twice",
            )
        # A doubled brace divides a literal, which is put together again: it may be part of a special token.
        before += literal
        if column is not None:
            pieces.append((before, column))
            before = ""
    return (*pieces, (before, None)) if before else tuple(pieces)


def columns_of(text: str, key: str) -> list[str]:
    """The columns that a template's text asks for, in order and with repeats."""
    return [column for _, column in pieces_of(text, key) if column is not None]


BUILT_IN: dict[str, TemplateSettings] = {
    # The Alpaca layout: a preamble, then the parts under headings; the wording is this project's.
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
        # -1 marks pairs on which SNLI's annotators did not agree: they have no answer.
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
    # The same, for rows whose prompt and completion are made of `messages` even where the file has such columns too.
    "messages": TemplateSettings(prompt="{prompt}", answer="{completion}"),
    "classification": TemplateSettings(
        prompt="Text: {text}\nWhich class does the text belong to?\nClass:\n",
        answer="{label_text}",
        options_from="label_text",
    ),
}
# Texts whose labels come without names: the same, with the labels themselves as options.
_BARE_CLASSIFICATION = TemplateSettings(
    prompt=BUILT_IN["classification"].prompt, answer="{label}", options_from="label"
)


def check_name(name: str, own: Mapping[str, TemplateSettings]) -> None:
    """Raise ConfigError for a template that is neither built in nor among the config's own."""
    known = ["auto", *BUILT_IN, *own]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"data.source.template = {name!r}: known are {', '.join(known)}{guess}")


def choose(name: str, own: Mapping[str, TemplateSettings], columns: Iterable[str], where: str) -> TemplateSettings:
    """The template of this name for a file with these columns; "auto" goes by the columns alone.

    Raises DataError where "auto" finds no template, or where the template asks for a column that is not
    there.
    """
    check_name(name, own)
    have = set(columns)
    if name == "auto":
        name = _by_columns(have, where)
    template = own[name] if name in own else BUILT_IN[name]
    if name == "classification" and name not in own and "label_text" not in have and "label" in have:
        template = _BARE_CLASSIFICATION
    check_columns(template, have, where)
    return template


def check_columns(template: TemplateSettings, columns: Iterable[str], where: str) -> None:
    """Raise DataError for a column that the template asks for and a file does not have."""
    have = set(columns)
    texts = {
        "prompt": template.prompt,
        "prompt_without_context": template.prompt_without_context or "",
        "answer": template.answer,
    }
    wanted = [column for key, text in texts.items() for column in columns_of(text, key)]
    for column in (*wanted, *([template.options_from] if template.options_from is not None else [])):
        if column not in have:
            raise missing_column(column, have, where)


def _by_columns(have: set[str], where: str) -> str:
    if {"premise", "hypothesis", "label"} <= have:
        return "snli"
    if {"instruction", "response"} <= have:
        return "alpaca"
    if {"prompt", "completion"} <= have:
        return "plain"
    if "text" in have and {"label", "label_text"} & have:
        return "classification"
    if "messages" in have:  # not used by `arrange`, so the file has one of the two columns
        beside = "prompt" if "prompt" in have else "completion"
        raise DataError(
            f"{where}: there are the columns messages and {beside}, and either could make the prompts. In this "
            f'[[data.source]], set template = "messages" to use messages, or drop the other column with columns = '
            f'{{{beside} = ""}}; for a client\'s own file, --template messages or --column {beside}='
        )
    raise DataError(
        f"{where}: no template fits the columns {listed(have)}; set template = one of "
        f"{', '.join(BUILT_IN)}, or write your own under [data.templates.<name>]"
    )


def options_of(template: TemplateSettings, rows: Iterable[Mapping[str, Any]], where: str) -> tuple[str, ...]:
    """The options of a whole source; `rows` are all its rows, train and test: its clients share the list.

    Empty for free text. Values that differ only by the white space around them are one option, without it; a warning
    counts the rows that have it. Raises DataError if `options_from` finds fewer than two values.
    """
    rows = list(rows)
    options = template.options
    if not options and template.options_from is None:
        options = tuple(dict.fromkeys(text for text in template.labels.values() if text))
    if not options and (column := template.options_from) is not None:
        spellings: dict[str, set[str]] = {}
        for text in {text_of(row[column], column, where) for row in rows if row[column] is not None}:
            spellings.setdefault(text.strip(), set()).add(text)
        spellings.pop("", None)
        options = tuple(sorted(label if len(texts) > 1 else texts.pop() for label, texts in spellings.items()))
        if len(options) < 2:
            raise _too_few_options(template, column, options, where)
    _warn_of_white_space(template, template.labels or options, rows, where)
    return options


def _warn_of_white_space(
    template: TemplateSettings, known: Collection[str], rows: Iterable[Mapping[str, Any]], where: str
) -> None:
    """Count the rows whose label is a known one but for the white space around it; `render` takes it for that one."""
    columns = columns_of(template.answer, "answer")
    if not known or len(columns) > 1:
        return
    labels = [row[columns[0]] for row in rows if isinstance(row.get(columns[0]), str)]
    spaced = [label for label in labels if label not in known and label.strip() in known]
    if spaced:
        log.warning(
            "%s: %d of %d labels have white space around them; each is taken for the label without it, for example %s",
            where,
            len(spaced),
            len(labels),
            shortened(spaced[0]),
        )


def _too_few_options(template: TemplateSettings, column: str, found: Sequence[str], where: str) -> DataError:
    """The error for a file with a single label: shows the template that lists the answers of the whole task."""
    keys = {"prompt": template.prompt, "prompt_without_context": template.prompt_without_context}
    keys |= {"context": template.context, "answer": template.answer}
    table = "".join(f"{key} = {_as_toml(text)}, " for key, text in keys.items() if text is not None)
    options = "".join(f"{_as_toml(text[:200])}, " for text in found)
    return DataError(
        f"{where}: column {column!r} has only the values {[text[:200] for text in found]}; options need at least two. "
        "If other clients have other answers, list all answers of the task in the config, which in a deployment is the "
        f"coordinator's: under [data.templates], task = {{ {table}options = [{options}...] }}. Then use it: template = "
        '"task" in each [[data.source]] of the task, or --template task for a client\'s own file'
    )


def _as_toml(text: str) -> str:
    return tomli_w.dumps({"text": text}).removeprefix("text = ").strip()


def render(template: TemplateSettings, options: Sequence[str], row: Mapping[str, Any], where: str) -> Example | None:
    """The example of one row, or None for a row without an answer; `where` names file and row in errors.

    Raises DataError for an empty column of the prompt other than the context and for an answer that is not
    among the options.
    """
    answer, answer_literals = _fill(pieces_of(template.answer, "answer"), row, where, missing="")
    if not answer.strip():
        return None
    known = template.labels or options
    if known and answer not in known:
        answer = answer.strip()
    if template.labels:
        if answer not in template.labels:
            raise DataError(
                f"{where}: the label {shortened(answer)} is outside the template's labels {list(template.labels)}; "
                f'correct the row or add it to labels (to "" to leave such rows out)'
            )
        answer = template.labels[answer]
        if not answer:
            return None
    if options and answer not in options:
        raise DataError(f"{where}: the label {shortened(answer)} is outside the template's options {list(options)}")
    before, context, after = _prompt(template, row, where)
    # Options of the template and the labels that it writes are its own text, whatever row chose among them.
    own_options = bool(options) and template.options_from is None
    if options:
        answer_literals = ((0, len(answer)),) if own_options else ()
    literals = Literals(before.literals, after.literals, answer_literals, own_options)
    return Example(before.text, context, after.text, answer, tuple(options), literals)


class _Filled(NamedTuple):
    """A template's text with the values of a row in it, and where its own text stands."""

    text: str
    literals: tuple[Span, ...]


def _prompt(template: TemplateSettings, row: Mapping[str, Any], where: str) -> tuple[_Filled, str, _Filled]:
    pieces, nothing = pieces_of(template.prompt, "prompt"), _Filled("", ())
    if template.context is None:
        return _fill(pieces, row, where), "", nothing
    value = row[template.context]
    context = "" if value is None else text_of(value, template.context, where)
    if not context.strip() and template.prompt_without_context is not None:
        without = pieces_of(template.prompt_without_context, "prompt_without_context")
        return _fill(without, row, where), "", nothing
    at = [column for _, column in pieces].index(template.context)
    before = _fill((*pieces[:at], (pieces[at][0], None)), row, where)
    return before, context, _fill(pieces[at + 1 :], row, where)


def _fill(pieces: Iterable[Piece], row: Mapping[str, Any], where: str, missing: str | None = None) -> _Filled:
    """Literals and values in order; `missing` stands for an empty value, without it that is a DataError."""
    parts: list[str] = []
    literals: list[Span] = []
    length = 0
    for literal, column in pieces:
        parts.append(literal)
        if literal:
            literals.append((length, length + len(literal)))
        length += len(literal)
        if column is None:
            continue
        if row[column] is None and missing is None:
            raise DataError(f"{where}: column {column!r} is empty; fill it in or remove the row")
        parts.append(missing if row[column] is None and missing is not None else text_of(row[column], column, where))
        length += len(parts[-1])
    return _Filled("".join(parts), tuple(literals))


def text_of(value: Any, column: str, where: str) -> str:
    """Return a value as text; DataError for one that a template cannot show.

    Text stays as it is, a number of a JSON file keeps its literal, truth values become true/false, and values of typed
    columns (Parquet) are written as Python writes them: `1`, `2.5`, `2024-03-01 08:30:00`.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or isinstance(value, list | dict | bytes):
        kind = "no value" if value is None else "bytes" if isinstance(value, bytes) else "a list or an object"
        raise DataError(f"{where}: column {column!r} holds {kind}, a template needs text or a number")
    return str(value)
