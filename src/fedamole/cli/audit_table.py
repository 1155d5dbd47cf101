"""What `fedamole audit-log` shows a person."""

from pathlib import Path

from rich.table import Table

from fedamole.deployment.security.audit_log import Sent, Summary
from fedamole.terminal import Screen


def show_audit(console: Screen, path: Path, found: Summary) -> None:
    """Print a table of what left by run and round, the totals, the refusals, and whether the log is whole."""
    head = ("run", "round", "answers", "refused", "bytes", "numbers of the method", "scores and losses")
    table = Table(title=str(path), title_style="bold", title_justify="left", show_footer=True)
    totals = ("in all", "", *(str(sum(_numbers(one)[place] for one in found.sent)) for place in range(5)))
    for place, (name, total) in enumerate(zip(head, totals, strict=True)):
        table.add_column(name, footer=total, justify="left" if place == 0 else "right")
    for one in found.sent:
        round_ = "before the first" if one.round < 0 else str(one.round + 1)
        table.add_row(one.run, round_, *map(str, _numbers(one)))
    console.print(table)
    for reason in found.refusals:
        console.print(f"refused: {reason}", soft_wrap=True)
    for fault in found.faults:
        console.print(f"NOT WHOLE: {fault}", soft_wrap=True)
    state = "not whole" if found.faults else "whole"
    text = (
        f"{found.lines} lines, {found.came} messages came in; the log is {state}; hash of its newest line {found.last}"
    )
    console.print(text, soft_wrap=True)


def _numbers(one: Sent) -> tuple[int, ...]:
    return one.answers, one.refused, one.bytes, one.numbers, one.scores
