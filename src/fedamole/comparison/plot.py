"""Plot of a comparison: test score and test loss of the methods in every scenario, as dots with error bars."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedamole.errors import ConfigError
from fedamole.reporting.plot_style import STYLE, require_matplotlib, save_figure, style_panel
from fedamole.reporting.results import Scenario, SeedResult
from fedamole.reporting.significance import deviation

FORMATS = (".svg", ".png", ".pdf")


def check_plot(path: Path) -> None:
    """Raise ConfigError if the plot cannot be drawn (file format, matplotlib), before anything is computed."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"--plot {path}: the name must end with {', '.join(FORMATS)}")
    require_matplotlib("--plot")


def draw(path: Path, scenarios: Sequence[Scenario]) -> None:
    """Draw two panels for each scenario: test score, with the best method on top, and test loss of the same models.

    A coloured dot is the mean over clients and seeds, its error bar the standard deviation over seeds. Small grey dots
    are the clients, each averaged over its seeds.
    """
    check_plot(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    lines = [max(2, len(scenario.methods)) for scenario in scenarios]
    with rc_context(STYLE):
        height = sum(0.3 * count + 0.9 for count in lines)
        figure = Figure(figsize=(9, height), layout="constrained")
        panels = figure.subplots(len(scenarios), 2, squeeze=False, sharey="row", height_ratios=lines)
        for pair, scenario in zip(panels, scenarios, strict=True):
            _draw_scenario(pair, scenario)
        save_figure(figure, path)


def _draw_scenario(panels: Any, scenario: Scenario) -> None:
    order = sorted(scenario.methods, key=lambda name: _mean(scenario.methods[name], "score"))
    score, loss = panels
    score.set_yticks(range(len(order)), [scenario.label(method) for method in order])
    score.set_title(scenario.name, loc="left", fontweight="bold")
    score.set_xlabel("test score, 0 to 100 (right is better)")
    loss.set_xlabel("test loss, nats per answer token (left is better)")
    for panel in panels:
        style_panel(panel, "x")
    for height, method in enumerate(order):
        colour = "C0" if method in scenario.trained else "0.35"
        for panel, measure in ((score, "score"), (loss, "loss")):
            _draw_method(panel, height, scenario.methods[method], measure, colour)


def _draw_method(panel: Any, height: int, results: Sequence[SeedResult], measure: str, colour: str) -> None:
    by_client = [result.scores if measure == "score" else result.losses for result in results]
    clients = [statistics.fmean(values[client] for values in by_client) for client in by_client[0]]
    means = [result.measures[measure] for result in results if measure in result.measures]
    if not means:
        return
    error = deviation(means) if len(means) > 1 else 0.0
    panel.plot(clients, [height] * len(clients), "o", color="0.7", markersize=3, zorder=2)
    panel.errorbar(
        statistics.fmean(means), height, xerr=error or None, fmt="o", color=colour, markersize=6, capsize=3, zorder=3
    )


def _mean(results: Sequence[SeedResult], measure: str) -> float:
    return statistics.fmean(result.measures[measure] for result in results)
