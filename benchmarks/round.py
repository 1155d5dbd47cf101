"""Local training of a whole cohort in one round, in samples per second, batch 1.

Lock-step (what a run does) against: the same training one client after the other; the same on PEFT with a plain
PyTorch loop (LoRA r = 8, Adam, one client after the other); and one process per client. Everybody has one core (a
GPU, where there is one): processes are pinned to one, have the base loaded and wait at a barrier before the clock
starts. `mixture` clients hold 2 to 8 experts of rank 8 in each module, `lora` clients a plain LoRA of rank 8. Ragged
lengths spread evenly from half to one and a half times the length given. Ratios above 1: lock-step is faster. The last
column compares lock-step with its floor by arithmetic: the base's products, forward and back to the activations (4
operations per weight and token; no gradient of frozen weights), at the rate of a large matrix product on this machine.

Targets on a CPU, C = 10: at least 1.8 x sequential at 32 tokens, 1.3 x at 64, 1.1 x at 128, never below 0.95 x.
On a GPU with Llama-3.2-1B's shape: at least 6 x at 128 tokens.

    python benchmarks/round.py [--quick] [--json FILE] [--base FOLDER|llama-1b] [--dropout 0] [--only SIZE]
"""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from bases import open_base
from measure import arguments, interleaved, report

from fedamole.federation.local import LocalTask, fit
from fedamole.federation.method import TrainingRequest
from fedamole.federation.settings import TrainingSettings
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.batch import TokenPair
from fedamole.model.params import Adapter, new_pool, new_shared

RATE = 1e-4


def adapters(base: Base, clients: int, kind: str, dropout: float) -> list[Adapter]:
    """One adapter per client: a plain LoRA, or a mixture of 2 to 8 experts, others in every module."""
    spec, draw = AdapterSpec(dropout=dropout), torch.Generator().manual_seed(0)
    if kind == "lora":
        return [Adapter(spec, new_shared(base.shapes, spec.rank, draw)) for _ in range(clients)]
    pool, modules, result = new_pool(base.shapes, spec.rank, 8, draw), sorted(base.shapes), []
    for client in range(clients):
        held = {module: 2 + (3 * client + 5 * index) % 7 for index, module in enumerate(modules)}
        result.append(
            Adapter(
                spec,
                {
                    name: tensor
                    for name, tensor in pool.items()
                    if "/expert-" not in name or int(name.split("/expert-")[1][:2]) < held[name.split("/")[0]]
                },
            )
        )
    return result


def texts(base: Base, clients: int, length: int, ragged: bool, rows: int) -> list[list[TokenPair]]:
    """Random prompts with answers of 8 tokens, for each client."""
    rng = np.random.default_rng(0)

    def row() -> TokenPair:
        total = int(rng.integers(length // 2, 3 * length // 2 + 1)) if ragged else length
        tokens = rng.integers(2, base.model.config.vocab_size, total).tolist()
        return tokens[:-8], tokens[-8:]

    return [[row() for _ in range(rows)] for _ in range(clients)]


class PeftLoop:
    """The same LoRAs on PEFT in a plain PyTorch loop, one client after the other."""

    def __init__(self, base: Base, dropout: float) -> None:
        """Wrap a base that no bank has wrapped."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=sorted(base.shapes))
        self.model, self.device = get_peft_model(base.model, config), base.device

    def train(self, tasks: Sequence[LocalTask], steps: int) -> None:
        """Train every client."""
        self.model.train()
        named = dict(self.model.named_parameters())
        trained = [parameter for parameter in named.values() if parameter.requires_grad]
        for task in tasks:
            with torch.no_grad():
                for name, tensor in task.fit.adapter.tensors.items():
                    module, _, part = name.split("/")
                    named[f"base_model.model.{module}.lora_{part}.default.weight"].copy_(tensor)
            optimiser = torch.optim.Adam(trained, lr=RATE, fused=True)
            for prompt, answer in task.rows[:steps]:
                ids = torch.tensor([[*prompt, *answer]], device=self.device)
                labels = ids.clone()
                labels[:, : len(prompt)] = -100
                optimiser.zero_grad()
                self.model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
                optimiser.step()


class Processes:
    """One process per client, forked with the base loaded; they share the core that this process is pinned to."""

    def __init__(self, work: Callable[[LocalTask], object], tasks: Sequence[LocalTask]) -> None:
        """Start them; they wait."""
        context = multiprocessing.get_context("fork")
        self.go, self.done = context.Barrier(len(tasks) + 1), context.Barrier(len(tasks) + 1)

        def serve(task: LocalTask) -> None:
            while True:
                self.go.wait()
                work(task)
                self.done.wait()

        self.processes = [context.Process(target=serve, args=(task,), daemon=True) for task in tasks]
        for process in self.processes:
            process.start()

    def train(self) -> None:
        """Let every process train its client once."""
        self.go.wait()
        self.done.wait()

    def stop(self) -> None:
        """End them."""
        for process in self.processes:
            process.kill()
            process.join()


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    clients: int
    length: int
    ragged: bool
    kind: str

    def steps(self, most: int) -> int:
        """Steps of a client: fewer of long sequences."""
        return max(4, min(most, 1280 // self.length))

    @property
    def size(self) -> str:
        """Clients x tokens."""
        return f"{self.clients}x{self.length}{'_ragged' if self.ragged else ''}"


def cases(quick: bool) -> list[Case]:
    """What is measured."""
    if quick:
        return [Case(3, 32, False, "mixture"), Case(3, 64, True, "mixture"), Case(3, 32, False, "lora")]
    results = [
        Case(10, length, ragged, "mixture") for length in (16, 32, 64, 128, 256, 512) for ragged in (False, True)
    ]
    results += [Case(clients, length, False, "mixture") for clients in (1, 50) for length in (32, 128)]
    return results + [Case(10, length, False, "lora") for length in (32, 64, 128, 256)]


def measured(case: Case, bank: Bank, peft: PeftLoop, dropout: float, repeats: int, most: int) -> dict[str, float]:
    """Median seconds of everybody in one case."""
    steps = case.steps(most)
    rows = texts(bank.base, case.clients, case.length, case.ragged, steps)
    held = adapters(bank.base, case.clients, case.kind, dropout)
    tasks = [
        LocalTask(f"client{index}", TrainingRequest(adapter), part, RATE)
        for index, (adapter, part) in enumerate(zip(held, rows, strict=True))
    ]
    gpu = bank.base.device.type == "cuda"

    def train(tasks: Sequence[LocalTask]) -> None:
        fit(bank, tasks, TrainingSettings(local_steps=steps), seed=0, round_=0)
        if gpu:
            torch.cuda.synchronize()

    def one_by_one() -> None:
        for task in tasks:
            train([task])

    runs: dict[str, Callable[[], object]] = {"lockstep": lambda: train(tasks), "sequential": one_by_one}
    if case.kind == "lora":
        runs["peft_loop"] = lambda: peft.train(tasks, steps)
    processes = None
    if not gpu and 1 < case.clients <= 10 and not case.ragged and case.kind == "mixture":
        processes = Processes(lambda task: train([task]), tasks)
        runs["processes"] = processes.train
    seconds = interleaved(runs, repeats)
    if processes is not None:
        processes.stop()
    return seconds


def matrix_rate(base: Base) -> float:
    """Operations a second of a large product in the base's dtype."""
    size = 8192 if base.device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=base.device, dtype=base.model.dtype) for _ in range(2))

    def run() -> None:
        torch.mm(a, b)
        if base.device.type == "cuda":
            torch.cuda.synchronize()

    return 2 * size**3 / interleaved({"mm": run}, 15)["mm"]


def operations(base: Base, case: Case, steps: int) -> float:
    """Operations of a round's products on the frozen base; the head sees the answers' 8 tokens alone."""
    head = base.model.get_output_embeddings().weight.numel()
    embedded = base.model.get_input_embeddings().weight.numel()
    inner = sum(weight.numel() for weight in base.model.parameters() if weight.dim() == 2) - embedded
    inner -= 0 if base.model.config.tie_word_embeddings else head
    return 4.0 * case.clients * steps * float(inner * case.length + head * 8)


def main() -> None:
    """Measure every case."""
    options = arguments(
        __doc__ or "",
        base="folder of a base, or llama-1b",
        dropout="0.05 unless given",
        only="sizes that contain this alone, e.g. 512_ragged, with 15 repeats",
    )
    dropout, (repeats, most) = float(options.dropout or 0.05), (2, 4) if options.quick else (5, 20)
    torch.set_num_threads(1)
    base = open_base(options.base)
    if base.device.type == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    bank, peft = Bank(base), PeftLoop(open_base(options.base), dropout)
    lines: list[list[object]] = []
    ratios: dict[str, float] = {}
    highest = matrix_rate(base)
    chosen = [case for case in cases(options.quick) if options.only in case.size]
    for case in chosen:
        seconds = measured(case, bank, peft, dropout, 15 if options.only else repeats, most)
        rate = f"{case.clients * case.steps(most) / seconds['lockstep']:.0f}" if base.device.type == "cuda" else "-"
        floor = operations(base, case, case.steps(most)) / highest
        for name in list(seconds)[1:]:
            ratio = seconds[name] / seconds["lockstep"]
            ratios[f"{case.kind}_lockstep_vs_{name}_at_{case.size}"] = ratio
            lines.append([case.size, case.kind, name, ratio, rate, seconds["lockstep"] / floor])
    head = ["clients x tokens", "adapters", "opponent", "its time / lock-step's", "samples/s", "lock-step / floor"]
    title = f"local training on {Path(base.name).name}, {base.device.type}, dropout {dropout}"
    report(title, head, lines, ratios, options.json)


if __name__ == "__main__":
    main()
