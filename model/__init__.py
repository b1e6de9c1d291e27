"""Engines and maskers by name. Importing this package loads no model and no torch."""

from __future__ import annotations

from importlib import import_module

from model.interface import Engine, EngineOptions, Masker

ENGINES = {"catvton": "model.catvton.engine"}  # name -> module with load(options) -> Engine
MASKERS = {"embedded": "model.embedded.parser"}  # name -> module with load() -> Masker


def load_engine(name: str, options: EngineOptions) -> Engine:
    """The engine of that name, loaded and on its device.

    Raises:
        ValueError: the name is not registered; the text lists the names.
        model.weights.WeightsError: a weight file is missing, damaged or does not fit.
    """
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; one of: {', '.join(sorted(ENGINES))}")
    engine: Engine = import_module(ENGINES[name]).load(options)
    return engine


def load_masker(name: str) -> Masker:
    """The masker of that name, loaded.

    Raises:
        ValueError: the name is not registered; the text lists the names.
        model.weights.WeightsError: a weight file is missing, damaged or does not fit.
    """
    if name not in MASKERS:
        raise ValueError(f"unknown masker {name!r}; one of: {', '.join(sorted(MASKERS))}")
    masker: Masker = import_module(MASKERS[name]).load()
    return masker
