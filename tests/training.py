"""Training one client alone, as the tests that came before groups see it; and what a LoRA adapter is made of."""

from collections.abc import Sequence

import torch

from fedamole.federation.local import DivergedError, LocalTask, OnStep, fit
from fedamole.federation.method import TrainingRequest, TrainingResult
from fedamole.federation.settings import TrainingSettings
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.batch import TokenPair
from fedamole.model.params import Adapter, new_shared
from fedamole.model.prompt import PromptSpec


def lora_spec(spec: AdapterSpec | PromptSpec) -> AdapterSpec:
    """A spec that has to be one of LoRA experts, not of virtual tokens."""
    assert isinstance(spec, AdapterSpec), spec
    return spec


def alone(
    bank: Bank,
    adapter: Adapter,
    rows: Sequence[TokenPair],
    settings: TrainingSettings,
    *,
    seed: int = 0,
    client: str = "mood",
    round_: int = 0,
    on_step: OnStep | None = None,
) -> TrainingResult:
    """Train one client as a group of one; raise where it diverges."""
    task = LocalTask(client, TrainingRequest(adapter), rows, settings.learning_rate * settings.lr_decay**round_)
    (outcome,) = fit(bank, [task], settings, seed=seed, round_=round_, on_step=on_step)
    if isinstance(outcome, DivergedError):
        raise outcome
    return outcome


def random_lora(bank: Bank, seed: int = 0) -> Adapter:
    """A LoRA of rank 2 without dropout whose A and B are both random."""
    generator = torch.Generator().manual_seed(seed)
    tensors = new_shared(bank.base.shapes, 2, generator)
    spec = AdapterSpec(2, 4.0, 0.0)
    return Adapter(spec, {key: t + 0.05 * torch.randn(t.shape, generator=generator) for key, t in tensors.items()})
