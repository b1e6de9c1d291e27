"""The published weights of CatVTON: where each file lies and how its modules are configured.

The weights are CC BY-NC-SA 4.0 (not for commercial use); the base model has its own licence.
"""

from __future__ import annotations

from typing import Any

from model.manifest import MERGED_FOLDERS, TENSORS

UNET_FOLDER = "stable-diffusion-inpainting/unet"
SCHEDULER_FILE = "stable-diffusion-inpainting/scheduler/scheduler_config.json"
VAE_FOLDER = "sd-vae-ft-mse"
CONFIG_FILE = "config.json"
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")  # first wins
ATTENTION_FILE = "model.safetensors"
ATTENTION_FOLDERS = {  # variant -> what it was trained on and at which height, in its name
    "mix": "CatVTON/mix-48k-1024/attention",
    "vitonhd": "CatVTON/vitonhd-16k-512/attention",
    "dresscode": "CatVTON/dresscode-16k-512/attention",
}

MERGED_FILES = {variant: f"{MERGED_FOLDERS['catvton']}/{variant}{TENSORS}" for variant in ATTENTION_FOLDERS}

UNET_CONFIG: dict[str, Any] = {  # Stable Diffusion 1.5 inpainting: 4 noisy + 1 mask + 4 picture channels
    "sample_size": 64,
    "in_channels": 9,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
}
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}
