"""CatVTON as an `Engine`: one picture per call, with the failures that a service tells apart."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image as PillowImage

from model import embedded, weights
from model.catvton.pipeline import CatVTONPipeline
from model.device import choose_device, choose_dtype, failures_told_apart
from model.interface import (
    EMBEDDED,
    BadPicture,
    Engine,
    EngineOptions,
    GenerationSettings,
    Image,
    OutOfMemory,
    TryOnInputs,
)


def load(options: EngineOptions) -> Engine:
    """The engine that the options describe, on its device.

    Raises:
        ValueError: an unknown device, dtype or variant, or CUDA where there is none.
        WeightsError: a weight file is missing, damaged or does not fit.
    """
    diffusers_logging.disable_default_handler()  # its lines go where the process's lines go
    diffusers_logging.enable_propagation()
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = options.tf32
    if options.weights == EMBEDDED:
        name, work_size_wh = "catvton/embedded", embedded.WORK_SIZE_WH
        pipeline = embedded.load_pipeline(dtype=str(dtype).rpartition(".")[2], device=str(device))
    else:
        name, work_size_wh = f"catvton/{options.variant}", None
        _log_verification(weights.verify(Path(options.weights), "catvton", options.variant))
        pipeline = CatVTONPipeline.from_published(options.weights, options.variant, dtype, device)
    pipeline.set_progress_bar_config(disable=not options.progress)
    return CatVTONEngine(pipeline, name, work_size_wh=work_size_wh)


def _log_verification(verification: weights.Verification) -> None:
    log = logging.getLogger("vton.weights")
    found = {"files": verification.files, "bytes": verification.bytes}
    if verification.verified:
        log.info("weights_verified", extra=found)
    elif verification.recorded:
        log.warning("weights_recorded", extra=found)  # first sight: nothing to compare with
    else:
        log.warning("weights_unverified", extra=found)  # no record, and none can be written


class CatVTONEngine:
    """One CatVTON pipeline behind the `Engine` protocol; immutable after construction.

    Args:
        pipeline: a `CatVTONPipeline` on its device.
        name: what an answer calls it.
        work_size_wh: (width, height) in px at which the pipeline draws, if not at the size asked for; the picture is
            then enlarged with LANCZOS.
    """

    def __init__(self, pipeline: CatVTONPipeline, name: str, *, work_size_wh: tuple[int, int] | None = None) -> None:
        self._pipeline = pipeline
        self._name = name
        self._work_size_wh = work_size_wh

    @property
    def name(self) -> str:
        """What the answer calls it."""
        return self._name

    def generate(self, inputs: TryOnInputs, settings: GenerationSettings) -> Image:
        """The person in the garment, without compositing.

        Returns:
            HWC uint8 RGB of exactly (settings.height, settings.width).
        Raises:
            OutOfMemory: the device had too little memory, twice, the second time with an empty cache.
            DeviceFailed: CUDA reported an error that outlives this call.
            BadPicture: a pixel is not finite, or all are equal.
            EngineError: any other failure inside torch.
        """
        return self.generate_batch([inputs], [settings])[0]

    def generate_batch(self, inputs: Sequence[TryOnInputs], settings: Sequence[GenerationSettings]) -> list[Image]:
        """What `generate` gives for each, made at once.

        Args:
            inputs: of each picture.
            settings: of each picture; they differ in the seed alone.
        Returns:
            A picture for each, as `generate` returns it; on the same device it differs by rounding at most.
        Raises:
            ValueError: the settings differ in more than the seed.
            OutOfMemory, DeviceFailed, BadPicture, EngineError: as of `generate`, for the whole batch.
        """
        if len({replace(each, seed=0) for each in settings}) != 1 or len(inputs) != len(settings):
            raise ValueError("a batch needs settings for each picture that differ in the seed alone")
        size_wh = (settings[0].width, settings[0].height)
        work_size_wh = self._work_size_wh or size_wh
        try:
            pixels = self._draw(inputs, settings, work_size_wh)
        except OutOfMemory:  # the cache is empty now, which may be what was missing
            if len(inputs) > 1:
                raise
            pixels = self._draw(inputs, settings, work_size_wh)
        return [_enlarged(to_picture(each), size_wh) for each in pixels]

    def _draw(
        self, inputs: Sequence[TryOnInputs], settings: Sequence[GenerationSettings], size_wh: tuple[int, int]
    ) -> torch.Tensor:  # (B, 3, H, W) float32 on the CPU
        with failures_told_apart():
            output: Any = self._pipeline(
                [each.person for each in inputs],
                [each.garment for each in inputs],
                [each.mask for each in inputs],
                width=size_wh[0],
                height=size_wh[1],
                num_inference_steps=settings[0].steps,
                guidance_scale=settings[0].guidance,
                generator=[torch.Generator("cpu").manual_seed(each.seed) for each in settings],
                output_type="pt",
            )
            pixels: torch.Tensor = output.images.cpu()
        return pixels


def _enlarged(picture: Image, size_wh: tuple[int, int]) -> Image:
    if picture.shape[1::-1] == size_wh:
        return picture
    return np.asarray(PillowImage.fromarray(picture).resize(size_wh, PillowImage.Resampling.LANCZOS))


def to_picture(pixels: torch.Tensor) -> Image:
    """The (3, H, W) float picture in [0, 1] as HWC uint8; BadPicture if a pixel is not finite or all are equal."""
    if not bool(torch.isfinite(pixels).all()):
        raise BadPicture("the picture holds values that are not finite")
    picture = pixels.mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    if picture.min() == picture.max():
        raise BadPicture(f"every value of the picture is {picture.min()}")
    return picture
