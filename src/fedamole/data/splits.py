"""Split one client's rows into train, embedding, validation and test."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedamole.data.examples import Task
from fedamole.data.seeding import generator
from fedamole.data.settings import DataSettings
from fedamole.errors import DataError
from fedamole.runs.run_files import SPLITS


@dataclass(frozen=True)
class ClientRows:
    """The rows of a client by split, as ascending row numbers of its source, from 0."""

    client: str
    train: tuple[int, ...]
    embedding: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]
    test_table: Literal["train", "test"]
    """`test` if the test rows come from the source's official test set, `train` if from its own rows."""
    count: int
    """Number of the client's rows, without an official test set."""
    distinct: int
    """Number of different rows among them."""
    value: str | None = None
    """In a partition by value, the client's value if the client's name does not contain it unchanged."""

    @property
    def training_size(self) -> int:
        """Number of training examples, or 0 if any split is empty: the client cannot take part then."""
        return len(self.train) if self.embedding and self.validation and self.test else 0

    def check(self, min_examples: int, notes: Sequence[str] = ()) -> None:
        """Raise DataError if a split is empty or there are fewer than `min_examples` training examples.

        The error includes the notes, which describe rows of the source that were left out.
        """
        if self.training_size >= max(1, min_examples):
            return
        sizes = ", ".join(f"{split} {len(getattr(self, split))}" for split in SPLITS)
        if self.training_size == 0:
            problem, remedy = "an empty split", "give it more rows"
        else:
            problem, remedy = f"fewer training examples than data.min_examples = {min_examples}", "lower min_examples"
        remedy += ", use fewer clients, or partition more evenly"
        if self.distinct < self.count:
            remedy = (
                f"only {self.distinct} of its {self.count} rows are different, and rows with the same prompt and "
                "answer stay in one split; remove the duplicates and give it more different rows"
            )
        raise DataError("; ".join([f"client {self.client!r} has {problem}: {sizes}", *notes, remedy]))


def split_client(
    client: str,
    rows: Sequence[int],
    identity: Mapping[int, Hashable],
    official_test: Sequence[int] | None,
    task: Task,
    settings: DataSettings,
) -> ClientRows:
    """Split a client's rows; a split that cannot be filled is empty.

    Rows with equal `identity` are the same example and stay in one split. With an official test set, no rows are taken
    for the test split. Test and validation shares are fractions of all rows of the client, the embedding share is a
    fraction of the remaining rows. The result depends only on the settings and the client's name and rows.
    """
    rng = generator(settings.partition_seed, "splits", client)
    groups: dict[Hashable, list[int]] = {}
    for row in rows:
        groups.setdefault(identity[row], []).append(row)
    ordered = list(groups.values())
    shuffled = [ordered[index] for index in rng.permutation(len(ordered))]
    if official_test is None:
        test, shuffled = _take(shuffled, round(settings.test_share * len(rows)))
    else:
        test = list(official_test)
    validation, shuffled = _take(shuffled, round(settings.validation_share * len(rows)))
    remaining = sum(len(group) for group in shuffled)
    embedding, shuffled = _take(shuffled, min(round(settings.embedding_share * remaining), settings.embedding_cap))
    return ClientRows(
        client=client,
        train=tuple(sorted(row for group in shuffled for row in group)),
        embedding=tuple(sorted(embedding)),
        validation=_capped(validation, "validation", client, task, settings),
        test=_capped(test, "test", client, task, settings),
        test_table="train" if official_test is None else "test",
        count=len(rows),
        distinct=len(groups),
    )


def _take(groups: list[list[int]], target: int) -> tuple[list[int], list[list[int]]]:
    """Take groups in order, up to `target` rows but at least one group; return their rows and the remaining groups.

    A group that would exceed the target is skipped. If all would, the smallest is taken.
    """
    target = max(target, 1)
    taken: list[int] = []
    remaining: list[list[int]] = []
    for group in groups:
        if len(taken) + len(group) <= target:
            taken += group
        else:
            remaining.append(group)
    if not taken and remaining:
        taken = remaining.pop(min(range(len(remaining)), key=lambda index: len(remaining[index])))
    return taken, remaining


def _capped(rows: list[int], split: str, client: str, task: Task, settings: DataSettings) -> tuple[int, ...]:
    """Return a seeded sample of at most as many rows as the split's cap; the others are not used.

    Each split has its own random generator, so that the validation cap does not affect the test rows.
    """
    # Pairs of answers are scored by their likelihood, as options are; only generated answers take long.
    cap: int = getattr(settings, f"{split}_cap_{'generation' if task == 'generation' else 'classification'}")
    if len(rows) > cap:
        rng = generator(settings.partition_seed, f"{split} cap", client)
        rows = rng.choice(rows, size=cap, replace=False).tolist()
    return tuple(sorted(rows))
