"""Draw the clients of one source: render its rows, partition them among clients and split each client's rows."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fedamole.data.answer_options import options_of
from fedamole.data.examples import Example, Task
from fedamole.data.filling import text_of
from fedamole.data.layouts import missing_column
from fedamole.data.partition import Part, allot_test, partition
from fedamole.data.seeding import generator
from fedamole.data.settings import DataSettings, SourceSettings
from fedamole.data.sources import Table, read_source
from fedamole.data.splits import ClientRows, split_client
from fedamole.data.templates import TemplateSettings, check_columns, choose, render
from fedamole.errors import DataError
from fedamole.runs.run_files import SPLITS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceData:
    """The tables of a source, with its template and answer options."""

    source: SourceSettings
    train: Table
    test: Table | None
    """Official test set, if the source has one."""
    template: TemplateSettings
    options: tuple[str, ...]
    """Answer options, shared by all clients of the source; empty for free text."""

    @property
    def task(self) -> Task:
        """Task of all examples of the source."""
        if self.template.rejected is not None:
            return "preference"
        return "classification" if self.options else "generation"

    def table(self, name: Literal["train", "test"]) -> Table:
        """Return the source's own rows or its official test set; KeyError if it has no official test set."""
        table = self.train if name == "train" else self.test
        if table is None:
            raise KeyError(name)
        return table

    def example(self, name: Literal["train", "test"], index: int) -> Example | None:
        """Return the example of a row, or None if the row has no answer."""
        table = self.table(name)
        return render(self.template, self.options, table.rows[index], table.row_name(index), table.folder)


def open_source(settings: DataSettings, source: SourceSettings, base_folder: Path) -> SourceData:
    """Read a source and determine its template and options."""
    train, test = read_source(source, base_folder)
    template = choose(source.template, settings.templates, train.columns, train.where)
    if test is not None:
        check_columns(template, test.columns, test.where)
    rows = [*train.rows, *(test.rows if test is not None else ())]
    return SourceData(source, train, test, template, options_of(template, rows, train.where))


@dataclass(frozen=True)
class Candidates:
    """The rows of a source that can be used, as input of partitioning and splitting."""

    rows: tuple[int, ...]
    """Row numbers."""
    values: list[str] | None
    """Value of the partition's column `by` for each of `rows`; None if the partition has no such column."""
    identity: Mapping[int, tuple[str, ...]]
    """`Example.identity` by row number. Rows with equal entries are duplicates."""
    test_rows: tuple[int, ...] | None
    """Row numbers of the official test set; None without one."""
    test_values: list[str] | None
    """Like `values`, for `test_rows`."""


def draw_clients(settings: DataSettings, data: SourceData) -> tuple[list[ClientRows], list[str]]:
    """Return the clients of a source with the rows of their splits, and notes on rows that were left out.

    The result depends only on the settings and rows of this source. Raises DataError if a client has an empty split or
    too few training examples, or if the source has no usable rows.
    """
    name, by = data.source.name, data.source.partition.by
    candidates, notes = _candidates(settings, data)
    if not candidates.rows:
        raise DataError("; ".join([f"source {name!r}: no rows are left to train on", *notes]))
    parts = partition(
        name,
        data.source.partition,
        len(candidates.rows),
        candidates.values,
        settings.partition_seed,
        settings.min_examples,
        lambda drawn: [client.training_size for client in _split(settings, data, candidates, drawn)],
        len({candidates.identity[row] for row in candidates.rows}),
    )
    clients = _split(settings, data, candidates, parts)
    for client in clients:
        client.check(settings.min_examples, notes)
    if (unused := len(candidates.rows) - sum(len(part.rows) for part in parts)) > 0:
        notes.append(f"source {name!r}: {unused} rows are not used: no client has their value of {by!r}")
    if candidates.values is not None and candidates.test_values is not None:
        trained = {candidates.values[index] for part in parts for index in part.rows}
        if (unused := sum(value not in trained for value in candidates.test_values)) > 0:
            notes.append(f"source {name!r}: {unused} official test rows are not used: no client trains on their {by!r}")
    for note in notes:
        log.info("%s", note)
    return clients, notes


def _candidates(settings: DataSettings, data: SourceData) -> tuple[Candidates, list[str]]:
    """Return the rows with an answer, within the limit and not in the official test set, and notes on the others."""
    notes: list[str] = []
    examples = _examples(data, "train", limited_rows(settings, data), notes)
    identity = {row: example.identity for row, example in examples.items()}
    if data.test is None:
        rows = tuple(examples)
        return Candidates(rows, _values(data.source, data.train, rows), identity, None, None), notes
    tests = _examples(data, "test", range(len(data.test.rows)), notes)
    test_examples = {example.identity for example in tests.values()}
    rows = tuple(row for row in examples if identity[row] not in test_examples)
    if dropped := len(examples) - len(rows):
        name = data.source.name
        notes.append(f"source {name!r}: {dropped} training rows that equal an official test row were dropped")
    values = _values(data.source, data.train, rows)
    return Candidates(rows, values, identity, tuple(tests), _values(data.source, data.test, tuple(tests))), notes


def _split(settings: DataSettings, data: SourceData, candidates: Candidates, parts: Sequence[Part]) -> list[ClientRows]:
    """Return the clients of a partition with their splits; a split that cannot be filled is empty."""
    tests: list[tuple[int, ...] | None] = [None] * len(parts)
    if (test_rows := candidates.test_rows) is not None:
        rng = generator(settings.partition_seed, "official test", data.source.name)
        allotted = allot_test(parts, candidates.values, len(test_rows), candidates.test_values, rng)
        tests = [tuple(test_rows[index] for index in indices) for indices in allotted]
    clients = []
    for part, test in zip(parts, tests, strict=True):
        rows = [candidates.rows[index] for index in part.rows]
        client = split_client(part.client, rows, candidates.identity, test, data.task, settings)
        clients.append(replace(client, value=part.value))
    return clients


def limited_rows(settings: DataSettings, data: SourceData) -> Sequence[int]:
    """Return the row numbers within the source's limit, a seeded sample if it has more rows."""
    count = len(data.train.rows)
    limit = data.source.limit
    if limit is None or limit >= count:
        return range(count)
    rng = generator(settings.partition_seed, "limit", data.source.name)
    return sorted(rng.choice(count, size=limit, replace=False).tolist())


def _examples(
    data: SourceData, name: Literal["train", "test"], rows: Sequence[int], notes: list[str]
) -> dict[int, Example]:
    """Return examples by row number, in order. Rows without an answer are left out; `notes` gets their number."""
    examples = {row: example for row in rows if (example := data.example(name, row)) is not None}
    if (unanswered := len(rows) - len(examples)) > 0:
        notes.append(f"{data.table(name).where}: {unanswered} rows without an answer were left out")
    return examples


def _values(source: SourceSettings, table: Table, rows: Sequence[int]) -> list[str] | None:
    """Return the text of the partition's column `by` for each row; DataError if the column or a value is missing."""
    by = source.partition.by
    if by is None:
        return None
    if by not in table.columns:
        raise missing_column(by, table.columns, table.where)
    for row in rows:
        if table.rows[row][by] is None:
            raise DataError(
                f"{table.row_name(row)}: column {by!r} has no value, but the partition needs it; fill it in or remove "
                "the row"
            )
    values = [text_of(table.rows[row][by], by, table.row_name(row)) for row in rows]
    stripped = [value.strip() for value in values]
    if padded := sum(value != text for value, text in zip(stripped, values, strict=True)):
        log.warning("%s: %d values of %r have white space around them, which is ignored", table.where, padded, by)
    return stripped


def examples_of(data: SourceData, client: ClientRows) -> Mapping[str, tuple[Example, ...]]:
    """Return a client's examples by split."""
    tables: dict[str, Literal["train", "test"]] = {"test": client.test_table}
    examples: dict[str, tuple[Example, ...]] = {}
    for split in SPLITS:
        rendered = [data.example(tables.get(split, "train"), row) for row in getattr(client, split)]
        examples[split] = tuple(example for example in rendered if example is not None)
    return examples
