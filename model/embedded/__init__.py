"""The small model that ships with the repository, and the drawn people it knows.

Its weights are drawn from a fixed seed and not trained: it shows that every step from photo to picture works, and it
paints noise where cloth should be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from model.embedded.body import sample_figure
from model.embedded.figures import draw_garment, draw_person, masks
from model.embedded.wardrobe import sample_garment, sample_lower, sample_outfit
from model.interface import Image

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from model.catvton.pipeline import CatVTONPipeline

__all__ = ["WORK_SIZE_WH", "demo_pictures", "load_pipeline"]

WORK_SIZE_WH = (192, 256)  # px; what the model is made for
DEMO_SIZE_WH = (768, 1024)  # px; the default size of a result
DEMO_SEED = 1_000_004  # a test seed; trousers and a printed top become a striped skirt and a plain one
_WEIGHTS_SEED = 2407
_LATENT_CHANNELS = 4


def load_pipeline() -> CatVTONPipeline:
    """CatVTON at a tiny size on the CPU in float32: the same weights on every machine and every version of torch.

    Loading neither reads a file nor moves torch's global generator.
    """
    # Heavy, here and below: whoever draws figures or asks for the size needs none of it.
    import torch
    from diffusers import DDIMScheduler

    from model.catvton.pipeline import CatVTONPipeline

    with torch.random.fork_rng(devices=[]):
        vae, unet = _tiny_vae(), _tiny_unet()
    for part, seed in ((vae, _WEIGHTS_SEED), (unet, _WEIGHTS_SEED + 1)):
        _draw_weights(part, seed)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return CatVTONPipeline(vae=vae.eval(), unet=unet.eval(), scheduler=scheduler)


def demo_pictures(*, size_wh: tuple[int, int] = DEMO_SIZE_WH, seed: int = DEMO_SEED) -> dict[str, Image]:
    """What a first try-on needs: a person, and a top and a lower garment that they do not wear yet.

    Args:
        size_wh: of person and mask, px; each garment has half of that height, so that the two joined fill one picture.
        seed: who and what is drawn.
    Returns:
        "person", "upper" and "lower", HWC uint8 RGB; "mask", HW uint8 0/255, for an overall garment.
    """
    draw = np.random.default_rng(seed)
    person = draw_person(sample_figure(draw), sample_outfit(draw, dress=False), size_wh)
    upper = sample_garment(draw, "top")
    lower = sample_lower(draw, unlike=upper.texture.base)
    half = (size_wh[0], size_wh[1] // 2)
    return {
        "person": person.image,
        "upper": draw_garment(upper, half),
        "lower": draw_garment(lower, half),
        "mask": masks(person)["overall"],
    }


def _tiny_vae() -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 32),
        latent_channels=_LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=WORK_SIZE_WH[1],
    )


def _tiny_unet() -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        in_channels=2 * _LATENT_CHANNELS + 1,
        out_channels=_LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(64, 128),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=32,
    )


def _draw_weights(module: torch.nn.Module, seed: int) -> None:
    """Fill a module with weights of its usual spread; norms stay the identity and biases 0."""
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(module.named_parameters()):
            if weight.ndim < 2:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            # Uniform numbers are exact on every processor, normal ones differ in the last bit.
            spread = (3.0 / weight[0].numel()) ** 0.5
            weight.copy_((torch.rand(weight.shape, generator=generator) * 2 - 1) * spread)
