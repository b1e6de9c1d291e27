"""Boxes of a two-stage detector in plain torch: anchors, decoding, suppression, selection and pooling.

Boxes are (N, 4) float32 tensors (x0, y0, x1, y1) in px. Nothing here changes what it is given. Equal scores rank by
index, so that the same numbers give the same boxes on every device.

Source: Faster R-CNN (arXiv 1506.01497), FPN (arXiv 1612.03144), Mask R-CNN (arXiv 1703.06870).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

ASPECTS = (0.5, 1.0, 2.0)  # height over width of the anchors of a cell
MAX_LOG_SCALE = math.log(1000 / 16)  # a decoded side is at most 62.5 times its anchor's
LEVELS = 4  # of the pyramid that boxes are pooled from
FINEST_STRIDE_PX = 4  # of the first of them; each next one's is twice as large
LEVEL_SIZE_PX = 224  # a box of this size is pooled from the level of LEVEL_AT
LEVEL_AT = 2  # stride 16
SAMPLES = 2  # per side of a bin
NMS_ROWS = 1024  # of the overlap matrix at a time: 4,000 boxes then take 16 MB an array


class Detections(NamedTuple):
    """Boxes by falling score: (N, 4) px and (N,) scores."""

    boxes: Tensor
    scores: Tensor


def cell_anchors(size_px: float) -> Tensor:
    """The (3, 4) float32 anchors of a cell around its origin, of equal area, by rising height over width."""
    sides = [(size_px / math.sqrt(aspect), size_px * math.sqrt(aspect)) for aspect in ASPECTS]
    return torch.tensor([(-width / 2, -height / 2, width / 2, height / 2) for width, height in sides])


def anchors(size_px: float, stride_px: int, map_hw: tuple[int, int], device: torch.device) -> Tensor:
    """The anchors of a feature map, cell by cell in row-major order; the first cell lies at (0, 0).

    Args:
        size_px: the root of an anchor's area.
        stride_px: the distance of two cells.
        map_hw: (height, width) of the map in cells.
        device: where the answer is made.
    Returns:
        (3 height width, 4) float32.
    """
    y, x = (stride_px * torch.arange(cells, device=device, dtype=torch.float32) for cells in map_hw)
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    corners = torch.stack([columns, rows, columns, rows], dim=-1)  # (H, W, 4)
    return (corners[:, :, None] + cell_anchors(size_px).to(device)).reshape(-1, 4)


def decode(boxes: Tensor, deltas: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Boxes moved and scaled by a regression.

    Args:
        boxes: (N, 4) px, the boxes that the regression refers to.
        deltas: (N, 4) float32 (dx, dy, dw, dh): shifts in box sides and logarithms of scales, times the weights.
        weights: of the four deltas.
    Returns:
        (N, 4) float32 px; non-finite where a delta is.
    """
    shift = deltas[:, :2] / deltas.new_tensor(weights[:2])
    log_scale = (deltas[:, 2:] / deltas.new_tensor(weights[2:])).clamp(max=MAX_LOG_SCALE)
    sides = boxes[:, 2:] - boxes[:, :2]
    centres = shift * sides + (boxes[:, :2] + 0.5 * sides)
    half = 0.5 * (log_scale.exp() * sides)
    return torch.cat([centres - half, centres + half], dim=1)


def clip(boxes: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Boxes cut at the borders of a picture of that height and width in px; a box outside becomes empty."""
    height, width = size_hw
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))


def is_filled(boxes: Tensor) -> Tensor:
    """(N,) bool: which boxes have a width and a height above zero."""
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def iou(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of every pair: (N, 4) and (M, 4) px to (N, M) float32; NaN for two empty boxes."""
    sides = torch.minimum(one[:, None, 2:], other[:, 2:]) - torch.maximum(one[:, None, :2], other[:, :2])
    common = sides.clamp_(min=0).prod(dim=2)
    return common / (_areas(one)[:, None] + _areas(other) - common)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes: (N, 4) px.
        scores: (N,), finite.
        threshold: a box goes if its IoU with a better box that stays is above this; one exactly at it stays.
    Returns:
        (K,) int64: the boxes that stay, by falling score, the lower index first among equals.
    """
    order = scores.argsort(descending=True, stable=True)
    ranked = boxes[order]
    gone = np.zeros(len(ranked), dtype=bool)
    for start in range(0, len(ranked), NMS_ROWS):
        overlaps = (iou(ranked[start : start + NMS_ROWS], ranked[start:]) > threshold).cpu().numpy()
        for row, overlapping in enumerate(overlaps):
            if not gone[start + row]:
                gone[start + row + 1 :] |= overlapping[row + 1 :]
    return order[torch.from_numpy(~gone).to(order.device)]


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """`nms` within each group.

    Args:
        boxes: (N, 4) px.
        scores: (N,), finite.
        groups: (N,) int64; boxes of different groups never suppress each other.
        threshold: as in `nms`.
    Returns:
        (K,) int64 of all groups together, ordered as in `nms`.
    """
    stays = torch.zeros_like(groups, dtype=torch.bool)
    for group in sorted(set(groups.tolist())):
        members = (groups == group).nonzero()[:, 0]
        stays[members[nms(boxes[members], scores[members], threshold)]] = True
    order = scores.argsort(descending=True, stable=True)
    return order[stays[order]]


def select_proposals(
    levels: Sequence[Detections],
    size_hw: tuple[int, int],
    *,
    per_level: int = 1000,
    total: int = 1000,
    threshold: float = 0.7,
) -> Detections:
    """The boxes of a region proposal network that are worth a second look.

    Args:
        levels: for each level of the pyramid its decoded boxes and their logits, in any order.
        size_hw: of the picture in px, without padding.
        per_level: boxes that a level may bring to the suppression.
        total: boxes of the answer at most.
        threshold: of the suppression within each level.
    Returns:
        Boxes within the picture with an area above zero, and their logits.
    """
    best = [level.scores.argsort(descending=True, stable=True)[:per_level] for level in levels]
    boxes = torch.cat([level.boxes[rows] for level, rows in zip(levels, best)])
    logits = torch.cat([level.scores[rows] for level, rows in zip(levels, best)])
    groups = torch.cat([torch.full_like(rows, number) for number, rows in enumerate(best)])
    clipped = clip(boxes, size_hw)
    usable = boxes.isfinite().all(dim=1) & logits.isfinite() & is_filled(clipped)
    clipped, logits, groups = clipped[usable], logits[usable], groups[usable]
    kept = batched_nms(clipped, logits, groups, threshold)[:total]
    return Detections(clipped[kept], logits[kept])


def select_detections(
    boxes: Tensor,
    scores: Tensor,
    size_hw: tuple[int, int],
    *,
    min_score: float = 0.8,
    threshold: float = 0.5,
    total: int = 100,
) -> Detections:
    """The detections of one class.

    Args:
        boxes: (N, 4) px, decoded.
        scores: (N,) probabilities of the class.
        size_hw: of the picture in px, without padding.
        min_score: only boxes above it count.
        threshold: of the suppression.
        total: boxes of the answer at most.
    Returns:
        Boxes cut at the picture's borders. One that is empty after that stays: it suppresses no other.
    """
    usable = boxes.isfinite().all(dim=1) & scores.isfinite() & (scores > min_score)
    clipped, scores = clip(boxes[usable], size_hw), scores[usable]
    kept = nms(clipped, scores, threshold)[:total]
    return Detections(clipped[kept], scores[kept])


def assign_levels(boxes: Tensor) -> Tensor:
    """(N,) int64 in 0..3: the level of the pyramid, finest first, from which each box is pooled."""
    sizes = _areas(boxes).sqrt()
    levels = (LEVEL_AT + torch.log2(sizes / LEVEL_SIZE_PX + 1e-8)).floor()
    return levels.clamp(0, LEVELS - 1).long()


def pool_levels(maps: Sequence[Tensor], boxes: Tensor, bins: int) -> Tensor:
    """`roi_align` of each box from its level of the pyramid.

    Args:
        maps: four (1, C, H, W) feature maps of strides 4, 8, 16 and 32 px.
        boxes: (N, 4) px.
        bins: per side.
    Returns:
        (N, C, bins, bins) float32.
    """
    levels = assign_levels(boxes)
    pooled = boxes.new_zeros(len(boxes), bins, bins, maps[0].shape[1])
    for level, features in enumerate(maps):
        members = (levels == level).nonzero()[:, 0]
        pooled[members] = roi_align(features, boxes[members], bins, 1 / (FINEST_STRIDE_PX << level)).permute(0, 2, 3, 1)
    return pooled.permute(0, 3, 1, 2)


def roi_align(features: Tensor, boxes: Tensor, bins: int, scale: float) -> Tensor:
    """The mean of 2x2 bilinear samples in every bin of every box, without a half-pixel shift ("aligned=False").

    Args:
        features: (1, C, H, W) of any floating dtype; fastest where channels lie last in memory.
        boxes: (N, 4) px.
        bins: per side of a box.
        scale: cells per px.
    Returns:
        (N, C, bins, bins) float32; samples more than one cell outside the map count as 0.
    Source: Mask R-CNN (arXiv 1703.06870), section 3, before the half-pixel correction.
    """
    _, channels, height, width = features.shape
    rows, row_weights = _taps(boxes[:, 1], boxes[:, 3], bins, scale, height)
    columns, column_weights = _taps(boxes[:, 0], boxes[:, 2], bins, scale, width)
    cells = rows[:, :, None, :, None] * width + columns[:, None, :, None, :]  # (N, bins, bins, 4, 4)
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    table = features.float().permute(0, 2, 3, 1).reshape(height * width, channels)
    taps = (2 * SAMPLES) ** 2
    pooled = functional.embedding_bag(
        cells.reshape(-1, taps), table, per_sample_weights=weights.reshape(-1, taps), mode="sum"
    )
    return pooled.reshape(-1, bins, bins, channels).permute(0, 3, 1, 2)


def _taps(start: Tensor, end: Tensor, bins: int, scale: float, cells: int) -> tuple[Tensor, Tensor]:
    """Along one axis the cells that every bin of every box reads, and their weights: each (N, bins, 4)."""
    first = start * scale
    span = (end * scale - first).clamp(min=1)
    steps = (torch.arange(bins * SAMPLES, device=start.device) + 0.5) / SAMPLES
    at = first[:, None] + steps * (span / bins)[:, None]  # (N, 2 bins)
    inside = (at >= -1) & (at <= cells)
    at = at.clamp(min=0)
    low = at.floor().clamp(max=cells - 1)
    high = (low + 1).clamp(max=cells - 1)
    fraction = torch.where(high > low, at - low, 0)
    weights = torch.stack([1 - fraction, fraction], dim=2) * inside[:, :, None] / SAMPLES
    shape = (-1, bins, 2 * SAMPLES)
    return torch.stack([low, high], dim=2).long().reshape(shape), weights.reshape(shape)
