"""An engine that waits and paints, with faults on request, for rows about the service and not about the picture.

What it does is decided by files in the folder that `FAULTS_CONTROL` names, read anew for each picture.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Callable

import numpy as np

from model.interface import (
    BadPicture,
    Engine,
    EngineOptions,
    GenerationSettings,
    Image,
    OutOfMemory,
    TryOnInputs,
)

CONTROL = "FAULTS_CONTROL"
HOLD, PACE, KEEP, FAULT, BEGUN = "hold", "pace", "keep", "fault", "begun"  # files of the folder
HOLD_LIMIT_S = 90.0
SECRET = "/app/secret https://images.example/a.jpg?X-Amz-Signature=5ecret at 0x7f0123456789"
FAULTS: dict[str, Callable[[], Exception]] = {
    "oom": lambda: OutOfMemory("CUDA out of memory"),
    "bad": lambda: BadPicture("the picture holds values that are not finite"),
    "unforeseen": lambda: KeyError(SECRET),
}


def load(options: EngineOptions) -> Engine:
    """The painter of the folder in the environment."""
    del options
    return Painter(Path(os.environ[CONTROL]))


class Painter:
    """Paints a ramp of a colour that the seed chooses.

    Args:
        control: the folder. While `hold` is there, a picture waits; `pace` has the seconds that one takes; `keep`
            makes it leave its inputs in `inputs.npz`; `fault` names one of FAULTS for the next picture.
    """

    name = "stand-in/painter"

    def __init__(self, control: Path) -> None:
        self._control = control

    def generate(self, inputs: TryOnInputs, settings: GenerationSettings) -> Image:
        """HWC uint8 RGB of the size that the settings ask for."""
        began = time.monotonic()
        with (self._control / BEGUN).open("a") as begun:
            begun.write(f"{settings.seed}\n")
        pace = self._read(PACE)
        while time.monotonic() - began < float(pace or 0):
            time.sleep(0.002)
        while (self._control / HOLD).exists() and time.monotonic() - began < HOLD_LIMIT_S:
            time.sleep(0.005)
        self._fail_if_asked()
        if (self._control / KEEP).exists():
            np.savez(self._control / "inputs.npz", person=inputs.person, garment=inputs.garment, mask=inputs.mask)
        return _painted(settings)

    def generate_batch(self, inputs: Sequence[TryOnInputs], settings: Sequence[GenerationSettings]) -> list[Image]:
        """One after the other."""
        return [self.generate(*pair) for pair in zip(inputs, settings)]

    def _fail_if_asked(self) -> None:
        asked = self._read(FAULT)
        if not asked:
            return
        order = json.loads(asked)
        if order["times"] == 1:
            (self._control / FAULT).unlink()
        else:
            (self._control / FAULT).write_text(json.dumps({**order, "times": order["times"] - 1}))
        raise FAULTS[order["kind"]]()

    def _read(self, name: str) -> str:
        try:
            return (self._control / name).read_text()
        except FileNotFoundError:
            return ""


def _painted(settings: GenerationSettings) -> Image:
    colour = np.random.default_rng(settings.seed).integers(0, 200, 3, dtype=np.uint8)
    ramp = np.linspace(0, 55, settings.width).astype(np.uint8)
    picture = np.empty((settings.height, settings.width, 3), np.uint8)
    picture[:] = colour + ramp[:, None]
    return picture
