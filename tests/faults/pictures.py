"""Pictures to send: smooth ones, so that a codec changes little, and the files that a good request needs."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

Pixels = NDArray[np.uint8]
SIZE_WH = (192, 256)  # px; small, for most rows are not about the picture


def ramp(width: int = SIZE_WH[0], height: int = SIZE_WH[1], tint: int = 40) -> Pixels:
    """HWC uint8: a smooth picture that no turn and no flip leaves as it is."""
    across = np.linspace(20, 220, width)[None, :]
    down = np.linspace(200, 40, height)[:, None]
    picture = np.empty((height, width, 3), np.uint8)
    for channel, level in enumerate((across, down, tint)):
        picture[..., channel] = level
    picture[: height // 4, : width // 3] = (230, 30, tint)
    return picture


def middle(width: int = SIZE_WH[0], height: int = SIZE_WH[1]) -> Pixels:
    """HW uint8: a mask, 255 in the middle half."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 255
    return mask


def file_of(picture: Any, kind: str = "PNG", **options: Any) -> bytes:
    """An image file of an array or of a Pillow picture."""
    made = picture if isinstance(picture, Pillow.Image) else Pillow.fromarray(picture)
    file = io.BytesIO()
    made.save(file, kind, **options)
    return file.getvalue()


def pixels_of(content: bytes) -> Pixels:
    """HWC uint8 of an image file."""
    with Pillow.open(io.BytesIO(content)) as opened:
        return np.asarray(opened.convert("RGB"))


def good_files() -> dict[str, bytes]:
    """One picture for each role of a request."""
    return {
        "person": file_of(ramp()),
        "upper": file_of(ramp(96, 128, tint=90)),
        "lower": file_of(ramp(96, 96, tint=140)),
        "mask": file_of(middle()),
    }
