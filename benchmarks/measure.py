"""What the benchmarks share: interleaved medians, one small table of ratios, one JSON file."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table


def arguments(description: str, **more: str) -> argparse.Namespace:
    """Read `--quick` (under a minute on two cores), `--json FILE` and the options explained in `more`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats: under a minute on 2 cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the ratios here too")
    for name, explanation in more.items():
        parser.add_argument(f"--{name}", default="", help=explanation)
    return parser.parse_args()


def interleaved(contestants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each contestant, after one warm-up each.

    Everybody runs once per repeat, in an order that turns round from repeat to repeat, so that a machine that is
    slow for a while, or slow after somebody's turn, is slow for all.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for name in names:
        contestants[name]()
    for repeat in range(repeats):
        for name in names if repeat % 2 else names[::-1]:
            started = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(
    title: str, head: Sequence[str], lines: Sequence[Sequence[object]], ratios: Mapping[str, float], file: Path | None
) -> None:
    """Print a table; write `{"ratios": {"what_vs_whom_at_size": number}}` where a file is asked for."""
    table = Table(title=title, title_style="bold", title_justify="left")
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left")
    for line in lines:
        table.add_row(*(f"{value:,.3g}" if isinstance(value, float) else str(value) for value in line))
    Console(width=130).print(table)
    if file is not None:
        file.write_text(json.dumps({"ratios": dict(ratios)}, indent=1) + "\n")
