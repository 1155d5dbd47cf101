"""Pack the finished trials of a comparison into one archive without models, and unpack them on another machine.

    python scripts/archive_trials.py pack ARCHIVE RUNS... --name SHARED=../shared
    python scripts/archive_trials.py unpack ARCHIVE --name SHARED=../shared

RUNS are folders of a comparison (its `folder` setting), relative to the current directory. A trial is packed if it has
a `summary.json`, so a comparison that is still running can be packed too: unpack it elsewhere, and `fedamole compare`
goes on with the trials that are missing. `--name NAME=FOLDER` writes `NAME/` in place of the folder's absolute path in
the `config.toml` files, and the other way round on unpacking. Nothing that exists is overwritten.
"""

import argparse
import io
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from fedamole.errors import FedamoleError

FILES = ("config.toml", "manifest.json", "run.json", "summary.json", "metrics.jsonl", "assignment.jsonl")
"""What `fedamole compare --show` reads of a finished trial."""
MOST_BYTES = 1 << 26
"""Maximum size of a file of a trial, 64 MiB."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, and pack or unpack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write finished trials into an archive (.tar.xz)")
    packing.add_argument("archive", type=Path, help="the archive to write; it is replaced if it exists")
    packing.add_argument("runs", type=Path, nargs="+", help="folders of comparisons, relative to the current directory")
    unpacking = commands.add_parser("unpack", help="write the trials of an archive below the current directory")
    unpacking.add_argument("archive", type=Path, help="the archive to read")
    for command in (packing, unpacking):
        command.add_argument(
            "--name", action="append", default=[], metavar="NAME=FOLDER", help="a folder of this machine"
        )
    chosen = parser.parse_args(arguments)
    try:
        folders = _named_folders(chosen.name)
        if chosen.command == "pack":
            print(f"{chosen.archive}: {pack(chosen.archive, chosen.runs, folders)} trials")
        else:
            print(f"{chosen.archive}: {unpack(chosen.archive, folders)} files written")
    except (FedamoleError, OSError, tarfile.TarError) as error:
        sys.exit(f"archive_trials.py: error: {error}")


def pack(archive: Path, runs: Sequence[Path], folders: Mapping[str, str]) -> int:
    """Write the finished trials below `runs` into the archive, and return their number."""
    names = {folder: name for name, folder in folders.items()}
    trials = sorted(path.parent for folder in runs for path in _summaries(folder))
    with tarfile.open(archive, "w:xz") as target:
        for trial in trials:
            for name in FILES:
                if (trial / name).exists():
                    text = (trial / name).read_text(encoding="utf-8")
                    _add(target, trial / name, _replaced(text, names) if name == "config.toml" else text)
    return len(trials)


def unpack(archive: Path, folders: Mapping[str, str]) -> int:
    """Write the files of the archive below the current directory, and return their number.

    Raises:
        FedamoleError: An entry is no file of a trial, lies outside the current directory, or exists with other content.
    """
    texts = dict[Path, str]()
    with tarfile.open(archive, "r:xz") as source:
        for entry in source:
            target = PurePosixPath(entry.name)
            content = source.extractfile(entry) if entry.isfile() and entry.size <= MOST_BYTES else None
            if content is None or target.name not in FILES or target.is_absolute() or ".." in target.parts:
                raise FedamoleError(
                    f"{archive}: {entry.name!r} is not a file of a trial of at most 64 MiB; nothing was written"
                )
            try:
                text = content.read().decode("utf-8")
            except UnicodeDecodeError as error:
                raise FedamoleError(f"{archive}: {entry.name!r} is not text in UTF-8; nothing was written") from error
            texts[Path(target)] = _replaced(text, folders) if target.name == "config.toml" else text
    for path, text in texts.items():
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise FedamoleError(f"{path} exists with other content; nothing was written: move the folder away")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return len(texts)


def _summaries(folder: Path) -> Iterator[Path]:
    if folder.is_absolute() or not folder.is_dir():
        raise FedamoleError(f"{folder}: give a folder of runs relative to the current directory")
    return folder.rglob("summary.json")


def _named_folders(names: Sequence[str]) -> dict[str, str]:
    pairs = [name.partition("=") for name in names]
    if any(not (name and folder) for name, _, folder in pairs):
        raise FedamoleError("--name must be NAME=FOLDER, for example SHARED=../shared")
    return {name: Path(folder).resolve().as_posix() for name, _, folder in pairs}


def _replaced(text: str, prefixes: Mapping[str, str]) -> str:
    """Return a config in which every text in quotes that begins with OLD/ begins with NEW/, for each old and new."""
    for old, new in prefixes.items():
        text = text.replace(f'"{old}/', f'"{new}/')
    return text


def _add(target: tarfile.TarFile, path: Path, text: str) -> None:
    """Add a file without owner and time, so that equal trials give an equal archive."""
    content = text.encode("utf-8")
    entry = tarfile.TarInfo(path.as_posix())
    entry.size = len(content)
    target.addfile(entry, io.BytesIO(content))


if __name__ == "__main__":
    main()
