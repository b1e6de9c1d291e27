"""The published weights of the masker's networks: where they lie, and how what was made of them is read.

They are published as pickles. Nothing here reads those; `conversion` makes a safetensors twin of each.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.weights import WeightsError

LIP = "CatVTON/SCHP/exp-schp-201908261155-lip.pth"  # below the directory of weights, as the two others
ATR = "CatVTON/SCHP/exp-schp-201908301523-atr.pth"
DENSEPOSE = "CatVTON/DensePose/model_final_162be9.pkl"
PUBLISHED = (LIP, ATR, DENSEPOSE)


def twin_of(published: Path) -> Path:
    """Where the safetensors of a published file lies."""
    return published.with_suffix(".safetensors")


def load_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a converted file by their published names, float32 on the CPU.

    Raises:
        WeightsError: the file is missing, not converted yet, or no safetensors file.
    """
    if not exists(path) and any(exists(path.with_suffix(suffix)) for suffix in (".pth", ".pkl")):
        raise WeightsError(f"{path} is missing; make it of the published file with `vton weights convert`")
    try:
        state: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as exc:
        raise WeightsError(f"{path} is missing; get it with `vton weights download`") from exc
    except (OSError, SafetensorError) as exc:
        raise WeightsError(f"{path} cannot be read as safetensors: {exc}") from exc
    return state


def exists(path: Path) -> bool:
    """Whether there is something of that name.

    Raises:
        WeightsError: its directory cannot be read.
    """
    try:
        return path.exists()
    except OSError as exc:
        raise WeightsError(f"{path} cannot be read: {exc.strerror}") from exc
