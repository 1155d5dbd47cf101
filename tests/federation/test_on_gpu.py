"""What runs on a GPU. Every test runs the same calls on the CPU too, so that they are tried where there is no GPU."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch

from fedamole.deployment import doctor
from fedamole.federation.local import LocalTask, TrainingGroup, fit
from fedamole.federation.method import TrainingRequest, TrainingResult
from fedamole.federation.settings import TrainingSettings
from fedamole.model import memory
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import BaseSettings, _quantized, load_base, resolve_device
from fedamole.model.batch import TokenPair
from fedamole.model.params import Adapter, new_pool
from fedamole.model.segments import to_device

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
SETTINGS = TrainingSettings(local_steps=4, batch_size=2, clip_norm=1.0)


@pytest.fixture
def open_bank(tiny: Path) -> Callable[[str, str], Bank]:
    def get(device: str, dtype: str) -> Bank:
        settings = BaseSettings(model=str(tiny / "base"), dtype=dtype)  # type: ignore[arg-type]
        return Bank(load_base(settings, torch.device(device), Path.cwd()))

    return get


def tasks(bank: Bank) -> list[LocalTask]:
    """Mixtures of 2, 3 and 4 experts on rows of uneven lengths."""
    results = []
    for client in range(3):
        draw = torch.Generator().manual_seed(client)
        rows: list[TokenPair] = [(tuple(range(5, 9 + client + 3 * index)), (7, 0)) for index in range(4)]
        pool = new_pool(bank.base.shapes, 4, 2 + client, draw)
        tensors = {name: 0.1 * torch.randn(tensor.shape, generator=draw) for name, tensor in pool.items()}
        spec = AdapterSpec(rank=4, alpha=8.0, dropout=0.1, balance_weight=0.01)
        results.append(LocalTask(f"client{client}", TrainingRequest(Adapter(spec, tensors)), rows, 1e-3))
    return results


@each_device
def test_training_is_the_same_on_gpu_and_cpu(open_bank: Callable[[str, str], Bank], device: str) -> None:
    """Dropout included: masks are functions of place, not of the device."""
    outcomes = []
    for each in ("cpu", device):
        bank = open_bank(each, "float32")
        outcomes.append(fit(bank, tasks(bank), SETTINGS, seed=0, round_=0))
    for on_cpu, there in zip(*outcomes, strict=True):
        assert isinstance(on_cpu, TrainingResult)
        assert isinstance(there, TrainingResult)
        assert on_cpu.loss == pytest.approx(there.loss, rel=1e-3)


@contextlib.contextmanager
def waiting_is_an_error(device: str) -> Iterator[None]:
    """On a GPU, a host that waits for the device raises a RuntimeError; a CPU has no such check."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_device
def test_no_step_waits_for_the_device(open_bank: Callable[[str, str], Bank], device: str) -> None:
    bank = open_bank(device, "bfloat16")
    group = TrainingGroup(bank, tasks(bank), SETTINGS, seed=0, round_=0, fit_index=0)
    bank.base.training(True)
    try:
        group.step(0)
        with waiting_is_an_error(device):
            group.step(1)
    finally:
        bank.base.training(False)
    assert not group.check(1)
    assert group.loss_sums.isfinite().all()
    assert bool((group.loss_sums > 0).all())


class FakeCuda:
    """A GPU of 80 bytes, 10 of them free, as PyTorch would describe it; wrong arguments are a TypeError."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers = {
            "mem_get_info": (10, 80),
            "memory_reserved": 7,
            "memory_allocated": 3,
            "max_memory_allocated": 2**21,
            "reset_peak_memory_stats": None,
            "empty_cache": None,
            "is_available": True,
            "device_count": 2,
            "get_device_name": "Some GPU",
        }
        self.calls = {
            name: create_autospec(getattr(torch.cuda, name), return_value=value) for name, value in answers.items()
        }
        for name, call in self.calls.items():
            monkeypatch.setattr(torch.cuda, name, call)


def test_memory_of_a_gpu_by_the_calls_that_pytorch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, device = FakeCuda(monkeypatch), torch.device("cuda", 1)
    assert memory.free_bytes(device) == 10 + 7 - 3, "what PyTorch holds without need is free, too"
    assert memory.used_bytes(device) == 3
    assert memory.peak_memory_mib(device) == 2
    memory.reset_peak_memory(device)
    fake.calls["reset_peak_memory_stats"].assert_called_once_with(device)
    memory.release_memory(device)
    fake.calls["empty_cache"].assert_called_once_with()
    for name in ("mem_get_info", "memory_reserved", "memory_allocated", "max_memory_allocated"):
        assert all(call.args == (device,) for call in fake.calls[name].call_args_list), name


def test_a_gpu_is_found_by_the_calls_that_pytorch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert [finding.text for finding in doctor.device()] == ["Some GPU, 0 of 0 GiB free"]


def test_a_base_in_4_bits_is_asked_for_in_words_that_transformers_knows() -> None:
    options = _quantized(torch.device("cuda"))
    config = options["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_compute_dtype) == (True, torch.bfloat16)
    assert options["device_map"] == {"": torch.device("cuda")}


def test_uploads_go_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device `meta` stands for one that is not the CPU; pinning itself needs a GPU."""
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    tensor = torch.ones(3)
    assert to_device(tensor, torch.device("cpu")) is tensor
    assert not pinned
    assert to_device(tensor, torch.device("meta")).device.type == "meta"
    assert [source is tensor for source in pinned] == [True]
