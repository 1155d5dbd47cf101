"""One client's rows cut into train, embedding, validation and test."""

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
    """Which rows of its source a client has, by split: ascending row numbers from 0."""

    client: str
    train: tuple[int, ...]
    embedding: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]
    # Whether the test rows stand in the source's own file or in its official test file.
    test_table: Literal["train", "test"]
    # The client's rows, and how many of them are different; an official test is not counted.
    count: int
    distinct: int
    # The value of a partition by value, where the client's name does not hold it letter by letter.
    value: str | None = None

    @property
    def training_size(self) -> int:
        """The number of training examples, 0 if any split is empty: such a client cannot take part."""
        return len(self.train) if self.embedding and self.validation and self.test else 0

    def check(self, min_examples: int, notes: Sequence[str] = ()) -> None:
        """Raise DataError for a client with an empty split or fewer training examples than `min_examples`.

        The error repeats the notes, which say what rows of the source were left out.
        """
        if self.training_size >= max(1, min_examples):
            return
        sizes = ", ".join(f"{split} {len(getattr(self, split))}" for split in SPLITS)
        if self.training_size == 0:
            problem, remedy = "an empty split", "give it more rows"
        else:
            problem, remedy = f"fewer training examples than data.min_examples = {min_examples}", "lower min_examples"
        remedy += ", have fewer clients, or partition more evenly"
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
    """Cut a client's rows into its splits; splits that cannot be filled come back empty.

    `identity` says which rows are the same example: such rows stay in one split. With an official test that
    is the test and none is cut. Shares of test and validation are of all the client's rows, the share of the
    embedding split is of the rest. Depends on nothing but the partition's seed and the client's own name and
    rows.
    """
    rng = generator(settings.partition_seed, "splits", client)
    groups: dict[Hashable, list[int]] = {}
    for row in rows:
        groups.setdefault(identity[row], []).append(row)
    in_order = list(groups.values())
    shuffled = [in_order[place] for place in rng.permutation(len(in_order))]
    if official_test is None:
        test, shuffled = _take(shuffled, round(settings.test_share * len(rows)))
    else:
        test = list(official_test)
    validation, shuffled = _take(shuffled, round(settings.validation_share * len(rows)))
    left = sum(len(group) for group in shuffled)
    embedding, shuffled = _take(shuffled, min(round(settings.embedding_share * left), settings.embedding_cap))
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
    """Take whole groups, in order, up to `target` rows but at least one; and the groups that stay.

    A group that would go past the target is passed over. If all would, the smallest is taken, whole.
    """
    target = max(target, 1)
    taken: list[int] = []
    left: list[list[int]] = []
    for group in groups:
        if len(taken) + len(group) <= target:
            taken += group
        else:
            left.append(group)
    if not taken and left:
        taken = left.pop(min(range(len(left)), key=lambda place: len(left[place])))
    return taken, left


def _capped(rows: list[int], split: str, client: str, task: Task, settings: DataSettings) -> tuple[int, ...]:
    """At most as many of the rows as the split's cap says, a seeded draw; the others stay unread.

    Each split has random numbers of its own, so that the validation cap does not decide which test rows are read.
    """
    cap: int = getattr(settings, f"{split}_cap_{task}")
    if len(rows) > cap:
        rng = generator(settings.partition_seed, f"{split} cap", client)
        rows = rng.choice(rows, size=cap, replace=False).tolist()
    return tuple(sorted(rows))
