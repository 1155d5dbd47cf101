"""What a tracker receives: the hyper-parameters of a run, and its series by step."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedamole.config import Config
from fedamole.model.base import is_path

Json = Mapping[str, Any]
Values = dict[str, float]

SECTIONS = ("method", "federation", "training", "evaluation", "secure_aggregation", "privacy")
"""Tables of the config whose values are hyper-parameters; the others name files and devices of this machine."""
INDICES = ("round", "exchange")
"""Numbers of a line of metrics.jsonl that are part of the step or of a series' name."""


def hyper_parameters(config: Config) -> dict[str, bool | int | float | str]:
    """Return the hyper-parameters of a run by `table.key`; no path of this machine is among them.

    Lists and tables are JSON texts. Of a base in a folder only the folder's name is given.
    """
    tables = config.tables()
    values = {f"{name}.{key}": value for name in SECTIONS for key, value in tables.get(name, {}).items()}
    values |= {f"run.{key}": tables["run"][key] for key in ("name", "seed")}
    values |= {f"base.{key}": tables["base"][key] for key in ("model", "dtype", "quantization", "targets")}
    values["data.partition_seed"] = tables["data"]["partition_seed"]
    values["data.sources"] = len(tables["data"]["source"])
    for key in ("base.model", "method.server_base"):
        if isinstance(model := values.get(key), str) and is_path(model):
            values[key] = Path(model).name
    return {
        key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for key, value in values.items()
    }


def round_series(lines: Iterable[Json]) -> dict[int, Values]:
    """Return the series values of some lines of metrics.jsonl, by step.

    The step is the number of rounds that were trained: 0 for the untuned base before the first round, 1 after it. Test
    lines are left out (`score_series`). Every number of a line of a client becomes the series
    `SPLIT/.../clients/NAME/FIELD`, and its mean over the clients of that step `SPLIT/.../mean/FIELD`.
    """
    steps: dict[int, Values] = defaultdict(dict)
    by_client: dict[tuple[int, str, str], list[float]] = defaultdict(list)
    failed: dict[int, int] = {}
    for line in lines:
        step, split = line["round"] + 1, line["split"]
        if split == "test":
            continue
        prefix = _prefix(line)
        if "client" not in line:
            steps[step] |= {f"{prefix}/{name}": value for name, value in _numbers(line)}
            continue
        if split == "train":
            failed[step] = failed.get(step, 0) + ("failed" in line)
        for name, value in _numbers(line):
            steps[step][f"{prefix}/clients/{line['client']}/{name}"] = value
            by_client[step, prefix, name].append(value)
    for (step, prefix, name), values in by_client.items():
        steps[step][f"{prefix}/mean/{name}"] = math.fsum(values) / len(values)
    for step, count in failed.items():
        steps[step]["train/failed"] = count
    return dict(steps)


def score_series(summary: Json) -> Values:
    """Return the test scores of a finished run, by the names that `round_series` would give them."""
    values: Values = {}
    for variant, row in summary["rows"].items():
        values |= {f"test/{variant}/{name}/score": row[name] for name in ("mean", "worst")}
        for client, scores in row["clients"].items():
            values |= {f"test/{variant}/clients/{client}/{name}": value for name, value in scores.items()}
    return values


def _prefix(line: Json) -> str:
    exchange = (f"exchange-{line['exchange']}",) if "exchange" in line else ()
    return "/".join((line["split"], *((line["method"],) if "method" in line else ()), *exchange))


def _numbers(line: Json) -> Iterable[tuple[str, float]]:
    for name, value in line.items():
        if name not in INDICES and isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value
