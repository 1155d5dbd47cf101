"""Recipes that turn several LoRAs of one base into one: each takes factors by module and returns factors of a rank.

- linear: the mean of the A's and of the B's, as FedIT averages them.
- svd: the mean of the changes B A.
- ties: Yadav et al., "TIES-Merging", NeurIPS 2023, https://arxiv.org/abs/2306.01708, on the changes.
- dare: Yu et al., "Language Models are Super Mario", ICML 2024, https://arxiv.org/abs/2311.03099, on the changes.
- regmean: see `regmean.py`.
- selective: see `selective.py`.

Means, pruning and the election of signs are PEFT's functions (`peft.utils.merge_utils`). All but linear are truncated
to a rank by a singular value decomposition; ties and dare form one module's changes at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.merging.low_rank import (
    Factors,
    LoraFactors,
    Svd,
    check_same_modules,
    of_rank,
    padded,
    product_svd,
    stacked_mean,
    truncate,
)
from fedamole.merging.moments import check_positive, shrink
from fedamole.merging.regmean import regmean

Recipe = Literal["linear", "svd", "ties", "dare", "regmean", "selective"]


def merge_linear(loras: Mapping[str, LoraFactors], rank: int) -> dict[str, Factors]:
    """Average the A's and the B's; a ConfigError for LoRAs of different ranks."""
    from peft.utils.merge_utils import task_arithmetic

    check_same_modules(loras)
    for module in next(iter(loras.values())):
        ranks = {name: len(lora[module][0]) for name, lora in loras.items()}
        if len(set(ranks.values())) > 1:
            listed = ", ".join(f"{name} {own}" for name, own in ranks.items())
            raise ConfigError(f"recipe linear needs LoRAs of one rank, and these differ ({listed}): use svd")
    weights = torch.full((len(loras),), 1 / len(loras))

    def mean(factors: Sequence[Factors]) -> Factors:
        a, b = (task_arithmetic([pair[i].float() for pair in factors], weights) for i in (0, 1))
        return of_rank((a, b), rank)

    return _by_module(loras, mean)


def merge_svd(loras: Mapping[str, LoraFactors], rank: int) -> dict[str, Factors]:
    """Average the changes and truncate the mean to a rank."""
    check_same_modules(loras)
    return _by_module(loras, lambda factors: padded(truncate(product_svd(*stacked_mean(factors)), rank), rank))


def merge_ties(loras: Mapping[str, LoraFactors], rank: int, density: float) -> dict[str, Factors]:
    """Keep the share `density` of each change that is largest, elect a sign per value, average those that agree."""
    from peft.utils.merge_utils import ties

    check_same_modules(loras)
    _check_density(density)
    weights = torch.ones(len(loras))
    return _by_module(loras, lambda factors: _truncated(ties(_changes(factors), weights, density), rank))


def merge_dare(
    loras: Mapping[str, LoraFactors], rank: int, density: float, generator: torch.Generator
) -> dict[str, Factors]:
    """Keep a random share `density` of each change, divided by it, and average; `generator` draws what is kept."""
    from peft.utils.merge_utils import dare_linear

    check_same_modules(loras)
    _check_density(density)
    weights = torch.full((len(loras),), 1 / len(loras))
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator, which is restored afterwards
        torch.random.set_rng_state(generator.get_state())
        return _by_module(loras, lambda factors: _truncated(dare_linear(_changes(factors), weights, density), rank))


def merge_regmean(
    loras: Mapping[str, LoraFactors], moments: Mapping[str, Mapping[str, Tensor]], rank: int, off_diagonal: float
) -> dict[str, Factors]:
    """Merge by RegMean; `moments` are (d_in, d_in) by name and module. A DataError if some are not positive."""
    check_same_modules(loras)
    merged = {}
    for module in next(iter(loras.values())):
        for name in loras:
            check_positive(moments[name][module], f"{name}, {module}")
        grams = [shrink(moments[name][module], off_diagonal) for name in loras]
        merged[module] = padded(regmean([lora[module] for lora in loras.values()], grams, rank), rank)
    return merged


def _by_module(loras: Mapping[str, LoraFactors], merge: Callable[[Sequence[Factors]], Factors]) -> dict[str, Factors]:
    return {module: merge([lora[module] for lora in loras.values()]) for module in next(iter(loras.values()))}


def _changes(factors: Sequence[Factors]) -> list[Tensor]:
    return [b.float() @ a.float() for a, b in factors]


def _truncated(change: Tensor, rank: int) -> Factors:
    return padded(truncate(Svd(*torch.linalg.svd(change.double(), full_matrices=False)), rank), rank)


def _check_density(density: float) -> None:
    if not 0 < density < 1:
        raise ConfigError(f"density = {density}: must be above 0 and below 1")
