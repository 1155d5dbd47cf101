"""What only a GPU can show; skipped where there is none."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedamole.federation.local import LocalTask, _Group, fit
from fedamole.federation.method import Fit, Trained
from fedamole.federation.settings import TrainingSettings
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import BaseSettings, load_base
from fedamole.model.batch import Row
from fedamole.model.params import Adapter, new_pool

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
SETTINGS = TrainingSettings(local_steps=4, batch_size=2, clip_norm=1.0)


@pytest.fixture
def open_bank(tiny: Path) -> Callable[[str, str], Bank]:
    def get(device: str, dtype: str) -> Bank:
        settings = BaseSettings(model=str(tiny / "base"), dtype=dtype)  # type: ignore[arg-type]
        return Bank(load_base(settings, torch.device(device), Path.cwd()))

    return get


def tasks(bank: Bank) -> list[LocalTask]:
    """Mixtures of 2, 3 and 4 experts on rows of uneven lengths."""
    found = []
    for client in range(3):
        draw = torch.Generator().manual_seed(client)
        rows: list[Row] = [(tuple(range(5, 9 + client + 3 * place)), (7, 0)) for place in range(4)]
        pool = new_pool(bank.base.shapes, 4, 2 + client, draw)
        tensors = {name: 0.1 * torch.randn(tensor.shape, generator=draw) for name, tensor in pool.items()}
        spec = AdapterSpec(rank=4, alpha=8.0, dropout=0.1, balance_weight=0.01)
        found.append(LocalTask(f"client{client}", Fit(Adapter(spec, tensors)), rows, 1e-3))
    return found


def test_training_is_the_same_on_gpu_and_cpu(open_bank: Callable[[str, str], Bank]) -> None:
    """Dropout included: masks are functions of place, not of the device."""
    outcomes = []
    for device in ("cpu", "cuda"):
        bank = open_bank(device, "float32")
        outcomes.append(fit(bank, tasks(bank), SETTINGS, seed=0, round_=0))
    for here, there in zip(*outcomes, strict=True):
        assert isinstance(here, Trained)
        assert isinstance(there, Trained)
        assert here.loss == pytest.approx(there.loss, rel=1e-3)


def test_no_step_waits_for_the_device(open_bank: Callable[[str, str], Bank]) -> None:
    bank = open_bank("cuda", "bfloat16")
    group = _Group(bank, tasks(bank), SETTINGS, seed=0, round_=0)
    bank.base.training(True)
    group.step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        group.step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        bank.base.training(False)
