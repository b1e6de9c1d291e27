"""From pictures to tensors: what a pipeline accepts, checked, cropped and scaled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Union

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from model.geometry import MASK_THRESHOLD, crop_resize, fit_pad

Picture = Union[Image.Image, NDArray[np.uint8]]
Pictures = Union[Picture, Sequence[Picture]]


def matched_lists(
    people: Pictures, garments: Pictures, masks: Pictures
) -> tuple[list[Image.Image], list[Image.Image], list[Image.Image]]:
    """A batch as three lists of Pillow images of one length.

    Args:
        people: a Pillow image, an HWC uint8 RGB array, or a list of them.
        garments: the same.
        masks: the same or HW uint8; each of its person's size.
    Raises:
        ValueError: another type, dtype or shape, an empty list, or lists that do not match.
    """
    lists = (
        _picture_list(people, "person_image"),
        _picture_list(garments, "garment_image"),
        _picture_list(masks, "mask_image"),
    )
    if len({len(pictures) for pictures in lists}) > 1:
        raise ValueError("{} people, {} garments and {} masks were given".format(*map(len, lists)))
    for person, mask in zip(lists[0], lists[2]):
        if person.size != mask.size:
            raise ValueError(f"mask_image is {mask.size} px, its person_image {person.size} px")
    return lists


def check_generator(generator: object, batch: int) -> None:
    """Raise ValueError unless it is None, a `torch.Generator`, or a list of one per picture."""
    generators = generator if isinstance(generator, list) else [generator] * batch
    if len(generators) != batch:
        raise ValueError(f"{len(generators)} generators were given for {batch} pictures")
    if generator is not None and not all(isinstance(each, torch.Generator) for each in generators):
        raise ValueError("generator must be a torch.Generator or a list of them")


def check_scales(**scales: object) -> None:
    """Raise ValueError, naming the scale, unless each is a finite number that is not negative."""
    for name, scale in scales.items():
        if not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale < 0:
            raise ValueError(f"{name} must be a number of at least 0, not {scale!r}")


def person_tensor(people: Sequence[Image.Image], width: int, height: int) -> torch.Tensor:
    """People cropped to the aspect of width x height and resized: (B, 3, height, width) float32 in [-1, 1]."""
    return _to_tensor([crop_resize(person.convert("RGB"), width, height) for person in people])


def garment_tensor(garments: Sequence[Image.Image], width: int, height: int) -> torch.Tensor:
    """Garments fitted on white: (B, 3, height, width) float32 in [-1, 1]."""
    return _to_tensor([fit_pad(garment.convert("RGB"), width, height) for garment in garments])


def mask_tensor(masks: Sequence[Image.Image], width: int, height: int) -> torch.Tensor:
    """Masks cropped like the people: (B, 1, height, width) float32, 1 where cloth is repainted, else 0."""
    grey = np.stack([np.asarray(crop_resize(mask.convert("L"), width, height)) for mask in masks])
    return torch.from_numpy(grey >= MASK_THRESHOLD).unsqueeze(1).float()


def _picture_list(pictures: Pictures, name: str) -> list[Image.Image]:
    if isinstance(pictures, (Image.Image, np.ndarray)):
        return [_picture(pictures, name)]
    if not isinstance(pictures, (list, tuple)):
        raise ValueError(  # noqa: TRY004 - one class for everything a caller can get wrong
            f"{name} must be a Pillow image, a uint8 array or a list of them, not {type(pictures)}"
        )
    if not pictures:
        raise ValueError(f"{name} is an empty list")
    return [_picture(picture, name) for picture in pictures]


def _picture(picture: Picture, name: str) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if not isinstance(picture, np.ndarray):
        raise ValueError(  # noqa: TRY004 - as above
            f"{name} holds a {type(picture)}; a Pillow image or a uint8 array is wanted"
        )
    is_rgb = picture.ndim == 3 and picture.shape[2] == 3
    if picture.dtype != np.uint8 or not (is_rgb or picture.ndim == 2) or picture.size == 0:
        raise ValueError(f"{name} must be HWC uint8 RGB (a mask may be HW), not {picture.dtype} {picture.shape}")
    return Image.fromarray(picture)


def _to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)
