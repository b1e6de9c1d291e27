"""The pictures of a quality bench side by side, for a person to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image as Pillow

from bench.cases import Case
from model.geometry import masked_person, repaint
from model.interface import Image

COLUMNS = ("person", "masked", "garment", "result", "target", "other garment", "result", "target")
_GAP_PX = 4
_HEADER_PX = 20


def write_sheet(cases: Sequence[Case], paired: Sequence[Image], swapped: Sequence[Image], path: Path) -> None:
    """A PNG with a row per figure and the columns of COLUMNS; results are composited, as a caller gets them.

    Args:
        cases: the figures to show.
        paired: the picture of each in the garment of its seed.
        swapped: the picture of each in the other garment.
        path: of the PNG.
    """
    rows = []
    for case, made, other in zip(cases, paired, swapped):
        first, second = case.paired, case.swapped
        masked = masked_person(first.person, first.mask)
        results = [repaint(one.person, picture, one.mask) for one, picture in ((first, made), (second, other))]
        rows.append(
            [first.person, masked, first.garment, results[0], first.target, second.garment, results[1], second.target]
        )
    sheet = np.concatenate([_header(rows[0][0].shape[1]), *map(_row, rows)])
    Pillow.fromarray(sheet).save(path, format="PNG")


def _row(pictures: Sequence[Image]) -> Image:
    return np.hstack([np.pad(one, ((0, _GAP_PX), (0, _GAP_PX), (0, 0)), constant_values=255) for one in pictures])


def _header(width: int) -> Image:
    header = np.full((_HEADER_PX, len(COLUMNS) * (width + _GAP_PX), 3), 255, np.uint8)
    for place, name in enumerate(COLUMNS):
        corner = (place * (width + _GAP_PX) + 2, _HEADER_PX - 6)
        cv2.putText(header, name, corner, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return header
