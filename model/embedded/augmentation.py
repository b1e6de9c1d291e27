"""Pictures as they reach the figure parser: not always centred, clean, or of a person at all."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from model.embedded.body import Figure
from model.embedded.canvas import UNITS_WH, Canvas
from model.embedded.figures import draw_garment
from model.embedded.people import paint_backdrop
from model.embedded.wardrobe import LOWER_CUTS, sample_garment
from model.interface import Image

_SCALES = (0.78, 1.2)  # against a figure drawn whole
_SHIFT_SHARE = 0.08  # of the picture's sides, at most
_GAIN = (0.85, 1.15)
_OFFSET = 14.0  # grey levels, at most
_QUALITIES = (45, 96)  # of JPEG
_SMALLEST_SHARE = 0.45  # of the size, before it is enlarged again
_NOISE = 6.0  # grey levels, standard deviation, at most


@dataclass(frozen=True)
class Sample:
    """One picture to learn from.

    Attributes:
        image: HWC uint8 RGB.
        labels: HW uint8, index into LABELS.
        masks: (H, W, M) uint8 0/255.
    """

    image: Image
    labels: Image
    masks: Image


def augmented(draw: np.random.Generator, sample: Sample) -> Sample:
    """The sample moved, scaled, mirrored and worn as by a camera and a JPEG."""
    if draw.random() < 0.8:
        sample = _moved(draw, sample)
    if draw.random() < 0.5:
        sample = Sample(*(np.ascontiguousarray(part[:, ::-1]) for part in (sample.image, sample.labels, sample.masks)))
    return Sample(_worn(draw, sample.image), sample.labels, sample.masks)


def without_person(draw: np.random.Generator, figure: Figure) -> Image:
    """A picture in which there is nobody: HWC uint8 RGB of 192x256.

    Args:
        draw: which kind, and what is on it.
        figure: whose backdrop may be shown.
    """
    kind = int(draw.integers(4))
    if kind == 0:
        canvas = Canvas.for_figure(UNITS_WH, oversample=1)
        paint_backdrop(canvas, figure)
        return canvas.finish()[0]
    if kind == 1:
        return draw_garment(sample_garment(draw, ("top", "dress", *LOWER_CUTS)[int(draw.integers(4))]))
    if kind == 2:
        return np.full((UNITS_WH[1], UNITS_WH[0], 3), draw.integers(0, 256, 3), np.uint8)
    cells = tuple(int(count) for count in draw.integers(2, 200, 2))
    coarse = draw.integers(0, 256, (*cells, 3), np.uint8)
    return np.asarray(cv2.resize(coarse, UNITS_WH, interpolation=cv2.INTER_LINEAR))


def _moved(draw: np.random.Generator, sample: Sample) -> Sample:
    height, width = sample.labels.shape
    scale = float(draw.uniform(*_SCALES))
    shift = draw.uniform(-_SHIFT_SHARE, _SHIFT_SHARE, 2) * (width, height)
    middle = np.array([width, height]) / 2
    matrix = np.column_stack([np.eye(2) * scale, middle * (1 - scale) + shift])
    moved = [
        cv2.warpAffine(part, matrix, (width, height), flags=flag, borderMode=border)
        for part, flag, border in (
            (sample.image, cv2.INTER_LINEAR, cv2.BORDER_REPLICATE),
            (sample.labels, cv2.INTER_NEAREST, cv2.BORDER_CONSTANT),
            (sample.masks, cv2.INTER_NEAREST, cv2.BORDER_CONSTANT),
        )
    ]
    return Sample(*(np.asarray(part, np.uint8) for part in moved))


def _worn(draw: np.random.Generator, image: Image) -> Image:
    height, width = image.shape[:2]
    if draw.random() < 0.35:
        share = float(draw.uniform(_SMALLEST_SHARE, 1))
        small = cv2.resize(image, (round(width * share), round(height * share)), interpolation=cv2.INTER_AREA)
        image = np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR))
    if draw.random() < 0.6:
        gain = draw.uniform(*_GAIN) * draw.uniform(0.95, 1.05, 3)
        light: NDArray[np.float64] = image * gain + draw.uniform(-_OFFSET, _OFFSET)
        image = np.clip(light, 0, 255).astype(np.uint8)
    if draw.random() < 0.25:
        grain = draw.standard_normal(image.shape, np.float32) * np.float32(draw.uniform(0, _NOISE))
        image = np.clip(image + grain, 0, 255).astype(np.uint8)
    if draw.random() < 0.5:
        quality = int(draw.integers(*_QUALITIES))
        encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        image = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED))
    return image
