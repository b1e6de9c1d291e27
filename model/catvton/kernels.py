"""Which of torch's attention kernels computes which attention."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from model.device import kind_of
from model.interface import EngineError

CANDIDATES = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
RUNS = 3
TOLERANCE = 2e-2  # between kernels, in half precision
BETTER = 0.95  # of the time of the one before, or the choice would change from start to start

Shape = tuple[torch.device, torch.dtype, tuple[int, ...], tuple[int, ...]]

log = logging.getLogger("vton.kernels")
_chosen: dict[Shape, SDPBackend] = {}


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """softmax(q k / sqrt(channels)) v of (B, heads, tokens, channels), by the fastest kernel for these shapes.

    On CUDA the kernels are timed when a shape is first seen, which is at the warm-up. Elsewhere there is one, and what
    is compiled keeps torch's own choice.
    """
    if queries.device.type != "cuda" or torch.compiler.is_compiling():
        return scaled_dot_product_attention(queries, keys, values)
    shape = (queries.device, queries.dtype, tuple(queries.shape), tuple(keys.shape))
    if shape not in _chosen:
        _chosen[shape] = _fastest_on_cuda(queries, keys, values)
    with sdpa_kernel(_chosen[shape]):
        return scaled_dot_product_attention(queries, keys, values)


def chosen_kernels() -> dict[str, str]:
    """The kernels chosen so far, by the shapes of queries and keys: "2x8x12288x40 to 24576" -> "CUDNN_ATTENTION"."""
    return {_named(queries, keys): kernel.name for (_, _, queries, keys), kernel in _chosen.items()}


def fastest(candidates: Sequence[SDPBackend], time_of: Callable[[SDPBackend], float]) -> SDPBackend:
    """The first of the candidates that no later one beats clearly; torch's own fallback where none runs.

    Args:
        candidates: in order of preference.
        time_of: seconds of one call; raises RuntimeError where the kernel cannot take the shape.
    Raises:
        RuntimeError: memory was short, or the device failed; neither says anything of a kernel.
    """
    best, best_s = SDPBackend.MATH, float("inf")
    for kernel in candidates:
        try:
            taken_s = time_of(kernel)
        except RuntimeError as exc:
            if kind_of(exc) is not EngineError:
                raise
            continue
        if taken_s < BETTER * best_s:
            best, best_s = kernel, taken_s
    return best


def _fastest_on_cuda(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> SDPBackend:
    expected = scaled_dot_product_attention(queries, keys, values)

    def time_of(kernel: SDPBackend) -> float:
        with sdpa_kernel(kernel), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why a kernel cannot take a shape
            found = scaled_dot_product_attention(queries, keys, values)
            if not torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
                raise RuntimeError(f"{kernel.name} computes something else")
            return statistics.median(_seconds(queries, keys, values) for _ in range(RUNS))

    kernel = fastest(CANDIDATES, time_of)
    log.info("attention_kernel", extra={"kernel": kernel.name, "shape": _named(queries.shape, keys.shape)})
    return kernel


def _named(queries: Sequence[int], keys: Sequence[int]) -> str:
    return f"{'x'.join(map(str, queries))} to {keys[-2]}"


def _seconds(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> float:
    torch.cuda.synchronize(queries.device)
    began = time.perf_counter()
    scaled_dot_product_attention(queries, keys, values)
    torch.cuda.synchronize(queries.device)
    return time.perf_counter() - began
