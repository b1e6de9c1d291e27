"""CatVTON as an `Engine`: one picture per call, with the failures that a service tells apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image as PillowImage

from model import embedded, geometry
from model.catvton.compiling import OFF, compile_unet
from model.catvton.knobs import QUALITIES
from model.catvton.latent_cache import LatentCache
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

MEMORIES = ("normal", "small")


def load(options: EngineOptions) -> Engine:
    """The engine that the options describe, on its device; `model.load_engine` proves its files beside that.

    Raises:
        ValueError: an unknown device, dtype, memory or variant, CUDA where there is none, or small memory compiled.
        WeightsError: a weight file is missing or does not fit.
    """
    diffusers_logging.disable_default_handler()  # its lines go where the process's lines go
    diffusers_logging.enable_propagation()
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    small = _is_small(options.memory)
    if small and options.compilation != OFF:
        raise ValueError("memory small excludes compilation: what comes and goes cannot be compiled in one piece")
    home = torch.device("cpu") if small else device  # where the weights lie between two pictures
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = options.tf32
    if options.weights == EMBEDDED:
        name, work_size_wh = "catvton/embedded", embedded.WORK_SIZE_WH
        pipeline = embedded.load_pipeline(dtype=str(dtype).rpartition(".")[2], device=str(home))
    else:
        name, work_size_wh = f"catvton/{options.variant}", None
        pipeline = CatVTONPipeline.from_published(options.weights, options.variant, dtype, home)
    if small:
        spare_memory(pipeline, device)
    if device.type == "cuda":  # tensor cores read pictures pixel by pixel
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    compile_unet(pipeline.unet, options.compilation)
    pipeline.latent_cache = LatentCache()
    pipeline.set_progress_bar_config(disable=not options.progress)
    return CatVTONEngine(pipeline, name, work_size_wh=work_size_wh)


def spare_memory(pipeline: CatVTONPipeline, device: torch.device) -> None:
    """Let a pipeline that lies on the CPU draw on the device with little of its memory, by diffusers' own switches.

    Args:
        pipeline: from now on works in tiles of the VAE's sample size, one picture of a batch after the other; on CUDA
            its networks lie in the main memory and come to the card to work, which takes accelerate.
        device: where it draws.
    """
    pipeline.enable_vae_tiling()
    pipeline.vae.enable_slicing()
    if device.type == "cuda":
        pipeline.enable_model_cpu_offload(device=device)


def _is_small(memory: str) -> bool:
    if memory not in MEMORIES:
        raise ValueError(f"unknown memory {memory!r}; one of: {', '.join(MEMORIES)}")
    return memory == "small"


class CatVTONEngine:
    """One CatVTON pipeline behind the `Engine` protocol; immutable after construction.

    Args:
        pipeline: a `CatVTONPipeline` on its device.
        name: what an answer calls it.
        work_size_wh: (width, height) in px at which the pipeline draws, if not at the size asked for; a person of
            another aspect lies whole in the middle of it. The person's part of the picture is then enlarged with
            LANCZOS.
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
        inputs = [_at_aspect(each, size_wh, work_size_wh) for each in inputs]
        try:
            pictures = self._draw(inputs, settings, work_size_wh)
        except OutOfMemory:  # the cache is empty now, which may be what was missing
            if len(inputs) > 1:
                raise
            pictures = self._draw(inputs, settings, work_size_wh)
        return [_enlarged(each, size_wh) for each in pictures]

    def _draw(
        self, inputs: Sequence[TryOnInputs], settings: Sequence[GenerationSettings], size_wh: tuple[int, int]
    ) -> list[Image]:
        def told(_pipeline: object, index: int, _timestep: object, latents: dict[str, Any]) -> dict[str, Any]:
            for each in settings:
                each.on_step(index + 1, each.steps)
            return latents

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
                callback_on_step_end=told,
                knobs=QUALITIES[settings[0].quality],
            )
            return [to_picture(pixels) for pixels in output.images]


def _at_aspect(inputs: TryOnInputs, size_wh: tuple[int, int], work_size_wh: tuple[int, int]) -> TryOnInputs:
    """The inputs, widened where the work size has another aspect, since the pipeline crops to that.

    Around the person and the mask their edges are repeated, so that cloth which the mask hides does not show there.
    """
    if size_wh[0] * work_size_wh[1] == size_wh[1] * work_size_wh[0]:
        return inputs
    left, top, right, bottom = geometry.fit_box(*size_wh, *work_size_wh)
    around = ((top, work_size_wh[1] - bottom), (left, work_size_wh[0] - right))
    cropped = (geometry.crop_resize(PillowImage.fromarray(each), *size_wh) for each in (inputs.person, inputs.mask))
    person, mask = (_resized(np.asarray(each), (right - left, bottom - top)) for each in cropped)
    garment = geometry.trim_white(PillowImage.fromarray(inputs.garment), *work_size_wh)
    return TryOnInputs(np.pad(person, (*around, (0, 0)), "edge"), np.asarray(garment), np.pad(mask, around, "edge"))


def _enlarged(picture: Image, size_wh: tuple[int, int]) -> Image:
    left, top, right, bottom = geometry.fit_box(*size_wh, *picture.shape[1::-1])
    return _resized(picture[top:bottom, left:right], size_wh)


def _resized(picture: Image, size_wh: tuple[int, int]) -> Image:
    if picture.shape[1::-1] == size_wh:
        return picture
    return np.asarray(PillowImage.fromarray(picture).resize(size_wh, PillowImage.Resampling.LANCZOS))


def to_picture(pixels: torch.Tensor) -> Image:
    """The (3, H, W) float picture in [0, 1] as HWC uint8; BadPicture if a pixel is not finite or all are equal.

    It is rounded where it is, so that a quarter of the bytes leaves the device.
    """
    if not bool(torch.isfinite(pixels).all()):
        raise BadPicture("the picture holds values that are not finite")
    picture = pixels.mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    if picture.min() == picture.max():
        raise BadPicture(f"every value of the picture is {picture.min()}")
    return picture
