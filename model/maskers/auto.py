"""Photos to masks: three networks look once, and the masks of all types follow from what they see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from model import weights
from model.device import choose_device, choose_dtype, failures_told_apart
from model.interface import Image, MaskerOptions, PersonNotFound
from model.maskers.agnostic import cloth_agnostic_mask
from model.maskers.densepose import DensePose
from model.maskers.labels import PARTS
from model.maskers.published import ATR, DENSEPOSE, LIP, load_state, twin_of
from model.maskers.schp import SCHP


@dataclass(frozen=True)
class Reading:
    """What the networks see in a photo; HW uint8 labels at its size.

    Attributes:
        densepose: parts of the body, 0..24.
        lip: clothes and body, 0..19.
        atr: the same otherwise, 0..17.
    """

    densepose: Image
    lip: Image
    atr: Image


class AutoMasker:
    """SCHP twice and DensePose behind the `Masker` protocol; immutable after construction.

    Of several people the one that DensePose is most certain of is looked at, but the clothes of all.

    Args:
        densepose: finds the body.
        lip: the parser of 20 classes.
        atr: the parser of 18 classes.
    """

    def __init__(self, densepose: DensePose, lip: SCHP, atr: SCHP) -> None:
        self.densepose = densepose
        self.lip = lip
        self.atr = atr

    def mask(self, person: Image, cloth_type: str) -> Image:
        """Where cloth is repainted for one type.

        Args:
            person: HWC uint8 RGB, upright, of any size.
            cloth_type: "upper", "lower", "overall", "inner" or "outer".
        Returns:
            HW uint8 0/255 at the person's size.
        Raises:
            PersonNotFound: DensePose sees nobody.
            ValueError: another type, shape or dtype.
            OutOfMemory, DeviceFailed, EngineError, BadPicture: the device or a network failed.
        """
        return self.masks(person, [cloth_type])[cloth_type]

    def masks(self, person: Image, cloth_types: Sequence[str]) -> dict[str, Image]:
        """What `mask` gives for each type; every network runs once, whatever the number of types."""
        unknown = [name for name in cloth_types if name not in PARTS]
        if unknown:
            raise ValueError(f"cloth_type must be one of {', '.join(PARTS)}, not {unknown[0]!r}")
        seen = self.read(person)
        return {name: cloth_agnostic_mask(seen.densepose, seen.lip, seen.atr, name) for name in cloth_types}

    def read(self, person: Image) -> Reading:
        """What the networks see, DensePose first, so that a photo of nobody costs one network."""
        with failures_told_apart():
            found = self.densepose.find(person)
            if found is None:
                raise PersonNotFound("DensePose finds nobody")
            return Reading(found.labels, self.lip.parse(person), self.atr.parse(person))


def load(options: MaskerOptions) -> AutoMasker:
    """The masker with the published weights, which `vton weights convert` has made safetensors.

    Raises:
        ValueError: an unknown device or dtype, or CUDA where there is none.
        WeightsError: a file is missing, damaged, not converted yet, or does not fit.
    """
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device) if device.type == "cuda" else torch.float32
    folder = Path(options.weights)
    with weights.verified(folder, "masker", "schp"):
        states = (load_state(twin_of(folder / name)) for name in (LIP, ATR))
        lip, atr = (SCHP.from_state_dict(state, device, dtype=dtype) for state in states)
        densepose = DensePose.from_state_dict(load_state(twin_of(folder / DENSEPOSE)), device, dtype)
    return AutoMasker(densepose, lip, atr)
