"""summary.json: the headline numbers of a finished run, computed from its folder."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from fedamole.evaluation.summary import over_clients
from fedamole.files import write_atomic
from fedamole.runs.run_folder import METRICS, SUMMARY, RunFolder

FORMAT = 1


def summarise(
    folder: RunFolder, results: Mapping[str, Mapping[str, Any]], rounds: int, stopped: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Write summary.json from the test scores, and return its content.

    `results` has an entry for every row of the summary: the variants of the run, the untuned base and the majority
    answer. An entry holds the best round (one for all, or one by client), and the scores by client at the `best` round
    and at the `last` one. A row without scores is left out, such as that of the majority answer in a deployment whose
    clients do not share it. `rounds` is the number of rounds that the run took, `stopped` the value of
    `FederationSettings.stopped`.
    """
    rows = {}
    for row, result in results.items():
        if not result["best"]:
            continue
        headline = {client: scores["score"] for client, scores in result["best"].items()}
        last = {client: scores["score"] for client, scores in result["last"].items()}
        rows[row] = {
            "best_round": result["best_round"],
            **asdict(over_clients(headline)),
            "last_mean": over_clients(last).mean,
            "clients": result["best"],
        }
    summary = {"format": FORMAT, "method": folder.about["method"], "rounds": rounds}
    summary |= {} if stopped is None else {"stopped": dict(stopped)}
    summary |= {"rows": rows, **costs(folder)}
    summary |= {"epsilon": epsilon} if (epsilon := spent_epsilon(folder.lines(METRICS))) else {}
    write_atomic(folder.path / SUMMARY, json.dumps(summary, indent=1) + "\n")
    return summary


def stopped_early(summary: Mapping[str, Any]) -> str:
    """Return why a run stopped before its configured number of rounds; empty if it did not."""
    if (stopped := summary.get("stopped")) is None:
        return ""
    patience = stopped["patience"]
    reason = f"no improvement for {patience} round{'s'[: patience != 1]}" if patience else "a callback ended it"
    return f"stopped after {summary['rounds']} of {stopped['rounds']} rounds: {reason}"


def nothing_trained(summary: Mapping[str, Any]) -> bool:
    """Return whether every update of a finished run failed, so that its models are those before training."""
    updates: int = summary.get("updates", 0)  # 0 in folders of earlier versions, and if there was nothing to train
    return updates > 0 and summary.get("left_out", 0) == updates


def updates_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Count the updates in the lines of a metrics.jsonl, and those of them that failed."""
    failed = ["failed" in line for line in lines if line["split"] == "train"]
    return {"updates": len(failed), "left_out": sum(failed)}


def spent_epsilon(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return epsilon that each client has spent by the lines of a metrics.jsonl; empty without `[privacy]`."""
    spent: dict[str, float] = {}
    for line in lines:
        if line["split"] == "train" and "epsilon" in line:
            spent[line["client"]] = max(spent.get(line["client"], 0.0), line["epsilon"])
    return dict(sorted(spent.items()))


def costs(folder: RunFolder) -> dict[str, Any]:
    """Return traffic per client and round, seconds, peak memory, group size and numbers of updates of a run.

    Traffic is in bytes, summed over the exchanges of a round, and averaged over the rounds of all clients that took
    part.
    """
    trained = [line for line in folder.lines(METRICS) if line["split"] == "train"]
    rounds = [line for line in folder.lines(METRICS) if line["split"] == "round"]
    client_rounds = max(1, len({(line["round"], line["client"]) for line in trained}))
    return {
        "bytes_down_per_client_round": sum(line["bytes_down"] for line in trained) / client_rounds,
        "bytes_up_per_client_round": sum(line["bytes_up"] for line in trained) / client_rounds,
        "seconds_update": sum(line["seconds_update"] for line in rounds),
        "seconds_evaluate": sum(line["seconds_evaluate"] for line in rounds),
        "peak_memory_mib": max((line.get("peak_memory_mib", 0.0) for line in trained), default=0.0),
        "group": max((line.get("group", 0) for line in trained), default=0),
        **updates_of(trained),
        "clipped": sum("clipped" in line for line in trained),
    }
