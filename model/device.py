"""Where the networks run, and what can go wrong there."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from model.interface import DeviceFailed, EngineError, OutOfMemory

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DEVICES = ("cuda", "cpu")


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
    except torch.cuda.OutOfMemoryError as exc:
        traceback.clear_frames(exc.__traceback__)  # they hold the tensors that filled the memory
        torch.cuda.empty_cache()
        raise OutOfMemory(str(exc)) from exc
    except RuntimeError as exc:
        if is_device_failure(exc):
            raise DeviceFailed(str(exc)) from exc
        raise EngineError(str(exc)) from exc


def is_device_failure(exc: RuntimeError) -> bool:
    """Whether CUDA reported an error that outlives the call."""
    accelerator_error = getattr(torch, "AcceleratorError", None)  # torch 2.8 and later
    return "CUDA error" in str(exc) or (accelerator_error is not None and isinstance(exc, accelerator_error))
