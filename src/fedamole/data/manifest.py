"""Load the data of all clients: draw a partition, or reproduce one from a stored manifest with hashes."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from fedamole.data.drawing import SourceData, draw_clients, examples_of, open_source
from fedamole.data.examples import Example, Shard
from fedamole.data.label_noise import Splits, with_label_noise
from fedamole.data.settings import DataSettings
from fedamole.data.sources import Table, digest
from fedamole.data.splits import ClientRows
from fedamole.errors import ConfigError, DataError
from fedamole.received import forms
from fedamole.received.files import MOST_JSON, parse_json, read_text
from fedamole.received.names import checked_names, quoted
from fedamole.runs.run_files import LONGEST_VALUE, SPLITS, client_form, table_form

FORMAT = 1
"""Version of the manifest's format; files of other versions are rejected."""
_source_form = forms.record({"name": forms.name, "train": table_form, "test": forms.either(forms.nothing, table_form)})
_form = forms.record(
    {
        "partition_seed": forms.whole(-forms.MOST_WHOLE),
        "settings": forms.record({}, {"source": forms.mapping(forms.anything)}),
        "sources": forms.listed(_source_form),
        "clients": forms.listed(client_form),
    },
    {"public": table_form},
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableRecord:
    """Name, size and hash of a file or Hub split when the partition was drawn."""

    name: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class SourceRecord:
    """The tables of a source; `test` is None without an official test set."""

    name: str
    train: TableRecord
    test: TableRecord | None


@dataclass(frozen=True)
class SplitRecord:
    """One split of a client: table, row numbers, and a hash of the rendered examples."""

    table: Literal["train", "test"]
    rows: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class ClientRecord:
    """A client's splits."""

    client: str
    source: str
    train: SplitRecord
    embedding: SplitRecord
    validation: SplitRecord
    test: SplitRecord
    value: str | None = None
    """In a partition by value, the beginning of the client's value; None if the client's name contains the value."""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as a JSON object, without `value` if it is None."""
        record = asdict(self)
        return record if self.value is not None else {key: item for key, item in record.items() if key != "value"}


@dataclass(frozen=True)
class Manifest:
    """A stored partition: the rows of every split, and hashes that reveal changed data."""

    partition_seed: int
    settings: dict[str, Any]
    """The settings that the partition was drawn with; a warning reports different settings of a config."""
    sources: tuple[SourceRecord, ...]
    clients: tuple[ClientRecord, ...]
    public: TableRecord | None = None
    """The server's public prompts; None for a method that reads none."""

    def to_json(self) -> str:
        """Return the manifest as JSON, one line per client; `from_json` is the inverse."""
        head = {"format": FORMAT, "partition_seed": self.partition_seed, "settings": self.settings}
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        if self.public is not None:
            lines.append(f'"public": {json.dumps(asdict(self.public))}')
        tables = {"sources": map(asdict, self.sources), "clients": (client.to_dict() for client in self.clients)}
        for key, records in tables.items():
            lines.append(f'"{key}": [\n' + ",\n".join(map(json.dumps, records)) + "\n]")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def values(self) -> dict[str, str]:
        """Return values by client, for clients whose name does not contain the value; see `ClientRecord.value`."""
        return {client.client: client.value for client in self.clients if client.value is not None}

    def only(self, client: str) -> "Manifest":
        """Return a manifest with one client and its source only; DataError if there is no such client."""
        clients = tuple(record for record in self.clients if record.client == client)
        if not clients:
            known = ", ".join(record.client for record in self.clients)
            raise DataError(f"the manifest has no client {client!r}; it has {known}")
        source = clients[0].source
        settings = {**self.settings, "source": {source: self.settings.get("source", {}).get(source)}}
        sources = tuple(record for record in self.sources if record.name == source)
        return replace(self, settings=settings, sources=sources, clients=clients, public=None)

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        """Parse a manifest; `where` names its file in the DataError for an invalid one."""
        content = parse_json(text, where, DataError)
        version = content.get("format") if isinstance(content, dict) else None
        if version != FORMAT:
            raise DataError(
                f"{where} is no usable manifest: its format is {quoted(version)}, this version reads {FORMAT}; restore "
                "it, or remove the key to draw a new partition"
            )
        forms.check_form(content, _form, where, DataError)
        checked_names((client["client"] for client in content["clients"]), f"clients of {where}", DataError)
        checked_names((source["name"] for source in content["sources"]), f"sources of {where}", DataError)
        return cls(
            partition_seed=content["partition_seed"],
            settings=content["settings"],
            sources=tuple(_source_record(source) for source in content["sources"]),
            clients=tuple(_client_record(client) for client in content["clients"]),
            public=table_record(content["public"]) if "public" in content else None,
        )


def table_record(table: Mapping[str, Any]) -> TableRecord:
    """Return the record of a table from its checked JSON object."""
    return TableRecord(table["name"], table["rows"], table["sha256"])


def _source_record(source: Mapping[str, Any]) -> SourceRecord:
    test = None if source["test"] is None else table_record(source["test"])
    return SourceRecord(source["name"], table_record(source["train"]), test)


def _client_record(client: Mapping[str, Any]) -> ClientRecord:
    splits = {
        name: SplitRecord(split["table"], tuple(split["rows"]), split["sha256"])
        for name, split in ((name, client[name]) for name in SPLITS)
    }
    return ClientRecord(client=client["client"], source=client["source"], value=client.get("value"), **splits)


@dataclass(frozen=True)
class Federation:
    """The data of all clients, their manifest, and notes about rows that were left out."""

    shards: tuple[Shard, ...]
    manifest: Manifest
    notes: tuple[str, ...]


def read_manifest(path: Path) -> Manifest:
    """Read a manifest file; DataError if it is missing or invalid."""
    return Manifest.from_json(read_text(path, MOST_JSON, DataError), str(path))


def load_federation(settings: DataSettings, base_folder: Path, manifest: Manifest | None = None) -> Federation:
    """Load the data of all clients, in the order of the config's sources.

    Relative paths start at `base_folder`. With a manifest (the argument, else the file `settings.manifest`) its splits
    are reproduced exactly; otherwise a partition is drawn. Raises DataError if data cannot be read or used or differ
    from the manifest, and ConfigError if two clients have the same name.
    """
    if manifest is None and settings.manifest is not None:
        manifest = read_manifest(base_folder / settings.manifest)
    if manifest is not None:
        _check_sources(settings, manifest)
    sources = {source.name: open_source(settings, source, base_folder) for source in settings.source}
    return _draw(settings, sources) if manifest is None else _reproduce(settings, sources, manifest)


def _draw(settings: DataSettings, sources: Mapping[str, SourceData]) -> Federation:
    shards: dict[str, Shard] = {}
    records: dict[str, ClientRecord] = {}
    notes = _different_options(sources.values())
    for note in notes:
        log.warning("%s", note)
    for name, data in sources.items():
        clients, source_notes = draw_clients(settings, data)
        notes += source_notes
        for client in clients:
            if client.client in records:
                raise ConfigError(
                    f"client {client.client!r} is in source {records[client.client].source!r} and in source {name!r}; "
                    "rename one of the sources"
                )
            noise, seed = data.source.label_noise, settings.partition_seed
            examples = with_label_noise(examples_of(data, client), noise, seed, client.client)
            records[client.client] = _record(client, name, examples)
            shards[client.client] = Shard(client.client, **_trained_on(data, examples))
    checked_names(shards, "clients of data.source", ConfigError)
    tables = tuple(_source_tables(name, data) for name, data in sources.items())
    manifest = Manifest(settings.partition_seed, drawn_with(settings), tables, tuple(records.values()))
    return Federation(tuple(shards.values()), manifest, tuple(notes))


def _trained_on(data: SourceData, examples: Mapping[str, Sequence[Example]]) -> Splits:
    """Return a client's splits with an example for every assistant turn in `train`, if the template says so.

    The manifest counts conversations, so that it does not depend on this.
    """
    splits = {name: tuple(split) for name, split in examples.items()}
    if data.template.every_turn:
        splits["train"] = tuple(part for example in splits["train"] for part in example.with_earlier_answers())
    return splits


def _different_options(sources: Iterable[SourceData]) -> list[str]:
    """Return notes on sources that seem to share a task, but whose rows contain different answer options."""
    notes: list[str] = []
    for first, second in combinations([data for data in sources if data.template.options_from is not None], 2):
        unshared = sorted(set(first.options) ^ set(second.options))
        if first.template == second.template and unshared and set(first.options) & set(second.options):
            notes.append(
                f"sources {first.source.name!r} and {second.source.name!r} have the same template and share options, "
                f"but only one of them has the option {unshared[0][:200]!r}; if they are the same task, list all its "
                "answers as `options` of a template under [data.templates]"
            )
    return notes


def _reproduce(settings: DataSettings, sources: Mapping[str, SourceData], manifest: Manifest) -> Federation:
    for record in manifest.sources:
        data = sources[record.name]
        for table, table_record in ((data.train, record.train), (data.test, record.test)):
            _check_table(record.name, table, table_record)
    shards: list[Shard] = []
    for client in manifest.clients:
        data = sources[client.source]
        examples = _stored_examples(data, client, manifest.partition_seed)
        shards.append(Shard(client.client, **_trained_on(data, examples)))
    notes = [
        f"data.{key} = {value!r} in the config has no effect: the manifest was drawn with "
        f"{manifest.settings.get(key)!r}"
        for key, value in drawn_with(settings).items()
        if value != manifest.settings.get(key)
    ]
    for note in notes:
        log.warning("%s", note)
    return Federation(tuple(shards), manifest, tuple(notes))


def drawn_with(settings: DataSettings) -> dict[str, Any]:
    """Return the settings that determine a partition, as a manifest stores them: sources by name, without paths."""
    tables = asdict(replace(settings, manifest=None))
    del tables["manifest"], tables["templates"], tables["public"]
    tables["source"] = {
        source.name: {
            "template": source.template,
            "limit": source.limit,
            # Only where there is noise, so that a manifest of an earlier version is still drawn with the same settings.
            **({"label_noise": source.label_noise} if source.label_noise else {}),
            "partition": {key: value for key, value in asdict(source.partition).items() if value is not None},
        }
        for source in settings.source
    }
    return tables


def _source_tables(name: str, data: SourceData) -> SourceRecord:
    train, test = (
        None if table is None else TableRecord(table.where, len(table.rows), table.sha256)
        for table in (data.train, data.test)
    )
    assert train is not None
    return SourceRecord(name, train, test)


def _record(client: ClientRows, source: str, examples: Mapping[str, Sequence[Example]]) -> ClientRecord:
    splits = {
        split: SplitRecord(
            table=client.test_table if split == "test" else "train",
            rows=getattr(client, split),
            sha256=_digest(examples[split]),
        )
        for split in SPLITS
    }
    value = None if client.value is None else client.value[:LONGEST_VALUE]
    return ClientRecord(client=client.client, source=source, value=value, **splits)


def _digest(examples: Sequence[Example]) -> str:
    return digest(
        [
            # Only pairs and images have further entries, so that other manifests keep their hashes.
            [example.conversation, example.answer, list(example.options), *pair, *image]
            for example in examples
            for pair in [() if example.rejected is None else (example.rejected,)]
            for image in [() if example.image is None else ({"image": example.image.sha256},)]
        ]
    )


def _check_sources(settings: DataSettings, manifest: Manifest) -> None:
    """Raise DataError unless config and manifest have the same sources, and each client has one of them."""
    config = {source.name for source in settings.source}
    stored = {record.name for record in manifest.sources}
    if config != stored:
        raise DataError(
            f"the manifest has the sources {sorted(stored)}, the config has {sorted(config)}; use the config that the "
            "manifest was drawn with, or remove data.manifest to draw a new partition"
        )
    for client in manifest.clients:
        if client.source not in stored:
            raise DataError(f"manifest: client {client.client!r} has no source; the file is damaged")


def _check_table(source: str, table: Table | None, record: TableRecord | None) -> None:
    """Raise DataError if a table differs from its record in the manifest."""
    if table is None or record is None:
        if (table is None) != (record is None):
            raise DataError(
                f"source {source!r}: only {'the config' if record is None else 'the manifest'} has an official test; "
                "use the config that the manifest was drawn with, or remove data.manifest to draw a new partition"
            )
    elif table.sha256 != record.sha256:
        raise DataError(
            f"source {source!r}: {table.where} is not what the partition was drawn from: {len(table.rows)} rows with "
            f"hash {table.sha256[:12]}, the manifest has {record.name} with {record.rows} rows and hash "
            f"{record.sha256[:12]}; restore the data, or remove data.manifest to draw a new partition. If the file is "
            "unchanged, an earlier version read its numbers or dates as other values: start a new run"
        )


def _stored_examples(data: SourceData, client: ClientRecord, seed: int) -> Splits:
    """Return the examples of a stored client by split; DataError if they are not those that were stored."""
    records: dict[str, SplitRecord] = {split: getattr(client, split) for split in SPLITS}
    clean = {split: _clean_examples(data, client, split, record) for split, record in records.items()}
    examples = with_label_noise(clean, data.source.label_noise, seed, client.client)
    for split, record in records.items():
        if _digest(examples[split]) != record.sha256:
            raise DataError(
                f"manifest: client {client.client!r}, split {split!r}: the hash of its examples does not match, though "
                f"the rows of source {data.source.name!r} are the same: an image, the template, its options or "
                "label_noise changed, or the manifest was edited; restore them, or remove data.manifest to draw a new "
                "partition"
            )
    return examples


def _clean_examples(data: SourceData, client: ClientRecord, split: str, record: SplitRecord) -> tuple[Example, ...]:
    """Return the examples of a stored split as they are in the data; DataError if a row does not exist."""
    where = f"manifest: client {client.client!r}, split {split!r}"
    try:
        count = len(data.table(record.table).rows)
    except KeyError:
        raise DataError(f"{where} uses an official test, which source {client.source!r} does not have") from None
    invalid = [row for row in record.rows if not 0 <= row < count]
    if invalid:
        raise DataError(f"{where} has row {invalid[0]}, the table has rows 0 to {count - 1}; the file is damaged")
    rendered = [data.example(record.table, row) for row in record.rows]
    return tuple(example for example in rendered if example is not None)
