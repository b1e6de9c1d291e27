"""The configurations that are timed, with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL

from model.catvton import published
from model.catvton.attention import TryOnUNet

LATENT_PX = 8  # pixels a side that one latent stands for, in all of them

TINY_UNET: dict[str, Any] = {
    "in_channels": 9,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}
TINY_VAE: dict[str, Any] = {
    **published.VAE_CONFIG,
    "block_out_channels": [8, 16, 16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
SMALL_UNET: dict[str, Any] = {  # the published one, a tenth as wide
    **published.UNET_CONFIG,
    "block_out_channels": [32, 64, 128, 128],
    "cross_attention_dim": 32,
}


@dataclass(frozen=True)
class Size:
    """What a configuration is built of and, where the caller does not say, how much of it is run."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    height: int
    width: int
    steps: int
    repeats: int


SIZES = {
    "tiny": Size(TINY_UNET, TINY_VAE, height=128, width=96, steps=4, repeats=3),
    # A canvas of 48x24 latents, so small that attention is not all there is; `fast` takes 4 of the 10 steps.
    "small": Size(SMALL_UNET, TINY_VAE, height=192, width=192, steps=10, repeats=3),
    "sd15": Size(published.UNET_CONFIG, published.VAE_CONFIG, height=1024, width=768, steps=10, repeats=3),
}


@dataclass(frozen=True)
class Job:
    """One measurement: which model, where, and how much of it."""

    config: str
    device: torch.device
    dtype: torch.dtype
    height: int
    width: int
    steps: int
    repeats: int


def random_modules(job: Job) -> tuple[AutoencoderKL, TryOnUNet]:
    """VAE and UNet of a job on its device, from one seed."""
    torch.manual_seed(0)
    with torch.device(job.device):
        unet = TryOnUNet(**SIZES[job.config].unet).to(job.dtype).eval()
        vae = AutoencoderKL(**SIZES[job.config].vae).to(job.dtype).eval()
    return vae, unet
