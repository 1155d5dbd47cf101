"""What FedAMoLE's assignment and routing came to in finished runs: `python scripts/look_inside.py RUN...`

For each run, means over its modules (and clients):

    P            relevance of the pairs chosen for the last round; 1 / clients is indifference
    kept         share of a client's experts that it keeps from one round to the next
    experts      fewest and most experts that a client holds in a module
    balance      n sum f_i P_i of the router on the clients' validation split, under their models: 1 where tokens
                 spread evenly over the n experts held, n where one expert takes all
    n            experts held, mean: what `balance` could be at most
"""

import json
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch

from fedamole.config import load_config
from fedamole.data.manifest import read_manifest
from fedamole.experiment import prepare
from fedamole.model.bank import Bank
from fedamole.model.batch import batches
from fedamole.model.forward_context import ForwardContext
from fedamole.model.params import expert_ids
from fedamole.model.pretrained import load_adapter
from fedamole.runs.run_folder import CONFIG, MANIFEST


def assignment(run: Path) -> tuple[float, float, int, int]:
    """P of the last round's pairs, share kept between rounds, fewest and most experts of a client in a module."""
    held: dict[int, dict[tuple[str, str], set[int]]] = defaultdict(dict)
    relevance: dict[int, list[float]] = defaultdict(list)
    for line in map(json.loads, (run / "assignment.jsonl").open()):
        held[line["round"]][line["module"], line["client"]] = set(line["experts"])
        relevance[line["round"]] += line["relevance"]
    kept = [
        len(before & held[later][module]) / len(before)
        for earlier, later in pairwise(sorted(held))
        for module, before in held[earlier].items()
    ]
    sizes = [len(experts) for experts in held[max(held)].values()]
    return fmean(relevance[max(held)]), fmean(kept), min(sizes), max(sizes)


def routing(run: Path) -> tuple[float, float]:
    """Mean balance loss and mean number of experts held, over clients and modules."""
    prepared = prepare(load_config(run / CONFIG), read_manifest(run / MANIFEST))
    bank, values, counts = Bank(prepared.base), [], []
    for name, data in prepared.clients.items():
        adapter = load_adapter(run / "clients" / name / "adapter", prepared.base.identity)
        bank.load([adapter])
        counts += [len(ids) for ids in expert_ids(adapter.tensors).values()]
        with torch.no_grad():
            for batch in batches([data.validation.pairs()], prepared.base.pad_id, bank.packs, 4096):
                balance: list[torch.Tensor] = []
                with bank.forward(batch, ForwardContext(balance_losses=balance)):
                    values += [float(value) for value in balance]
    return fmean(values), fmean(counts)


def main() -> None:
    """Print a line for each run."""
    print(f"{'run':40} {'P':>7} {'kept':>6} {'experts':>8} {'balance':>8} {'n':>5}")
    for run in map(Path, sys.argv[1:]):
        p, kept, fewest, most = assignment(run)
        balance, n = routing(run)
        print(f"{run!s:40} {p:7.4f} {kept:6.1%} {f'{fewest}-{most}':>8} {balance:8.2f} {n:5.1f}")


if __name__ == "__main__":
    main()
