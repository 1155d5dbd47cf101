"""The `[data]` table of a config as frozen dataclasses that refuse what cannot be run."""

import math
from dataclasses import dataclass, field
from typing import Literal

from fedamole.data.templates import BUILT_IN, TemplateSettings, check_name
from fedamole.errors import ConfigError
from fedamole.received.names import LONGEST_NAME, NAME, not_on_windows

LONGEST_PREFIX = 80
"""Characters of the name of a source that has several clients: their names are longer and have to stay usable."""

NEEDS: dict[str, tuple[str, ...]] = {
    "whole": (),
    "iid": ("clients",),
    "dirichlet": ("by", "alpha", "clients"),
    "classes": ("by", "classes_per_client", "clients"),
    "value": ("by",),
}
"""The keys that each kind of partition reads; it needs all of these and takes no other."""


@dataclass(frozen=True)
class PartitionSettings:
    """`[data.source.partition]`: how the rows of a source become clients."""

    # whole: one client; iid: equal random parts; dirichlet: the rows of each value of `by` shared out by
    # Dirichlet(alpha); classes: a few values of `by` per client; value: one client per value of `by`.
    kind: Literal["whole", "iid", "dirichlet", "classes", "value"] = "whole"
    # The column that decides: a label, a category, an id.
    by: str | None = None
    # Concentration of the Dirichlet distribution: 0.1 gives very unequal clients, 100 nearly equal ones.
    alpha: float | None = None
    # How many clients.
    clients: int | None = None
    # How many values of `by` a client has.
    classes_per_client: int | None = None

    def __post_init__(self) -> None:
        key = "data.source.partition"
        if self.kind not in NEEDS:
            raise ConfigError(f"{key}.kind = {self.kind!r}: must be one of {', '.join(NEEDS)}")
        for name in ("by", "alpha", "clients", "classes_per_client"):
            value, needed = getattr(self, name), name in NEEDS[self.kind]
            if value is None and needed:
                raise ConfigError(f"{key}.{name} is not set: kind = {self.kind!r} needs it")
            if value is not None and not needed:
                raise ConfigError(f"{key}.{name} = {value!r}: kind = {self.kind!r} does not read it; remove it")
        if self.alpha is not None and not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ConfigError(f"{key}.alpha = {self.alpha}: must be a number above 0, for example 0.1 or 100.0")
        for name in ("clients", "classes_per_client"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{key}.{name} = {value}: must be at least 1")


@dataclass(frozen=True)
class SourceSettings:
    """`[[data.source]]`: one data set, from files or from the Hugging Face hub."""

    # ASCII letters, digits, dot, dash and underscore; the clients' names begin with it.
    name: str
    # The file with the rows: .jsonl, .json, .csv (each also .gz) or .parquet; relative to the config's
    # folder.
    path: str | None = None
    # The official test file, same formats; without it test rows are cut from each client's own.
    test: str | None = None
    # A data set's id on the hub, in place of `path`.
    hub: str | None = None
    # Its split that holds the rows, for example "train".
    split: str | None = None
    # Its split that serves as the official test.
    test_split: str | None = None
    # Its configuration, where it has several.
    config: str | None = None
    # A built-in template, one of [data.templates], or "auto": chosen by the columns.
    template: str = "auto"
    # Columns to rename, new = old: {instruction = "question"}. An empty text drops a column: {prompt = ""}.
    columns: dict[str, str] = field(default_factory=dict)
    # Rows used at most, drawn with the partition's seed; test rows are not counted. Unset: all.
    limit: int | None = None
    # How the rows become clients.
    partition: PartitionSettings = PartitionSettings()

    def __post_init__(self) -> None:
        key = f"data.source[{self.name}]"
        if not NAME.fullmatch(self.name):
            raise ConfigError(
                f"data.source.name = {self.name!r}: use ASCII letters, digits, dot, dash and underscore only, a letter "
                "or a digit first"
            )
        if unusable := not_on_windows(self.name):
            raise ConfigError(f"data.source.name = {self.name!r}: {unusable}")
        longest, why = LONGEST_NAME, ""
        if self.partition.kind != "whole":
            longest, why = LONGEST_PREFIX, f", as the clients of partition {self.partition.kind!r} have longer names"
        if len(self.name) > longest:
            raise ConfigError(f"data.source.name = {self.name!r}: at most {longest} characters{why}")
        if (self.path is None) == (self.hub is None):
            raise ConfigError(f"{key}: give either path = <file> or hub = <data set id>, and not both")
        if self.hub is not None and self.split is None:
            raise ConfigError(f'{key}.split is not set: a hub data set needs it, for example split = "train"')
        foreign = ("test",) if self.hub is not None else ("split", "test_split", "config")
        for name in foreign:
            if getattr(self, name) is not None:
                kind = "hub" if self.hub is not None else "path"
                raise ConfigError(f"{key}.{name} = {getattr(self, name)!r}: not read beside {kind}; remove it")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"{key}.limit = {self.limit}: must be at least 1; leave it out for all rows")


@dataclass(frozen=True)
class DataSettings:
    """The `[data]` table."""

    # The data sets, each with a partition of its own; none where every organisation brings its own.
    source: tuple[SourceSettings, ...] = ()
    # Seed of everything drawn here; apart from the run's seed, so that runs with several seeds share a
    # partition.
    partition_seed: int = 0
    # A stored partition to use instead of drawing one; relative to the config's folder.
    manifest: str | None = None
    # Fewest training examples a client may end up with; a Dirichlet partition is redrawn until all have them.
    min_examples: int = 10
    # Share of a client's rows for validation.
    validation_share: float = 0.1
    # Share of a client's rows for the test, where the source has no official one.
    test_share: float = 0.1
    # Share of what is left for the embedding split.
    embedding_share: float = 0.05
    # Most examples in an embedding split; what this cuts off stays training data.
    embedding_cap: int = 200
    # Most test examples of a client whose answers are chosen from options.
    test_cap_classification: int = 200
    # Most test examples of a client whose answers are free text.
    test_cap_generation: int = 50
    # Most validation examples of a client whose answers are chosen from options.
    validation_cap_classification: int = 200
    # Most validation examples of a client whose answers are free text.
    validation_cap_generation: int = 200
    # The config's own templates by name.
    templates: dict[str, TemplateSettings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [source.name for source in self.source]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"data.source.name = {name!r} is given {names.count(name)} times: names must differ")
        if self.partition_seed < 0:
            raise ConfigError(f"data.partition_seed = {self.partition_seed}: must be 0 or more")
        caps = [f"{split}_cap_{task}" for split in ("test", "validation") for task in ("classification", "generation")]
        for key in ("min_examples", "embedding_cap", *caps):
            if getattr(self, key) < 1:
                raise ConfigError(f"data.{key} = {getattr(self, key)}: must be at least 1")
        for key in ("validation_share", "test_share", "embedding_share"):
            if not 0 < getattr(self, key) < 1:
                raise ConfigError(f"data.{key} = {getattr(self, key)}: must lie between 0 and 1, for example 0.1")
        if self.validation_share + self.test_share >= 1:
            together = self.validation_share + self.test_share
            raise ConfigError(f"data.validation_share + data.test_share = {together}: must leave rows to train on")
        for name in self.templates:
            if name == "auto" or name in BUILT_IN:
                raise ConfigError(f"data.templates.{name}: this name is built in; choose another")
        for source in self.source:
            check_name(source.template, self.templates)
