"""The texts and tables of a report as HTML, for a browser without JavaScript. The figures need the script."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

Json = Mapping[str, Any]
NOTE = (
    "This browser does not run JavaScript, so the page shows its tables and no figures. "
    "<code>fedamole report RUN --figures FOLDER</code> writes the figures as image files."
)


def tables_as_html(content: Json) -> str:
    """Return title, verdict, states and every table that the content has data for; all texts are escaped."""
    return "\n".join(_parts(content))


def _parts(content: Json) -> Iterator[str]:
    yield f"<h1>{escape(content['title'])}</h1>"
    if content.get("verdict"):
        yield f'<p class="verdict">{escape(content["verdict"])}</p>'
    for mark, text in content["states"]:
        yield f'<p class="state"><strong>{escape(mark)}</strong>: {escape(text)}</p>'
    yield f'<p class="soft">{NOTE}</p>'
    for key, table in (
        ("about", _about),
        ("learning", _learning),
        ("test", _test),
        ("gain", _gain),
        ("data", _data),
        ("labels", _labels),
        ("costs", _costs),
        ("failed", _failed),
    ):
        if content.get(key):
            title, _ = content["titles"][key]
            yield f"<section><h2>{escape(title)}</h2>{table(content)}</section>"


def _table(head: Sequence[str], body: Sequence[Sequence[str]], kind: str = "", caption: str = "") -> str:
    def cell(text: str, index: int) -> str:
        return f'<th scope="row">{escape(text)}</th>' if index == 0 else f"<td>{escape(text)}</td>"

    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    rows = "".join(f"<tr>{''.join(cell(text, index) for index, text in enumerate(row))}</tr>" for row in body)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    name = f' class="{kind}"' if kind else ""
    return f'<div class="wide"><table{name}>{title}<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _about(content: Json) -> str:
    """Return the settings; a value that all methods share is shown once."""
    lines = [
        [name, *(values if len(set(values)) > 1 else [*values[:1], *["〃"] * (len(values) - 1)])]
        for name, values in content["about"]["lines"]
    ]
    return _table(["", *content["about"]["head"]], lines, kind="words")


def _learning(content: Json) -> str:
    """Return the validation values of each method, a mean over the clients, after the first, middle and last round."""
    learning = content["learning"]
    measure, last = learning["measures"][0], learning["rounds"] - 1
    rounds = sorted({0, last // 2, last})
    body = []
    for line in learning["lines"]:
        values = line["values"][measure][""]
        shown = [values[number] if number < len(values) else None for number in rounds]
        label = f"{content['models'][line['model']]}, seed {line['seed']}"
        body.append([label, *("–" if value is None else f"{value:.3f}" for value in shown)])
    caption = f"Validation {measure}, mean of all clients"
    return _table(["method", *(f"round {number}" for number in rounds)], body, caption=caption)


def _test(content: Json) -> str:
    test = content["test"]
    return f'<p class="soft">{escape(test["caption"])}</p>{_table(test["head"], test["body"])}'


def _gain(content: Json) -> str:
    """Return the gains of the last model, which the page shows first."""
    gains = content["gain"][-1]
    columns = gains["columns"]
    body = [
        [name, *(f"{column['clients'][name]:+.1f}" if name in column["clients"] else "–" for column in columns)]
        for name in content["test"]["clients"]
    ]
    body.append(["mean", *(f"{column['mean']:+.1f}" for column in columns)])
    intervals = ["–" if one["low"] is None else f"{one['low']:+.1f} to {one['high']:+.1f}" for one in columns]
    body.append(["95 % interval of the mean", *intervals])
    caption = f"Test score of {gains['reference']} minus that of the method of the column"
    return _table(["client", *(column["other"] for column in columns)], body, caption=caption)


def _data(content: Json) -> str:
    sources = content["data"]["sources"]
    lines = [[name, *[source] * sources, *map(str, counts)] for name, source, counts in content["data"]["lines"]]
    return _table(["client", *["source"] * sources, *content["data"]["splits"]], lines)


def _labels(content: Json) -> str:
    return _table(
        ["client", *content["labels"]["labels"]],
        [[name, *map(str, counts)] for name, counts in content["labels"]["lines"]],
    )


def _costs(content: Json) -> str:
    lines = [[label, *texts] for label, _, texts in content["costs"]["lines"]]
    return _table(["method", *content["costs"]["columns"]], lines, kind="costs")


def _failed(content: Json) -> str:
    lines = [[str(cell) for cell in line] for line in content["failed"]]
    return _table(["run", "round", "client", "reason"], lines, kind="words")
