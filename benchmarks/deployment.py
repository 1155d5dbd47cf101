"""What a round costs across organisations, beyond a round in one process, and where the time goes.

Real processes on loopback, with TLS and keys: `fedamole server` and three times `fedamole client`, on the data of
examples/three_hospitals and the bundled base, against the same run in one process (a client at a time, one thread).
Runs alternate; figures are medians over rounds (the first is left out) and repeats. Seconds are this machine's, and all
four sides share it. The large adapters have as many bytes as FedAMoLE's for a base of a billion parameters.

A round of FedAMoLE is one exchange: a message down, training, an answer up. `down` is from the server's asking to the
worker's beginning, `up` from its answer on disk to the server's having it. FedIT has another one, of averages down and
scores up: `evaluation`. Memory is the proportional share (PSS) of a client's processes; beside it, that of one process
that trains alone.

Targets: a deployed round takes at most 5 s more than one in one process; a client has at most 400 MiB beyond base and
adapters.

    python benchmarks/deployment.py [--quick] [--json FILE]
"""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import tomli_w
from measure import arguments, report

EXAMPLE = Path(__file__).parents[1] / "examples" / "three_hospitals"
COLUMNS = {"genetics_clinic": {"instruction": "question", "response": "answer"}}
FEDAMOLE = Path(sys.executable).parent / "fedamole"
POLICY = "min_rows = 1\nmin_steps = 1\nmin_examples_per_update = 1\nmax_rank = 100000\nmin_scaling = 0.0\n"
"""What the clients consent to: few rows, and one step where only the way counts."""
IDLE = 15.0
"""Seconds over which waiting clients are watched."""


@dataclass(frozen=True)
class Case:
    """A size of messages and an amount of work."""

    method: str = "fedamole"
    rank: int = 8
    steps: int = 1
    rows: int = 20
    """Rows of each client; few, where only the way counts."""
    rounds: int = 6

    def tables(self) -> dict[str, Any]:
        """Return the example's config; the settings of its method are kept for this method only."""
        tables = tomllib.loads((EXAMPLE / "config.toml").read_text())
        if tables["method"]["name"] != self.method:
            tables["method"] = {"name": self.method}
        return tables

    def settings(self) -> list[str]:
        """Return what differs from the example's config."""
        return [
            f"method.rank={self.rank}",
            f"training.local_steps={self.steps}",
            f"federation.rounds={self.rounds}",
            "evaluation.max_new_tokens=4",
        ]


def until(true: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not (value := true()):
        if time.monotonic() > end:
            raise SystemExit(f"after {seconds:.0f} s still not: {what}")
        time.sleep(0.05)
    return value


def lines(path: Path) -> list[dict[str, Any]]:
    """Finished lines of a file of JSON lines; none where there is no such file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def rounds_of(run: Path) -> list[dict[str, float]]:
    """Seconds of each round but the first: its two halves, and the training alone."""
    result = lines(run / "metrics.jsonl")
    trained = [line for line in result if line["split"] == "train"]
    return [
        {
            "update": line["seconds_update"],
            "evaluate": line["seconds_evaluate"],
            "own": max(
                line_of_client["seconds"] for line_of_client in trained if line_of_client["round"] == line["round"]
            ),
            "bytes": max(
                line_of_client["bytes_down"] for line_of_client in trained if line_of_client["round"] == line["round"]
            ),
        }
        for line in result
        if line["split"] == "round" and line["round"] > 0
    ]


def in_process(case: Case, folder: Path) -> list[dict[str, float]]:
    """The run in one process; its rounds."""
    tables = case.tables()
    names = tables.pop("deployment")["clients"]
    tables["data"]["source"] = [
        {
            "name": name,
            "path": str(EXAMPLE / "data" / f"{name}.jsonl"),
            "limit": case.rows,
            "columns": COLUMNS.get(name, {}),
        }
        for name in names
    ]
    config = folder / "config.toml"
    config.write_text(tomli_w.dumps(tables))
    options = ["run", str(config), f"run.folder={folder / 'run'}", "run.group=1", *case.settings()]
    started = subprocess.Popen([FEDAMOLE, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    most = 0.0
    while started.poll() is None:
        most = max(most, memory([psutil.Process(started.pid)]))
        time.sleep(0.2)
    if started.returncode:
        raise SystemExit(f"{case} failed:\n{started.communicate()[1]}")
    rounds = rounds_of(folder / "run")
    return [{**measures, "round": measures["update"] + measures["evaluate"], "memory": most} for measures in rounds]


def memory(processes: Sequence[psutil.Process]) -> float:
    """MiB that processes take, shared pages shared out among those who use them."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 2**20


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that it has started and that lives."""
    return [
        member for member in (process, *process.children(recursive=True)) if member.status() != psutil.STATUS_ZOMBIE
    ]


@contextmanager
def deployed(case: Case, folder: Path) -> Iterator[tuple[Path, dict[str, Callable[[], psutil.Process]]]]:
    """A server that waits for clients, and what starts each of them; all are ended afterwards."""
    tables, config = case.tables(), folder / "config.toml"
    names = tables["deployment"]["clients"]
    config.write_text(tomli_w.dumps(tables))
    certs, started = folder / "certs", list[subprocess.Popen[bytes]]()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "policy.toml").write_text(POLICY)
    subprocess.run(
        [FEDAMOLE, "certs", "--folder", certs, *(f"--client={name}" for name in names)],
        check=True,
        stdout=subprocess.DEVNULL,
    )

    def start(*options: str) -> psutil.Process:
        with (folder / "log").open("ab") as log:
            started.append(subprocess.Popen([FEDAMOLE, *options], stdout=log, stderr=log, cwd=folder))
        return psutil.Process(started[-1].pid)

    def client(name: str) -> psutil.Process:
        columns = [f"--column={new}={old}" for new, old in COLUMNS.get(name, {}).items()]
        return start(
            "client",
            "--server",
            f"127.0.0.1:{port}",
            "--certs",
            str(certs / "clients" / name),
            "--name",
            name,
            "--data",
            str(EXAMPLE / "data" / f"{name}.jsonl"),
            f"--limit={case.rows}",
            "--threads=1",
            *columns,
            "--folder",
            str(folder / name),
            "--policy",
            str(folder / "policy.toml"),
        )

    run = folder / "run"
    try:
        start(
            "server",
            str(config),
            "--certs",
            str(certs),
            "--port",
            str(port),
            f"run.folder={run}",
            *case.settings(),
        )
        yield run, {name: partial(client, name) for name in names}
    finally:
        for process in started[::-1]:
            process.send_signal(signal.SIGINT)
        for process in started:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def across(case: Case, folder: Path) -> list[dict[str, float]]:
    """The run as a deployment; its rounds, and what a client takes of memory and, while it waits, of a processor."""
    with deployed(case, folder) as (run, clients):
        progress = run / "server" / "progress.jsonl"

        def events(what: str) -> list[dict[str, Any]]:
            return [line for line in lines(progress) if line["what"] == what]

        *early, late = clients.values()
        waiting = [start() for start in early]
        until(lambda: len(events("joined")) == len(early), 120, "clients have joined; see " + str(folder / "log"))
        time.sleep(2)
        before = _seconds(waiting[0])
        time.sleep(IDLE)
        idle = (_seconds(waiting[0]) - before) / IDLE
        late()
        answered: dict[tuple[int, str], float] = {}

        def done() -> bool:
            for name in clients:
                for path in (folder / name).glob(f"*/clients/{name}/answers/round-*.safetensors"):
                    answered.setdefault((int(path.stem[6:]), name), path.stat().st_mtime)
            return len(events("done")) == case.rounds

        most = {"parts": 0.0, "worker": 0.0}

        until(done, 600, "the rounds are done; see " + str(folder / "log"))
        parts = family(waiting[0])
        (worker,) = (measures for measures in parts if "warm_worker" in " ".join(measures.cmdline()))
        most = {"worker": memory([worker]), "parts": memory([measures for measures in parts if measures != worker])}
        ends = [line["time"] for line in events("done")]
        rounds = rounds_of(run)
        for number, measures in enumerate(rounds, 1):
            of = {kind: [line for line in events(kind) if line["round"] == number] for kind in ("asked", "answered")}
            (sent_at,) = (line["time"] for line in of["asked"])
            ways = [(answered[number, line["client"]], line["seconds"], line["time"]) for line in of["answered"]]
            measures["down"] = statistics.median(end - seconds - sent_at for end, seconds, _ in ways)
            measures["up"] = statistics.median(time_ - end for end, _, time_ in ways)
            measures["round"] = ends[number] - ends[number - 1]
            measures |= {"idle": idle, **most}
        return rounds


def _seconds(process: psutil.Process) -> float:
    """Processor seconds of a process and all that it has started."""
    return sum(sum(member.cpu_times()[:2]) for member in family(process))


def measure(case: Case, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Medians of both ways of running a case, which alternate."""
    rounds: tuple[list[dict[str, float]], ...] = ([], [])
    for _ in range(repeats):
        for way, result in zip((in_process, across), rounds, strict=True):
            with tempfile.TemporaryDirectory() as folder:
                result.extend(way(case, Path(folder)))
    in_process_median, there = (
        {key: statistics.median(measures[key] for measures in result) for key in result[0]} for result in rounds
    )
    return in_process_median, there


def main() -> None:
    """Measure every case."""
    options = arguments(__doc__ or "")
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    cases = {"small": Case(rounds=4 if options.quick else 8)}
    if not options.quick:
        cases |= {"small, fedit": Case("fedit"), "large": Case(rank=483)}
        cases |= {"the example's 20 steps": Case(steps=20, rows=63)}
    table: list[list[object]] = []
    ratios: dict[str, float] = {}
    for name, case in cases.items():
        local, there = measure(case, 1 if options.quick else 2)
        more = there["round"] - local["round"]
        rest = there["round"] - there["update"] - there["evaluate"]
        table.append(
            [
                name,
                f"{there['bytes'] / 2**20:.2f}",
                local["round"],
                there["round"],
                more,
                there["down"],
                there["own"],
                there["up"],
                there["evaluate"],
                rest,
            ]
        )
        key = name.replace(" ", "_").replace("'", "")
        ratios[f"overhead_vs_5_s_at_{key}"] = more / 5
        ratios[f"parts_of_a_client_vs_400_mib_at_{key}"] = there["parts"] / 400
        ratios[f"worker_memory_vs_one_process_at_{key}"] = there["worker"] / local["memory"]
        print(
            f"{name}: a client's processes take {there['parts']:.0f} MiB beside the worker, the worker "
            f"{there['worker']:.0f} MiB, one process that runs all three {local['memory']:.0f} MiB; "
            f"while it waits, a client takes {there['idle']:.1%} of a core",
            flush=True,
        )
    head = ["messages", "MiB", "in process", "deployed", "more", "down", "own work", "up", "evaluation", "rest"]
    report("seconds of a round with three clients", head, table, ratios, options.json)


if __name__ == "__main__":
    main()
