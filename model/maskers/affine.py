"""Bilinear warps between a picture and the square that a network sees, to the bit of OpenCV 4's `warpAffine`.

OpenCV 4 rounds positions in the source to 1/32 px, OpenCV 5 does not, and a border between labels must not depend on
which is installed. The matrices here scale and shift but never rotate: a column of the result then needs two columns
of the source and a row two rows, wherever in the picture they meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.interface import Image

Matrix = NDArray[np.float64]  # (2, 3): takes (x, y, 1) in the source to (x, y) in the result, pixels

POSITION_UNITS = 1024  # a position is first rounded to that part of a pixel,
DROPPED_BITS = 5  # then to 1/32 of a pixel
FRACTION_BITS = 5
FRACTIONS = 1 << FRACTION_BITS
MAX_LABELS = 256  # a label is a uint8
TILE_PIXELS = 1 << 17  # of the result at a time: its few float32 planes stay in a core's cache


@dataclass(frozen=True)
class Letterbox:
    """The centred fit of a picture into a square that keeps its proportions.

    The first and the last pixel of the longer side land on those of the square.

    Attributes:
        width: of the picture, px.
        height: of the picture, px.
        side: of the square, px.
    Raises:
        ValueError: on construction; a side below 1 px, or one pixel only, which has no scale.
    """

    width: int
    height: int
    side: int

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 1 or max(self.width, self.height) < 2 or self.side < 2:
            raise ValueError(f"{self.width}x{self.height} px cannot be fitted into a square of {self.side} px")

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) of the middle of the picture, px."""
        return (self.width - 1) / 2, (self.height - 1) / 2

    @property
    def scale(self) -> float:
        """From the first to the last pixel of the picture's longer side, px."""
        return float(max(self.width, self.height) - 1)

    @property
    def forward(self) -> Matrix:
        """(2, 3) float64 from the picture to the square."""
        zoom = (self.side - 1) / self.scale
        x, y = self._margins
        return np.array([[zoom, 0, zoom * x], [0, zoom, zoom * y]])

    @property
    def inverse(self) -> Matrix:
        """(2, 3) float64 from the square to the picture."""
        zoom = self.scale / (self.side - 1)
        x, y = self._margins
        return np.array([[zoom, 0, -x], [0, zoom, -y]])

    @property
    def _margins(self) -> tuple[float, float]:
        """Left of and above the picture, in its own pixels."""
        x, y = self.center
        return self.scale / 2 - x, self.scale / 2 - y


def warp_image(image: Image, matrix: Matrix, size_wh: tuple[int, int]) -> Image:
    """A picture as the matrix moves it, black where it does not reach.

    Args:
        image: HWC uint8, any number of channels.
        matrix: (2, 3) from the image to the result; no rotation.
        size_wh: (width, height) of the result, px.
    Returns:
        HWC uint8.
    Raises:
        ValueError: another shape or dtype, an empty size, or a matrix that rotates or has no inverse.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.size == 0:
        raise ValueError(f"the image must be HWC uint8, not {image.shape} {image.dtype}")
    columns, rows = _taps(matrix, size_wh, (image.shape[1], image.shape[0]))
    left, right = (weight[:, None].astype(np.int32) for weight in columns.weights)
    upper, lower = (
        image[np.ix_(row, columns.near)] * left + image[np.ix_(row, columns.far)] * right
        for row in (rows.near, rows.far)
    )
    above, below = (weight[:, None, None].astype(np.int32) for weight in rows.weights)
    total = upper * above + lower * below
    warped: Image = ((total + FRACTIONS * FRACTIONS // 2) >> (2 * FRACTION_BITS)).astype(np.uint8)
    return warped


def warp_plane(plane: torch.Tensor, matrix: Matrix, size_wh: tuple[int, int]) -> torch.Tensor:
    """One plane of numbers as the matrix moves it, 0 where it does not reach.

    Args:
        plane: (h, w) float32 on any device.
        matrix: (2, 3) from the plane to the result; no rotation.
        size_wh: (width, height) of the result, px.
    Returns:
        (height, width) float32 on the device of the plane.
    Raises:
        ValueError: another shape or dtype, an empty size, or a matrix that rotates or has no inverse.
    """
    if plane.ndim != 2 or plane.dtype != torch.float32 or plane.numel() == 0:
        raise ValueError(f"the plane must be HW float32, not {tuple(plane.shape)} {plane.dtype}")
    columns, rows = _taps(matrix, size_wh, (plane.shape[1], plane.shape[0]))
    return _Tile.of(columns, rows, plane.device).sample(plane)


def warped_argmax(planes: torch.Tensor, matrix: Matrix, size_wh: tuple[int, int]) -> Image:
    """Which plane is the largest at every pixel after `warp_plane`; the first one where several are.

    It never holds more than a tile of a plane at the size of the result.

    Args:
        planes: (C, h, w) float32 on any device, C from 1 to 256, without NaN.
        matrix: (2, 3) from a plane to the result; no rotation.
        size_wh: (width, height) of the result, px.
    Returns:
        HW uint8.
    Raises:
        ValueError: another shape or dtype, an empty size, or a matrix that rotates or has no inverse.
    """
    if planes.ndim != 3 or planes.dtype != torch.float32 or planes.numel() == 0 or len(planes) > MAX_LABELS:
        raise ValueError(f"the planes must be CHW float32, not {tuple(planes.shape)} {planes.dtype}")
    columns, rows = _taps(matrix, size_wh, (planes.shape[2], planes.shape[1]))
    labels = np.empty((size_wh[1], size_wh[0]), np.uint8)
    for row, column in _tiles(size_wh):
        tile = _Tile.of(columns.part(column), rows.part(row), planes.device)
        labels[row, column] = tile.argmax(planes).cpu().numpy()
    return labels


@dataclass(frozen=True)
class _Taps:
    """Which two pixels of the source, along one axis, each pixel of the result mixes.

    The indices are int64 (n), within the source. The weights are int64 (n) in 1/32; 0 where the pixel lies outside.
    """

    near: NDArray[np.int64]
    far: NDArray[np.int64]
    weights: tuple[NDArray[np.int64], NDArray[np.int64]]

    def part(self, pixels: slice) -> _Taps:
        near_weights, far_weights = self.weights
        return _Taps(self.near[pixels], self.far[pixels], (near_weights[pixels], far_weights[pixels]))


@dataclass(frozen=True)
class _Tile:
    """A rectangle of the result: where in the source its pixels lie, and the weights of their four corners."""

    source_rows: slice
    source_columns: slice
    columns: tuple[torch.Tensor, ...]  # near and far, int64 (w), within the slice
    rows: tuple[torch.Tensor, ...]  # near and far, int64 (h), within the slice
    weights: tuple[torch.Tensor, ...]  # of the four corners, float32 (h, w), in the order in which they are added

    @classmethod
    def of(cls, columns: _Taps, rows: _Taps, device: torch.device) -> _Tile:
        first_column, first_row = columns.near.min(), rows.near.min()
        across, down = (
            [torch.from_numpy(weight).to(device, torch.float32) / FRACTIONS for weight in taps.weights]
            for taps in (columns, rows)
        )
        return cls(
            slice(first_row, rows.far.max() + 1),
            slice(first_column, columns.far.max() + 1),
            tuple(torch.from_numpy(index - first_column).to(device) for index in (columns.near, columns.far)),
            tuple(torch.from_numpy(index - first_row).to(device) for index in (rows.near, rows.far)),
            tuple(vertical[:, None] * horizontal for vertical in down for horizontal in across),
        )

    def sample(self, plane: torch.Tensor) -> torch.Tensor:
        band = plane[self.source_rows, self.source_columns]
        sides = [band.index_select(1, column) for column in self.columns]
        corners = (side.index_select(0, row) for row in self.rows for side in sides)
        # Products first, sums after, one by one: a fused or reordered sum would round differently.
        products = (corner.mul_(weight) for corner, weight in zip(corners, self.weights))
        total = next(products)
        for product in products:
            total.add_(product)
        return total

    def argmax(self, planes: torch.Tensor) -> torch.Tensor:
        best = self.sample(planes[0])
        labels = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
        for label, plane in enumerate(planes[1:], start=1):
            value = self.sample(plane)
            labels.masked_fill_(value > best, label)
            torch.maximum(best, value, out=best)
        return labels


def _taps(matrix: Matrix, size_wh: tuple[int, int], source_wh: tuple[int, int]) -> tuple[_Taps, _Taps]:
    """The taps of the columns and of the rows."""
    if min(size_wh) < 1:
        raise ValueError(f"the result must have a width and a height, not {size_wh}")
    if matrix.shape != (2, 3) or not np.isfinite(matrix).all():
        raise ValueError(f"the matrix must be 2x3 and finite, not {matrix.tolist()}")
    (zoom_x, shear_x, shift_x), (shear_y, zoom_y, shift_y) = matrix.tolist()
    if shear_x or shear_y or not zoom_x * zoom_y:
        raise ValueError(f"the matrix must scale and shift only, not {matrix.tolist()}")
    # In this order of operations, because a position may lie just between two that it can be rounded to.
    determinant = 1 / (zoom_x * zoom_y)
    scale_x, scale_y = zoom_y * determinant, zoom_x * determinant
    # A column's position is rounded in two parts, a row's as a whole.
    columns = _rounded(scale_x * np.arange(size_wh[0])) + _rounded(np.array(-scale_x * shift_x))
    rows = _rounded(scale_y * np.arange(size_wh[1]) - scale_y * shift_y)
    return _axis_taps(columns, source_wh[0]), _axis_taps(rows, source_wh[1])


def _rounded(pixels: NDArray[np.float64]) -> NDArray[np.int64]:
    units: NDArray[np.int64] = np.rint(POSITION_UNITS * pixels).astype(np.int64)
    return units


def _axis_taps(positions: NDArray[np.int64], length: int) -> _Taps:
    position = (positions + (1 << DROPPED_BITS >> 1)) >> DROPPED_BITS
    near, fraction = position >> FRACTION_BITS, position & (FRACTIONS - 1)
    near_weight, far_weight = (
        np.where((index >= 0) & (index < length), weight, 0)
        for index, weight in ((near, FRACTIONS - fraction), (near + 1, fraction))
    )
    return _Taps(near.clip(0, length - 1), (near + 1).clip(0, length - 1), (near_weight, far_weight))


def _tiles(size_wh: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    width, height = size_wh
    tile_width = min(width, TILE_PIXELS)
    tile_height = max(1, TILE_PIXELS // tile_width)
    for top in range(0, height, tile_height):
        for left in range(0, width, tile_width):
            yield slice(top, min(top + tile_height, height)), slice(left, min(left + tile_width, width))
