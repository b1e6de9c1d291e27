"""Engines and maskers by name. Importing this package loads no model and no torch."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import cast

from model.interface import EMBEDDED, Engine, EngineOptions, Masker, MaskerOptions

ENGINES = {"catvton": "model.catvton.engine"}  # name -> module with load(options) -> Engine
SCHP = "schp"
MASKERS = {  # name -> module with load(options) -> Masker
    EMBEDDED: "model.embedded.parser",
    SCHP: "model.maskers.auto",
}

SCHP_SIGN = "CatVTON/DensePose/model_final_162be9.safetensors"  # where this file is, its fellows are expected


@contextmanager
def without(packages: Sequence[str]) -> Iterator[None]:
    """Inside the block these packages count as not installed, unless they were imported before.

    diffusers imports what it finds, and asks but once: for processes that need nothing else of it.
    """
    left_out = [name for name in packages if name not in sys.modules]
    for name in left_out:
        sys.modules[name] = cast(ModuleType, None)  # with which an import of it fails
    try:
        yield
    finally:
        for name in left_out:
            sys.modules.pop(name, None)


def device_of(device: str) -> str:
    """ "cuda" or "cpu", as which "auto" counts on this machine; loads torch.

    Raises:
        ValueError: it is none of these, or CUDA where there is none.
    """
    from model.device import choose_device

    return choose_device(device).type


def load_engine(name: str, options: EngineOptions) -> Engine:
    """The engine of that name, loaded and on its device, from files that were proved beside that.

    Raises:
        ValueError: the name is not registered; the text lists the names.
        model.weights.WeightsError: a weight file is missing, damaged or does not fit.
    """
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; one of: {', '.join(sorted(ENGINES))}")
    from model.weights import verified  # the processes that decode pictures need none of it

    own = options.weights == EMBEDDED  # ships with this code and is as good as that
    with nullcontext() if own else verified(Path(options.weights), name, options.variant):
        began = time.monotonic()
        module = import_module(ENGINES[name])  # torch, for seconds
        imported = time.monotonic()
        engine: Engine = module.load(options)
        loaded = time.monotonic()
    took_ms = {"imports_ms": 1000 * (imported - began), "load_ms": 1000 * (loaded - imported)}
    logging.getLogger("vton.model").info("engine_loaded", extra={key: round(ms, 1) for key, ms in took_ms.items()})
    return engine


def load_masker(name: str, options: MaskerOptions) -> Masker:
    """The masker of that name, loaded and on its device.

    Raises:
        ValueError: the name is not registered; the text lists the names.
        model.weights.WeightsError: a weight file is missing, damaged or does not fit.
    """
    if name not in MASKERS:
        raise ValueError(f"unknown masker {name!r}; one of: {', '.join(sorted(MASKERS))}")
    masker: Masker = import_module(MASKERS[name]).load(options)
    return masker


def choose_masker(weights: str | Path) -> str | None:
    """The masker that goes with an engine's weights: of the same kind, and only if its files are there."""
    if weights == EMBEDDED:
        return EMBEDDED
    return SCHP if (Path(weights) / SCHP_SIGN).exists() else None
