"""Folders of finished runs with validation and test results that a test writes down."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedamole.reporting.results import TrialResult

Losses = Sequence[dict[str, float]]
"""Validation losses by client, one entry per round; an absent client was not scored in the round."""
STEPS = {"a": 3, "b": 5}
TOKENS = {"a": 100, "b": 300}


def made_run(
    folder: Path,
    method: str,
    rounds: Mapping[str, Losses],
    scores: dict[str, dict[str, float]],
    *,
    seed: int = 0,
    weights: str = "w",
    select: str = "loss",
    best: Any = None,
    sent: int = 1000,
    counted: bool = True,
    failed: bool = False,
) -> TrialResult:
    """Write a run of the clients a and b, which take 3 and 5 steps with 100 and 300 tokens in a round.

    Args:
        folder: The new folder.
        method: Its method and name.
        rounds: Validation losses by variant; validation scores are 100 - loss.
        scores: Test scores by variant and client; test losses are score / 100.
        seed: Seed of the run.
        weights: Hash of the base.
        select: What chooses the best round.
        best: Best round, or rounds by client; default: that with the lowest mean.
        sent: Bytes to and from each client in a round, each.
        counted: Whether the run counted its tokens.
        failed: Whether every update failed.
    """
    folder.mkdir(parents=True)
    first = next(iter(rounds.values()))
    lines: list[dict[str, Any]] = [validation(-1, "base", client, 4.0) for client in STEPS]
    for number in range(len(first)):
        for client in first[number]:
            line = {"round": number, "client": client, "split": "train", "steps": STEPS[client], "bytes_down": sent}
            tokens = {"backward_tokens": TOKENS[client], "forward_tokens": 10} if counted else {}
            lines.append(line | {"bytes_up": sent} | tokens | ({"failed": "no"} if failed else {}))
        for variant, losses in rounds.items():
            lines += [validation(number, variant, client, loss) for client, loss in losses[number].items()]
        lines.append({"round": number, "split": "round", "seconds_update": 1.0, "seconds_evaluate": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = {"weights": weights, "tokenizer": "t", "targets": "x"}
    about = {"format": 1, "fedamole": "0", "id": f"{method}-{seed}", "method": method, "base": base}
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "manifest.json").write_text(json.dumps({"clients": sorted(STEPS)}))
    (folder / "config.toml").write_text(
        f'[run]\nname = "{method}"\nseed = {seed}\n[method]\nname = "{method}"\n[base]\nmodel = "bundled"\n'
        f'quantization = "none"\n[federation]\nrounds = {len(first)}\ncohort = 1.0\n[training]\nlocal_epochs = 0\n'
        "local_steps = 3\nbatch_size = 1\naccumulation = 1\nlearning_rate = 0.01\nlr_decay = 1.0\nmax_length = 64\n"
        f'[evaluation]\nselect = "{select}"\ngeneration_score = "rouge_l"\n'
    )
    rows = {"base": row(None, {"a": 5.0, "b": 5.0}), "majority": row(None, {"a": 6.0, "b": 6.0})}
    for variant, losses in rounds.items():
        means = [sum(of_round.values()) / len(of_round) for of_round in losses]
        rows[variant] = row(means.index(min(means)) if best is None else best, scores[variant])
    summary = {
        "format": 1,
        "method": method,
        "rounds": len(first),
        "rows": rows,
        "seconds_update": 7.0,
        "seconds_evaluate": 3.0,
        "bytes_down_per_client_round": sent,
        "bytes_up_per_client_round": sent,
        "peak_memory_mib": 100.0 + seed,
        "updates": 2,
        "left_out": 2 if failed else 0,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return TrialResult("s", method, method, seed, folder)


def validation(round_: int, method: str, client: str, loss: float) -> dict[str, Any]:
    line = {"round": round_, "client": client, "split": "validation", "method": method}
    return line | {"loss": loss, "score": 100.0 - loss}


def row(best: Any, scores: dict[str, float]) -> dict[str, Any]:
    values = [*scores.values()]
    mean = sum(values) / len(values)
    clients = {name: {"score": score, "loss": score / 100} for name, score in scores.items()}
    return {
        "best_round": best,
        "mean": mean,
        "worst": min(values),
        "spread": (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5,
        "last_mean": mean,
        "clients": clients,
    }
