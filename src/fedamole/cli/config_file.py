"""`fedamole init` and `fedamole config`. Heavy packages are imported inside the commands."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedamole.cli.completion import complete_methods
from fedamole.cli.options import ConfigPath, Overrides, read_config
from fedamole.terminal import say, screen

if TYPE_CHECKING:
    from fedamole.data.settings import SourceSettings

TEST = ".test"
"""End of the name, before the suffix, of a file with the official test rows: `north.test.jsonl` of `north.jsonl`."""
TEXT = """\
# Written by `fedamole init`. `fedamole config --schema` and docs/reference.md list all keys.
# Check it with `fedamole plan {name}`, train with `fedamole run {name}`.

[method]
# `fedamole methods` lists them.
name = {method}

[run]
# The run's folder is runs/NAME.
name = {run}
# seed = 0
# trackers = ["tensorboard"]

[base]
# "bundled" is tiny, to try things out; else a folder in Hugging Face layout, a GGUF file or a hub id.
model = {base}

[federation]
rounds = 8
# Stop after this number of rounds without a better validation value.
# patience = 3

[training]
# Optimiser steps of a client in each round.
local_steps = 20
batch_size = 4
# 1e-3 suits small bases, the paper's 5e-5 a base of a billion parameters; `fedamole compare` selects it on validation.
learning_rate = 1e-3
# In tokens; longer prompts are truncated.
max_length = 256

[data]
# Fractions of each client's rows.
# validation_share = 0.1
# test_share = 0.1
"""
SPLIT = """
# One file: its rows are divided at random, to try things out. For real clients, give each its own file, or divide by a
# column: kind = "value" and by = "COLUMN".
[data.source.partition]
kind = "iid"
clients = {clients}
"""
CLIENTS = 4
"""Number of clients into which the rows of a single file are divided."""


def init(
    data: Annotated[
        list[Path],
        typer.Argument(
            metavar="DATA...", help="Folder with one file for each client, or the files (.jsonl, .csv, ...)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Config to write; an existing file is not replaced.")] = Path(
        "fedamole.toml"
    ),
    method: Annotated[str, typer.Option(help="Method to train.", autocompletion=complete_methods)] = "fedamole",
    base: Annotated[str, typer.Option(help="Base model: `bundled`, a folder, a GGUF file or a hub id.")] = "bundled",
) -> None:
    """Write a commented config for your data files, one client for each.

    The rows are read once, so that a wrong format or missing columns are reported now. NAME.test.jsonl is used as the
    test set of NAME.jsonl.

    Examples:

      fedamole init my-data                                   all data files of a folder
      fedamole init north.jsonl south.jsonl --out my.toml --base ./my-qwen
    """
    from fedamole.config import load_config
    from fedamole.files import new_file, write_atomic

    _check_name(out)
    sources = _sources(data, out.parent)
    _check(sources, out.parent)
    with new_file(out):
        write_atomic(out, _text(out, sources, method, base))
        try:
            load_config(out)
        except Exception:
            out.unlink()
            raise
    say(out)
    clients = f"{len(sources)} clients" if len(sources) > 1 else f"1 file, divided among {CLIENTS} clients"
    screen(error=True).print(f"{clients}; next: fedamole plan {out}, then fedamole run {out}", soft_wrap=True)


def _check_name(out: Path) -> None:
    """Raise ConfigError for a name that would end the comment of the config in which it stands."""
    from unicodedata import category

    from fedamole.errors import ConfigError
    from fedamole.received.names import quoted

    if any(category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in out.name):
        raise ConfigError(f"--out: the name {quoted(out.name)} has line breaks or control characters; choose another")


def _sources(paths: Sequence[Path], folder: Path) -> "list[SourceSettings]":
    """Return a source for each data file. Paths below the config's folder are written relative to it."""
    from fedamole.data.settings import SourceSettings
    from fedamole.data.sources import FORMATS
    from fedamole.errors import DataError
    from fedamole.received.names import as_name

    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"there is no file or folder {path}")
        within = sorted(child for child in path.iterdir() if child.name.endswith(FORMATS)) if path.is_dir() else [path]
        if not within:
            raise DataError(f"{path} has no data files; known are {', '.join(FORMATS)}")
        files += within
    stems = {file: file.name[: -len(next((end for end in FORMATS if file.name.endswith(end)), ""))] for file in files}
    if unknown := [file for file, stem in stems.items() if not stem]:
        raise DataError(f"{unknown[0]}: unknown file format; known are {', '.join(FORMATS)}")
    tests = {stem.removesuffix(TEST): file for file, stem in stems.items() if stem.endswith(TEST)}
    rows = {stem: file for file, stem in stems.items() if not stem.endswith(TEST)}
    if alone := [stem for stem in tests if stem not in rows]:
        raise DataError(
            f"{tests[alone[0]]} has the name of a test set, but there is no training file {alone[0]!r}: name both, or "
            "rename it if its rows are training data"
        )

    def shown(path: Path) -> str:
        resolved, top = path.resolve(), folder.resolve()
        return str(resolved.relative_to(top) if resolved.is_relative_to(top) else resolved)

    names = [as_name(stem) for stem in rows]
    if len(rows) + len(tests) < len(files) or len({name.lower() for name in names}) < len(names):
        raise DataError("two of the files have the same name, which would be that of two clients: rename one of them")
    return [
        SourceSettings(as_name(stem), shown(file), shown(tests[stem]) if stem in tests else None)
        for stem, file in rows.items()
    ]


def _check(sources: "Sequence[SourceSettings]", folder: Path) -> None:
    """Raise DataError if a file cannot be read, or if its columns are those of no built-in template."""
    from fedamole.data.sources import read_source
    from fedamole.data.templates import choose

    for source in sources:
        for table in filter(None, read_source(source, folder)):
            choose(source.template, {}, table.columns, table.where)


def _text(out: Path, sources: "Sequence[SourceSettings]", method: str, base: str) -> str:
    """Return the config as text."""
    from fedamole.received.names import as_name

    text = TEXT.format(name=out.name, method=_quoted(method), run=_quoted(as_name(out.stem)), base=_quoted(base))
    for source in sources:
        text += f"\n[[data.source]]\nname = {_quoted(source.name)}\npath = {_quoted(source.path or '')}\n"
        text += f"test = {_quoted(source.test)}\n" if source.test else ""
    return text + (SPLIT.format(clients=CLIENTS) if len(sources) == 1 else "")


def _quoted(text: str) -> str:
    """Return a TOML string; JSON's escapes are TOML's, too."""
    return json.dumps(text, ensure_ascii=False)


def config(
    file: ConfigPath = None,
    overrides: Overrides = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of all configs, for completion in an editor.")
    ] = False,
) -> None:
    """Print a config with all its defaults, as a run would store it, or the JSON schema of configs.

    Examples:

      fedamole config my.toml method.name=fedit
      fedamole config --schema > fedamole.schema.json
    """
    import tomli_w

    if schema:
        from fedamole.config_schema import config_schema

        say(json.dumps(config_schema(), indent=1))
        return
    say(tomli_w.dumps(read_config(file, overrides).tables()), end="")
