"""Where the networks run, and what can go wrong there."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from model.interface import DeviceFailed, EngineError, OutOfMemory

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DEVICES = ("cuda", "cpu")
# What CUDA, cuBLAS, cuDNN and Triton say. The first list comes first, for most of its texts have words of the second.
SHORT_OF_MEMORY = ("out of memory", "_ALLOC_FAILED", "_ALLOCATION_FAILED", "unable to find an engine to execute")
DEVICE_FAILED = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]")


def choose_device(device: str) -> torch.device:
    """The device that "auto", "cuda" or "cpu" stands for; ValueError for another name, or CUDA where there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}; one of: auto, {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for but no CUDA device is present")
    return torch.device(device)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is float16 on CUDA and float32 on the CPU. ValueError for another name."""
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; one of: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


@contextmanager
def failures_told_apart() -> Iterator[None]:
    """Turns torch's failures inside the block into those that a service tells apart.

    Raises:
        OutOfMemory: the device had too little memory; its cache has been emptied.
        DeviceFailed: CUDA reported an error that outlives this call.
        EngineError: any other failure inside torch.
    """
    try:
        yield
    except RuntimeError as exc:
        raise _told_apart(exc) from exc


def kind_of(failure: RuntimeError) -> type[EngineError]:
    """What torch's failure is to a service: `OutOfMemory`, `DeviceFailed`, or `EngineError` for any other."""
    text = str(failure)
    if isinstance(failure, torch.cuda.OutOfMemoryError) or any(words in text for words in SHORT_OF_MEMORY):
        return OutOfMemory
    accelerator_error = getattr(torch, "AcceleratorError", None)  # torch 2.8 and later
    if accelerator_error is not None and isinstance(failure, accelerator_error):
        return DeviceFailed
    return DeviceFailed if any(words in text for words in DEVICE_FAILED) else EngineError


def _told_apart(exc: RuntimeError) -> EngineError:
    kind = kind_of(exc)
    if kind is OutOfMemory:
        traceback.clear_frames(exc.__traceback__)  # they hold the tensors that filled the memory
        try:
            torch.cuda.empty_cache()
        except RuntimeError as emptying:  # on a failed device too cuDNN says that it finds no engine
            return kind_of(emptying)(f"{exc}; then the cache could not be emptied: {emptying}")
    return kind(str(exc))
