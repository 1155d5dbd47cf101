"""Evaluation: options by likelihood as a tree over the prompt's cache, and generation for many clients at once.

`options`: 77 options of 3 to 8 tokens, of which eighths begin alike, on prompts of 20 to 40 tokens, against whole
forward passes over prompt and option (batched). `generation`: greedy answers of 24 tokens for ten clients in one
batch, against one client after the other (each client's prompts in one batch). Ratios above 1: ours is faster.

`options, per token`: the same scoring per token of prompt and tree, against the forward pass of a training batch per
token: rows of prompt and answer, without gradients, which makes the opponent faster than it is in training.

Targets: ours is not slower than any of the three.

    python benchmarks/scoring.py [--quick] [--json FILE] [--base FOLDER|llama-1b]
"""

from pathlib import Path

import numpy as np
import torch
from bases import open_base
from measure import arguments, interleaved, report

from fedamole.evaluation.generation import generate_answers
from fedamole.evaluation.likelihood import Tree, mean_losses, option_losses
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.params import Adapter, new_pool

CLIENTS, TOKENS = 10, 8192


def main() -> None:
    """Measure both."""
    options = arguments(__doc__ or "", base="folder of a base, or llama-1b")
    torch.set_num_threads(1)
    bank = Bank(open_base(options.base))
    base, rng = bank.base, np.random.default_rng(0)
    prompts_each, repeats = (1, 1) if options.quick else (4, 7)

    def draw(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(2, base.model.config.vocab_size, rng.integers(low, high + 1)).tolist())

    beginnings = [draw(2, 2) for _ in range(8)]
    choices = [(*beginnings[index % 8], *draw(0, 5), base.tokenizer.eos_token_id) for index in range(77)]
    rows = [[(draw(20, 40), choices) for _ in range(prompts_each)] for _ in range(CLIENTS)]
    prompts = [[prompt for prompt, _ in part] for part in rows]
    adapters = [
        Adapter(AdapterSpec(), new_pool(base.shapes, 8, 4, torch.Generator().manual_seed(client)))
        for client in range(CLIENTS)
    ]

    def by_tree() -> list[list[list[float]]]:
        bank.load(adapters)
        return option_losses(bank, rows, TOKENS)

    def whole() -> list[list[list[float]]]:
        bank.packs = False
        try:
            return by_tree()
        finally:
            bank.packs = True

    def together() -> None:
        bank.load(adapters)
        generate_answers(bank, prompts, 24, TOKENS)

    def one_by_one() -> None:
        for adapter, part in zip(adapters, prompts, strict=True):
            bank.load([adapter])
            generate_answers(bank, [part], 24, TOKENS)

    pairs = [[(prompt, choice) for prompt, _ in part for choice in choices[::8]] for part in rows]
    plain_tokens = sum(len(prompt) + len(answer) for part in pairs for prompt, answer in part)
    tree_tokens = sum(len(prompt) + len(Tree(choices).tokens) - 1 for part in rows for prompt, _ in part)

    def plain() -> None:
        bank.load(adapters)
        mean_losses(bank, pairs, TOKENS)

    apart = np.abs(np.array(by_tree()) - np.array(whole())).max()
    runs = {"tree": by_tree, "whole": whole, "plain": plain, "together": together, "one_by_one": one_by_one}
    seconds = interleaved(runs, repeats)
    ratios = {
        "options_tree_vs_whole_forwards_at_77": seconds["whole"] / seconds["tree"],
        "options_vs_training_forward_per_token": (seconds["plain"] / plain_tokens) / (seconds["tree"] / tree_tokens),
        "generation_together_vs_one_by_one_at_10": seconds["one_by_one"] / seconds["together"],
    }
    lines = [
        ["77 options", "whole forward passes", ratios["options_tree_vs_whole_forwards_at_77"], f"{apart:.1e}"],
        ["options, per token", "forward of training", ratios["options_vs_training_forward_per_token"], "-"],
        ["generation", "one client at a time", ratios["generation_together_vs_one_by_one_at_10"], "-"],
    ]
    head = ["what", "opponent", "its time / ours", "largest difference"]
    title = f"scoring {CLIENTS} clients x {prompts_each} prompts on {Path(base.name).name}, {base.device.type}"
    report(title, head, lines, ratios, options.json)


if __name__ == "__main__":
    main()
