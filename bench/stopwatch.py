"""How long one picture took, and what ran on the device meanwhile."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_ATTENTION_OP = re.compile(r"aten::_scaled_dot_product_\w+$")
_ATTENTION_KERNEL = re.compile(r"flash|fmha|attention|sdpa", re.IGNORECASE)


def activities_on(device: torch.device) -> list[ProfilerActivity]:
    """What every profile of a process records: torch's profiler never sees more than the first one asked for."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


class Stopwatch:
    """Keeps the seconds of one picture.

    On CUDA the loop is timed by events and the whole picture by the wall clock, with the device idle at both ends of
    it; on a CPU both are processor time, which other processes do not add to.

    Attributes:
        loop_s: the denoising loop.
        whole_s: from tensors to uint8 pictures on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.loop_s = 0.0
        self.whole_s = 0.0

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Time the block as the whole picture; ends with pictures on the host, so that the device is idle."""
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self._device)
        clock = time.perf_counter if cuda else time.process_time
        started = clock()
        yield
        self.whole_s = clock() - started

    @contextmanager
    def loop(self) -> Iterator[None]:
        """Time the block as the loop."""
        if self._device.type != "cuda":
            started = time.process_time()
            yield
            self.loop_s = time.process_time() - started
            return
        begins, ends = (self._event() for _ in range(2))
        begins.record(torch.cuda.current_stream(self._device))
        yield
        ends.record(torch.cuda.current_stream(self._device))
        ends.synchronize()
        self.loop_s = begins.elapsed_time(ends) / 1e3

    @staticmethod
    def _event() -> Any:  # noqa: ANN401 - torch has no types for its methods
        event: Any = torch.cuda.Event
        return event(enable_timing=True)


class AttentionWitness(Stopwatch):
    """Sees which attention runs in the loop instead of timing it.

    Attributes:
        ops: the attention operators of aten by the shape of their query, (B, heads, tokens, channels).
        kernels: names of the attention kernels that ran on CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.ops: dict[str, str] = {}
        self.kernels: list[str] = []

    @contextmanager
    def loop(self) -> Iterator[None]:
        """Watch the block."""
        with profile(activities=activities_on(self._device), record_shapes=True) as seen:
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        kernels: set[str] = set()
        for event in seen.events() or ():
            name = str(event.name)
            if event.device_type.name == "CUDA":
                if _ATTENTION_KERNEL.search(name):
                    kernels.add(name)
            elif _ATTENTION_OP.match(name) and event.input_shapes:
                self.ops[" x ".join(map(str, event.input_shapes[0]))] = name.replace("aten::", "")
        self.kernels = sorted(kernels)
