"""Serving 1, 10 and 50 personal models from one base: answers per second and memory, against what one would do else.

As many requests at once in all (prompts of 20 to 40 tokens, answers of 24), spread evenly over the models, at most 32
under way. Ours: one engine for all models. Opponents, with time / our time (above 1: ours is faster):

- a process per model: each model's requests in an engine of their own. Measured one after the other in this process, so
  that the cost of switching between processes is not in it: what C of them reach on the same cores at best.
- PEFT swap: one base in this process, `set_adapter` per model, `generate` for its requests.
- PEFT mixed: one base, `generate` with `adapter_names` for the requests of all models.

Adapters are LoRAs of rank 8, which is what PEFT can mix; "FedAMoLE" is our engine with mixtures of four experts
instead, its time / that of ours with LoRAs. HTTP is in none of it. All of them must give the same answers.

Memory is what a server process has for itself alone (USS, after answering; files that processes share, PyTorch's above
all, are in no figure): that of ours with C models, and that of ours with one model times C, of which one is measured.

Target: none was set.

    python benchmarks/serving.py [--quick] [--json FILE] [--base FOLDER|llama-1b]
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from bases import open_base
from measure import arguments, interleaved, report
from peft import LoraConfig, get_peft_model

from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.batch import Ids, pad_left
from fedamole.model.params import Adapter, new_pool, new_shared
from fedamole.serving.engine import InferenceEngine
from fedamole.serving.requests import Chunk, GenerationRequest
from fedamole.serving.scheduling import Limits

NEW, ROWS = 24, 32
Work = list[tuple[int, Ids]]
"""(model, prompt) of each request."""


def adapters(base: Base, models: int, mixture: bool = False) -> list[Adapter]:
    """Fresh adapters, which change nothing yet: all opponents answer alike, and take as long as trained ones."""
    draws = [torch.Generator().manual_seed(model) for model in range(models)]
    if mixture:
        return [Adapter(AdapterSpec(), new_pool(base.shapes, 8, 4, draw)) for draw in draws]
    return [Adapter(AdapterSpec(), new_shared(base.shapes, 8, draw)) for draw in draws]


def requests(base: Base, models: int, total: int) -> Work:
    """Requests of random tokens, evenly for all models."""
    rng = np.random.default_rng(0)
    token_range = base.tokenizer.eos_token_id + 1, len(base.tokenizer)
    return [(turn % models, tuple(rng.integers(*token_range, rng.integers(20, 41)).tolist())) for turn in range(total)]


def answered(engine: InferenceEngine, work: Work) -> list[str]:
    """Answers of an engine to all requests, which come at once."""
    results = [""] * len(work)

    def hear(index: int) -> Callable[[Chunk], None]:
        return lambda chunk: results.__setitem__(index, chunk.text)

    for index, (model, prompt) in enumerate(work):
        engine.submit(GenerationRequest(model, prompt, NEW), hear(index))
    while engine.step():
        pass
    return results


class WithPeft:
    """The same models in PEFT on a base of their own."""

    def __init__(self, base: Base, models: int) -> None:
        """Put a fresh LoRA for each model on the base."""
        self.base = base
        config = LoraConfig(r=8, lora_alpha=16, target_modules=list(base.shapes), task_type="CAUSAL_LM")
        self.model = get_peft_model(base.model, config, "model-0")
        for model in range(1, models):
            self.model.add_adapter(f"model-{model}", config)
        self.model.eval()

    def generate(self, prompts: Sequence[Ids], **more: object) -> list[str]:
        """Greedy answers, as many at once as in the engine."""
        results: list[str] = []
        for start in range(0, len(prompts), ROWS):
            ids, mask = pad_left(prompts[start : start + ROWS], self.base.pad_id, self.base.device)
            part = {name: value[start : start + ROWS] for name, value in more.items()}  # type: ignore[index]
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=self.base.pad_id,
                eos_token_id=self.base.tokenizer.eos_token_id,
                **part,
            )
            texts = self.base.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            results += [text.strip() for text in texts]
        return results

    def swapped(self, work: Work) -> list[str]:
        """Model after model."""
        results = [""] * len(work)
        for model in sorted({model for model, _ in work}):
            self.model.set_adapter(f"model-{model}")
            indices = [index for index, (owner, _) in enumerate(work) if owner == model]
            for index, text in zip(indices, self.generate([work[index][1] for index in indices]), strict=True):
                results[index] = text
        return results

    def mixed(self, work: Work) -> list[str]:
        """All models in one batch."""
        return self.generate([prompt for _, prompt in work], adapter_names=[f"model-{model}" for model, _ in work])


def memory(models: int, base: str) -> float:
    """MiB that a process of its own with so many models has for itself alone, after it has answered."""
    command = [sys.executable, __file__, "--child", str(models), "--base", base]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def child(models: int, name: str) -> None:
    """Serve, and say how much memory that took."""
    engine = opened(open_base(name), models)
    answered(engine, requests(engine.bank.base, models, ROWS))
    sys.stdout.write(f"{psutil.Process().memory_full_info().uss / 2**20}\n")


def opened(base: Base, models: int, mixture: bool = False) -> InferenceEngine:
    """An engine over fresh models."""
    return InferenceEngine(
        Bank(base), adapters(base, models, mixture), Limits(max_rows=ROWS, max_tokens=10**6, max_waiting=10**6)
    )


def main() -> None:
    """Measure all sizes."""
    options = arguments(__doc__ or "", base="folder of a base, or llama-1b", child="for the benchmark's own use")
    torch.set_num_threads(1)
    if options.child:
        child(int(options.child), options.base)
        return
    total, repeats = (8, 1) if options.quick else (100, 5)
    lines: list[list[object]] = []
    ratios: dict[str, float] = {}
    one_client = memory(1, options.base)
    for models in (4,) if options.quick else (1, 10, 50):
        together, single = opened(open_base(options.base), models), opened(open_base(options.base), 1)
        mixtures = opened(open_base(options.base), models, mixture=True)
        theirs = WithPeft(open_base(options.base), models)
        work = requests(together.bank.base, models, total)
        apart = [[(0, prompt) for model, prompt in work if model == expected] for expected in range(models)]
        expected = answered(together, work)
        for name, result in (("swap", theirs.swapped(work)), ("mixed", theirs.mixed(work))):
            same = sum(mine == other for mine, other in zip(expected, result, strict=True))
            assert same == total, f"{name}: {total - same} other answers at {models} models"
        runs: dict[str, Callable[[], object]] = {
            "ours": lambda: answered(together, work),  # noqa: B023
            "process_per_model": lambda: [answered(single, part) for part in apart],  # noqa: B023
            "peft_swap": lambda: theirs.swapped(work),  # noqa: B023
            "peft_mixed": lambda: theirs.mixed(work),  # noqa: B023
            "fedamole": lambda: answered(mixtures, work),  # noqa: B023
        }
        seconds = interleaved(runs, repeats)
        relative = {name: value / seconds["ours"] for name, value in seconds.items() if name != "ours"}
        used = memory(models, options.base)
        ratios |= {f"{name}_vs_ours_at_{models}": value for name, value in relative.items()}
        ratios[f"memory_process_per_model_vs_ours_at_{models}"] = models * one_client / used
        lines.append([models, total / seconds["ours"], *relative.values(), used, models * one_client / used])
    head = ["models", "answers / s", "process per model", "PEFT swap", "PEFT mixed", "FedAMoLE", "MiB", "x memory"]
    base = together.bank.base
    title = f"serving {total} requests at once on {Path(base.name).name}, {base.device.type}"
    report(title, head, lines, ratios, options.json)


if __name__ == "__main__":
    main()
