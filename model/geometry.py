"""Crop, fit, join and blend pictures: pure functions on arrays and Pillow images, without torch.

The sizes follow CatVTON (arXiv 2407.15886) in integer arithmetic, so that a picture lands on the same pixels as in the
published inference. Arrays are HWC uint8 RGB, masks HW uint8 with 255 where cloth is repainted and 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from model.interface import Image as Pixels

MASK_THRESHOLD = 128  # the first grey level with grey / 255 >= 0.5
MAX_JOINED_WIDTH = 1536  # px; twice the model's width: more is lost in fitting and costs 17 MB per 3,840 rows
BLEND_BAND_ROWS = 256  # rows blended at once: a 50 MP photo in float at one go would take 1.2 GB
EDGE_SHARE = 100  # the soft edge of a repaint is 1/100 of the picture's height: 10 px at 1024
MID_GREY = 128

Box = tuple[int, int, int, int]
_WHITE = (255, 255, 255)
TINT = (255, 0, 80)


def crop_box(width_in: int, height_in: int, width: int, height: int) -> Box:
    """The largest centred box of aspect width:height inside a picture.

    Returns:
        (left, top, right, bottom) in px, right and bottom exclusive, at least 1 px a side.
    Raises:
        ValueError: a size below 1.
    """
    _check_sizes(width_in, height_in, width, height)
    kept_width, kept_height = width_in, height_in
    if width_in * height < width * height_in:
        kept_height = max(1, width_in * height // width)
    else:
        kept_width = max(1, height_in * width // height)
    return (
        (width_in - kept_width) // 2,
        (height_in - kept_height) // 2,
        (width_in + kept_width) // 2,
        (height_in + kept_height) // 2,
    )


def fit_box(width_in: int, height_in: int, width: int, height: int) -> Box:
    """Where a whole picture lies when it is fitted, centred, inside width x height.

    Returns:
        (left, top, right, bottom) in px, right and bottom exclusive, at least 1 px a side.
    Raises:
        ValueError: a size below 1.
    """
    _check_sizes(width_in, height_in, width, height)
    fitted_width, fitted_height = width, height
    if width_in * height < width * height_in:
        fitted_width = max(1, width_in * height // height_in)
    else:
        fitted_height = max(1, height_in * width // width_in)
    left, top = (width - fitted_width) // 2, (height - fitted_height) // 2
    return left, top, left + fitted_width, top + fitted_height


def crop_resize(
    image: Image.Image, width: int, height: int, *, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Centre-crop to the aspect width:height, then resize; a picture that has this size already keeps every pixel.

    Args:
        image: any mode that Pillow resizes, e.g. "RGB" for a person and "L" for a mask.
        width: of the answer, px.
        height: of the answer, px.
        resample: Pillow's filter.
    Returns:
        A new image of exactly (width, height) in the same mode.
    Raises:
        ValueError: a size below 1.
    """
    box = crop_box(image.width, image.height, width, height)
    return image.crop(box).resize((width, height), resample)


def fit_within(image: Pixels, longest_side: int) -> Pixels:
    """Shrink a picture until its longer side is at most `longest_side` px; a smaller one is left as it is.

    Args:
        image: HWC uint8 RGB; an extreme aspect keeps at least 1 px of its short side.
        longest_side: px.
    """
    _check_rgb(image, "image")
    _check_sizes(longest_side)
    height, width = image.shape[:2]
    longest = max(height, width)
    if longest <= longest_side:
        return image
    return _resize(image, *(max(1, round(side * longest_side / longest)) for side in (width, height)))


def resize_mask(mask: Pixels, width: int, height: int) -> Pixels:
    """The nearest pixels of an HW uint8 mask at another size."""
    _check_mask(mask)
    _check_sizes(width, height)
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def fit_pad(image: Image.Image, width: int, height: int) -> Image.Image:
    """Fit a whole picture inside width x height, centred on white.

    Args:
        image: converted to RGB; an extreme aspect keeps at least 1 px of its short side.
        width: of the answer, px.
        height: of the answer, px.
    Returns:
        A new RGB image of exactly (width, height).
    Raises:
        ValueError: a size below 1.
    """
    left, top, right, bottom = fit_box(image.width, image.height, width, height)
    canvas = Image.new("RGB", (width, height), _WHITE)
    canvas.paste(image.convert("RGB").resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
    return canvas


def trim_white(image: Image.Image, width: int, height: int) -> Image.Image:
    """Cut white from two opposite sides alike, as far as the picture exceeds the aspect width:height.

    What `fit_pad` put around a picture goes before it is fitted to another aspect, which would make it smaller twice.

    Args:
        image: RGB.
        width, height: the aspect.
    Returns:
        A new RGB image; nothing but pure white is missing.
    Raises:
        ValueError: a size below 1.
    """
    _check_sizes(image.width, image.height, width, height)
    whole = (0, 0, image.width, image.height)
    left, top, right, bottom = ImageOps.invert(image).getbbox() or whole
    across = min(left, image.width - right, max(0, image.width - image.height * width // height) // 2)
    down = min(top, image.height - bottom, max(0, image.height - image.width * height // width) // 2)
    return image.crop((across, down, image.width - across, image.height - down))


def join_garments(upper: Pixels, lower: Pixels, style: Literal["clean", "legacy"] = "clean") -> Pixels:
    """One garment picture from two, the upper above the lower.

    Args:
        upper: HWC uint8 RGB.
        lower: HWC uint8 RGB, any width.
        style: "clean" scales both to one width (the wider one, at most 1536 px); "legacy" stacks them unscaled and
            leaves a black bar beside the narrower one, as the first deployment did.
    Returns:
        HWC uint8 RGB.
    Raises:
        ValueError: not RGB uint8, or an unknown style.
    """
    _check_rgb(upper, "upper")
    _check_rgb(lower, "lower")
    widest = max(upper.shape[1], lower.shape[1])
    if style == "legacy":
        canvas = np.zeros((upper.shape[0] + lower.shape[0], widest, 3), np.uint8)
        canvas[: upper.shape[0], : upper.shape[1]] = upper
        canvas[upper.shape[0] :, : lower.shape[1]] = lower
        return canvas
    if style != "clean":
        raise ValueError(f"style must be 'clean' or 'legacy', not {style!r}")
    common = min(widest, MAX_JOINED_WIDTH)
    return np.concatenate([_resize_to_width(upper, common), _resize_to_width(lower, common)])


def binarise(mask: Pixels) -> Pixels:
    """A mask of 0 and 255 from grey values, cut at one half.

    Args:
        mask: HW uint8, or HWC uint8 RGB, which is turned to grey first.
    Returns:
        HW uint8, 255 where grey / 255 >= 0.5, else 0.
    Raises:
        ValueError: another shape or dtype.
    """
    if mask.ndim == 3:
        _check_rgb(mask, "mask")
        mask = np.asarray(Image.fromarray(mask).convert("L"))
    _check_mask(mask)
    return np.where(mask >= MASK_THRESHOLD, np.uint8(255), np.uint8(0))


def smooth_mask(mask: Pixels, *, radius: float = 9) -> Pixels:
    """A mask with its outline smoothed: a Gaussian blur, cut at one half again.

    Args:
        mask: HW uint8 0/255.
        radius: standard deviation of the blur, px; 9 is that of the published demo.
    Returns:
        HW uint8 0/255.
    Raises:
        ValueError: another shape or dtype.
    """
    binary = Image.fromarray(binarise(mask))
    return binarise(np.asarray(binary.filter(ImageFilter.GaussianBlur(radius))))


def soft_edge(mask: Pixels, width_px: int) -> NDArray[np.float32]:
    """How much of the result shows at each pixel of a repaint.

    The ramp lies inside the mask, so that compositing changes nothing outside. The picture's border is no edge: a mask
    that touches it stays 1 there.

    Args:
        mask: HW uint8 0/255.
        width_px: from the outline to full strength, at least 1.
    Returns:
        HW float32 in [0, 1]: exactly 0 outside the mask, 1 from width_px inside.
    Raises:
        ValueError: another shape or dtype, or width_px below 1.
    """
    _check_mask(mask)
    if width_px < 1:
        raise ValueError(f"width_px must be at least 1, not {width_px}")
    inside = binarise(mask)
    if inside.all():  # there is no outline to measure from
        return np.ones(mask.shape, np.float32)
    distance = np.asarray(cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE), np.float32)
    ramp = np.clip(distance / np.float32(width_px), 0, 1)
    return np.asarray(ramp * ramp * (3 - 2 * ramp), np.float32)


def repaint(person: Pixels, result: Pixels, mask: Pixels) -> Pixels:
    """The result inside the mask, the person outside, with a soft edge of 1/100 of the height inside the mask.

    Args:
        person: HWC uint8 RGB.
        result: HWC uint8 RGB, same size.
        mask: HW uint8 0/255, same size.
    Returns:
        HWC uint8 RGB; outside the mask every byte is the person's.
    Raises:
        ValueError: another shape or dtype, or sizes that differ.
    """
    _check_rgb(person, "person")
    _check_rgb(result, "result")
    _check_mask(mask)
    if result.shape != person.shape or mask.shape != person.shape[:2]:
        raise ValueError(f"person {person.shape}, result {result.shape} and mask {mask.shape} must have one size")
    alpha = soft_edge(mask, max(1, person.shape[0] // EDGE_SHARE))[..., None]
    blended = person.copy()
    for top in range(0, person.shape[0], BLEND_BAND_ROWS):
        band = slice(top, top + BLEND_BAND_ROWS)
        before = person[band].astype(np.float32)
        after = np.rint(before + (result[band] - before) * alpha[band]).astype(np.uint8)
        blended[band] = np.where(alpha[band] > 0, after, person[band])
    return blended


def paste_back(person: Pixels, result: Pixels, mask: Pixels | None = None) -> Pixels:
    """The result at the person's own size, put where `crop_resize` had taken it from.

    Args:
        person: HWC uint8 RGB at its own size.
        result: HWC uint8 RGB at the model's size.
        mask: HW uint8 0/255 at the person's size; without it the whole crop is replaced.
    Returns:
        HWC uint8 RGB of the person's size. Outside the mask, and outside the crop, every byte is the person's; the
        edge of what is replaced is soft except on the photo's border.
    Raises:
        ValueError: another shape or dtype, or a mask of another size.
    """
    _check_rgb(person, "person")
    _check_rgb(result, "result")
    height, width = person.shape[:2]
    left, top, right, bottom = crop_box(width, height, result.shape[1], result.shape[0])
    if mask is not None:
        _check_mask(mask)
        if mask.shape != (height, width):
            raise ValueError(f"mask is {mask.shape}, the person is {(height, width)}")
    window = (slice(top, bottom), slice(left, right))
    replaced = np.zeros((height, width), np.uint8)
    # A mask may leave the crop; cutting it there lets the soft edge hide the seam.
    replaced[window] = 255 if mask is None else mask[window]
    pasted = person.copy()
    pasted[window] = _resize(result, right - left, bottom - top)
    return repaint(person, pasted, replaced)


def side_by_side(images: Sequence[Pixels], *, height: int = 512, gap: int = 8) -> Pixels:
    """A strip of pictures at one height, with white between them.

    Args:
        images: at least one HWC uint8 RGB.
        height: of the strip, px.
        gap: between two pictures, px.
    Returns:
        HWC uint8 RGB.
    Raises:
        ValueError: no image, another shape or dtype, or a size out of range.
    """
    if not images:
        raise ValueError("side_by_side needs at least one image")
    if height < 1 or gap < 0:
        raise ValueError(f"height {height} must be at least 1 and gap {gap} at least 0")
    spacer = np.full((height, gap, 3), 255, np.uint8)
    parts: list[Pixels] = []
    for image in images:
        _check_rgb(image, "image")
        parts += [spacer, _resize(image, max(1, round(image.shape[1] * height / image.shape[0])), height)]
    return np.concatenate(parts[1:], axis=1)


def masked_person(person: Pixels, mask: Pixels) -> Pixels:
    """The person with mid grey where cloth is repainted: what the model is shown.

    Args:
        person: HWC uint8 RGB.
        mask: HW uint8 0/255, same size.
    Returns:
        HWC uint8 RGB.
    Raises:
        ValueError: another shape or dtype, or sizes that differ.
    """
    _check_rgb(person, "person")
    _check_mask(mask)
    if mask.shape != person.shape[:2]:
        raise ValueError(f"mask is {mask.shape}, the person is {person.shape[:2]}")
    return np.where(binarise(mask)[..., None] > 0, np.uint8(MID_GREY), person)


def tinted(person: Pixels, mask: Pixels) -> Pixels:
    """The person with half of a strong colour where the mask is set, to look at.

    Args:
        person: HWC uint8 RGB.
        mask: HW uint8 of the same height and width.
    """
    _check_rgb(person, "person")
    _check_mask(mask)
    if mask.shape != person.shape[:2]:
        raise ValueError(f"mask is {mask.shape}, the person is {person.shape[:2]}")
    mixed = (person.astype(np.uint16) + np.array(TINT, np.uint16)) // 2
    return np.where(binarise(mask)[..., None] > 0, mixed.astype(np.uint8), person)


def _resize(image: Pixels, width: int, height: int) -> Pixels:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def _resize_to_width(image: Pixels, width: int) -> Pixels:
    return _resize(image, width, max(1, round(image.shape[0] * width / image.shape[1])))


def _check_sizes(*sizes: int) -> None:
    if min(sizes) < 1:
        raise ValueError(f"sizes must be at least 1 px, not {sizes}")


def _check_rgb(image: Pixels, name: str) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"{name} must be HWC uint8 RGB and not empty, not {image.dtype} {image.shape}")


def _check_mask(mask: Pixels) -> None:
    if mask.ndim != 2 or mask.dtype != np.uint8 or mask.size == 0:
        raise ValueError(f"mask must be HW uint8 and not empty, not {mask.dtype} {mask.shape}")
