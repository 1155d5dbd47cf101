"""A federation's data: drawn once, stored as a hashed manifest, and reproduced from it exactly."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from fedamole.data.drawing import SourceData, draw_clients, examples_of, open_source
from fedamole.data.examples import Example, Shard
from fedamole.data.settings import DataSettings
from fedamole.data.sources import Table, digest
from fedamole.data.splits import ClientRows
from fedamole.errors import ConfigError, DataError
from fedamole.received import forms
from fedamole.received.files import MOST_JSON, parse_json, read_text
from fedamole.received.names import checked_names, quoted
from fedamole.runs.run_files import LONGEST_VALUE, SPLITS, client_form

FORMAT = 1
"""Version of the manifest's layout; a file of another version is refused."""
_table_form = forms.record({"name": forms.text(1000), "rows": forms.whole(), "sha256": forms.text(100)})
_source_form = forms.record(
    {"name": forms.name, "train": _table_form, "test": forms.either(forms.nothing, _table_form)}
)
_form = forms.record(
    {
        "partition_seed": forms.whole(-forms.MOST_WHOLE),
        "settings": forms.record({}, {"source": forms.mapping(forms.anything)}),
        "sources": forms.listed(_source_form),
        "clients": forms.listed(client_form),
    }
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableRecord:
    """A file, or a split on the hub, as it was when the partition was drawn."""

    name: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class SourceRecord:
    """The tables of a source."""

    name: str
    train: TableRecord
    test: TableRecord | None


@dataclass(frozen=True)
class SplitRecord:
    """One split of a client: which rows of which table, and a hash of the examples they make."""

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
    # The beginning of its value in a partition by value, for people; None where the client's name holds the value.
    value: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON has it: without `value` where there is none."""
        found = asdict(self)
        return found if self.value is not None else {key: item for key, item in found.items() if key != "value"}


@dataclass(frozen=True)
class Manifest:
    """A stored partition: what it takes to have the same splits again and to notice changed data."""

    partition_seed: int
    # The settings it was drawn with, for people and for the note where a config says otherwise.
    settings: dict[str, Any]
    sources: tuple[SourceRecord, ...]
    clients: tuple[ClientRecord, ...]

    def to_json(self) -> str:
        """The manifest as text, one line a client, which `from_json` turns back."""
        head = {"format": FORMAT, "partition_seed": self.partition_seed, "settings": self.settings}
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        tables = {"sources": map(asdict, self.sources), "clients": (client.to_dict() for client in self.clients)}
        for key, records in tables.items():
            lines.append(f'"{key}": [\n' + ",\n".join(map(json.dumps, records)) + "\n]")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def values(self) -> dict[str, str]:
        """By client, the value that its name does not hold; see `ClientRecord.value`."""
        return {client.client: client.value for client in self.clients if client.value is not None}

    def only(self, client: str) -> "Manifest":
        """The part of one client, its splits and its source alone; DataError where there is no such client."""
        mine = tuple(record for record in self.clients if record.client == client)
        if not mine:
            known = ", ".join(record.client for record in self.clients)
            raise DataError(f"the manifest has no client {client!r}; it has {known}")
        source = mine[0].source
        settings = {**self.settings, "source": {source: self.settings.get("source", {}).get(source)}}
        kept = tuple(record for record in self.sources if record.name == source)
        return replace(self, settings=settings, sources=kept, clients=mine)

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        """The manifest in a text; `where` names its file in the DataError for a corrupt or foreign one."""
        found = parse_json(text, where, DataError)
        version = found.get("format") if isinstance(found, dict) else None
        if version != FORMAT:
            raise DataError(
                f"{where} is no usable manifest: its format is {quoted(version)}, this version reads {FORMAT}; restore "
                "it, or leave it out to draw the partition anew"
            )
        forms.check_form(found, _form, where, DataError)
        checked_names((client["client"] for client in found["clients"]), f"clients of {where}", DataError)
        checked_names((source["name"] for source in found["sources"]), f"sources of {where}", DataError)
        return cls(
            partition_seed=found["partition_seed"],
            settings=found["settings"],
            sources=tuple(_source_record(source) for source in found["sources"]),
            clients=tuple(_client_record(client) for client in found["clients"]),
        )


def _table_record(found: Mapping[str, Any]) -> TableRecord:
    return TableRecord(found["name"], found["rows"], found["sha256"])


def _source_record(found: Mapping[str, Any]) -> SourceRecord:
    test = None if found["test"] is None else _table_record(found["test"])
    return SourceRecord(found["name"], _table_record(found["train"]), test)


def _client_record(found: Mapping[str, Any]) -> ClientRecord:
    splits = {
        name: SplitRecord(found[name]["table"], tuple(found[name]["rows"]), found[name]["sha256"]) for name in SPLITS
    }
    return ClientRecord(client=found["client"], source=found["source"], value=found.get("value"), **splits)


@dataclass(frozen=True)
class Federation:
    """Every client's data, the manifest that gives them again, and notes for people on what was left out."""

    shards: tuple[Shard, ...]
    manifest: Manifest
    notes: tuple[str, ...]


def read_manifest(path: Path) -> Manifest:
    """The manifest stored in a file; DataError if it is missing or corrupt."""
    return Manifest.from_json(read_text(path, MOST_JSON, DataError), str(path))


def load_federation(settings: DataSettings, base_folder: Path, manifest: Manifest | None = None) -> Federation:
    """The shards of all clients, sources in the order of the config.

    Relative paths start at `base_folder`. With a manifest (the argument, else the file `settings.manifest`)
    exactly its splits, and nothing random; without one the partition is drawn. Raises DataError for data that
    cannot be read or used, or that are not what the manifest says, and ConfigError for two clients of one
    name.
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
        clients, remarks = draw_clients(settings, data)
        notes += remarks
        for client in clients:
            if client.client in records:
                raise ConfigError(
                    f"client {client.client!r} comes from source {records[client.client].source!r} and "
                    f"from source {name!r}; rename one of the sources"
                )
            examples = examples_of(data, client)
            records[client.client] = _record(client, name, examples)
            shards[client.client] = Shard(client.client, **examples)
    checked_names(shards, "clients of data.source", ConfigError)
    tables = tuple(_source_tables(name, data) for name, data in sources.items())
    manifest = Manifest(settings.partition_seed, drawn_with(settings), tables, tuple(records.values()))
    return Federation(tuple(shards.values()), manifest, tuple(notes))


def _different_options(sources: Iterable[SourceData]) -> list[str]:
    """Notes on sources whose options were found in their own rows alone, though they seem to be of one task."""
    notes: list[str] = []
    for one, other in combinations([data for data in sources if data.template.options_from is not None], 2):
        alone = sorted(set(one.options) ^ set(other.options))
        if one.template == other.template and alone and set(one.options) & set(other.options):
            notes.append(
                f"sources {one.source.name!r} and {other.source.name!r} have one template and share options, but "
                f"{alone[0][:200]!r} is an option of one of them alone; if they are one task, list all its answers as "
                "`options` of a template under [data.templates]"
            )
    return notes


def _reproduce(settings: DataSettings, sources: Mapping[str, SourceData], manifest: Manifest) -> Federation:
    for record in manifest.sources:
        data = sources[record.name]
        for now, then in ((data.train, record.train), (data.test, record.test)):
            _check_table(record.name, now, then)
    shards: list[Shard] = []
    for client in manifest.clients:
        data = sources[client.source]
        splits = {split: getattr(client, split) for split in SPLITS}
        examples = {split: _examples(data, client, split, record) for split, record in splits.items()}
        shards.append(Shard(client.client, **examples))
    now_with = drawn_with(settings)
    notes = [
        f"data.{key} = {now_with[key]!r} in the config is not read: the manifest was drawn with "
        f"{manifest.settings.get(key)!r}"
        for key in now_with
        if now_with[key] != manifest.settings.get(key)
    ]
    for note in notes:
        log.warning("%s", note)
    return Federation(tuple(shards), manifest, tuple(notes))


def drawn_with(settings: DataSettings) -> dict[str, Any]:
    """The settings that decide a partition, as a manifest holds them; sources by name, without paths."""
    found = asdict(replace(settings, manifest=None))
    del found["manifest"], found["templates"]
    found["source"] = {
        source.name: {
            "template": source.template,
            "limit": source.limit,
            "partition": {key: value for key, value in asdict(source.partition).items() if value is not None},
        }
        for source in settings.source
    }
    return found


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
    return digest([[example.prompt, example.answer, list(example.options)] for example in examples])


def _check_sources(settings: DataSettings, manifest: Manifest) -> None:
    """Raise DataError unless config and manifest name the same sources, and each client is of one of them."""
    config = {source.name for source in settings.source}
    stored = {record.name for record in manifest.sources}
    if config != stored:
        raise DataError(
            f"the manifest is of the sources {sorted(stored)}, the config has {sorted(config)}; use the "
            f"config it was drawn with, or leave the manifest out to draw anew"
        )
    for client in manifest.clients:
        if client.source not in stored:
            raise DataError(f"manifest: client {client.client!r} has no source; the file is damaged")


def _check_table(source: str, now: Table | None, then: TableRecord | None) -> None:
    if now is None or then is None:
        if (now is None) != (then is None):
            raise DataError(
                f"source {source!r}: only {'the config' if then is None else 'the manifest'} has an "
                f"official test; use "
                f"the config the manifest was drawn with, or leave the manifest out to draw anew"
            )
    elif now.sha256 != then.sha256:
        raise DataError(
            f"source {source!r}: {now.where} is not what the partition was drawn from: {len(now.rows)} "
            f"rows with hash {now.sha256[:12]}, the manifest has {then.name} with {then.rows} rows and "
            f"{then.sha256[:12]}; restore the data, or leave the manifest out to draw anew. If the file is unchanged, "
            f"an earlier version read its numbers or dates as other values: start the run anew"
        )


def _examples(data: SourceData, client: ClientRecord, split: str, record: SplitRecord) -> tuple[Example, ...]:
    where = f"manifest: client {client.client!r}, split {split!r}"
    try:
        count = len(data.table(record.table).rows)
    except KeyError:
        raise DataError(f"{where} is of an official test, which source {client.source!r} does not have") from None
    strangers = [row for row in record.rows if not 0 <= row < count]
    if strangers:
        raise DataError(f"{where} has row {strangers[0]}, the table has rows 0 to {count - 1}; the file is damaged")
    found = [data.example(record.table, row) for row in record.rows]
    examples = tuple(example for example in found if example is not None)
    if _digest(examples) != record.sha256:
        raise DataError(
            f"{where}: the hash of its examples does not match, though the data of source "
            f"{client.source!r} are the "
            f"same: the template or its options changed, or the manifest was edited; restore them, or draw "
            f"anew"
        )
    return examples
