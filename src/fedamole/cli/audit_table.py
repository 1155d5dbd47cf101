"""The table of `fedamole audit-log`."""

from pathlib import Path

from rich.table import Table

from fedamole.deployment.security.audit_log import AuditSummary, RoundTraffic
from fedamole.terminal import Screen


def show_audit(console: Screen, path: Path, summary: AuditSummary) -> None:
    """Print a table of the replies by run and round, the totals, the refusals, and whether the log is intact."""
    head = ("run", "round", "answers", "refused", "bytes", "numbers of the method", "scores and losses")
    table = Table(title=str(path), title_style="bold", title_justify="left", show_footer=True)
    totals = ("total", "", *(str(sum(_numbers(traffic)[index] for traffic in summary.sent)) for index in range(5)))
    for index, (name, total) in enumerate(zip(head, totals, strict=True)):
        table.add_column(name, footer=total, justify="left" if index == 0 else "right")
    for traffic in summary.sent:
        round_ = "before round 1" if traffic.round < 0 else str(traffic.round + 1)
        table.add_row(traffic.run, round_, *map(str, _numbers(traffic)))
    console.print(table)
    for reason in summary.refusals:
        console.print(f"refused: {reason}", soft_wrap=True)
    for fault in summary.faults:
        console.print(f"NOT INTACT: {fault}", soft_wrap=True)
    state = "not intact" if summary.faults else "intact"
    counts = f"{summary.lines} lines, {summary.came} messages received"
    text = f"{counts}; the log is {state}; hash of its newest line {summary.last}"
    console.print(text, soft_wrap=True)


def _numbers(traffic: RoundTraffic) -> tuple[int, ...]:
    return traffic.answers, traffic.refused, traffic.bytes, traffic.numbers, traffic.scores
