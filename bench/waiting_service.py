"""The serving process with an engine that only waits, so that the service is measured and not the processor.

`python -m bench.waiting_service` is `container/serve` with one more engine to choose from: `VTON_ENGINE=waiting`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from container import server
from model import ENGINES
from model.interface import Engine, EngineOptions, GenerationSettings, Image, TryOnInputs

NAME = "waiting"
PICTURE_S = "BENCH_PICTURE_S"  # the environment variable with the seconds that a picture takes


class WaitingEngine:
    """Waits, uses no processor, and gives the garment for the picture.

    Args:
        picture_s: seconds that each picture takes.
    """

    name = NAME

    def __init__(self, picture_s: float) -> None:
        self._picture_s = picture_s

    def generate(self, inputs: TryOnInputs, settings: GenerationSettings) -> Image:
        """The garment, which the service has brought to the size of the picture: HWC uint8 RGB."""
        del settings
        time.sleep(self._picture_s)
        return inputs.garment

    def generate_batch(self, inputs: Sequence[TryOnInputs], settings: Sequence[GenerationSettings]) -> list[Image]:
        """What `generate` gives for each, one after another."""
        return [self.generate(*each) for each in zip(inputs, settings)]


def load(options: EngineOptions) -> Engine:
    """The engine that waits as long as the environment says."""
    del options
    return WaitingEngine(float(os.environ[PICTURE_S]))


def main() -> int:
    """What `container/serve` does, with the waiting engine in the registry; the exit status."""
    ENGINES[NAME] = "bench.waiting_service"
    return server.main()


if __name__ == "__main__":
    sys.exit(main())
