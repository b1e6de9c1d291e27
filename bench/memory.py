"""What an arm of a comparison takes of a GPU's memory."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

MIB = 2**20
LIMIT_BYTES = 4_500_000_000  # promised of exact mode at the published size in float16


@dataclass(frozen=True)
class Memory:
    """Bytes on the device.

    Attributes:
        allocated: in tensors.
        reserved: that PyTorch had asked the driver for, whether or not a tensor lay there.
    """

    allocated: int
    reserved: int


def settled(device: torch.device) -> Memory | None:
    """What is held once everything that can be given back is; peaks count from here. None elsewhere than on CUDA."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return Memory(torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device))


def peak_of(modules: Sequence[torch.nn.Module], before: Memory, device: torch.device) -> Memory:
    """The most that was held since memory was last settled, as if the modules were alone.

    Args:
        modules: whose weights were there before.
        before: what was held before anything of these modules ran.
        device: a CUDA device.
    """
    weights = weight_bytes(modules)
    allocated = weights + torch.cuda.max_memory_allocated(device) - before.allocated
    reserved = weights + torch.cuda.max_memory_reserved(device) - before.reserved
    return Memory(allocated, max(allocated, reserved))  # what others had reserved may have had room


def weight_bytes(modules: Sequence[torch.nn.Module]) -> int:
    """Of all parameters, shared ones once."""
    parameters = {parameter.data_ptr(): parameter for module in modules for parameter in module.parameters()}
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())


def peak_text(arm: dict[str, Any]) -> str:
    """The MiB that an arm had allocated and reserved at most; "-" where that was not measured."""
    if arm["peak_memory_bytes"] is None:
        return "-"
    return " / ".join(f"{arm[key] / MIB:.0f}" for key in ("peak_memory_bytes", "peak_reserved_bytes"))
