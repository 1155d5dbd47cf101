"""Public prompts: rows that the server holds for methods that need them, and that belong to no client."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedamole.data.answer_options import options_of
from fedamole.data.drawing import SourceData, limited_rows
from fedamole.data.examples import Example
from fedamole.data.layouts import Row
from fedamole.data.manifest import TableRecord
from fedamole.data.settings import DataSettings
from fedamole.data.sources import Table, read_source
from fedamole.data.templates import BUILT_IN, TemplateSettings, choose, render_prompt
from fedamole.data.tokens import TokenRow, tokenise, warn_of_text
from fedamole.errors import DataError

if TYPE_CHECKING:  # takes seconds to import, and the tokenizer comes from the caller
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

NAME = "data.public"
"""Name of these rows in errors and warnings."""
ANSWER_COLUMNS: tuple[tuple[frozenset[str], tuple[str, ...]], ...] = (
    (frozenset({"premise", "hypothesis"}), ("label",)),
    (frozenset({"instruction"}), ("response",)),
    (frozenset({"prompt"}), ("completion",)),
    (frozenset({"text"}), ("label_text", "label")),
)
"""Columns of prompts, each with the columns that may hold their answers, in the order in which "auto" tries them."""


@dataclass(frozen=True)
class PublicRows:
    """The token rows of the public prompts, and the file that they come from."""

    rows: tuple[TokenRow, ...]
    """The answer of a row without an answer is empty."""
    record: TableRecord


def load_public(
    settings: DataSettings, base_folder: Path, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> PublicRows:
    """Read and tokenise the rows of `settings.public`, which must be set; relative paths start at `base_folder`.

    Raises DataError if they cannot be read or used, or if none fits into `max_length` tokens.
    """
    data = _opened(settings, base_folder)
    examples = [_example(data, row) for row in limited_rows(settings, data)]
    try:
        tokens = tokenise(examples, tokenizer, max_length)
    except DataError as error:
        raise DataError(f"{NAME}: {error}") from error
    if not tokens.rows:
        raise DataError(f"{NAME}: no prompt fits into training.max_length = {max_length}; raise it")
    warn_of_text(NAME, [tokens])
    if tokens.cut or tokens.dropped:
        log.warning(
            "%s: %d prompts cut to fit training.max_length = %d, %d left out because their answer alone is too long",
            NAME,
            tokens.cut,
            max_length,
            tokens.dropped,
        )
    rows = tuple(
        row if examples[i].answer else replace(row, answer=())
        for i, row in zip(tokens.indices, tokens.rows, strict=True)
    )
    return PublicRows(rows, TableRecord(data.train.where, len(data.train.rows), data.train.sha256))


def check_unchanged(record: TableRecord, stored: TableRecord) -> None:
    """Raise DataError if public rows are not those that a run was started with."""
    if record.sha256 != stored.sha256:
        raise DataError(
            f"{NAME}: {record.name} is not what the run was started with: {record.rows} rows with hash "
            f"{record.sha256[:12]}, the run had {stored.name} with {stored.rows} rows and hash {stored.sha256[:12]}; "
            "restore the file, or start a new run"
        )


def _opened(settings: DataSettings, base_folder: Path) -> SourceData:
    """Return the table with its template and options; columns of answers that it lacks are empty."""
    assert settings.public is not None
    source = settings.public.source()
    table, _ = read_source(source, base_folder)
    added = _missing_columns(source.template, settings.templates, set(table.columns))
    rows: tuple[Row, ...] = tuple({**row, **dict.fromkeys(added)} for row in table.rows)
    completed = replace(table, rows=rows)
    template = choose(source.template, settings.templates, completed.columns, table.where)
    return SourceData(source, completed, None, template, _options(template, table, rows))


def _options(template: TemplateSettings, table: Table, rows: tuple[Row, ...]) -> tuple[str, ...]:
    """Return the answer options; none if the template takes them from a column that the file lacks."""
    if template.options_from is not None and template.options_from not in table.columns:
        return ()
    return options_of(template, rows, table.where)


def _missing_columns(name: str, own: Mapping[str, TemplateSettings], have: set[str]) -> tuple[str, ...]:
    """Return the columns of the answer, and a context, that the template needs and a file of prompts lacks."""
    if name not in ("auto", "chat"):
        template = own[name] if name in own else BUILT_IN[name]
        needed = dict.fromkeys(template.answer_columns)
        return tuple(column for column in needed if column not in have.union(template.prompt_columns))
    for prompt_columns, answers in ANSWER_COLUMNS:
        if prompt_columns <= have:
            added = () if have & set(answers) else answers[:1]
            return (*added, *(() if answers != ("response",) or "context" in have else ("context",)))
    return ()


def _example(data: SourceData, row: int) -> Example:
    """Return the example of a row; without an answer in the row, its answer is empty."""
    if (example := data.example("train", row)) is not None:
        return example
    prompt = render_prompt(data.template, data.train.rows[row], data.train.row_name(row))
    literals = replace(prompt.literals, options=bool(data.options) and data.template.options_from is None)
    return replace(prompt, options=data.options, literals=literals)
