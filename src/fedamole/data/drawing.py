"""The clients of one source: its rows as examples, shared out and split, all from the partition's seed."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fedamole.data.examples import Example, Task
from fedamole.data.layouts import missing_column
from fedamole.data.partition import Part, allot_test, partition
from fedamole.data.seeding import generator
from fedamole.data.settings import DataSettings, SourceSettings
from fedamole.data.sources import Table, read_source
from fedamole.data.splits import ClientRows, split_client
from fedamole.data.templates import TemplateSettings, check_columns, choose, options_of, render, text_of
from fedamole.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceData:
    """A source as read, with what turns its rows into examples."""

    source: SourceSettings
    train: Table
    # The official test, where there is one.
    test: Table | None
    template: TemplateSettings
    # Shared by all clients of the source; empty for free text.
    options: tuple[str, ...]

    @property
    def task(self) -> Task:
        """Of all the source's examples."""
        return "classification" if self.options else "generation"

    def table(self, name: Literal["train", "test"]) -> Table:
        """The source's own rows or its official test; KeyError for a test that it does not have."""
        table = self.train if name == "train" else self.test
        if table is None:
            raise KeyError(name)
        return table

    def example(self, name: Literal["train", "test"], index: int) -> Example | None:
        """The example of a row, None where the row has no answer."""
        table = self.table(name)
        return render(self.template, self.options, table.rows[index], table.row_name(index))


def open_source(settings: DataSettings, source: SourceSettings, base_folder: Path) -> SourceData:
    """Read a source and find its template and options."""
    train, test = read_source(source, base_folder)
    template = choose(source.template, settings.templates, train.columns, train.where)
    if test is not None:
        check_columns(template, test.columns, test.where)
    rows = [*train.rows, *(test.rows if test is not None else ())]
    return SourceData(source, train, test, template, options_of(template, rows, train.where))


@dataclass(frozen=True)
class Candidates:
    """What of a source takes part: its row numbers, and what partition and splits need to know of them."""

    rows: tuple[int, ...]
    # The value of the column `by` for each of `rows`, where the partition has one.
    values: list[str] | None
    # By row number: rows with the same one are the same example.
    identity: Mapping[int, tuple[str, str]]
    # Row numbers of the official test, None without one, and their values.
    test_rows: tuple[int, ...] | None
    test_values: list[str] | None


def draw_clients(settings: DataSettings, data: SourceData) -> tuple[list[ClientRows], list[str]]:
    """The clients of a source with the rows of their splits, and notes on rows left out.

    The same settings and rows give the same clients, whatever other sources there are. Raises DataError for a
    client with an empty split or too few training examples, and for a source of which no rows are left.
    """
    name, by = data.source.name, data.source.partition.by
    found, notes = _candidates(settings, data)
    if not found.rows:
        raise DataError("; ".join([f"source {name!r}: no rows are left to train on", *notes]))
    parts = partition(
        name,
        data.source.partition,
        len(found.rows),
        found.values,
        settings.partition_seed,
        settings.min_examples,
        lambda drawn: [client.training_size for client in _split(settings, data, found, drawn)],
        len({found.identity[row] for row in found.rows}),
    )
    clients = _split(settings, data, found, parts)
    for client in clients:
        client.check(settings.min_examples, notes)
    if (unused := len(found.rows) - sum(len(part.rows) for part in parts)) > 0:
        notes.append(f"source {name!r}: {unused} rows have values of {by!r} that no client was given")
    if found.values is not None and found.test_values is not None:
        held = {found.values[place] for part in parts for place in part.rows}
        if (unused := sum(value not in held for value in found.test_values)) > 0:
            notes.append(f"source {name!r}: {unused} official test rows have values of {by!r} nobody trains on")
    for note in notes:
        log.info("%s", note)
    return clients, notes


def _candidates(settings: DataSettings, data: SourceData) -> tuple[Candidates, list[str]]:
    """The rows with an answer, within the limit and not in the official test; and notes on the rest."""
    notes: list[str] = []
    examples = _examples(data, "train", _limited(settings, data), notes)
    identity = {row: (example.prompt, example.answer) for row, example in examples.items()}
    if data.test is None:
        rows = tuple(examples)
        return Candidates(rows, _values(data.source, data.train, rows), identity, None, None), notes
    tests = _examples(data, "test", range(len(data.test.rows)), notes)
    tested = {(example.prompt, example.answer) for example in tests.values()}
    rows = tuple(row for row in examples if identity[row] not in tested)
    if dropped := len(examples) - len(rows):
        name = data.source.name
        notes.append(f"source {name!r}: {dropped} training rows that equal an official test row were dropped")
    values = _values(data.source, data.train, rows)
    return Candidates(rows, values, identity, tuple(tests), _values(data.source, data.test, tuple(tests))), notes


def _split(settings: DataSettings, data: SourceData, found: Candidates, parts: Sequence[Part]) -> list[ClientRows]:
    """The clients of a partition with their splits; splits that cannot be filled come back empty."""
    tests: list[tuple[int, ...] | None] = [None] * len(parts)
    if found.test_rows is not None:
        rng = generator(settings.partition_seed, "official test", data.source.name)
        allotted = allot_test(parts, found.values, len(found.test_rows), found.test_values, rng)
        tests = [tuple(found.test_rows[place] for place in share) for share in allotted]
    clients = []
    for part, test in zip(parts, tests, strict=True):
        rows = [found.rows[place] for place in part.rows]
        client = split_client(part.client, rows, found.identity, test, data.task, settings)
        clients.append(replace(client, value=part.value))
    return clients


def _limited(settings: DataSettings, data: SourceData) -> Sequence[int]:
    """The row numbers of the source that are used at all: a seeded draw where there is a limit."""
    count = len(data.train.rows)
    limit = data.source.limit
    if limit is None or limit >= count:
        return range(count)
    rng = generator(settings.partition_seed, "limit", data.source.name)
    return sorted(rng.choice(count, size=limit, replace=False).tolist())


def _examples(
    data: SourceData, name: Literal["train", "test"], rows: Sequence[int], notes: list[str]
) -> dict[int, Example]:
    """Examples by row number, in order; rows without an answer are left out and noted."""
    examples = {row: example for row in rows if (example := data.example(name, row)) is not None}
    if len(examples) < len(rows):
        without = len(rows) - len(examples)
        notes.append(f"{data.table(name).where}: {without} rows without an answer were left out")
    return examples


def _values(source: SourceSettings, table: Table, rows: Sequence[int]) -> list[str] | None:
    """The text of the column that the partition goes by, one per row; DataError where there is none."""
    by = source.partition.by
    if by is None:
        return None
    if by not in table.columns:
        raise missing_column(by, table.columns, table.where)
    for row in rows:
        if table.rows[row][by] is None:
            raise DataError(
                f"{table.row_name(row)}: column {by!r} holds no value, and the partition goes by it; fill it in or "
                "remove the row"
            )
    values = [text_of(table.rows[row][by], by, table.row_name(row)) for row in rows]
    plain = [value.strip() for value in values]
    spaced = sum(value != text for value, text in zip(plain, values, strict=True))
    if spaced:
        log.warning(
            "%s: %d values of %r have white space around them; they count as the values without it",
            table.where,
            spaced,
            by,
        )
    return plain


def examples_of(data: SourceData, client: ClientRows) -> Mapping[str, tuple[Example, ...]]:
    """A client's examples by split."""
    tables: dict[str, Literal["train", "test"]] = {"test": client.test_table}
    found: dict[str, tuple[Example, ...]] = {}
    for split in ("train", "embedding", "validation", "test"):
        rows = [data.example(tables.get(split, "train"), row) for row in getattr(client, split)]
        found[split] = tuple(example for example in rows if example is not None)
    return found
