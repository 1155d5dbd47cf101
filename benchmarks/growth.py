"""How time, memory and traffic of a FedAMoLE round grow: in clients, experts, modules and length.

Every point is a whole run of two rounds in a process of its own (peak memory is the process's, PyTorch and
transformers included, which are most of it on a tiny base), on the bundled base and texts made from the bundled task.
One dimension grows at a time from the first line, which everything is relative to; `time` is of a client's update,
`memory` the peak, `traffic` what a client is sent. The last line is a paper-sized round (10 clients x 200 steps, batch
1): the share of its time that is neither training nor evaluation.

Targets: 200 clients within 1.5 x the memory of 10; everything but training and evaluation at most 3 % of a round.

    python benchmarks/growth.py [--quick] [--json FILE]
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path

import tomli_w
from measure import arguments, report

ROWS = 20
"""Examples of a client."""


@dataclass(frozen=True)
class Point:
    """One run."""

    clients: int = 10
    experts: int = 30
    choices: int = 2
    most: int = 8
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    length: int = 1
    """Contexts of the bundled task one behind the other, of some 40 tokens each."""
    steps: int = 4
    rounds: int = 2


def points(quick: bool) -> dict[str, Point]:
    """The runs by name; the first is what the others are relative to."""
    first = Point()
    results = {
        "10 clients": first,
        "40 clients": replace(first, clients=40, experts=120),
        "200 clients": replace(first, clients=200, experts=600),
        "120 experts, 4 choices": replace(first, experts=120, choices=4, most=64),
        "q k v o": replace(first, targets=("q_proj", "k_proj", "v_proj", "o_proj")),
        "all linears": replace(
            first, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        ),
        "2 x length": replace(first, length=2),
        "4 x length": replace(first, length=4),
    }
    chosen = ("10 clients", "40 clients") if quick else tuple(results)
    return {name: results[name] for name in chosen}


def config(point: Point, folder: Path, method: Mapping[str, object] | None = None) -> Path:
    """Write data and config of a point; `method` is its table of the config, FedAMoLE's unless given."""
    source = files("fedamole") / "bundled" / "task" / "hospital_north.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    with (folder / "data.jsonl").open("w") as out:
        for number in range(ROWS * point.clients):
            parts = [rows[(number + 7 * part) % len(rows)]["context"] for part in range(point.length)]
            row = {**rows[number % len(rows)], "context": f"Letter {number}. " + " ".join(parts)}
            out.write(json.dumps(row) + "\n")
    template = {
        "prompt": "{instruction}\n{context}\n",
        "answer": "{response}",
        "options": ["low", "medium", "high"],
    }
    partition = {"kind": "iid", "clients": point.clients}
    tables = {
        "run": {"threads": 1},
        "base": {"targets": list(point.targets)},
        "federation": {"rounds": point.rounds},
        "training": {"local_steps": point.steps, "learning_rate": 1e-3, "max_length": 480},
        "method": method
        or {
            "name": "fedamole",
            "experts": point.experts,
            "expert_choices": point.choices,
            "max_experts": point.most,
        },
        "data": {
            "templates": {"letter": template},
            "source": [{"name": "letters", "path": "data.jsonl", "template": "letter", "partition": partition}],
        },
    }
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


def work(path: Path) -> None:
    """Run a config in this process and print what it took."""
    import time

    from fedamole.config import load_config
    from fedamole.experiment import start
    from fedamole.federation.progress import ProgressListener

    class Clock(ProgressListener):
        started = finished = 0.0

        def round_started(self, round_: int, rounds: int, cohort: object) -> None:
            self.started = time.perf_counter()

        def round_done(self, round_: int, validation: object) -> None:
            self.finished = time.perf_counter()

    clock = Clock()
    folder = path.parent / "run"
    summary = start(load_config(path), folder, clock)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = max(line["round"] for line in lines if line["split"] == "round")
    trained = [line for line in lines if line["split"] == "train" and line["round"] == last]
    (evaluated,) = [line["seconds_evaluate"] for line in lines if line["split"] == "round" and line["round"] == last]
    training, wall = sum(line["seconds_training"] for line in trained), clock.finished - clock.started
    print(
        json.dumps(
            {
                "time": (wall - evaluated) / len(trained),
                "memory": summary["peak_memory_mib"],
                "traffic": summary["bytes_down_per_client_round"],
                "machinery": 1 - (training + evaluated) / wall,
            }
        )
    )


def measure(point: Point) -> dict[str, float]:
    """Run a point in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = config(point, Path(folder))
        command = [sys.executable, __file__, "--work", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{asdict(point)} failed:\n{done.stderr}")
        result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return result


def main() -> None:
    """Measure every point."""
    options = arguments(__doc__ or "", work="config of a point, for the script's own processes")
    if options.work:
        work(Path(options.work))
        return
    chosen, repeats = points(options.quick), 1 if options.quick else 3
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for _ in range(repeats):
        for name, point in chosen.items():
            runs[name].append(measure(point))
    middle = {
        name: {key: statistics.median(run[key] for run in result) for key in result[0]} for name, result in runs.items()
    }
    first = middle[next(iter(middle))]
    lines: list[list[object]] = []
    ratios: dict[str, float] = {}
    for name, result in middle.items():
        relative = {key: result[key] / first[key] for key in ("time", "memory", "traffic")}
        lines.append([name, *relative.values(), f"{result['machinery']:.1%}"])
        for key, value in relative.items():
            ratios[f"{key}_vs_10_clients_at_{name.replace(' ', '_').replace(',', '')}"] = value
    steps = 20 if options.quick else 200
    paper = measure(Point(steps=steps, rounds=1))
    lines.append([f"10 clients, {steps} steps", "", "", "", f"{paper['machinery']:.1%}"])
    ratios[f"machinery_vs_round_at_{steps}_steps"] = paper["machinery"]
    head = ["run", "time per client", "peak memory", "bytes to a client", "machinery"]
    report("growth of a FedAMoLE round, relative to the first line", head, lines, ratios, options.json)


if __name__ == "__main__":
    main()
