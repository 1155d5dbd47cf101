"""One source's rows shared out among clients, by the partitioners of `flwr_datasets`."""

import contextlib
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedamole.data.seeding import derived_seed, generator
from fedamole.data.settings import PartitionSettings
from fedamole.errors import DataError
from fedamole.received.names import joined_name, quoted

DRAWS = 100
"""Dirichlet partitions drawn before giving up on `min_examples`."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """The rows of one client, as ascending positions in the list that was partitioned."""

    client: str
    rows: tuple[int, ...]
    # In a partition by value, the value where the client's name does not hold it letter by letter.
    value: str | None = None


def partition(
    source: str,
    settings: PartitionSettings,
    count: int,
    values: Sequence[str] | None,
    seed: int,
    min_examples: int,
    training_sizes: Callable[[list[Part]], list[int]],
    distinct: int | None = None,
) -> list[Part]:
    """Share `count` rows out among the clients of a source; the same arguments give the same parts.

    `values` holds the text of the column `by`, one per row, where the kind has one. `training_sizes` says how
    many training examples each part would leave; a Dirichlet partition is drawn until all are >=
    `min_examples`. `distinct` is the number of different rows, for the error. Raises DataError after 100 draws, with
    the sizes of the best one, and for more clients or classes than rows can serve.
    """
    if settings.kind == "whole":
        return [Part(source, tuple(range(count)))]
    if settings.clients is not None and settings.clients > count:
        raise DataError(f"source {source!r}: {settings.clients} clients cannot share {count} rows; lower clients")
    if settings.kind != "dirichlet":
        return _draw(source, settings, count, values, seed, 0)
    best: list[int] = []
    for attempt in range(DRAWS):
        parts = _draw(source, settings, count, values, seed, attempt)
        sizes = training_sizes(parts)
        if min(sizes) >= min_examples:
            log.info("source %s: Dirichlet partition met min_examples at draw %d", source, attempt + 1)
            return parts
        best = max(best, sizes, key=lambda found: min(found, default=-1))
    raise DataError(
        f"source {source!r}: none of {DRAWS} Dirichlet({settings.alpha}) draws gave each of "
        f"{settings.clients} clients "
        f"{min_examples} training examples and no empty split; the best draw gave {best}. "
        f"{_identical_rows(count, distinct)}"
        f"Raise alpha, or lower clients or data.min_examples"
    )


def _identical_rows(count: int, distinct: int | None) -> str:
    if distinct is None or distinct == count:
        return ""
    return f"Only {distinct} of the {count} rows are different, and identical rows stay in one split. "


def _draw(
    source: str,
    settings: PartitionSettings,
    count: int,
    values: Sequence[str] | None,
    seed: int,
    attempt: int,
) -> list[Part]:
    """One draw; attempts differ only in their seed."""
    from datasets import Dataset

    # The partitioners cut the rows of a class, or all of them, into consecutive pieces: in the file's order
    # neighbours (SNLI's three hypotheses of one premise) would stay together, so they get the rows shuffled.
    order = generator(seed, "partition order", source, attempt).permutation(count)
    columns = {"row": order.tolist()}
    # The partitioners get numbers in place of the texts. As NumPy strings, texts that differ only in a NUL character
    # at the end would be the same, and each would take as much memory as the longest.
    known = sorted(set(values or ()))
    if values is not None:
        numbers = {value: number for number, value in enumerate(known)}
        columns["value"] = [numbers[values[row]] for row in order]
    partitioner = _partitioner(settings, derived_seed(seed, "partition", source, attempt))
    partitioner.dataset = Dataset.from_dict(columns)
    try:
        # One partitioner shows a progress bar that it offers no way to turn off; another warns of unused
        # classes, which the caller counts and reports itself.
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pieces = [partitioner.load_partition(index)["row"] for index in range(partitioner.num_partitions)]
    except ValueError as error:
        text = re.sub(r"(?<=Label: )\d+", lambda found: repr(known[int(found[0])])[:80], str(error))
        raise DataError(f"source {source!r}: partition {settings.kind!r} by {settings.by!r}: {text}") from error
    rows = [tuple(sorted(int(row) for row in piece)) for piece in pieces]
    if settings.kind != "value" or values is None:
        return [Part(name, piece) for name, piece in zip(numbered(source, len(rows)), rows, strict=True)]
    return _named(source, settings, {values[piece[0]]: piece for piece in rows})


def _partitioner(settings: PartitionSettings, seed: int):  # type: ignore[no-untyped-def]  # the library's base class
    # Imported here because it takes seconds, and only those who draw a partition need it.
    from flwr_datasets.partitioner import (
        DirichletPartitioner,
        IidPartitioner,
        NaturalIdPartitioner,
        PathologicalPartitioner,
    )

    if settings.kind == "iid":
        return IidPartitioner(num_partitions=settings.clients)
    if settings.kind == "value":
        return NaturalIdPartitioner(partition_by="value")
    if settings.kind == "dirichlet":
        # Its own redrawing gives up after 10 draws and knows nothing of our splits, hence the size of 0.
        return DirichletPartitioner(
            num_partitions=settings.clients,
            partition_by="value",
            alpha=settings.alpha,
            min_partition_size=0,
            self_balancing=False,
            shuffle=False,
            seed=seed,
        )
    return PathologicalPartitioner(
        num_partitions=settings.clients,
        partition_by="value",
        num_classes_per_partition=settings.classes_per_client,
        # The first class of client i is class i: no class is left over while there are enough clients.
        class_assignment_mode="first-deterministic",
        shuffle=False,
        seed=seed,
    )


def numbered(source: str, clients: int) -> list[str]:
    """Names of a source's clients where no value of a column names them: source-00, source-01 and so on."""
    width = max(2, len(str(clients - 1)))
    return [f"{source}-{index:0{width}d}" for index in range(clients)]


def _named(source: str, settings: PartitionSettings, rows: Mapping[str, tuple[int, ...]]) -> list[Part]:
    """The clients of a partition by value, each named by source and value."""
    parts: dict[str, Part] = {}
    for value, piece in rows.items():
        name = joined_name(source, value)
        part = Part(name, piece, None if name == f"{source}-{value}" else value)
        if (other := parts.setdefault(part.client, part)) is not part:
            raise DataError(
                f"source {source!r}: the values {quoted(other.value)} and {quoted(value)} of column {settings.by!r} "
                f"would both be client {part.client!r}, as their hashes begin alike; change one of the two"
            )
    return list(parts.values())


def allot_test(
    parts: Sequence[Part],
    values: Sequence[str] | None,
    test_count: int,
    test_values: Sequence[str] | None,
    rng: np.random.Generator,
) -> list[tuple[int, ...]]:
    """Share the official test rows out among a source's clients as its training rows are; one tuple per part.

    With values: the test rows of each value in proportion to the clients' shares of its training rows
    (largest remainder), which for a partition by value is one client. Rows of a value that nobody trains on
    go to nobody. Without: evenly. Which rows go where is a seeded shuffle.
    """
    given: list[list[int]] = [[] for _ in parts]
    groups: dict[str | None, list[int]] = {}
    for row in range(test_count):
        groups.setdefault(test_values[row] if test_values is not None else None, []).append(row)
    if values is None:
        held = [Counter[str | None]({None: 1}) for _ in parts]
    else:
        held = [Counter[str | None](values[row] for row in part.rows) for part in parts]
    for value, rows in groups.items():
        weights = [counts[value] for counts in held]
        if sum(weights) == 0:
            continue
        shuffled = rng.permutation(rows).tolist()
        start = 0
        for client, amount in enumerate(largest_remainder(len(rows), weights)):
            given[client] += shuffled[start : start + amount]
            start += amount
    return [tuple(sorted(rows)) for rows in given]


def largest_remainder(total: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to the weights that add up to `total`; ties go to the earlier place."""
    whole = sum(weights)
    amounts = [total * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda place: -(total * weights[place] % whole))
    for place in by_remainder[: total - sum(amounts)]:
        amounts[place] += 1
    return amounts
