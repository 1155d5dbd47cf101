"""Wall time of a round of every method, against FedIT at the same number of optimiser steps.

Each method is a run of four rounds on the bundled base, with eight clients of 20 letters each, and FedIT runs right
before it: each repeat gives one ratio, and the table has the medians. The time is that of all rounds without
evaluation: training, forward passes that a method asks for, messages, aggregation and checkpoints. All rounds count,
because some methods do their extra work in the first or the last round only. Variants that score the same training
before the aggregation (`_ft`) are left out. Prompts at the server are the bundled public ones. `--quick` takes three
methods.

Columns: the time; the steps that clients took; the tokens of forward and backward passes (training) and of forward
passes only (teachers, probes, choosing a model), all relative to FedIT's, the last to FedIT's training tokens.

Target: at most 2 x FedIT's time, unless the method's paper trains or reads more, which the columns of tokens show.

    python benchmarks/methods.py [--quick] [--json FILE]
"""

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from growth import Point, config
from measure import arguments, report
from typing_extensions import override

from fedamole.config import load_config
from fedamole.experiment import start
from fedamole.federation.progress import ProgressListener
from fedamole.methods import METHODS
from fedamole.reporting.runs import read_run

POINT = Point(clients=8, experts=24, steps=20, rounds=4)
QUICK = {"local_only", "fedamole", "fedmap"}
QUICK_POINT = Point(clients=4, experts=12, steps=2, rounds=2)
WORK = ("steps", "backward_tokens", "forward_tokens")


@dataclass
class Clock(ProgressListener):
    """Adds up the seconds of the rounds."""

    seconds: float = 0.0
    started: float = field(default=0.0, init=False)

    @override
    def round_started(self, round_: int, rounds: int, cohort: Sequence[str]) -> None:
        self.started = time.perf_counter()

    @override
    def round_done(self, round_: int, validation: Mapping[str, float]) -> None:
        self.seconds += time.perf_counter() - self.started


def run(name: str, point: Point) -> dict[str, float]:
    """Run a method; return the seconds of its rounds and its work per client."""
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        path = Path(folder) / "run"
        start(load_config(config(point, Path(folder), {"name": name}), public_prompts(name)), path, clock)
        lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        evaluation = sum(line.get("seconds_evaluate", 0.0) for line in lines)
        work = read_run(path).work[name]
        return {"seconds": clock.seconds - evaluation} | {key: work.get(key, 0.0) for key in WORK}


def public_prompts(name: str) -> list[str]:
    """Return the override that gives a method's server its public prompts, if it needs them."""
    path = files("fedamole") / "bundled" / "task" / "public.jsonl"
    return [f"data.public.path={path}"] if METHODS[name].needs_public_prompts else []


def main() -> None:
    """Measure every method."""
    options = arguments(__doc__ or "")
    trained = {name for name in METHODS if not name.endswith("_ft")}
    names = sorted((QUICK if options.quick else trained) - {"fedit"})
    point, repeats = (QUICK_POINT, 1) if options.quick else (POINT, 3)
    run("fedit", point)  # the first run of a process is slower
    ratios: dict[str, float] = {}
    lines: list[list[object]] = []
    for name in names:
        times, work, opponent = [], dict[str, float](), dict[str, float]()
        for _ in range(repeats):
            opponent, work = run("fedit", point), run(name, point)
            times.append(work["seconds"] / opponent["seconds"])
        ratios[f"{name}_vs_fedit_at_{point.steps}_steps"] = statistics.median(times)
        tokens = [work[key] / opponent["backward_tokens"] for key in WORK[1:]]
        lines.append([name, statistics.median(times), work["steps"] / opponent["steps"], *tokens])
    lines.sort(key=lambda line: str(line[0]))
    head = ["method", "time", "steps", "training tokens", "forward tokens"]
    title = f"a run of {point.rounds} rounds of {point.steps} steps, relative to fedit"
    report(title, head, lines, ratios, options.json)


if __name__ == "__main__":
    main()
