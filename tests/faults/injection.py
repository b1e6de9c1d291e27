"""Faults inside the real engine: where the pipeline is called, CUDA's errors come up or the picture is spoilt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import torch

from model.catvton.pipeline import CatVTONPipeline

FAULT, CALLS, EMPTIED = "fault", "calls", "emptied"  # files of the control folder
ERRORS: dict[str, Callable[[], Exception]] = {
    "oom": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "assert": lambda: RuntimeError("CUDA error: device-side assert triggered"),
    "illegal": lambda: RuntimeError("CUDA error: an illegal memory access was encountered"),
}
SPOILT = {"nan": float("nan"), "constant": 0.5}


def install(control: Path) -> None:
    """From now on every call of a pipeline is written to `calls`, and fails as the file `fault` says.

    Args:
        control: `fault` is {"kind", "times"}; "emptied" gets a line each time that the device's cache is emptied.
    """
    call, empty = CatVTONPipeline.__call__, torch.cuda.empty_cache

    def spoilt_call(self: CatVTONPipeline, *args: Any, **kwargs: Any) -> Any:
        kind = _next_fault(control / FAULT)
        _add_line(control / CALLS, kind)
        if kind in ERRORS:
            raise ERRORS[kind]()
        output: Any = call(self, *args, **kwargs)
        if kind in SPOILT:
            output.images[0] = torch.full_like(output.images[0], SPOILT[kind])
        return output

    def recorded_empty() -> None:
        _add_line(control / EMPTIED, "emptied")
        empty()

    setattr(CatVTONPipeline, "__call__", spoilt_call)  # noqa: B010 - the types forbid the plain form
    setattr(torch.cuda, "empty_cache", recorded_empty)  # noqa: B010


def _next_fault(file: Path) -> str:
    if not file.exists():
        return "none"
    order = json.loads(file.read_text())
    if order["times"] == 1:
        file.unlink()
    else:
        file.write_text(json.dumps({**order, "times": order["times"] - 1}))
    return str(order["kind"])


def _add_line(file: Path, line: str) -> None:
    with file.open("a") as opened:
        opened.write(f"{line}\n")
