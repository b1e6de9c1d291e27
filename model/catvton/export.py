"""A trained model as files: the published layout, and a sheet of what it makes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Pillow
from safetensors.torch import save_file

from model.catvton import published
from model.catvton.pairs import Pair
from model.catvton.pipeline import CatVTONPipeline
from model.geometry import masked_person
from model.interface import Image

SHEET_STEPS = 20
SHEET_GUIDANCE = 2.0
ATTENTION_STRIDE = 8  # an attention, its projections and its processor are numbered in one row


def export_weights(pipeline: CatVTONPipeline, folder: Path, variant: str) -> None:
    """Write a pipeline's weights in float16 as `from_published` reads them; the folder appears whole.

    Args:
        pipeline: left as it is.
        folder: replaced if it exists.
        variant: in whose place the self-attention goes, one of `published.ATTENTION_FOLDERS`.
    """
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    for name, part in ((published.UNET_FOLDER, pipeline.unet), (published.VAE_FOLDER, pipeline.vae)):
        part.save_config(fresh / name)
        save_file(_halves(part), fresh / name / published.WEIGHT_FILES[0])
    pipeline.scheduler.save_config((fresh / published.SCHEDULER_FILE).parent)
    attention_file = fresh / published.ATTENTION_FOLDERS[variant] / published.ATTENTION_FILE
    attention_file.parent.mkdir(parents=True)
    save_file(_attentions(pipeline.unet), attention_file)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def write_sheet(pipeline: CatVTONPipeline, pairs: Sequence[Pair], path: Path) -> None:
    """A PNG with a row per pair: person, masked person, garment, what the pipeline makes of them, the truth."""
    rows = [
        np.hstack(
            [pair.person, masked_person(pair.person, pair.mask), pair.garment, _dress(pipeline, pair), pair.target]
        )
        for pair in pairs
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(np.vstack(rows)).save(path)


def _dress(pipeline: CatVTONPipeline, pair: Pair) -> Image:
    height, width = pair.mask.shape
    made, _ = pipeline(
        pair.person,
        pair.garment,
        pair.mask,
        height=height,
        width=width,
        num_inference_steps=SHEET_STEPS,
        guidance_scale=SHEET_GUIDANCE,
        eta=0.0,
        generator=torch.Generator().manual_seed(0),
        return_dict=False,
    )
    return np.asarray(made[0])


def _halves(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: _half(tensor) for key, tensor in module.state_dict().items()}


def _attentions(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    attentions = [module for name, module in unet.named_modules() if name.endswith("attn1")]
    return {
        f"{ATTENTION_STRIDE * order}.{key}": _half(tensor)
        for order, attention in enumerate(attentions)
        for key, tensor in attention.state_dict().items()
    }


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float16).contiguous()
