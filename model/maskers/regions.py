"""Regions of a mask: grow, blur, choose and wrap them, to the bit as OpenCV 4 does.

OpenCV 5 fills polygons in another arithmetic, so hulls are drawn here. What is left to OpenCV gives the same bits in
both.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from model.maskers.labels import Mask

Indices = NDArray[np.int64]
QUARTER = 4
_FRACTION_BITS = 16  # of the fixed point in which OpenCV follows a polygon's edge


@dataclass(frozen=True)
class Box:
    """A rectangle of whole pixels; right and bottom are exclusive."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class _Points:
    """Points in the order of their components, and of their rows within one."""

    component: Indices
    x: Indices
    y: Indices


@dataclass(frozen=True)
class _Edges:
    """Lines from (x0, y0) down to (x1, y1)."""

    x0: Indices
    y0: Indices
    x1: Indices
    y1: Indices


def dilate(mask: Mask, size: int, iterations: int = 1) -> Mask:
    """Grow by a square window; beyond the picture there is nothing.

    Args:
        mask: HW bool.
        size: of the window, px, odd; 1 changes nothing.
        iterations: how often.
    Returns:
        A new HW bool.
    """
    window = np.ones((size, size), np.uint8)
    return _as_mask(cv2.dilate(_as_bytes(mask), window, iterations=iterations))


def dilate_at_quarter_scale(mask: Mask, size: int, iterations: int = 1) -> Mask:
    """Take every fourth pixel, grow by a square window, and let each pixel stand for 4x4 again.

    Args:
        mask: HW bool, any size; the last row and column of blocks absorb what four does not divide.
        size: of the window at quarter scale, px, odd.
        iterations: how often.
    Returns:
        A new HW bool.
    """
    height, width = mask.shape
    rows, columns = _quarter(height), _quarter(width)
    grown = dilate(mask[::QUARTER, ::QUARTER][:rows, :columns], size, iterations)
    wide = grown[:, np.minimum(np.arange(width) // QUARTER, columns - 1)]
    return np.asarray(wide[np.minimum(np.arange(height) // QUARTER, rows - 1)], np.bool_)


def blur(mask: Mask, size: int) -> NDArray[np.uint8]:
    """A Gaussian blur in 16-bit fixed point, its deviation 0.3 * ((size - 1) / 2 - 1) + 0.8; the border reflects.

    Args:
        mask: HW bool.
        size: of the window, px, odd.
    Returns:
        HW uint8; 255 where the whole window is inside the mask.
    """
    return np.asarray(cv2.GaussianBlur(_as_bytes(mask) * np.uint8(255), (size, size), 0), np.uint8)


def largest_component(mask: Mask) -> Mask:
    """The 8-connected component of the largest area; of several that are equal, the first that OpenCV numbers.

    Args:
        mask: HW bool.
    Returns:
        A new HW bool, empty where the mask is.
    """
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(_as_bytes(mask), connectivity=8)
    areas = statistics[1:, cv2.CC_STAT_AREA]
    if areas.size == 0:
        return np.zeros_like(mask)
    return np.asarray(labels == 1 + int(np.argmax(areas)), np.bool_)


def bounding_box(mask: Mask) -> Box:
    """The smallest box around the mask; all zeros where the mask is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return Box(0, 0, 0, 0)
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def convex_hulls(mask: Mask) -> Mask:
    """The union of the filled convex hulls of the 8-connected components, one hull each.

    A component in the hole of another adds nothing, as it lies two pixels inside that one's hull on every side. The
    time grows with the number of pixels, not of components.

    Args:
        mask: HW bool.
    Returns:
        A new HW bool that contains the mask.
    """
    left, right = _row_ends(mask)
    left_edges = _edges(_envelope(left, side=-1))
    right_edges = _edges(_envelope(right, side=1))
    # The scanline stops above the last row of a hull, whose edge it leaves to the outline.
    last = np.flatnonzero(np.append(left.component[1:] != left.component[:-1], True)[: left.y.size])
    rows, left_x = _crossings(left_edges)
    _, right_x = _crossings(right_edges)
    hulls = _filled_spans(
        mask.shape,
        np.concatenate([rows, left.y[last]]),
        np.concatenate([left_x, left.x[last]]),
        np.concatenate([right_x, right.x[last]]),
    )
    for edges in (left_edges, right_edges):
        line_x, line_y = _line_pixels(edges)
        hulls[line_y, line_x] = True
    return hulls


def _quarter(length: int) -> int:
    return max(1, round(length / QUARTER))  # Python rounds halves to even, as OpenCV does


def _row_ends(mask: Mask) -> tuple[_Points, _Points]:
    """The first and the last pixel of each component in each of its rows."""
    _, labels = cv2.connectedComponents(_as_bytes(mask), connectivity=8)
    opens, closes = mask.copy(), mask.copy()
    opens[:, 1:] &= ~mask[:, :-1]
    closes[:, :-1] &= ~mask[:, 1:]
    first_pixels, last_pixels = np.flatnonzero(opens), np.flatnonzero(closes)
    component = labels.ravel()[first_pixels]
    rows, starts = np.divmod(first_pixels, mask.shape[1])
    ends = last_pixels % mask.shape[1]
    order = np.argsort(component, kind="stable")
    component, rows, starts, ends = component[order], rows[order], starts[order], ends[order]
    changes = (component[1:] != component[:-1]) | (rows[1:] != rows[:-1])
    first = np.append(True, changes)[: rows.size]
    last = np.append(changes, True)[: rows.size]
    left = _Points(component[first], starts[first], rows[first])
    return left, _Points(component[last], ends[last], rows[last])


def _envelope(points: _Points, side: int) -> _Points:
    """The corners of each component's hull on its right (side 1) or left (side -1)."""
    x = points.x * side
    settled = []
    kept = np.arange(x.size)
    while kept.size:
        # A point on or behind the line between its neighbours is no corner, whatever happens to them.
        component, kept_x, kept_y = points.component[kept], x[kept], points.y[kept]
        rise = (kept_x[1:-1] - kept_x[:-2]) * (kept_y[2:] - kept_y[:-2])
        chord = (kept_x[2:] - kept_x[:-2]) * (kept_y[1:-1] - kept_y[:-2])
        dropped = np.zeros(kept.size, np.bool_)
        dropped[1:-1] = (rise <= chord) & (component[2:] == component[:-2])
        changed = np.isin(component, component[dropped])
        settled.append(kept[~changed])
        kept = kept[changed & ~dropped]
    corners = np.sort(np.concatenate([np.zeros(0, np.int64), *settled]))
    return _Points(points.component[corners], points.x[corners], points.y[corners])


def _edges(corners: _Points) -> _Edges:
    joined = np.flatnonzero(corners.component[1:] == corners.component[:-1])
    x, y = corners.x, corners.y
    return _Edges(x[joined], y[joined], x[joined + 1], y[joined + 1])


def _crossings(edges: _Edges) -> tuple[Indices, Indices]:
    """The rows that each edge crosses, but for its last, and the nearest column in each."""
    width, height = edges.x1 - edges.x0, edges.y1 - edges.y0
    slope = np.sign(width) * ((np.abs(width) << _FRACTION_BITS) // height)
    edge, step = _unroll(height)
    half = 1 << (_FRACTION_BITS - 1)
    x = (edges.x0[edge] << _FRACTION_BITS) + slope[edge] * step
    return edges.y0[edge] + step, (x + half) >> _FRACTION_BITS


def _line_pixels(edges: _Edges) -> tuple[Indices, Indices]:
    """The columns and rows of Bresenham's lines, each drawn from its left end."""
    swap = edges.x0 > edges.x1
    start_x, start_y = np.where(swap, edges.x1, edges.x0), np.where(swap, edges.y1, edges.y0)
    width, height = np.abs(edges.x1 - edges.x0), edges.y1 - edges.y0
    down = np.where(swap, -1, 1)
    major, minor = np.maximum(width, height), np.minimum(width, height)
    edge, step = _unroll(major + 1)
    # The error starts at major - 2 * minor and decides after it is tested: halves stay behind.
    aside = (2 * minor[edge] * step + major[edge] - 1) // (2 * major[edge])
    flat = (width >= height)[edge]
    x = start_x[edge] + np.where(flat, step, aside)
    return x, start_y[edge] + down[edge] * np.where(flat, aside, step)


def _unroll(counts: Indices) -> tuple[Indices, Indices]:
    """For each item `counts` times its index, with 0, 1, 2, ... beside it."""
    item = np.repeat(np.arange(counts.size), counts)
    return item, np.arange(item.size) - np.repeat(np.cumsum(counts) - counts, counts)


def _filled_spans(shape: tuple[int, ...], rows: Indices, first: Indices, last: Indices) -> Mask:
    height, width = shape
    depth = np.zeros(height * (width + 1), np.int32)
    np.add.at(depth, rows * (width + 1) + first, 1)
    np.subtract.at(depth, rows * (width + 1) + last + 1, 1)
    covered = np.cumsum(depth.reshape(height, width + 1), axis=1, dtype=np.int32)[:, :width] > 0
    return np.asarray(covered, np.bool_)


def _as_bytes(mask: Mask) -> NDArray[np.uint8]:
    return np.ascontiguousarray(mask).view(np.uint8)


def _as_mask(grey: NDArray[np.uint8]) -> Mask:
    return np.asarray(grey, np.uint8).view(np.bool_)
