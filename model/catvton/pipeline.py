"""CatVTON as a diffusers pipeline: person and garment side by side in one latent picture, no text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, ClassVar, Optional, Union, get_type_hints

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from model.catvton.attention import without_cross_attention
from model.catvton.checkpoint import load_components
from model.catvton.denoising import Denoising, check_halves
from model.catvton.inputs import (
    Pictures,
    check_generator,
    check_scales,
    garment_tensor,
    mask_tensor,
    matched_lists,
    person_tensor,
)
from model.catvton.knobs import EXACT, Knobs
from model.catvton.latent_cache import LatentCache, content_key
from model.catvton.schedule import Generators, Steps, most_steps, solver_like, steps_of

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Images = Union[list[Image.Image], NDArray[np.float32], torch.Tensor]
StepCallback = Callable[["CatVTONPipeline", int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@dataclass
class CatVTONPipelineOutput(BaseOutput):  # type: ignore[misc]
    """What one call made.

    Attributes:
        images: in the output type that was asked for.
        nsfw_detected: one flag per picture, or None where nothing was checked.
    """

    images: Images
    nsfw_detected: list[bool] | None


class CatVTONPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Dresses a person in a garment.

    Args:
        vae: encodes and decodes pictures.
        unet: takes twice the latent channels plus one; its cross-attention, if it has any, is left behind.
        scheduler: any of diffusers; the published weights go with DDIM.
        safety_checker: the one of Stable Diffusion 1; needs feature_extractor.
        feature_extractor: prepares pictures for safety_checker.
    Raises:
        ValueError: the components do not fit together.
    Source: CatVTON (arXiv 2407.15886).
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components: ClassVar[list[str]] = ["safety_checker", "feature_extractor"]
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["safety_checker"]

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        safety_checker: Optional[torch.nn.Module] = None,  # noqa: UP045 - evaluated below
        feature_extractor: Optional[object] = None,  # noqa: UP045
    ) -> None:
        super().__init__()
        wanted_channels = 2 * vae.config.latent_channels + 1
        if unet.config.in_channels != wanted_channels:
            raise ValueError(f"the unet takes {unet.config.in_channels} channels, the vae needs {wanted_channels}")
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("a safety_checker needs a feature_extractor")
        self.register_modules(
            vae=vae,
            unet=without_cross_attention(unet),
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_cache: LatentCache | None = None  # set one, and no picture is encoded twice

    # diffusers compares loaded components with these classes, and 0.36 does not read them from strings.
    __init__.__annotations__.update(get_type_hints(__init__))

    @classmethod
    def from_published(
        cls,
        weights_dir: str | Path,
        variant: str = "mix",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> CatVTONPipeline:
        """The pipeline of the published files, without a safety checker.

        Args:
            weights_dir: holds `stable-diffusion-inpainting`, `sd-vae-ft-mse` and `CatVTON`.
            variant: "mix", "vitonhd" or "dresscode".
            dtype: of the weights in memory, whatever the files have.
            device: where the weights go.
        Raises:
            ValueError: an unknown variant.
            WeightsError: a file is missing, is no safetensors file, or does not fit; the text names it.
        """
        return cls(*load_components(Path(weights_dir), variant, dtype=dtype, device=torch.device(device)))

    @torch.no_grad()
    def __call__(
        self,
        person_image: Pictures,
        garment_image: Pictures,
        mask_image: Pictures,
        height: int = 1024,
        width: int = 768,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.5,
        eta: float = 1.0,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        knobs: Knobs = EXACT,
    ) -> CatVTONPipelineOutput | tuple[Images, list[bool] | None]:
        """Dress each person in the garment of the same place in the lists.

        Args:
            person_image: a Pillow image, an HWC uint8 RGB array, or a list of them (a batch).
            garment_image: the same; fitted whole, on white.
            mask_image: the same or HW uint8; of the person's size, 128 and above where cloth is repainted.
            height, width: of the result, px, multiples of the VAE's factor (8).
            num_inference_steps: at least 1, at most what the schedule has room for.
            guidance_scale: 1 or less turns guidance off, which halves the work.
            eta: share of fresh noise in each step, for schedulers that take it; 1 is DDPM, 0 deterministic DDIM.
            generator: one for the batch, or one per picture so that a picture does not depend on its neighbours.
            output_type: "pil", "np" (NHWC float32 in [0, 1]), "pt" (BCHW float32 in [0, 1]) or "latent".
            return_dict: False returns the tuple (images, nsfw_detected).
            callback_on_step_end: called with (pipeline, step, timestep, {"latents": ...}); answers with such a dict.
            knobs: what is traded for speed; by default nothing.
        Raises:
            ValueError: an argument is of the wrong type or size, or the lists differ in length.
        """
        # 1. Check the arguments
        people, garments, masks = matched_lists(person_image, garment_image, mask_image)
        check_generator(generator, len(people))
        check_scales(guidance_scale=guidance_scale, eta=eta)
        self.check_settings(height, width, num_inference_steps, output_type, knobs)
        # 2. Crop, fit and scale the pictures
        person = person_tensor(people, width, height)  # (B, 3, H, W)
        garment = garment_tensor(garments, width, height)  # (B, 3, H, W)
        mask = mask_tensor(masks, width, height)  # (B, 1, H, W)
        # 3. Encode what the UNet is shown
        condition = self.encode_condition(person * (mask < 0.5), garment, mask, guided=guidance_scale > 1)
        # 4. Draw the noise
        scheduler = solver_like(self.scheduler, knobs.solver, num_inference_steps)
        latents = self.prepare_latents(len(people), height, width, generator).mul(scheduler.init_noise_sigma)
        steps = steps_of(scheduler, latents, generator, eta)
        # 5. Denoise
        latents = self.denoise(latents, condition, guidance_scale, steps, knobs, callback_on_step_end)
        # 6. Keep the person's half and decode it
        latents = self.unscale(latents[..., : latents.shape[-2] // 2, :])  # (B, C, H/8, W/8)
        flags = None
        images: Images = latents
        if output_type != "latent":
            images, flags = self.check_safety(self.decode(latents))
            images = self.convert(images, output_type)
        # 7. Hand the memory back
        self.maybe_free_model_hooks()
        return CatVTONPipelineOutput(images, flags) if return_dict else (images, flags)

    def check_settings(
        self, height: int, width: int, num_inference_steps: int, output_type: str, knobs: Knobs = EXACT
    ) -> None:
        """Raise ValueError for a size, a number of steps or an output type that cannot be had, with these knobs."""
        for name, size in (("height", height), ("width", width)):
            if not isinstance(size, int) or size < 1 or size % self.vae_scale_factor:
                raise ValueError(f"{name} must be a positive multiple of {self.vae_scale_factor}, not {size!r}")
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be a whole number of at least 1, not {num_inference_steps!r}")
        most = most_steps(self.scheduler, knobs.solver)
        if num_inference_steps > most:
            raise ValueError(
                f"num_inference_steps must be at most {most} with {knobs.solver}, not {num_inference_steps}"
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}")
        check_halves(self.unet, height // self.vae_scale_factor, knobs, num_inference_steps)

    def encode_condition(
        self, masked: torch.Tensor, garment: torch.Tensor, mask: torch.Tensor, *, guided: bool
    ) -> torch.Tensor:
        """The channels that stay the same in every step: (B or 2B, 1 + C, 2H/8, W/8), unconditional first."""
        masked_latent, garment_latent = self.encode(masked), self.encode(garment)  # (B, C, H/8, W/8)
        mask = mask.to(masked_latent.device)
        mask_latent = functional.interpolate(mask, size=masked_latent.shape[-2:], mode="nearest")
        mask_canvas = torch.cat([mask_latent, torch.zeros_like(mask_latent)], dim=-2)  # (B, 1, 2H/8, W/8)
        with_garment = torch.cat([mask_canvas, torch.cat([masked_latent, garment_latent], dim=-2)], dim=1)
        if not guided:
            return with_garment
        no_garment = torch.cat([masked_latent, torch.zeros_like(garment_latent)], dim=-2)
        return torch.cat([torch.cat([mask_canvas, no_garment], dim=1), with_garment])

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The mode of the posterior of pictures in [-1, 1], scaled: (B, C, H/8, W/8) float32.

        With a `latent_cache`, pictures that are on the CPU are looked up there, and encoded one by one.
        """
        if self.latent_cache is None or pixels.device.type != "cpu":
            return self._encode(pixels)
        return torch.cat([self._encoded_once(picture, self.latent_cache) for picture in pixels])

    def _encoded_once(self, picture: torch.Tensor, cache: LatentCache) -> torch.Tensor:
        key = content_key(picture)
        latents = cache.recall(key)
        if latents is None:
            latents = self._encode(picture[None])
            cache.keep(key, latents)
        return latents

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.to(self._execution_device, self.vae.dtype)
        latents: torch.Tensor = self.vae.encode(pixels).latent_dist.mode().float()
        return latents.sub(self.vae.config.shift_factor or 0.0).mul(self.vae.config.scaling_factor)

    def prepare_latents(self, batch: int, height: int, width: int, generator: Generators) -> torch.Tensor:
        """Standard noise: (B, C, 2H/8, W/8), float32 so that every dtype draws the same numbers."""
        factor = self.vae_scale_factor
        shape = (batch, self.vae.config.latent_channels, 2 * height // factor, width // factor)
        noise: torch.Tensor = randn_tensor(shape, generator, device=self._execution_device, dtype=torch.float32)
        return noise

    def denoise(
        self,
        latents: torch.Tensor,
        condition: torch.Tensor,
        guidance_scale: float,
        steps: Steps,
        knobs: Knobs = EXACT,
        callback_on_step_end: StepCallback | None = None,
    ) -> torch.Tensor:
        """The latents, (B, C, 2H/8, W/8), after every step."""
        denoising = Denoising(self.unet, condition, len(latents), guidance_scale, knobs, steps.timesteps)
        indices: Iterable[int] = self.progress_bar(range(len(steps.timesteps)))
        for index in indices:
            prediction = denoising.predict(steps.scaled(latents, index), index)
            latents = steps.after(latents, prediction, index)
            if callback_on_step_end is not None:
                told = callback_on_step_end(self, index, steps.timesteps[index], {"latents": latents})
                latents = told.get("latents", latents)
        return latents

    def unscale(self, latents: torch.Tensor) -> torch.Tensor:
        """What the VAE decodes: the latents divided by its scaling factor."""
        return latents.div(self.vae.config.scaling_factor).add(self.vae.config.shift_factor or 0.0)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures of unscaled latents: (B, 3, H, W) float32 in [0, 1]."""
        pixels: torch.Tensor = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def check_safety(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[bool] | None]:
        """The pictures, (B, 3, H, W), with flagged ones black, and the flags; None without a safety checker."""
        if self.safety_checker is None:
            return pixels, None
        shown = self.feature_extractor(self.convert(pixels, "pil"), return_tensors="pt").pixel_values
        shown = shown.to(device=pixels.device, dtype=self.safety_checker.dtype)
        checked, flags = self.safety_checker(images=pixels, clip_input=shown)
        return checked, [bool(flag) for flag in flags]

    def convert(self, pixels: torch.Tensor, output_type: str) -> Images:
        """Pictures of (B, 3, H, W) in [0, 1] as the caller wants them: "pil", "np" or "pt"."""
        if output_type == "pt":
            return pixels
        arrays: NDArray[np.float32] = VaeImageProcessor.pt_to_numpy(pixels)
        if output_type == "np":
            return arrays
        people: list[Image.Image] = VaeImageProcessor.numpy_to_pil(arrays)
        return people

    def enable_vae_tiling(self) -> None:
        """Encode and decode in tiles: less memory, faint seams."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Encode and decode whole pictures again."""
        self.vae.disable_tiling()
