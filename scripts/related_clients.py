"""Compare ways to find out which clients of a federation have similar data: how many find a true relative?

    python scripts/related_clients.py CONFIG [--seeds N] [setting=value ...]

Clients of one data source count as related. Each line of the table is one way to describe a client by a vector, or one
way to compare two clients. "nearest" is the share of clients whose most similar client is related, and "gap" the
difference between the lowest similarity of a related pair and the highest of an unrelated pair (above 0: one threshold
separates them). "sent" says what a client has to send. Similarities are cosines after the mean over the clients is
subtracted; those of adapters are means over the adapted modules.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedamole.config import load_config
from fedamole.evaluation.likelihood import mean_losses
from fedamole.experiment import Prepared, prepare, resolved
from fedamole.federation.local import LocalTask, fit
from fedamole.federation.method import TrainingRequest, TrainingResult
from fedamole.federation.randomness import torch_generator
from fedamole.methods.local_only import LocalOnly
from fedamole.methods.shared.similarity import cosine_similarities
from fedamole.model.bank import Bank
from fedamole.model.batch import TokenPair, batches, token_losses
from fedamole.model.params import Adapter, new_shared

TOKENS = 2048
Vectors = Mapping[str, Tensor]
"""Vectors (C, d) by part: a layer of the base, or an adapted module."""


def similarity(parts: Vectors) -> Tensor:
    """Return the mean over parts of the cosines between centred vectors, (C, C)."""
    centred = [vectors.double() - vectors.double().mean(0) for vectors in parts.values()]
    clients = [*zip(*centred, strict=True)]
    return cosine_similarities(clients, clients)


def hidden_means(bank: Bank, clients: Sequence[Sequence[TokenPair]]) -> tuple[Vectors, Vectors]:
    """Return mean hidden states per layer of the base, over the prompts' last tokens and over all prompt tokens."""
    model = bank.base.model
    last: dict[str, list[Tensor]] = {}
    every: dict[str, list[Tensor]] = {}
    bank.load([])
    for rows in clients:
        ends: dict[str, list[Tensor]] = {}
        sums: dict[str, Tensor] = {}
        count = 0
        for prompt, _ in rows:
            with torch.no_grad():
                states = model.model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False).hidden_states
            for index, state in enumerate(states):
                layer = f"{index:02d}"
                ends.setdefault(layer, []).append(state[0, -1].float())
                sums[layer] = sums.get(layer, torch.zeros(())) + state[0].float().sum(0)
            count += len(prompt)
        for layer, vectors in ends.items():
            last.setdefault(layer, []).append(torch.stack(vectors).mean(0))
            every.setdefault(layer, []).append(sums[layer] / count)
    return ({layer: torch.stack(v) for layer, v in last.items()}, {layer: torch.stack(v) for layer, v in every.items()})


def first_gradients(bank: Bank, adapter: Adapter, clients: Sequence[Sequence[TokenPair]]) -> Vectors:
    """Return the gradient of the mean loss over all examples at the initial LoRA, of the B of each module."""
    gradients: dict[str, list[Tensor]] = {}
    for rows in clients:
        bank.load([adapter])
        parameters = bank.trainable()
        bank.store.gradients.zero_()
        answers = sum(len(answer) for _, answer in rows)
        for batch in batches([rows], bank.base.pad_id, bank.packs, TOKENS):
            with bank.forward(batch) as logits:
                bank.backward(token_losses(logits, batch.labels).sum() / answers)
        bank.store.weights[0].copy_(parameters[0].grad if parameters[0].grad is not None else bank.store.gradients[0])
        for name, tensor in bank.adapter().tensors.items():
            if name.endswith("/B"):
                gradients.setdefault(name, []).append(tensor.flatten())
    return {name: torch.stack(vectors) for name, vectors in gradients.items()}


def train(bank: Bank, prepared: Prepared, adapter: Adapter, seed: int) -> list[TrainingResult]:
    """Train every client for one round from the same LoRA."""
    settings = prepared.config.training
    tasks = [
        LocalTask(name, TrainingRequest(adapter), data.train.pairs(), settings.learning_rate)
        for name, data in prepared.clients.items()
    ]
    results = fit(bank, tasks, settings, seed=seed, round_=0)
    return [result for result in results if isinstance(result, TrainingResult)]


def cross_losses(bank: Bank, trained: Sequence[TrainingResult], clients: Sequence[Sequence[TokenPair]]) -> Tensor:
    """Return minus the mean of the losses of each client's adapter on the other's examples, (C, C)."""
    losses = torch.zeros(len(clients), len(clients), dtype=torch.float64)
    for i, result in enumerate(trained):
        for j, rows in enumerate(clients):
            bank.load([result.adapter])
            losses[i, j] = mean_losses(bank, [rows], TOKENS)[0]
    relative = losses - losses.diagonal()  # on each client's examples, against its own adapter
    return -(relative + relative.T) / 2


def quality(similarities: Tensor, owners: Sequence[str]) -> tuple[float, float]:
    """Return the share of clients whose nearest client is related, and the gap between related and other pairs.

    Each is NaN where it does not exist: without related pairs, and the gap also if all clients are related.
    """
    values = similarities.clone().double()
    values.fill_diagonal_(-torch.inf)
    related = torch.tensor([[a == b for b in owners] for a in owners])
    has_relative = [i for i, owner in enumerate(owners) if owners.count(owner) > 1]
    actual = [owners[int(values[i].argmax())] == owners[i] for i in has_relative]
    others = ~torch.eye(len(owners), dtype=torch.bool)
    gap = (
        float(values[related & others].min() - values[~related].max())
        if has_relative and not related.all()
        else float("nan")
    )
    return (100 * fmean(actual) if actual else float("nan")), gap


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="setting=value")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    prepared = prepare(
        resolved(load_config(options.config, [*options.overrides, "method.name=local_only"]), Path("runs"))
    )
    source = {record.client: record.source for record in prepared.federation.manifest.clients}
    owners = [source[name] for name in prepared.clients]
    clients = [data.train.pairs() for data in prepared.clients.values()]
    bank, method = Bank(prepared.base), prepared.config.method
    assert isinstance(method, LocalOnly)
    rows: dict[str, tuple[str, list[tuple[float, float]], float]] = {}

    def add(name: str, sent: str, seconds: float, similarities: Tensor) -> None:
        rows.setdefault(name, (sent, [], seconds))[1].append(quality(similarities, owners))

    started = time.process_time()
    last, every = hidden_means(bank, clients)
    seconds = time.process_time() - started
    layers = sorted(last)
    for layer in [layers[round(share * (len(layers) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)]:
        for what, vectors in (("last prompt token", last), ("all prompt tokens", every)):
            add(
                f"mean hidden state, layer {int(layer)}, {what}",
                "1 vector",
                seconds,
                similarity({layer: vectors[layer]}),
            )
    for seed in range(options.seeds):
        generator = torch_generator(seed, "lora")
        adapter = Adapter(method.spec(), new_shared(prepared.base.shapes, method.rank, generator))
        started = time.process_time()
        gradients = first_gradients(bank, adapter, clients)
        add("gradient at the start, B", "1 LoRA B more", time.process_time() - started, similarity(gradients))
        started = time.process_time()
        trained = train(bank, prepared, adapter, seed)
        seconds = time.process_time() - started
        for factor in "AB":
            changes = {
                name: torch.stack([(result.adapter.tensors[name] - tensor).flatten() for result in trained])
                for name, tensor in adapter.tensors.items()
                if name.endswith(f"/{factor}")
            }
            add(f"change of {factor} in round 1", "nothing more", seconds, similarity(changes))
        started = time.process_time()
        losses = cross_losses(bank, trained, [rows[:16] for rows in clients])
        add("losses of each other's adapters, 16 examples", "all LoRAs down", time.process_time() - started, losses)
    table = Table(title=f"{options.config.stem}: {len(owners)} clients, {options.seeds} seeds")
    for column in ("description", "nearest %", "gap", "sent", "CPU s"):
        table.add_column(column, justify="left" if column in ("description", "sent") else "right")
    for name, (sent, values, seconds) in rows.items():
        nearest, gap = np.mean([value[0] for value in values]), np.mean([value[1] for value in values])
        table.add_row(name, f"{nearest:.0f}", f"{gap:.3f}", sent, f"{seconds:.0f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
