"""The figures of a report as SVG and PNG files for a paper, with the data, titles and colours of the page."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from fedamole.errors import RunError
from fedamole.reporting.page.palette import BELOW_LIGHT, EVEN_LIGHT, HEAT_LIGHT, LIGHT, PLAIN_LIGHT
from fedamole.reporting.page.scale import tone
from fedamole.reporting.plot_style import STYLE, require_matplotlib, save_figure, style_panel

Json = Mapping[str, Any]
MARKS = ("o", "D", "s", "^", "v")
DASHES = ("-", (0, (5, 2)), ":", (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
FORMATS = (".svg", ".png")
UNITS = {"loss": "validation loss, nats per answer token", "score": "validation score, 0 to 100"}


def check_folder(folder: Path) -> None:
    """Raise ConfigError or RunError if figures cannot be written to the folder, before anything is computed."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--figures {folder}: this is a file; name a folder")
    require_matplotlib("--figures")


def draw_all(folder: Path, content: Json) -> list[Path]:
    """Write every figure for which the content has data, as SVG and PNG; return the files. Existing files are replaced.

    If two figures would have the same name (runs with non-ASCII names, for example), the second gets a number:
    `unnamed-sizes-2.svg`.
    """
    from matplotlib import rc_context

    written: list[Path] = []
    taken: set[str] = set()
    with rc_context(STYLE):
        for name, figure in _figures(content):
            candidates = chain([name], (f"{name}-{number}" for number in count(2)))
            free = next(candidate for candidate in candidates if candidate.lower() not in taken)
            taken.add(free.lower())
            for suffix in FORMATS:
                written.append(folder / f"{free}{suffix}")
                save_figure(figure, written[-1])
    return written


def _figures(content: Json) -> Iterator[tuple[str, Any]]:
    if "learning" in content:
        for measure in content["learning"]["measures"]:
            yield f"learning-{measure}", _learning(content, measure)
    if "test" in content:
        yield "test", _test(content)
    if content.get("gain"):
        yield "gain", _gain(content)
    for run in content.get("experts", ()):
        prefix = f"{_plain(run['label'])}-" if len(content["experts"]) > 1 else ""
        yield f"{prefix}sizes", _sizes(content, run)
        for module, name in enumerate(run["modules"]):
            yield f"{prefix}experts-{_plain(name)}", _experts(content, run, module)
    for run in content.get("routing", ()):
        prefix = f"{_plain(run['label'])}-" if len(content["routing"]) > 1 else ""
        for module, name in enumerate(run["modules"]):
            yield f"{prefix}routing-{_plain(name)}", _routing(content, run, module)
    if "data" in content:
        yield "data", _data(content)
    if "costs" in content:
        yield "costs", _costs(content)


def _plain(name: str) -> str:
    """Return a name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "unnamed"


def _short(content: Json) -> list[str]:
    return [content["short"][name] for name in content["clients"]]


def _figure(content: Json, key: str, width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(content["titles"][key][0], x=0.01, ha="left", fontweight="bold", fontsize=10)
    return figure


def _panels(figure: Any, down: int, across: int, shown: Sequence[Any], **shared: bool) -> list[tuple[Any, Any]]:
    """Return a panel for each item of `shown`, row by row; unused panels are hidden."""
    panels = list(figure.subplots(down, across, squeeze=False, **shared).flat)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    return list(zip(panels, shown, strict=False))


def _style_index(content: Json, label: str) -> int:
    """Return the index of a model's colour and mark; the last model has index 0, as on the page, yardsticks -1."""
    models = content["models"]
    return len(models) - 1 - models.index(label) if label in models else -1


def _learning(content: Json, measure: str) -> Any:
    """Draw a panel for the mean and for each client that was scored."""
    lines = content["learning"]["lines"]
    scored = [
        name
        for name in content["clients"]
        if any(value is not None for line in lines for value in line["values"].get(measure, {}).get(name, []))
    ]
    names = ["", *scored] if len(scored) > 1 else scored
    across = min(5, len(names))
    down = -(-len(names) // across)
    figure = _figure(content, "learning", 9, 1.5 * down + 0.7)
    for index, (panel, name) in enumerate(_panels(figure, down, across, names, sharex=True)):
        for line in lines:
            label = content["models"][line["model"]]
            style = _style_index(content, label)
            points = [
                (round_, value)
                for round_, value in enumerate(line["values"].get(measure, {}).get(name, []))
                if value is not None
            ]
            colour, dashes = LIGHT[style % len(LIGHT)], DASHES[style % len(DASHES)]
            panel.plot(*zip(*points, strict=True), color=colour, linestyle=dashes, linewidth=1.3, label=label)
        panel.set_title(content["short"].get(name, name) or "mean", fontsize=8, loc="left")
        panel.set_ylim(bottom=0)
        panel.xaxis.get_major_locator().set_params(integer=True)
        style_panel(panel, "y")
        if index >= len(names) - across:
            panel.tick_params(labelbottom=True)
            panel.set_xlabel("round", fontsize=8)
    by_label = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=6, frameon=False)
    figure.supylabel(UNITS[measure], fontsize=9)
    return figure


def _test(content: Json) -> Any:
    """Draw a row per client and a mark per method."""
    clients, marks = content["test"]["clients"], content["test"]["marks"]
    figure = _figure(content, "test", 7, 0.24 * len(clients) + 1.3)
    panel = figure.subplots()
    for label, by_client in marks.items():
        style = _style_index(content, label)
        colour = PLAIN_LIGHT if style < 0 else LIGHT[style % len(LIGHT)]
        mark = MARKS[style % len(MARKS)] if style >= 0 else "+" if label != next(iter(marks)) else "o"
        face = {"markerfacecolor": "white"} if style < 0 else {}
        panel.plot(
            [by_client[name] for name in clients],
            range(len(clients)),
            mark,
            color=colour,
            label=label,
            markersize=5,
            linestyle="none",
            **face,
        )
    panel.set_yticks(range(len(clients)), [content["short"][name] for name in clients])
    panel.invert_yaxis()
    panel.set_xlim(-2, 102)
    panel.set_xlabel("test score, 0 to 100")
    style_panel(panel, "both")
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    return figure


def _gain(content: Json) -> Any:
    """Draw a panel of bars per other method, for the last model."""
    gains, clients = content["gain"][-1], content["test"]["clients"]
    columns = gains["columns"]
    across = min(5, len(columns))
    down = -(-len(columns) // across)
    figure = _figure(content, "gain", 1.6 * across + 1.5, (0.2 * len(clients) + 0.6) * down + 0.6)
    for panel, column in _panels(figure, down, across, columns, sharex=True, sharey=True):
        values = [column["clients"].get(name, 0.0) for name in clients]
        panel.barh(range(len(clients)), values, color=[LIGHT[0] if value >= 0 else LIGHT[1] for value in values])
        panel.axvline(0, color="0.4", linewidth=0.8)
        panel.set_title(f"over {column['other']}: {column['mean']:+.1f}", fontsize=8, loc="left")
        panel.set_yticks(range(len(clients)), [content["short"][name] for name in clients])
        style_panel(panel, "x")
    figure.axes[0].invert_yaxis()
    figure.supxlabel(f"points of test score gained by {gains['reference']}", fontsize=9)
    return figure


def _map(
    figure: Any, lines: Sequence[str], columns: Sequence[str], values: Any, label: str, scale: Json | None = None
) -> None:
    """Draw a heat map; NaN is left blank. With a scale, the values are tones from -1 to 1."""
    from matplotlib.colors import LinearSegmentedColormap

    panel = figure.subplots()
    ends = [*HEAT_LIGHT] if scale is None else [BELOW_LIGHT, EVEN_LIGHT, HEAT_LIGHT[1]]
    least, most = (None, None) if scale is None else (-1 if scale["even"] else 0, 1)
    if scale is not None and not scale["even"]:
        ends = ends[1:]
    colours = LinearSegmentedColormap.from_list("fedamole", ends)
    drawn = panel.imshow(values, cmap=colours, aspect="auto", interpolation="nearest", vmin=least, vmax=most)
    every = -(-len(columns) // 40)
    long = max(map(len, columns)) > 3
    panel.set_xticks(range(0, len(columns), every), columns[::every], rotation=90 if long else 0, fontsize=7)
    panel.set_yticks(range(len(lines)), lines, fontsize=8)
    panel.tick_params(length=0)
    panel.set_xticks([index - 0.5 for index in range(1, len(columns))], minor=True)
    panel.set_yticks([index - 0.5 for index in range(1, len(lines))], minor=True)
    panel.grid(which="minor", color="white", linewidth=1)
    panel.tick_params(which="minor", length=0)
    panel.spines[:].set_color("0.85")
    bar = figure.colorbar(drawn, ax=panel, label=label if scale is None else scale["name"], pad=0.01)
    bar.outline.set_visible(False)
    if scale is not None:
        low = [(-1, f"≤ {scale['low']:.3f}")] if scale["even"] else []
        high = f"≥ {scale['high']:.3f}" if scale["high"] < 1 else f"{scale['high']:.3f}"
        ticks = [*low, (0, f"{scale['even']:.3f}\n{scale['meaning']}"), (1, high)]
        bar.set_ticks([position for position, _ in ticks], labels=[text for _, text in ticks], fontsize=7)


def _size(lines: int, columns: int) -> tuple[float, float]:
    return min(12.0, 0.24 * columns + 3), 0.2 * lines + 1.5


def _experts(content: Json, run: Json, module: int) -> Any:
    """Draw the assignment of one module's experts in the last round."""
    import numpy as np

    clients = content["clients"]
    values = np.full((len(clients), run["experts"]), np.nan)
    for client, flat in enumerate(run["held"][-1][module]):
        values[client, flat[::2]] = [tone(value / 10_000, run["scale"]) for value in flat[1::2]]
    figure = _figure(content, "experts", *_size(*values.shape))
    _map(figure, _short(content), [str(expert) for expert in range(run["experts"])], values, "", run["scale"])
    figure.supxlabel(f"expert in {run['modules'][module]}, round {run['rounds'][-1]}", fontsize=9)
    return figure


def _sizes(content: Json, run: Json) -> Any:
    """Draw the number of experts of each client in each module, in the last round."""
    import numpy as np

    values = np.array([[len(flat) / 2 for flat in by_client] for by_client in run["held"][-1]]).T
    figure = _figure(content, "sizes", *_size(len(content["clients"]), len(run["modules"])))
    _map(figure, _short(content), run["modules"], values, "experts")
    return figure


def _routing(content: Json, run: Json, module: int) -> Any:
    """Draw the shares of the tokens that are routed to each expert of one module."""
    import numpy as np

    shares = run["shares"][module]
    by_client = [shares.get(name, {}) for name in run["clients"]]
    values = np.array([[by_expert.get(expert, np.nan) for expert in run["experts"]] for by_expert in by_client])
    figure = _figure(content, "routing", *_size(*values.shape))
    _map(figure, [content["short"][name] for name in run["clients"]], run["experts"], values, "share of the tokens")
    figure.supxlabel(f"expert in {run['modules'][module]}", fontsize=9)
    return figure


def _data(content: Json) -> Any:
    """Draw a bar per client with a segment per split."""
    lines = content["data"]["lines"]
    figure = _figure(content, "data", 7, 0.24 * len(lines) + 1.2)
    panel = figure.subplots()
    start = [0.0] * len(lines)
    for index, split in enumerate(content["data"]["splits"]):
        counts = [by_split[index] for *_, by_split in lines]
        panel.barh(range(len(lines)), counts, left=start, color=LIGHT[(0, 3, 2, 4)[index]], label=split, height=0.7)
        start = [before + count for before, count in zip(start, counts, strict=True)]
    panel.set_yticks(range(len(lines)), [content["short"][name] for name, *_ in lines])
    panel.invert_yaxis()
    panel.set_xlabel("examples")
    style_panel(panel, "x")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def _costs(content: Json) -> Any:
    """Draw a panel per kind of cost with a bar per method."""
    columns, lines = content["costs"]["columns"], content["costs"]["lines"]
    figure = _figure(content, "costs", 2 * len(columns) + 1, 0.3 * len(lines) + 1)
    panels = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    for index, (panel, title) in enumerate(zip(panels, columns, strict=True)):
        values = [means[index] for _, means, _ in lines]
        bars = panel.barh(range(len(lines)), values, color=LIGHT[0], height=0.6)
        panel.bar_label(bars, [texts[index] for *_, texts in lines], padding=2, fontsize=7)
        panel.margins(x=0.25)
        panel.set_title(title, fontsize=7, loc="left")
        panel.set_yticks(range(len(lines)), [label for label, *_ in lines])
        style_panel(panel, "x")
    panels[0].invert_yaxis()
    return figure
