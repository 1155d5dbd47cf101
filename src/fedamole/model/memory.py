"""Memory of a device: free, used, peak, and an estimate for training a group of clients."""

import contextlib
import ctypes
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from fedamole.model.base import Base

log = logging.getLogger(__name__)

HEADROOM = 0.8
"""Fraction of the free memory that a group may use; the rest is for other programs, fragmentation and evaluation."""


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of a device; on a CPU at most what the container's memory limit leaves."""
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
    """Return the bytes that this process uses on a device."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak of a GPU; a CPU's peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory in MiB: of a GPU since the last reset, of a CPU process since its start."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) / 2**20)
    with contextlib.suppress(OSError):
        # getrusage would include the peak of the parent process after a fork.
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        lines = dict(line.split(":", 1) for line in status.splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak / 2**20 if sys.platform == "darwin" else peak / 2**10)


def release_memory(device: torch.device) -> None:
    """Return cached memory to the device: PyTorch's GPU cache and the free lists of the C library on Linux."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def fits_in_memory(run: Callable[[], None], clients: int, device: torch.device) -> bool:
    """Call `run`, which works on this many clients at once; return False if the memory of the device ran out.

    Raises the error of a single client that does not fit.
    """
    try:
        run()
        return True
    except RuntimeError as error:
        if clients == 1 or not out_of_memory(error):
            raise
    # Outside the handler, because the error keeps the tensors of the failed pass alive.
    release_memory(device)
    log.warning("out of memory with %d clients at once, continuing with %d", clients, (clients + 1) // 2)
    return False


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error reports that memory ran out, on a GPU or in PyTorch's allocator on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def group_bytes(base: Base, clients: int, adapter_parameters: int, tokens: int) -> int:
    """Estimate the bytes that local training of a group needs in addition to the base.

    `adapter_parameters` is the size of the largest adapter; each parameter takes 16 bytes (weight, gradient and two
    Adam moments in float32). `tokens` is the number of tokens in one forward pass. The backward pass needs about 24
    values per token and hidden unit of every layer (of one layer with gradient checkpointing), and the logits of half
    the tokens.
    """
    config = base.model.config.get_text_config()
    item = torch.empty(0, dtype=base.model.dtype).element_size()
    layers = 1 if base.gradient_checkpointing else config.num_hidden_layers
    activations = tokens * (24 * layers * config.hidden_size * item + config.vocab_size * (item + 4) // 2)
    return int(16 * clients * adapter_parameters + activations)
