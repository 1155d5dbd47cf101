"""Partition the rows of one source among its clients, with the partitioners of `flwr_datasets`."""

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

MAX_DRAWS = 100
"""Maximum number of Dirichlet partitions to draw until one meets `min_examples`."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """The rows of one client, as ascending indices into the list that was partitioned."""

    client: str
    rows: tuple[int, ...]
    value: str | None = None
    """In a partition by value, the client's value if the client's name does not contain it unchanged."""


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
    """Partition `count` rows among the clients of a source. The result depends only on the arguments.

    Args:
        values: The text of the column `by` of each row, if the kind of partition has one.
        training_sizes: Returns the number of training examples of each part. A Dirichlet partition is drawn again until
            all are at least `min_examples`.
        distinct: The number of different rows, for the error message.

    Raises:
        DataError: After `MAX_DRAWS` draws, with the sizes of the best one; or if there are more clients or classes than
            the rows allow.
    """
    if settings.kind == "whole":
        return [Part(source, tuple(range(count)))]
    if settings.clients is not None and settings.clients > count:
        raise DataError(f"source {source!r}: {settings.clients} clients cannot share {count} rows; lower clients")
    if settings.kind != "dirichlet":
        return _draw(source, settings, count, values, seed, 0)
    best: list[int] = []
    for attempt in range(MAX_DRAWS):
        parts = _draw(source, settings, count, values, seed, attempt)
        sizes = training_sizes(parts)
        if min(sizes) >= min_examples:
            log.info("source %s: Dirichlet partition met min_examples at draw %d", source, attempt + 1)
            return parts
        best = max(best, sizes, key=lambda candidate: min(candidate, default=-1))
    raise DataError(
        f"source {source!r}: none of {MAX_DRAWS} Dirichlet({settings.alpha}) draws gave each of {settings.clients} "
        f"clients {min_examples} training examples and no empty split; the best draw gave {best}. "
        f"{_identical_rows(count, distinct)}Raise alpha, or lower clients or data.min_examples"
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
    """Draw a partition; attempts differ only in their seed."""
    from datasets import Dataset

    # The partitioners cut rows into consecutive pieces. Shuffle the rows first, so that neighbours in the file do not
    # stay together (SNLI has three hypotheses of each premise).
    order = generator(seed, "partition order", source, attempt).permutation(count)
    columns = {"row": order.tolist()}
    # Pass numbers instead of texts: as NumPy strings, texts that differ only in a trailing NUL character would be
    # equal, and each would take as much memory as the longest.
    unique_values = sorted(set(values or ()))
    if values is not None:
        numbers = {value: number for number, value in enumerate(unique_values)}
        columns["value"] = [numbers[values[row]] for row in order]
    partitioner = _partitioner(settings, derived_seed(seed, "partition", source, attempt))
    partitioner.dataset = Dataset.from_dict(columns)
    try:
        # One partitioner shows a progress bar without an option to disable it; another warns about unused classes,
        # which the caller reports.
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pieces = [partitioner.load_partition(index)["row"] for index in range(partitioner.num_partitions)]
    except ValueError as error:
        text = re.sub(r"(?<=Label: )\d+", lambda match: repr(unique_values[int(match[0])])[:80], str(error))
        raise DataError(f"source {source!r}: partition {settings.kind!r} by {settings.by!r}: {text}") from error
    rows = [tuple(sorted(int(row) for row in piece)) for piece in pieces]
    if settings.kind != "value" or values is None:
        return [Part(name, piece) for name, piece in zip(numbered(source, len(rows)), rows, strict=True)]
    return _named(source, settings, {values[piece[0]]: piece for piece in rows})


def _partitioner(settings: PartitionSettings, seed: int):  # type: ignore[no-untyped-def]  # the library's base class
    # Imported here because the import takes seconds, and only drawing a partition needs it.
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
        # 0 disables its own redrawing, which stops after 10 draws and does not consider the splits.
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
        # The first class of client i is class i, so that every class is used if there are enough clients.
        class_assignment_mode="first-deterministic",
        shuffle=False,
        seed=seed,
    )


def numbered(source: str, clients: int) -> list[str]:
    """Return numbered client names: source-00, source-01, ..."""
    width = max(2, len(str(clients - 1)))
    return [f"{source}-{index:0{width}d}" for index in range(clients)]


def _named(source: str, settings: PartitionSettings, rows: Mapping[str, tuple[int, ...]]) -> list[Part]:
    """Return the parts of a partition by value; clients are named after source and value."""
    parts: dict[str, Part] = {}
    for value, piece in rows.items():
        name = joined_name(source, value)
        part = Part(name, piece, None if name == f"{source}-{value}" else value)
        if (other := parts.setdefault(part.client, part)) is not part:
            raise DataError(
                f"source {source!r}: the values {quoted(other.value)} and {quoted(value)} of column {settings.by!r} "
                f"would both be client {part.client!r}, because their hashes begin alike; change one of them"
            )
    return list(parts.values())


def allot_test(
    parts: Sequence[Part],
    values: Sequence[str] | None,
    test_count: int,
    test_values: Sequence[str] | None,
    rng: np.random.Generator,
) -> list[tuple[int, ...]]:
    """Divide the official test rows among a source's clients like its training rows; return one tuple per part.

    With values, the test rows of each value are divided in proportion to the clients' numbers of training rows with it
    (largest remainder method). Test rows whose value no client has are not used. Without values, rows are divided
    evenly. Rows are shuffled with `rng` first.
    """
    allotted: list[list[int]] = [[] for _ in parts]
    groups: dict[str | None, list[int]] = {}
    for row in range(test_count):
        groups.setdefault(test_values[row] if test_values is not None else None, []).append(row)
    if values is None:
        client_counts = [Counter[str | None]({None: 1}) for _ in parts]
    else:
        client_counts = [Counter[str | None](values[row] for row in part.rows) for part in parts]
    for value, rows in groups.items():
        weights = [counts[value] for counts in client_counts]
        if sum(weights) == 0:
            continue
        shuffled = rng.permutation(rows).tolist()
        start = 0
        for client, amount in enumerate(largest_remainder(len(rows), weights)):
            allotted[client] += shuffled[start : start + amount]
            start += amount
    return [tuple(sorted(rows)) for rows in allotted]


def largest_remainder(total: int, weights: Sequence[int]) -> list[int]:
    """Return integers in proportion to the weights, with sum `total`; ties go to the lower index."""
    weight_sum = sum(weights)
    amounts = [total * weight // weight_sum for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda index: -(total * weights[index] % weight_sum))
    for index in by_remainder[: total - sum(amounts)]:
        amounts[index] += 1
    return amounts
