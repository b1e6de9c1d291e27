"""The small model that ships with the repository, and the drawn people that it was trained on.

It shows that every step from photo to picture works, and that the garment arrives; it knows no photographs.
`weights/README.md` says how it was made.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.embedded.body import sample_figure
from model.embedded.figures import draw_garment, draw_person, masks
from model.embedded.wardrobe import sample_garment, sample_lower, sample_outfit
from model.interface import Image

if TYPE_CHECKING:
    from model.catvton.pipeline import CatVTONPipeline

__all__ = ["WORK_SIZE_WH", "demo_pictures", "load_pipeline"]

WORK_SIZE_WH = (192, 256)  # px; what the model is made for
DEMO_SIZE_WH = (768, 1024)  # px; the default size of a result
DEMO_SEED = 1_000_004  # a test seed; trousers and a printed top become a striped skirt and a plain one
WEIGHTS_DIR = Path(__file__).parent / "weights"


def load_pipeline(*, dtype: str = "float32", device: str = "cpu") -> CatVTONPipeline:
    """The small CatVTON of this folder, trained on drawn figures; it works at `WORK_SIZE_WH`.

    Args:
        dtype: of the weights in memory, "float32", "float16" or "bfloat16"; the files are float16.
        device: where they go.
    """
    # Heavy: whoever draws figures or asks for the size needs none of it.
    import torch

    from model.catvton.pipeline import CatVTONPipeline

    return CatVTONPipeline.from_published(WEIGHTS_DIR, dtype=getattr(torch, dtype), device=device)


def demo_pictures(*, size_wh: tuple[int, int] = DEMO_SIZE_WH, seed: int = DEMO_SEED) -> dict[str, Image]:
    """What a first try-on needs: a person, and a top, a lower garment and a dress that they do not wear yet.

    Args:
        size_wh: of person, dress and mask, px; top and lower garment have half of that height, so that the two joined
            fill one picture.
        seed: who and what is drawn.
    Returns:
        "person", "upper", "lower" and "dress", HWC uint8 RGB; "mask", HW uint8 0/255, for an overall garment.
    """
    draw = np.random.default_rng(seed)
    person = draw_person(sample_figure(draw), sample_outfit(draw, dress=False), size_wh)
    upper = sample_garment(draw, "top")
    lower = sample_lower(draw, unlike=upper.texture.base)
    dress = sample_garment(draw, "dress")
    half = (size_wh[0], size_wh[1] // 2)
    return {
        "person": person.image,
        "upper": draw_garment(upper, half),
        "lower": draw_garment(lower, half),
        "dress": draw_garment(dress, size_wh),
        "mask": masks(person)["overall"],
    }
