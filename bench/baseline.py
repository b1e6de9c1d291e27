"""What one writes with stock diffusers, to compare with: its eager UNet, its attention, its scheduler's step.

The loop asks the scheduler on the device in every step, and the picture is turned to whole numbers on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from torch.nn import functional


class SkipProcessor:
    """The processor of a cross-attention without text: it hands on what it is given."""

    def __call__(self, _attention: torch.nn.Module, hidden_states: torch.Tensor, **_options: object) -> torch.Tensor:
        """The hidden states, (B, tokens, channels), as they came."""
        return hidden_states


@dataclass(frozen=True)
class Conditions:
    """What one picture is made of.

    Attributes:
        person, garment: (B, 3, H, W) in [-1, 1].
        mask: (B, 1, H, W), 1 where cloth is repainted, else 0.
    """

    person: torch.Tensor
    garment: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Baseline:
    """The plain loop over stock modules; `stock_unet` gives one the weights of another pipeline."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDIMScheduler

    @torch.no_grad()
    def encode(self, conditions: Conditions, *, guided: bool) -> torch.Tensor:
        """Mask and pictures as latents, unconditional first: (B or 2B, 1 + C, 2H/8, W/8)."""
        masked = conditions.person * (conditions.mask < 0.5)
        person, garment = (
            self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode() * self.vae.config.scaling_factor
            for pixels in (masked, conditions.garment)
        )
        mask = functional.interpolate(conditions.mask, size=person.shape[-2:], mode="nearest").to(person.dtype)
        mask = torch.cat([mask, torch.zeros_like(mask)], dim=-2)
        shown = torch.cat([mask, torch.cat([person, garment], dim=-2)], dim=1)
        if not guided:
            return shown
        nothing = torch.cat([person, torch.zeros_like(garment)], dim=-2)
        return torch.cat([torch.cat([mask, nothing], dim=1), shown])

    @torch.no_grad()
    def denoise(
        self,
        condition: torch.Tensor,
        *,
        steps: int,
        guidance: float,
        generator: torch.Generator | None,
        eta: float = 1.0,
        timesteps_on: torch.device | None = None,
    ) -> torch.Tensor:
        """Latents from noise: (B, C, 2H/8, W/8) float32.

        Args:
            condition: of `encode`; two branches if guided.
            steps: of the scheduler.
            guidance: scale; above 1 the condition has two branches.
            generator: on the CPU or the device.
            eta: share of fresh noise in each step.
            timesteps_on: where the timesteps lie, if not where the condition is.
        """
        branches = 2 if guidance > 1 else 1
        device = condition.device
        scheduler = self.scheduler
        scheduler.set_timesteps(steps, device=timesteps_on or device)
        batch, channels, height, width = condition.shape
        shape = (batch // branches, channels - 1, height, width)
        latents: torch.Tensor = randn_tensor(shape, generator, device, torch.float32) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            noisy = scheduler.scale_model_input(torch.cat([latents] * branches), timestep)
            shown = torch.cat([noisy.to(condition.dtype), condition], dim=1)
            prediction = self.unet(shown, timestep, encoder_hidden_states=None, return_dict=False)[0].float()
            if branches == 2:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + guidance * (conditional - unconditional)
            latents = scheduler.step(prediction, timestep, latents, eta=eta, generator=generator).prev_sample
        return latents

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        """The person's half as pictures on the host: (B, H, W, 3) uint8."""
        person = latents[..., : latents.shape[-2] // 2, :] / self.vae.config.scaling_factor
        pixels = self.vae.decode(person.to(self.vae.dtype)).sample
        pixels = (pixels / 2 + 0.5).clamp(0, 1)
        floats: NDArray[np.float32] = VaeImageProcessor.pt_to_numpy(pixels)
        return (floats * 255).round().astype(np.uint8)


def stock_unet(unet: UNet2DConditionModel, processor: Any = None) -> UNet2DConditionModel:  # noqa: ANN401 - of diffusers
    """The stock class with its stock attention, sharing every weight of the try-on UNet; cross-attention is skipped.

    Args:
        unet: without cross-attention; left as it is. The result has those weights as well, with whatever was in
            memory, since a stock UNet cannot be without.
        processor: of every self-attention; the stock one if None.
    """
    with torch.device("meta"):
        stock = UNet2DConditionModel.from_config(unet.config)
    stock.load_state_dict(unet.state_dict(), strict=False, assign=True)
    processors: dict[str, Any] = {}
    for name, module in stock.named_modules():
        if name.endswith(".attn2"):
            module.to_empty(device=unet.device).to(unet.dtype)
            processors[f"{name}.processor"] = SkipProcessor()
        elif name.endswith(".attn1"):
            processors[f"{name}.processor"] = processor or AttnProcessor2_0()
    stock.set_attn_processor(processors)
    return stock.eval()
