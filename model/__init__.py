"""Engines by name. Importing this package loads no model and no torch."""

from __future__ import annotations

from importlib import import_module

from model.interface import Engine, EngineOptions

ENGINES = {"catvton": "model.catvton.engine"}  # name -> module with load(options) -> Engine


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
