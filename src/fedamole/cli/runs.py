"""`fedamole runs`. Reads files only, without PyTorch."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fedamole.cli.completion import complete_runs
from fedamole.cli.options import AsJson
from fedamole.terminal import printable, say_json, screen

DEPTH = 3
"""Levels of folders below the named one that are searched for runs."""
COLUMNS = ("run", "state", "method", "seed", "score", "started")


def runs(
    folder: Annotated[
        Path, typer.Argument(help="Folder that is searched, with three levels below it.", autocompletion=complete_runs)
    ] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder: state, method, seed, mean test score, and when they started (UTC); latest first.

    The state is `finished`, or the number of finished rounds: `fedamole resume` continues such a run, unless another
    process is still running it. The score is that of the method at its best validation round.

    Examples:

      fedamole runs
      fedamole runs runs/demo --json
    """
    from fedamole.cli.table_layout import print_table
    from fedamole.errors import RunError
    from fedamole.received.names import cut
    from fedamole.runs.run_folder import RUN

    patterns = ("/".join(["*"] * depth + [RUN]) for depth in range(DEPTH + 1))
    folders = _each_once([path.parent for pattern in patterns for path in folder.glob(pattern)])
    if not folders:
        raise RunError(f"no run in {folder}: `fedamole run` writes to runs/NAME; name the folder that contains yours")
    records = sorted(map(_record, folders), key=lambda record: _time(record["started"]), reverse=True)
    if as_json:
        say_json(records)
        return
    lines = [
        [_started(record[key]) if key == "started" else _cell(record[key]) for key in COLUMNS] for record in records
    ]
    names = [line[0] for line in lines]
    print_table(
        screen(wide=120),
        [COLUMNS, *lines],
        title=f"{len(records)} runs in {_cell(folder)}",
        text_columns=3,
        names=names,
    )
    for record in records:
        if record["state"] == "damaged":
            screen().print(f"{_cell(record['run'])} is damaged: {cut(_cell(record['error']), 200)}", soft_wrap=True)


def _each_once(folders: Sequence[Path]) -> list[Path]:
    """Return each folder once, though links lead to it; its path without links if it has one."""
    first: dict[Path, Path] = {}
    for folder in sorted(folders, key=lambda folder: (os.path.realpath(folder) != os.path.abspath(folder), folder)):
        first.setdefault(folder.resolve(), folder)
    return list(first.values())


def _time(started: Any) -> float:
    """Return when a run started, in seconds; 0 if it is missing or damaged."""
    from datetime import UTC, datetime

    try:
        time = datetime.fromisoformat(started)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _record(folder: Path) -> dict[str, Any]:
    """Return what the list shows of one run; a damaged one has the state `damaged` and its error."""
    from datetime import UTC, datetime

    from fedamole.errors import FedamoleError
    from fedamole.runs.run_folder import RUN, SUMMARY, RunFolder

    record: dict[str, Any] = dict.fromkeys(COLUMNS) | {"run": str(folder)}
    try:
        run = RunFolder.open(folder)
        tables, method = run.tables(), run.about["method"]
        record |= {"method": method, "seed": tables["run"]["seed"], "kind": run.kind}
        written = datetime.fromtimestamp((folder / RUN).stat().st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        record["started"] = run.about.get("started", written)
        if run.finished:
            summary = run.read_json(SUMMARY)
            record |= {"state": "finished", "score": summary["rows"].get(method, {}).get("mean")}
        else:
            record["state"] = f"{_rounds_done(folder)} of {tables['federation']['rounds']} rounds"
    except (FedamoleError, OSError, UnicodeError) as error:
        record |= {"state": "damaged", "error": str(error)}
    return record


def _rounds_done(folder: Path) -> int:
    """Return the number of rounds that an unfinished run has committed."""
    numbers = [path.stem.removeprefix("round-") for path in (folder / "checkpoints").glob("round-*.json")]
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def _started(value: Any) -> str:
    """Return a time as the table shows it, without seconds if they are 0."""
    return "" if value is None else _cell(value).replace("T", " ").removesuffix(":00Z").removesuffix("Z")


def _cell(value: Any) -> str:
    """Return a value as one line of text."""
    if isinstance(value, float):
        return f"{value:.1f}"
    return "" if value is None else printable(value).replace("\n", "\\n").replace("\t", "\\t")
