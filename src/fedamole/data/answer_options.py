"""The answer options of a source: listed by its template, or found in the rows."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import tomli_w

from fedamole.data.filling import text_of
from fedamole.data.layouts import shortened
from fedamole.data.templates import TemplateSettings, columns_of
from fedamole.errors import DataError

log = logging.getLogger(__name__)


def options_of(template: TemplateSettings, rows: Iterable[Mapping[str, Any]], where: str) -> tuple[str, ...]:
    """Return the answer options of a source, which all its clients share; empty for free text.

    `rows` are all rows of the source, train and test. Values that differ only in leading or trailing white space are
    one option, without it; a warning counts such rows. Raises DataError if `options_from` finds fewer than two values.
    """
    rows = list(rows)
    options = template.options
    if not options and template.options_from is None:
        options = tuple(dict.fromkeys(text for text in template.labels.values() if text))
    if not options and (column := template.options_from) is not None:
        spellings: dict[str, set[str]] = {}
        for text in {text_of(row[column], column, where) for row in rows if row[column] is not None}:
            spellings.setdefault(text.strip(), set()).add(text)
        spellings.pop("", None)
        options = tuple(sorted(label if len(texts) > 1 else texts.pop() for label, texts in spellings.items()))
        if len(options) < 2:
            raise _too_few_options(template, column, options, where)
    _warn_of_white_space(template, template.labels or options, rows, where)
    return options


def _warn_of_white_space(
    template: TemplateSettings, known: Collection[str], rows: Iterable[Mapping[str, Any]], where: str
) -> None:
    """Log the number of labels that are known only without white space around them; `render` strips it."""
    columns = columns_of(template.answer, "answer")
    if not known or len(columns) > 1:
        return
    labels = [row[columns[0]] for row in rows if isinstance(row.get(columns[0]), str)]
    padded = [label for label in labels if label not in known and label.strip() in known]
    if padded:
        log.warning(
            "%s: %d of %d labels have white space around them, which is removed; for example %s",
            where,
            len(padded),
            len(labels),
            shortened(padded[0]),
        )


def _too_few_options(template: TemplateSettings, column: str, values: Sequence[str], where: str) -> DataError:
    """Return the error for a file with fewer than two labels. It shows a template that lists all answers."""
    keys = {"prompt": template.prompt, "prompt_without_context": template.prompt_without_context}
    keys |= {"context": template.context, "answer": template.answer, "system": template.system}
    keys["category"] = template.category
    table = "".join(f"{key} = {_as_toml(text)}, " for key, text in keys.items() if text is not None)
    table += "chat = true, " if template.chat else ""
    options = "".join(f"{_as_toml(text[:200])}, " for text in values)
    return DataError(
        f"{where}: column {column!r} has only the values {[text[:200] for text in values]}; at least two are "
        "required. If other clients have other answers, list all answers of the task in the config (in a deployment, "
        f"the coordinator's): under [data.templates], task = {{ {table}options = [{options}...] }}. Then use it: "
        'template = "task" in each [[data.source]] of the task, or --template task for a client\'s own file'
    )


def _as_toml(text: str) -> str:
    return tomli_w.dumps({"text": text}).removeprefix("text = ").strip()
