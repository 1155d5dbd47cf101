"""Secure aggregation: what the masks of a client take, against the training of a round.

`masks`: a client encodes 6.5 million numbers (1,600 tensors, as FedAMoLE sends for a base of 1 B parameters) and adds
three mask streams, its own and two pair masks, against one round of `fedit` on the bundled task (eight clients, 20
steps each, one after the other on one core). `exchange`: all steps of the protocol between these eight clients for the
14,336 numbers of that round, with signatures, seeds and the opened sum.
The ratios are the time of ours over that of the round.

Targets: at most 0.1 of a round each.

    python benchmarks/secure.py [--quick] [--json FILE]
"""

import tempfile
import time
from importlib.resources import files
from pathlib import Path
from statistics import median

import numpy as np
import torch
from measure import arguments, report

from fedamole.config import load_config
from fedamole.experiment import start
from fedamole.federation.progress import ProgressListener
from fedamole.federation.secure.fixed_point import encode
from fedamole.federation.secure.masks import add, seed_of, stream
from fedamole.federation.secure.settings import SecureAggregationSettings
from fedamole.federation.secure.simulation import SimulatedSecureAggregation
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.runs.run_folder import METRICS, RunFolder

NUMBERS, TENSORS, STREAMS, CLIENTS = 6_500_000, 1_600, 3, 8
ROUND_NUMBERS, ROUND_TENSORS = 14_336, 16


def seconds_of_a_round() -> float:
    """Run one round of fedit on the bundled task; return the seconds of its update, without scoring."""
    config = load_config(
        Path(str(files("fedamole") / "bundled" / "fedit.toml")),
        ["federation.rounds=1", "run.threads=1", "run.device=cpu", "evaluation.max_new_tokens=1"],
    )
    with tempfile.TemporaryDirectory() as folder:
        start(config, Path(folder) / "run", ProgressListener())
        lines = RunFolder.open(Path(folder) / "run").lines(METRICS)
        return next(float(line["seconds_update"]) for line in lines if line["split"] == "round")


def seconds_of_masks(values: list[np.ndarray]) -> float:
    """Encode tensors and add three masks to each; return the seconds."""
    started = time.perf_counter()
    for index, numbers in enumerate(values):
        total = encode(numbers, 16.0).words
        for number in range(STREAMS):
            add(total, stream(seed_of(bytes([number] * 32), f"tensors:{index}"), len(total)), 1)
    return time.perf_counter() - started


def seconds_of_an_exchange(round_: int, aggregation: SimulatedSecureAggregation, replies: dict[str, object]) -> float:
    """Run all steps of the protocol between the clients; return the seconds."""
    started = time.perf_counter()
    aggregation(round_, replies, replies)
    return time.perf_counter() - started


def main() -> None:
    """Measure them, interleaved."""
    options = arguments(__doc__ or "")
    torch.set_num_threads(1)
    repeats = 1 if options.quick else 7
    generator = np.random.default_rng(0)
    values = [generator.normal(0, 0.01, NUMBERS // TENSORS) for _ in range(TENSORS)]
    names = [f"client-{index}" for index in range(CLIENTS)]
    shape = ROUND_NUMBERS // ROUND_TENSORS
    replies: dict[str, object] = {
        name: SharedTensors({f"{index}/shared/A": torch.zeros(shape) for index in range(ROUND_TENSORS)})
        for name in names
    }
    aggregation = SimulatedSecureAggregation(SecureAggregationSettings(enabled=True), ("tensors",), names)
    seconds: dict[str, list[float]] = {"round": [], "masks": [], "exchange": []}
    seconds_of_a_round()
    for repeat in range(repeats):
        seconds["round"].append(seconds_of_a_round())
        seconds["masks"].append(seconds_of_masks(values))
        seconds["exchange"].append(seconds_of_an_exchange(repeat, aggregation, replies))
    medians = {name: median(of_name) for name, of_name in seconds.items()}
    ratios = {
        "masks_of_a_client_vs_round_of_fedit_at_6500000": medians["masks"] / medians["round"],
        "exchange_of_8_clients_vs_round_of_fedit_at_14336": medians["exchange"] / medians["round"],
    }
    lines = [
        ["masks of a client", NUMBERS, medians["masks"], medians["round"], medians["masks"] / medians["round"]],
        ["exchange", ROUND_NUMBERS, medians["exchange"], medians["round"], medians["exchange"] / medians["round"]],
    ]
    head = ["what", "numbers", "seconds", "seconds of a round of fedit", "ours / round"]
    report(f"secure aggregation, {CLIENTS} clients, one core", head, lines, ratios, options.json)


if __name__ == "__main__":
    main()
