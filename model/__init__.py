"""Engines and maskers by name. Importing this package loads no model and no torch."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from model.interface import EMBEDDED, Engine, EngineOptions, Masker, MaskerOptions

ENGINES = {"catvton": "model.catvton.engine"}  # name -> module with load(options) -> Engine
SCHP = "schp"
MASKERS = {  # name -> module with load(options) -> Masker
    EMBEDDED: "model.embedded.parser",
    SCHP: "model.maskers.auto",
}

SCHP_SIGN = "CatVTON/DensePose/model_final_162be9.safetensors"  # where this file is, its fellows are expected


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
