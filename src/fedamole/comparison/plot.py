"""The picture of a comparison: methods by score and by loss, as dots with whiskers, in every scenario."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedamole.errors import ConfigError
from fedamole.reporting.plot_style import STYLE, save_figure
from fedamole.reporting.results import Result, Scenario
from fedamole.reporting.significance import deviation

KINDS = (".svg", ".png", ".pdf")


def check_picture(path: Path) -> None:
    """Raise ConfigError where a picture of this name cannot be drawn, before anything has been computed."""
    if path.suffix not in KINDS:
        raise ConfigError(f"--plot {path}: the name must end with {', '.join(KINDS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs `pip install matplotlib`; or leave it out") from error


def draw(path: Path, scenarios: Sequence[Scenario]) -> None:
    """Draw a row of two panels for each scenario: test score, best on top, and the loss of the same models.

    A blue dot is the mean over clients and seeds, its whiskers the standard deviation over seeds; small grey dots are
    the clients, each averaged over its seeds.
    """
    check_picture(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    lines = [max(2, len(found.methods)) for found in scenarios]
    with rc_context(STYLE):
        height = sum(0.3 * count + 0.9 for count in lines)
        figure = Figure(figsize=(9, height), layout="constrained")
        panels = figure.subplots(len(scenarios), 2, squeeze=False, sharey="row", height_ratios=lines)
        for row, scenario in zip(panels, scenarios, strict=True):
            _panels(row, scenario)
        save_figure(figure, path)


def _panels(row: Any, scenario: Scenario) -> None:
    order = sorted(scenario.methods, key=lambda name: _mean(scenario.methods[name], "score"))
    score, loss = row
    score.set_yticks(range(len(order)), [scenario.label(method) for method in order])
    score.set_title(scenario.name, loc="left", fontweight="bold")
    score.set_xlabel("test score, 0 to 100 (right is better)")
    loss.set_xlabel("test loss, nats per answer token (left is better)")
    for panel in row:
        panel.grid(axis="x", color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    for height, method in enumerate(order):
        results = scenario.methods[method]
        trained = method in scenario.trained
        for panel, key in ((score, "score"), (loss, "loss")):
            _line(panel, height, results, key, "C0" if trained else "0.35")


def _line(panel: Any, height: int, results: Sequence[Result], key: str, colour: str) -> None:
    by_client = [result.scores if key == "score" else result.losses for result in results]
    clients = [statistics.fmean(found[client] for found in by_client) for client in by_client[0]]
    means = [result.measures[key] for result in results if key in result.measures]
    if not means:
        return
    spread = deviation(means) if len(means) > 1 else 0.0
    panel.plot(clients, [height] * len(clients), "o", color="0.7", markersize=3, zorder=2)
    panel.errorbar(
        statistics.fmean(means), height, xerr=spread or None, fmt="o", color=colour, markersize=6, capsize=3, zorder=3
    )


def _mean(results: Sequence[Result], key: str) -> float:
    return statistics.fmean(result.measures[key] for result in results)
