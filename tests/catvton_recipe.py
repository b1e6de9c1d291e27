"""Tiny CatVTON models whose weights follow from their names, and the published layout written with them.

A tensor is drawn from numpy's `default_rng(crc32(key) + salt)`, so a golden needs no weight file.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file

from model.catvton import published
from model.catvton.pipeline import CatVTONPipeline

GOLDENS = Path(__file__).parent / "goldens" / "catvton"
LOG_VARIANCE = -30.0  # of the posterior: its deviation is 3e-7, so that a sample equals the mode
PROJECTIONS = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
OWN_NUMBERS = {  # where a checkpoint keeps a projection a second time: (distance from its attention, name)
    "to_q.weight": (1, "weight"),
    "to_k.weight": (2, "weight"),
    "to_v.weight": (3, "weight"),
    "to_out.0.weight": (5, "weight"),
    "to_out.0.bias": (5, "bias"),
}


def recipe_tensor(key: str, shape: tuple[int, ...], salt: int = 0) -> torch.Tensor:
    """The float32 tensor of that name: biases small, norms near one, the rest scaled by their fan-in."""
    normal = np.random.default_rng(zlib.crc32(key.encode()) + salt).standard_normal(shape)
    if key.endswith("bias"):
        drawn = 0.02 * normal
    elif len(shape) == 1:
        drawn = 1 + 0.1 * normal
    else:
        drawn = normal / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(drawn).float()


def configs() -> dict[str, Any]:
    """The configurations of the goldens and "quick": {"configs": {"tiny2": {"unet", "vae"}, ...}, "scheduler"}."""
    found = json.loads((GOLDENS / "configs.json").read_text())
    found["configs"]["quick"] = _quick(found["configs"]["tiny2"])
    return found


def _quick(tiny: dict[str, Any]) -> dict[str, Any]:
    """Attention at the coarsest level only, so that 768x1024 takes a second on one core."""
    blocks = {
        "down_block_types": ["DownBlock2D"] * 3 + ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"] + ["UpBlock2D"] * 3,
        "block_out_channels": [8, 8, 8, 16],
    }
    return {"unet": {**tiny["unet"], **blocks}, "vae": tiny["vae"]}


def build_unet(config: str = "tiny2", salt: int = 0) -> UNet2DConditionModel:
    """The stock UNet, with cross-attention, before CatVTON's self-attention."""
    return _fill(UNet2DConditionModel(**configs()["configs"][config]["unet"]), salt)


def build_vae(config: str = "tiny2", salt: int = 0) -> AutoencoderKL:
    """The VAE, with a posterior so narrow that its mode is its only sample."""
    vae = _fill(AutoencoderKL(**configs()["configs"][config]["vae"]), salt)
    latent_channels = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight[latent_channels:] = 0
        vae.quant_conv.bias[latent_channels:] = LOG_VARIANCE
    return vae


def build_scheduler() -> DDIMScheduler:
    """The scheduler of the goldens."""
    return DDIMScheduler(**configs()["scheduler"])


def attention_tensors(
    unet: torch.nn.Module, salt: int = 0, attention_stride: int = 8, duplicates: bool = False
) -> dict[str, torch.Tensor]:
    """An attention checkpoint for the UNet; its values do not depend on how it is numbered."""
    tensors = {}
    attentions = [module for name, module in unet.named_modules() if name.endswith("attn1")]
    for order, attention in enumerate(attentions):
        number = order * attention_stride
        for name in PROJECTIONS:
            shape = tuple(attention.get_parameter(name).shape)
            tensor = recipe_tensor(f"{8 * order}.{name}", shape, salt + 1)
            tensors[f"{number}.{name}"] = tensor
            if duplicates:
                distance, own_name = OWN_NUMBERS[name]
                tensors[f"{number + distance}.{own_name}"] = tensor.clone()
    return tensors


def build_pipeline(config: str = "tiny2", salt: int = 0) -> CatVTONPipeline:
    """The pipeline of the goldens, put together without any file."""
    unet = build_unet(config, salt)
    tensors = attention_tensors(unet, salt)
    for order, name in enumerate(name for name, _ in unet.named_modules() if name.endswith("attn1")):
        unet.get_submodule(name).load_state_dict({key: tensors[f"{8 * order}.{key}"] for key in PROJECTIONS})
    pipeline = CatVTONPipeline(build_vae(config, salt), unet, build_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_published_layout(
    root: Path,
    config: str = "tiny2",
    variant: str = "mix",
    attention_stride: int = 8,
    duplicates: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the tiny model as its authors publish the large one; returns root."""
    unet = build_unet(config)
    scheduler_config = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **configs()["scheduler"]}
    _write_model(root / published.UNET_FOLDER, unet, dtype)
    _write_model(root / published.VAE_FOLDER, build_vae(config), dtype)
    _write_json(root / published.SCHEDULER_FILE, scheduler_config)
    attention_file = root / published.ATTENTION_FOLDERS[variant] / published.ATTENTION_FILE
    attention_file.parent.mkdir(parents=True)
    tensors = attention_tensors(unet, 0, attention_stride, duplicates)
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, attention_file)
    return root


def _fill(module: torch.nn.Module, salt: int) -> Any:
    state = module.state_dict()
    module.load_state_dict({key: recipe_tensor(key, tuple(tensor.shape), salt) for key, tensor in state.items()})
    return module.eval()


def _write_model(folder: Path, module: Any, dtype: torch.dtype) -> None:
    config = {"_class_name": type(module).__name__, "_diffusers_version": "0.6.0.dev0", **module.config}
    _write_json(folder / published.CONFIG_FILE, config)
    state = {key: tensor.to(dtype).contiguous() for key, tensor in module.state_dict().items()}
    save_file(state, folder / published.WEIGHT_FILES[0])


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
