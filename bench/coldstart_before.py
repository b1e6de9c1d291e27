"""The container process as it started before, for comparison: hash, then load, then a warm-up at full size.

It is made of the service's own parts and behaves as `container/serve` does; `bench.coldstart` starts it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import structlog

from container.decoder import ProcessDecoder
from container.notify import NullNotifier
from container.server import doors, serve
from container.settings import Settings
from container.storage import LocalStorage
from container.telemetry import configure_logging
from container.wiring import WARM_UP_STEPS, Ports, assemble, https_fetcher
from container.worker import Models
from model import ENGINES, weights
from model.interface import EngineOptions, GenerationSettings, TryOnInputs

DECODERS = 2

log = structlog.get_logger()


def main() -> int:
    """Serves as `container/serve` does with these settings, of which the place of results is a directory."""
    settings = Settings.from_env(os.environ)
    configure_logging(settings.log_level)
    null = NullNotifier()
    storage = LocalStorage(settings.output_dir or Path())
    ports = Ports(https_fetcher(settings), ProcessDecoder(DECODERS), storage, null, null)
    app = assemble(settings, ports, partial(_load, settings), partial(_warm_up, settings))
    log.info("starting", **settings.model_dump(mode="json"))
    status = serve(doors(app), app)
    logging.shutdown()
    os._exit(status)


def _load(settings: Settings) -> Models:
    """Every step after the one before it."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    began = time.monotonic()
    module = import_module(ENGINES[settings.engine])
    imported = time.monotonic()
    found = weights.verify(Path(settings.weights), settings.engine, settings.variant)
    verified = time.monotonic()
    log.info("weights_verified", files=found.files, elapsed_ms=1000 * (verified - imported))
    engine = module.load(EngineOptions(settings.weights, settings.variant, settings.device, settings.dtype))
    load_ms = 1000 * (time.monotonic() - verified)
    log.info("engine_loaded", imports_ms=1000 * (imported - began), load_ms=load_ms)
    return Models(engine)


def _warm_up(settings: Settings, models: Models) -> None:
    began = time.monotonic()
    width, height = settings.width, settings.height
    grey = np.full((height, width, 3), 128, np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2] = 255
    models.engine.generate(TryOnInputs(grey, grey, mask), GenerationSettings(WARM_UP_STEPS, 2.0, 0, width, height))
    log.info("warmed_up", width=width, height=height, steps=WARM_UP_STEPS, elapsed_ms=1000 * (time.monotonic() - began))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    sys.exit(main())
