"""Weights of the masking networks that follow from their names, so that a golden needs no weight file.

A tensor is drawn from numpy's `default_rng(crc32(key) + salt)` and scaled so that activations keep their size.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

GOLDENS = Path(__file__).parent / "goldens" / "masking"


def schp_state_dict(dataset: str) -> dict[str, torch.Tensor]:
    """The 603 float32 tensors of "atr" or "lip" in the published order and naming, `module.` included."""
    arrays = _arrays(f"schp/keys_{dataset}.json") | _overrides("schp")[dataset]
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def densepose_state_dict() -> dict[str, NDArray[np.float32]]:
    """The 335 float32 arrays in the published order and naming."""
    return _arrays("densepose/keys_densepose.json") | _overrides("densepose")


def recipe_array(key: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The array of that name before any override; float32, save int64 for a batch counter."""
    recipe = _recipe()
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    rng = np.random.default_rng(zlib.crc32(key.encode()) + recipe["salt"].get(key, 0))
    if key.endswith(".running_mean"):
        drawn = 0.1 * rng.standard_normal(shape)
    elif key.endswith(".running_var"):
        drawn = rng.uniform(0.5, 1.5, shape) * recipe["running_var_scale"].get(key, 1.0)
    elif key.endswith(".bias"):
        drawn = 0.05 * rng.standard_normal(shape)
    elif key.endswith(".weight") and len(shape) == 1:
        drawn = rng.uniform(0.5, 1.5, shape) * _gamma_scale(key)
    else:
        fan_in = math.prod(shape[1:])
        drawn = rng.standard_normal(shape) * np.sqrt(2 / fan_in) * recipe["scale_after_fan_in"].get(key, 1.0)
    return drawn.astype(np.float32)


def _gamma_scale(key: str) -> float:
    scales: dict[str, float] = _recipe()["norm_gamma_scale_suffix"]
    return next((scale for suffix, scale in scales.items() if key.endswith(suffix)), 1.0)


def _recipe() -> Any:
    return json.loads((GOLDENS / "recipe.json").read_text())


def _arrays(key_file: str) -> dict[str, NDArray[np.float32]]:
    shapes = json.loads((GOLDENS / key_file).read_text())
    return {key: recipe_array(key, tuple(shape)) for key, shape in shapes}


def _overrides(network: str) -> Any:
    def arrays(values: Any) -> Any:
        if isinstance(values, list):
            return np.array(values, np.float32)
        return {key: arrays(value) for key, value in values.items()}

    return arrays(json.loads((GOLDENS / network / "overrides.json").read_text()))
