"""Settings of the `[data]` table of a config: data sources, partitions, splits and templates."""

import math
from dataclasses import dataclass, field
from typing import Literal

from fedamole.data.templates import BUILT_IN, TemplateSettings, check_name
from fedamole.errors import ConfigError
from fedamole.received.names import LONGEST_NAME, NAME, not_on_windows

MAX_SOURCE_NAME = 80
"""Maximum length of a source's name when it has several clients; their names append a number or a value to it."""

NEEDS: dict[str, tuple[str, ...]] = {
    "whole": (),
    "iid": ("clients",),
    "dirichlet": ("by", "alpha", "clients"),
    "classes": ("by", "classes_per_client", "clients"),
    "value": ("by",),
}
"""Keys of each kind of partition: all of them are required, and no others are allowed."""


@dataclass(frozen=True)
class PartitionSettings:
    """`[data.source.partition]`: how a source's rows are divided among clients."""

    kind: Literal["whole", "iid", "dirichlet", "classes", "value"] = "whole"
    """`whole`: one client gets all rows. `iid`: random parts of equal size. `dirichlet`: the rows of each value of the
    column `by` are divided by Dirichlet(`alpha`). `classes`: each client gets rows of `classes_per_client` values of
    `by`. `value`: one client per value of `by`."""
    by: str | None = None
    """Name of the column to partition by, for example a label, a category or an id. Required for `dirichlet`, `classes`
    and `value`, otherwise not allowed."""
    alpha: float | None = None
    """Concentration of the Dirichlet distribution, above 0: 0.1 gives very different clients, 100 nearly equal ones.
    Required for `dirichlet`, otherwise not allowed."""
    clients: int | None = None
    """Number of clients, at least 1 and at most the number of rows. Required for `iid`, `dirichlet` and `classes`,
    otherwise not allowed."""
    classes_per_client: int | None = None
    """Number of values of `by` that each client has, at least 1. Required for `classes`, otherwise not allowed."""

    def __post_init__(self) -> None:
        key = "data.source.partition"
        if self.kind not in NEEDS:
            raise ConfigError(f"{key}.kind = {self.kind!r}: must be one of {', '.join(NEEDS)}")
        for name in ("by", "alpha", "clients", "classes_per_client"):
            value, needed = getattr(self, name), name in NEEDS[self.kind]
            if value is None and needed:
                raise ConfigError(f"{key}.{name} is missing: kind = {self.kind!r} requires it")
            if value is not None and not needed:
                raise ConfigError(f"{key}.{name} = {value!r}: kind = {self.kind!r} does not use it; remove this key")
        if self.alpha is not None and not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ConfigError(f"{key}.alpha = {self.alpha}: must be a number above 0, for example 0.1 or 100.0")
        for name in ("clients", "classes_per_client"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{key}.{name} = {value}: must be at least 1")


@dataclass(frozen=True)
class SourceSettings:
    """`[[data.source]]`: one data set, from local files or from the Hugging Face Hub."""

    name: str
    """Name of the source, unique in the config. The names of its clients begin with it. It consists of ASCII letters,
    digits, dot, dash and underscore, and begins with a letter or a digit."""
    path: str | None = None
    """File with the rows: .jsonl, .json or .csv (each also with .gz), or .parquet. A relative path starts at the
    config's folder. Set either `path` or `hub`."""
    test: str | None = None
    """File with the official test set, in the same formats. Unset: each client's test rows are taken from its own rows.
    Only with `path`."""
    hub: str | None = None
    """Id of a data set on the Hugging Face Hub, instead of `path`."""
    split: str | None = None
    """Split of the Hub data set that contains the rows, for example `"train"`. Required with `hub`."""
    test_split: str | None = None
    """Split of the Hub data set that is the official test set. Unset: as for `test`. Only with `hub`."""
    config: str | None = None
    """Configuration (subset) of the Hub data set, if it has several. Only with `hub`."""
    template: str = "auto"
    """Template that turns rows into examples: `alpaca`, `snli`, `banking77`, `pubmedqa`, `plain`, `messages`,
    `classification`, a name from `[data.templates]`, or `auto`, which selects a built-in template by the columns.
    `chat` does so too, and renders the example through the chat template of the base's tokenizer. `chat_turns` is
    `chat` for `messages` rows of which every assistant turn is trained on, not the last one alone."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns to rename, new name = old name: `{instruction = "question"}`. An empty value drops a column:
    `{prompt = ""}`."""
    limit: int | None = None
    """Maximum number of rows to use, at least 1, sampled with `data.partition_seed`. An official test set is used
    completely. Unset: all rows."""
    label_noise: float = 0.0
    """Fraction of each client's training and embedding examples that get a wrong answer on purpose, for experiments: 0
    to 1, drawn with `data.partition_seed`. The wrong answer is another option, or in free text the answer of another
    example. Validation and test stay as they are. Not allowed for `fedamole server`."""
    partition: PartitionSettings = PartitionSettings()
    """How the rows are divided among clients; see `[data.source.partition]`."""

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
            longest, why = (
                MAX_SOURCE_NAME,
                f", because the names of its clients (partition {self.partition.kind!r}) append to it",
            )
        if len(self.name) > longest:
            raise ConfigError(f"data.source.name = {self.name!r}: at most {longest} characters{why}")
        _check_origin(self, key, ("split", "test_split", "config"))
        if self.hub is not None and self.test is not None:
            raise ConfigError(f"{key}.test = {self.test!r}: not used with hub; remove this key")
        if not 0 <= self.label_noise <= 1:
            raise ConfigError(f"{key}.label_noise = {self.label_noise}: must be a fraction between 0 and 1")


@dataclass(frozen=True)
class PublicSettings:
    """`[data.public]`: prompts that the server holds, for methods that need them.

    They belong to no client. In a deployment only the coordinator reads them, and clients do not learn where they are.
    """

    path: str | None = None
    """File with the rows, in the formats of `[[data.source]]`. A relative path starts at the config's folder. Set
    either `path` or `hub`."""
    hub: str | None = None
    """Id of a data set on the Hugging Face Hub, instead of `path`."""
    split: str | None = None
    """Split of the Hub data set, for example `"train"`. Required with `hub`."""
    config: str | None = None
    """Configuration (subset) of the Hub data set, if it has several. Only with `hub`."""
    template: str = "auto"
    """Template that turns rows into prompts, as for `[[data.source]]`. Rows may lack the columns of its answer."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns to rename, new name = old name, as for `[[data.source]]`."""
    limit: int | None = None
    """Maximum number of rows to use, at least 1, sampled with `data.partition_seed`. Unset: all rows."""

    def __post_init__(self) -> None:
        _check_origin(self, "data.public", ("split", "config"))

    def source(self) -> "SourceSettings":
        """Return the same rows as a data source, which is read by the same code."""
        keys = ("path", "hub", "split", "config", "template", "columns", "limit")
        return SourceSettings("data.public", **{key: getattr(self, key) for key in keys})


def _check_origin(settings: "SourceSettings | PublicSettings", key: str, only_hub: tuple[str, ...]) -> None:
    """Raise ConfigError for a wrong `limit`, and unless the rows are those of one file or of one Hub data set."""
    if (settings.path is None) == (settings.hub is None):
        raise ConfigError(f"{key}: set either path = <file> or hub = <data set id>, not both")
    if settings.hub is not None and settings.split is None:
        raise ConfigError(f'{key}.split is missing: a hub data set requires it, for example split = "train"')
    for name in () if settings.hub is not None else only_hub:
        if getattr(settings, name) is not None:
            raise ConfigError(f"{key}.{name} = {getattr(settings, name)!r}: not used with path; remove this key")
    if settings.limit is not None and settings.limit < 1:
        raise ConfigError(f"{key}.limit = {settings.limit}: must be at least 1; remove this key to use all rows")


@dataclass(frozen=True)
class DataSettings:
    """The `[data]` table."""

    source: tuple[SourceSettings, ...] = ()
    """Data sets, each with its own partition; see `[[data.source]]`. Empty only in a deployment, where each client
    provides its own data."""
    partition_seed: int = 0
    """Seed of partitions and splits, 0 or more. It is independent of `run.seed`, so that runs with different seeds use
    the same partition."""
    manifest: str | None = None
    """Path of a stored partition to use instead of drawing one. A relative path starts at the config's folder."""
    min_examples: int = 10
    """Minimum number of training examples per client, at least 1. A Dirichlet partition is drawn again, at most 100
    times, until every client has that many; with the other kinds of partition too few are an error."""
    validation_share: float = 0.1
    """Fraction of a client's rows for validation, between 0 and 1."""
    test_share: float = 0.1
    """Fraction of a client's rows for testing, between 0 and 1; not used if the source has an official test set.
    `validation_share + test_share` must be below 1."""
    embedding_share: float = 0.05
    """Fraction of the remaining rows for the embedding split, between 0 and 1."""
    embedding_cap: int = 200
    """Maximum number of examples in a client's embedding split, at least 1. Further rows stay in the training split."""
    test_cap_classification: int = 200
    """Maximum number of test examples per client for classification (answers from options) and preference pairs, at
    least 1."""
    test_cap_generation: int = 50
    """Maximum number of test examples per client for generation (free text), at least 1."""
    validation_cap_classification: int = 200
    """Maximum number of validation examples per client for classification and preference pairs, at least 1."""
    validation_cap_generation: int = 200
    """Maximum number of validation examples per client for generation, at least 1."""
    public: PublicSettings | None = None
    """Prompts that the server holds, for methods that need them; see `[data.public]`. Other methods ignore them."""
    templates: dict[str, TemplateSettings] = field(default_factory=dict)
    """Templates by name; see `[data.templates.NAME]`. The names of built-in templates and `auto` are not allowed."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.source]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    f"data.source.name = {name!r} appears {names.count(name)} times: give each source its own name"
                )
        if self.partition_seed < 0:
            raise ConfigError(f"data.partition_seed = {self.partition_seed}: must be 0 or more")
        caps = [f"{split}_cap_{task}" for split in ("test", "validation") for task in ("classification", "generation")]
        for key in ("min_examples", "embedding_cap", *caps):
            if getattr(self, key) < 1:
                raise ConfigError(f"data.{key} = {getattr(self, key)}: must be at least 1")
        for key in ("validation_share", "test_share", "embedding_share"):
            if not 0 < getattr(self, key) < 1:
                raise ConfigError(f"data.{key} = {getattr(self, key)}: must be between 0 and 1, for example 0.1")
        if self.validation_share + self.test_share >= 1:
            total = self.validation_share + self.test_share
            raise ConfigError(
                f"data.validation_share + data.test_share = {total}: must be below 1, to leave training rows"
            )
        for name in self.templates:
            if name == "auto" or name in BUILT_IN:
                raise ConfigError(f"data.templates.{name}: a built-in template has this name; choose another name")
        for source in self.source:
            check_name(source.template, self.templates)
        if self.public is not None:
            check_name(self.public.template, self.templates, "data.public")

    def noise(self) -> dict[str, float]:
        """Return `label_noise` by source, without sources that have none."""
        return {source.name: source.label_noise for source in self.source if source.label_noise}
