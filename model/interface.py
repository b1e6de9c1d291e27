"""What an engine takes and gives, for every caller above `model/`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # (H, W, 3) RGB, or (H, W) for a mask
EXACT: Final = "exact"  # qualities; this one trades nothing for speed
BALANCED: Final = "balanced"
FAST: Final = "fast"
FAST_STEPS = 20  # of the fast quality, where nobody asks for a number
EMBEDDED = "embedded"  # the value of `weights` that names the small model that ships in the repository


class EngineError(Exception):
    """The engine made no picture; the text is for the log, never for the caller."""


class OutOfMemory(EngineError):
    """The device had too little memory for this picture; the next one may fit."""


class DeviceFailed(EngineError):
    """The device is unusable until the process is replaced (a sticky CUDA error)."""


class BadPicture(EngineError):
    """The model produced NaN or an all-constant picture."""


class PersonNotFound(Exception):
    """The picture shows too little of a person to say where cloth is; the text is for the log."""


@dataclass(frozen=True)
class TryOnInputs:
    """The pictures of one try-on.

    Attributes:
        person: HWC uint8 RGB, upright.
        garment: HWC uint8 RGB on white, any size.
        mask: HW uint8, same height and width as person, 255 where cloth is repainted, else 0.
    """

    person: Image
    garment: Image
    mask: Image


@dataclass(frozen=True)
class GenerationSettings:
    """How one picture is made.

    Attributes:
        steps: denoising steps, 1-100.
        guidance: classifier-free guidance scale, 1-10; 1 turns guidance off.
        seed: 0..2**63-1; the same seed gives the same picture on the same device and versions.
        width: of the picture, px, a multiple of 8.
        height: of the picture, px, a multiple of 8.
        quality: "exact", "balanced" or "fast": what is traded for speed.
        on_step: told (steps done, steps in all) after each step; must not raise. No part of what the picture is.
    """

    steps: int
    guidance: float
    seed: int
    width: int
    height: int
    quality: str = EXACT
    on_step: Callable[[int, int], None] = field(default=lambda _done, _of: None, compare=False, repr=False)


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is loaded.

    Attributes:
        weights: `"embedded"`, or the directory of weights in the published layout.
        variant: which published weights, e.g. "mix", "vitonhd", "dresscode".
        device: "auto", "cuda" or "cpu"; "auto" takes CUDA where there is one.
        dtype: "auto", "float16", "bfloat16" or "float32"; "auto" is float16 on CUDA and float32 on the CPU.
        tf32: allow TF32 matrix products on CUDA.
        compilation: "off", "inductor" or "graphs": what compiles the network's steps.
        progress: show a bar of the denoising steps on stderr.
        memory: "normal", or "small" for cards of 6 GB: pictures are encoded and decoded in tiles, and the networks
            lie in the main memory and come to the card to work.
    """

    weights: str | Path
    variant: str = "mix"
    device: str = "auto"
    dtype: str = "auto"
    tf32: bool = True
    compilation: str = "off"
    progress: bool = False
    memory: str = "normal"


@dataclass(frozen=True)
class MaskerOptions:
    """How a masker is loaded.

    Attributes:
        weights: the directory of weights in the published layout; the embedded masker brings its own.
        device: "auto", "cuda" or "cpu".
        dtype: of the networks on CUDA: "auto" (float16), "float16", "bfloat16" or "float32"; the CPU has float32.
    """

    weights: str | Path = EMBEDDED
    device: str = "auto"
    dtype: str = "auto"


class Engine(Protocol):
    """One loaded model. Immutable after load; called by one thread at a time."""

    @property
    def name(self) -> str:
        """What the answer calls it, e.g. "catvton/mix"; "catvton/embedded" for the small model of the repository."""

    def generate(self, inputs: TryOnInputs, settings: GenerationSettings) -> Image:
        """The person in the garment, without compositing.

        Returns:
            HWC uint8 RGB of exactly (settings.height, settings.width).
        Raises:
            OutOfMemory, DeviceFailed, BadPicture, EngineError.
        """

    def generate_batch(self, inputs: Sequence[TryOnInputs], settings: Sequence[GenerationSettings]) -> list[Image]:
        """What `generate` gives for each, made at once; the settings differ in the seed alone.

        A failure is that of the whole batch, whichever picture is at fault.
        """


class Masker(Protocol):
    """Finds in a picture of a person what a try-on repaints. Immutable after load; called by one thread at a time."""

    def mask(self, person: Image, cloth_type: str) -> Image:
        """Where cloth is repainted; hands, feet, face and background stay free.

        Args:
            person: HWC uint8 RGB, upright.
            cloth_type: "upper", "lower", "overall", "inner" or "outer".
        Returns:
            HW uint8 0/255 at the person's size.
        Raises:
            PersonNotFound: the picture shows too little of a person.
            ValueError: an unknown type, or another shape or dtype.
        """

    def masks(self, person: Image, cloth_types: Sequence[str]) -> dict[str, Image]:
        """What `mask` gives for each of the types, for the work of one."""
