"""summary.json: the headline numbers of a finished run, computed from its folder."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from fedamole.evaluation.summary import over_clients
from fedamole.files import write_atomic
from fedamole.runs.run_folder import METRICS, SUMMARY, RunFolder

FORMAT = 1


def summarise(folder: RunFolder, results: Mapping[str, Mapping[str, Any]], rounds: int) -> dict[str, Any]:
    """Write summary.json from the test scores by row, and return its content.

    `results` maps a row to its best round (one for all, or by client), and to the scores of every client at the `best`
    round (by validation) and at the `last` one. A row without scores, as the constant answer's where clients keep it
    to themselves, is left out.
    """
    rows = {}
    for row, found in results.items():
        if not found["best"]:
            continue
        headline = {client: scores["score"] for client, scores in found["best"].items()}
        last = {client: scores["score"] for client, scores in found["last"].items()}
        rows[row] = {
            "best_round": found["best_round"],
            **asdict(over_clients(headline)),
            "last_mean": over_clients(last).mean,
            "clients": found["best"],
        }
    summary = {"format": FORMAT, "method": folder.about["method"], "rounds": rounds, "rows": rows, **costs(folder)}
    write_atomic(folder.path / SUMMARY, json.dumps(summary, indent=1) + "\n")
    return summary


def nothing_trained(summary: Mapping[str, Any]) -> bool:
    """Whether every update of a finished run failed, so that its models are as they were before training."""
    updates: int = summary.get("updates", 0)  # 0 in folders of earlier versions, and where nothing was to be trained
    return updates > 0 and summary.get("left_out", 0) == updates


def updates_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many updates the lines of a metrics.jsonl tell of, and how many of them failed."""
    failed = ["failed" in line for line in lines if line["split"] == "train"]
    return {"updates": len(failed), "left_out": sum(failed)}


def costs(folder: RunFolder) -> dict[str, Any]:
    """Bytes per round and client each way, seconds, memory, clients at once, failed updates; from metrics.jsonl."""
    trained = [line for line in folder.lines(METRICS) if line["split"] == "train"]
    rounds = [line for line in folder.lines(METRICS) if line["split"] == "round"]
    return {
        "bytes_down_per_client_round": sum(line["bytes_down"] for line in trained) / max(1, len(trained)),
        "bytes_up_per_client_round": sum(line["bytes_up"] for line in trained) / max(1, len(trained)),
        "seconds_update": sum(line["seconds_update"] for line in rounds),
        "seconds_evaluate": sum(line["seconds_evaluate"] for line in rounds),
        "peak_memory_mib": max((line.get("peak_memory_mib", 0.0) for line in trained), default=0.0),
        "group": max((line.get("group", 0) for line in trained), default=0),
        **updates_of(trained),
        "clipped": sum("clipped" in line for line in trained),
    }
