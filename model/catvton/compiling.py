"""Compiled forwards of the UNet, for those who give a longer start for faster steps."""

from __future__ import annotations

from typing import Any

import torch

OFF, INDUCTOR, GRAPHS = "off", "inductor", "graphs"
COMPILATIONS = (OFF, INDUCTOR, GRAPHS)
SHAPES = 96  # of one process: guided or not, exact, deep layers kept or reused, each by as many pictures as 16


def compile_unet(unet: torch.nn.Module, how: str) -> None:
    """Compile what the UNet does when it is called; the first call of each shape takes minutes, or finds a cache.

    Args:
        unet: its calls are compiled in place.
        how: "off"; "inductor", fused kernels, whose cache lies in TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR;
            "graphs", the same, replayed as CUDA graphs.
    Raises:
        ValueError: another name.
    """
    if how not in COMPILATIONS:
        raise ValueError(f"unknown compilation {how!r}; one of: {', '.join(COMPILATIONS)}")
    if how == OFF:
        return
    dynamo: Any = torch._dynamo  # its documented settings have no public name
    dynamo.config.cache_size_limit = max(SHAPES, dynamo.config.cache_size_limit)
    compile_calls: Any = unet.compile
    compile_calls(fullgraph=True, dynamic=False, mode="reduce-overhead" if how == GRAPHS else None)
