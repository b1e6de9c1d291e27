"""What a timing depends on besides the code: versions, load, and the GPU's clocks. Everything is only read."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from contextlib import suppress
from importlib import metadata
from typing import Any

import diffusers
import torch

_ASKED_S = 10.0  # of nvidia-smi, which answers in well under a second
_FIELDS = (
    "driver_version",
    "clocks.sm",  # MHz
    "clocks.mem",  # MHz
    "clocks.max.sm",  # MHz
    "power.draw",  # W
    "power.limit",  # W
    "temperature.gpu",  # degrees Celsius
    "utilization.gpu",  # per cent
)
_PREFIXES = ("TORCH", "CUDA", "CUDNN", "CUBLAS", "NVIDIA_TF32", "OMP_", "MKL_", "PYTORCH")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of everything that a timing depends on; what is not there is left out."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
    if torch.version.cuda and cudnn:
        found.update(cuda=torch.version.cuda, cudnn=str(cudnn))
        with suppress(metadata.PackageNotFoundError):
            found.update(triton=metadata.version("triton"))
    return found


def load_average() -> float:
    """Processes that wanted to run in the last minute, mean."""
    return round(os.getloadavg()[0], 2)


def environment() -> dict[str, str]:
    """The variables that change what torch and CUDA do."""
    return {name: text for name, text in sorted(os.environ.items()) if name.startswith(_PREFIXES)}


def gpu_state(device: torch.device) -> dict[str, Any] | None:
    """Clocks, power and temperature of the GPU now, as nvidia-smi tells them; None where it cannot be asked."""
    command = shutil.which("nvidia-smi")
    if device.type != "cuda" or command is None:
        return None
    identity = str(torch.cuda.get_device_properties(device).uuid)
    asked = [command, f"--query-gpu=uuid,{','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=_ASKED_S, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return parsed_state(done.stdout, identity)


def parsed_state(answer: str, identity: str) -> dict[str, Any] | None:
    """What nvidia-smi's line says of the GPU with that UUID; None where it is not among the lines."""
    for line in answer.splitlines():
        uuid, *values = (part.strip() for part in line.split(","))
        if len(values) == len(_FIELDS) and uuid.endswith(identity):  # nvidia-smi writes "GPU-" before it
            return {name: _number(value) for name, value in zip(_FIELDS, values)}
    return None


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
