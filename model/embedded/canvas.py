"""A drawing surface: vector shapes in figure units, painted too large and reduced, so that edges are smooth."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from model.embedded.textures import Colour, Texture

Points = NDArray[np.float64]  # (N, 2) as (x, y) in figure units

UNITS_WH = (192, 256)  # figure units of a whole picture, so 1 unit is 1 px at the embedded model's size
_SUBPIXEL_BITS = 4  # OpenCV's fixed-point polygons: 1/16 px
_CURVE = np.linspace(0, 1, 9)
_BERNSTEIN = np.stack([(1 - _CURVE) ** 2, 2 * _CURVE * (1 - _CURVE), _CURVE**2], axis=1)  # (9, 3)
_SEAM_UNITS = 1.1  # width of the darker line along a garment's outline
_SEAM_SHADE = 0.68


@dataclass(frozen=True)
class Frame:
    """Where a cloth lies: `origin` is the middle of its top edge, `down` the unit vector along it, `width` its width.

    `start` is how much cloth has gone before, in widths: a forearm continues the sleeve of the upper arm.
    """

    origin: tuple[float, float]
    width: float
    down: tuple[float, float] = (0.0, 1.0)
    start: float = 0.0


@dataclass(frozen=True)
class Part:
    """A polygon of cloth and where its texture hangs."""

    polygon: Points
    frame: Frame


class Canvas:
    """A picture and its labels while they are drawn.

    Args:
        size_wh: of the finished picture, px.
        scale: px per figure unit.
        offset: of the figure's origin in the finished picture, px.
        oversample: how many times larger everything is painted.
    """

    def __init__(
        self, size_wh: tuple[int, int], scale: float, offset: tuple[float, float], *, oversample: int = 3
    ) -> None:
        self.size_wh = size_wh
        self._oversample = oversample
        self._scale = scale * oversample
        self._offset = np.array(offset) * oversample
        width, height = size_wh[0] * oversample, size_wh[1] * oversample
        self.image: NDArray[np.uint8] = np.full((height, width, 3), 255, np.uint8)
        self.labels: NDArray[np.uint8] = np.zeros((height, width), np.uint8)

    @classmethod
    def for_figure(cls, size_wh: tuple[int, int], *, oversample: int | None = None) -> Canvas:
        """A canvas that shows the whole figure, centred."""
        scale = min(size_wh[0] / UNITS_WH[0], size_wh[1] / UNITS_WH[1])
        offset = ((size_wh[0] - UNITS_WH[0] * scale) / 2, (size_wh[1] - UNITS_WH[1] * scale) / 2)
        return cls(size_wh, scale, offset, oversample=oversample or oversampling(size_wh))

    def flat(self, polygon: Points, colour: Colour, label: int, *, edge: Colour | None = None) -> None:
        """Fill a polygon with one colour, with a thin line around it when `edge` is given."""
        points = self._fixed(polygon)
        if edge is not None:
            thickness = max(1, round(_SEAM_UNITS * self._scale))
            cv2.polylines(self.image, [points], True, edge, thickness, cv2.LINE_8, _SUBPIXEL_BITS)
        cv2.fillPoly(self.image, [points], colour, cv2.LINE_8, _SUBPIXEL_BITS)
        cv2.fillPoly(self.labels, [points], label, cv2.LINE_8, _SUBPIXEL_BITS)

    def line(self, points: Points, colour: Colour, width: float) -> None:
        """Draw an open line; it changes no label."""
        thickness = max(1, round(width * self._scale))
        cv2.polylines(self.image, [self._fixed(points)], False, colour, thickness, cv2.LINE_8, _SUBPIXEL_BITS)

    def cloth(self, parts: list[Part], texture: Texture, label: int) -> None:
        """Fill the union of parts with a texture that hangs on each part's frame, with a darker seam inside."""
        fixed = [self._fixed(part.polygon) for part in parts]
        corners = np.concatenate(fixed) >> _SUBPIXEL_BITS
        # The margin keeps the outline away from the window's border, where erosion does not see it.
        left, top = (int(edge) for edge in np.maximum(corners.min(axis=0) - 2, 0))
        right, bottom = (int(edge) for edge in np.minimum(corners.max(axis=0) + 3, self.labels.shape[::-1]))
        if left >= right or top >= bottom:
            return
        mask = np.zeros((bottom - top, right - left), np.uint8)
        tile = np.empty((*mask.shape, 3), np.uint8)
        palette = texture.palette()
        frames = list(dict.fromkeys(part.frame for part in parts))
        for frame in frames:
            own = np.zeros_like(mask) if len(frames) > 1 else mask
            for points, part in zip(fixed, parts):
                if part.frame == frame:
                    moved = points - (np.array([left, top], np.int32) << _SUBPIXEL_BITS)
                    cv2.fillPoly(own, [moved.astype(np.int32)], 255, cv2.LINE_8, _SUBPIXEL_BITS)
            across, along = self._in_frame(frame, (left, top, right, bottom))
            cv2.copyTo(palette[texture.share_of_accent(across, along)], own, tile)
            mask |= own
        window = (slice(top, bottom), slice(left, right))
        reach = 2 * max(1, round(_SEAM_UNITS * self._scale)) + 1
        rim = cv2.subtract(mask, cv2.erode(mask, np.ones((reach, reach), np.uint8)))
        cv2.copyTo(cv2.convertScaleAbs(tile, alpha=_SEAM_SHADE), rim, tile)
        cv2.copyTo(tile, mask, self.image[window])
        self.labels[window][mask > 0] = label

    def silhouette(self, parts: list[Part], label: int) -> None:
        """Label the union of parts without painting it."""
        for part in parts:
            cv2.fillPoly(self.labels, [self._fixed(part.polygon)], label, cv2.LINE_8, _SUBPIXEL_BITS)

    def finish(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """(HWC uint8 RGB, HW uint8 labels) at the finished size."""
        reduced = cv2.resize(self.image, self.size_wh, interpolation=cv2.INTER_AREA)
        middle = self._oversample // 2
        labels = self.labels[middle :: self._oversample, middle :: self._oversample]
        return np.asarray(reduced, np.uint8), np.ascontiguousarray(labels)

    def wholly_labelled(self) -> NDArray[np.bool_]:
        """Finished pixels that nothing of the background shows through: HW bool."""
        share = cv2.resize(np.minimum(self.labels, 1) * np.uint8(255), self.size_wh, interpolation=cv2.INTER_AREA)
        return np.asarray(share == 255)

    def _fixed(self, points: Points) -> NDArray[np.int32]:
        # The centre of pixel 0 is 0.5 in ours and 0 in OpenCV's coordinates.
        pixels = points * self._scale + self._offset - 0.5
        return np.asarray(np.rint(pixels * (1 << _SUBPIXEL_BITS)), np.int32)

    def _in_frame(
        self, frame: Frame, box: tuple[int, int, int, int]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        left, top, right, bottom = box
        x = ((np.arange(left, right) + 0.5 - self._offset[0]) / self._scale - frame.origin[0])[None] / frame.width
        y = ((np.arange(top, bottom) + 0.5 - self._offset[1]) / self._scale - frame.origin[1])[:, None] / frame.width
        if frame.down == (
            0.0,
            1.0,
        ):  # rows and columns stay apart: most cloth hangs straight, and this is 10 times faster
            return x.astype(np.float32), (y + frame.start).astype(np.float32)
        dx, dy = frame.down
        return (x * dy - y * dx).astype(np.float32), (x * dx + y * dy + frame.start).astype(np.float32)


def oversampling(size_wh: tuple[int, int]) -> int:
    """How many times larger to paint: small pictures need more for edges that look smooth."""
    return 2 if min(size_wh) > 400 else 3


def ellipse(
    centre: tuple[float, float], radius_x: float, radius_y: float, *, arc_deg: tuple[int, int] = (0, 360)
) -> Points:
    """An ellipse, or a part of it; angles run clockwise from the right."""
    angle = np.deg2rad(np.linspace(*arc_deg, 40))
    return np.stack([centre[0] + radius_x * np.cos(angle), centre[1] + radius_y * np.sin(angle)], axis=1)


def bend(start: tuple[float, float], pull: tuple[float, float], stop: tuple[float, float]) -> Points:
    """A quadratic curve from start to stop, drawn towards `pull`, as 9 points."""
    return np.asarray(_BERNSTEIN @ np.array([start, pull, stop]))
