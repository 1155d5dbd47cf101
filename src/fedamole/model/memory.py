"""How much memory a group of clients takes, how much there is, and how much was taken."""

import contextlib
import ctypes
import sys
from pathlib import Path

import psutil
import torch

from fedamole.model.base import Base

HEADROOM = 0.8
"""Share of the free memory that a group may take: other programs, fragments and evaluation need the rest."""


def free_bytes(device: torch.device) -> int:
    """Memory still free on a device; on a CPU also within the limit of this container, where it has one."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    try:
        limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
        return min(int(free), int(limit.read_text(encoding="utf-8")) - int(used.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # no such limit
        return int(free)


def used_bytes(device: torch.device) -> int:
    """Memory that this process holds on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring anew, where the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory: of the device since the last reset, or of the whole process since its start on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) / 2**20)
    with contextlib.suppress(OSError):
        # Not getrusage: there a process that was forked begins with the peak of its parent.
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        lines = dict(line.split(":", 1) for line in status.splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak / 2**20 if sys.platform == "darwin" else peak / 2**10)


def release_memory(device: torch.device) -> None:
    """Hand freed memory back: PyTorch keeps a GPU's, the C library of Linux what many small tensors leave behind."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, on a GPU or in PyTorch's own allocator on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def group_bytes(base: Base, clients: int, adapter_parameters: int, tokens: int) -> int:
    """Estimate what local training of a group takes beside the base.

    `adapter_parameters` are the numbers of the largest adapter: each takes 16 bytes (weight, gradient, two moments of
    Adam, in float32). `tokens` are those of one forward pass: about 24 values per token and hidden unit of every layer
    are kept for the backward pass (of one layer with gradient checkpointing), and the logits of half the tokens.
    """
    config = base.model.config.get_text_config()
    item = torch.empty(0, dtype=base.model.dtype).element_size()
    layers = 1 if base.gradient_checkpointing else config.num_hidden_layers
    activations = tokens * (24 * layers * config.hidden_size * item + config.vocab_size * (item + 4) // 2)
    return int(16 * clients * adapter_parameters + activations)
