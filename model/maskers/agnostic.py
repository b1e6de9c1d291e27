"""Cloth-agnostic masks: what of a person is repainted for a type of garment, from label maps, to the bit.

The rules are those published with CatVTON (arXiv 2407.15886) and FastFit (arXiv 2508.20586). Sizes that four does not
divide, on which those programs stop, work here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from model.maskers.labels import (
    ARMS,
    FASTFIT_PARTS,
    FEET,
    HANDS,
    LEGS,
    PARTS,
    WORN,
    LabelMap,
    LabelMaps,
    Mask,
    Part,
    check_parses,
    is_in_atr,
    is_in_lip,
)
from model.maskers.regions import (
    Box,
    blur,
    bounding_box,
    convex_hulls,
    dilate,
    dilate_at_quarter_scale,
    largest_component,
)

FAINT = 25  # of 255: a blur cut here reaches beyond what was blurred
SOLID = 100  # of 255: a blur cut here drops specks and thin strips
MAX_WIDENING = 0.2  # of the box's width, on each side


class Uniform(Protocol):
    """Draws numbers as numpy's RandomState and Generator do."""

    def uniform(self, low: float, high: float) -> float:
        """A number from [low, high)."""


def cloth_agnostic_mask(densepose: LabelMap, schp_lip: LabelMap, schp_atr: LabelMap, part: str) -> NDArray[np.uint8]:
    """What CatVTON repaints. Empty maps give an empty mask; see `target_found` for pictures without such a garment.

    Args:
        densepose: HW uint8, 0-24, parts of one person's body.
        schp_lip: HW uint8, 0-19, same size.
        schp_atr: HW uint8, 0-17, same size.
        part: "upper", "lower", "overall", "inner" or "outer".
    Returns:
        A new HW uint8, 255 where cloth is repainted, else 0.
    Raises:
        ValueError: another shape or dtype, sizes that differ, a label out of range, or an unknown part.
    Source: CatVTON (arXiv 2407.15886), the published program's automatic masks.
    """
    maps = LabelMaps(densepose, schp_lip, schp_atr)
    rules = _rules(part, PARTS)
    window, blur_window = _windows(densepose, 250, 25)
    strong, weak = protected(maps, rules, window)
    area = convex_hulls(uncovered(maps, rules, weak, window)) & ~weak
    # The blur bleeds back into what is weakly protected; only strong protection holds to the end.
    area = (blur(area, blur_window) >= FAINT) | maps.in_either(rules.target)
    return _picture(dilate(area & ~strong, window))


def fastfit_agnostic_mask(
    densepose: LabelMap, schp_lip: LabelMap, schp_atr: LabelMap, part: str, square: bool = False
) -> NDArray[np.uint8]:
    """What FastFit repaints for one garment: the hull of the largest region that is free, without what is protected.

    Args:
        densepose: HW uint8, 0-24, parts of one person's body.
        schp_lip: HW uint8, 0-19, same size.
        schp_atr: HW uint8, 0-17, same size.
        part: "upper", "lower", "overall", "inner" or "outer"; "full" and "dresses" are "overall".
        square: repaint the region's bounding box, but for what is protected in it.
    Returns:
        A new HW uint8, 255 where cloth is repainted, else 0.
    Raises:
        ValueError: another shape or dtype, sizes that differ, a label out of range, or an unknown part.
    Source: FastFit (arXiv 2508.20586), the published program.
    """
    maps = LabelMaps(densepose, schp_lip, schp_atr)
    rules = _rules(part, FASTFIT_PARTS)
    window, blur_window = _windows(densepose, 500, 50)
    _, weak = protected(maps, rules, window)
    area = blur(uncovered(maps, rules, weak, window), blur_window) >= SOLID
    area = convex_hulls(largest_component(area)) & ~weak
    area = blur(area, blur_window) >= FAINT
    if square:
        free = area | ~weak
        area = _filled(bounding_box(area), area) & free
        area = dilate(area, window) & ~maps.in_lip(("Face",))
    return _picture(dilate(area, window, 2))


def multi_ref_cloth_agnostic_mask(
    densepose: LabelMap,
    schp_lip: LabelMap,
    schp_atr: LabelMap,
    square: bool = False,
    horizon_expand: bool = False,
    generator: Uniform | None = None,
) -> NDArray[np.uint8]:
    """What FastFit repaints for a whole outfit: clothes, shoes and the body under them; only the face is protected.

    Args:
        densepose: HW uint8, 0-24, parts of one person's body.
        schp_lip: HW uint8, 0-19, same size.
        schp_atr: HW uint8, 0-17, same size.
        square: repaint the bounding box, but for the face.
        horizon_expand: widen that box on both sides, each by a random 0-20 % of its width; without `square` nothing.
        generator: numpy's RandomState or Generator, drawn from twice, left first; without one a new `default_rng(0)`,
            so that equal maps give equal masks.
    Returns:
        A new HW uint8, 255 where cloth is repainted, else 0.
    Raises:
        ValueError: another shape or dtype, sizes that differ, or a label out of range.
    Source: FastFit (arXiv 2508.20586), the published program.
    """
    maps = LabelMaps(densepose, schp_lip, schp_atr)
    window, blur_window = _windows(densepose, 500, 50)
    face = maps.in_lip(("Face",))
    area = dilate(maps.in_either(WORN), window)
    area |= dilate_at_quarter_scale(maps.in_densepose(FASTFIT_PARTS["overall"].dense), window, 2)
    area = blur(dilate(area & ~face, window), blur_window) >= SOLID
    area = blur(convex_hulls(area), blur_window) >= FAINT
    if square:
        box = bounding_box(area)
        if horizon_expand:
            draws = np.random.default_rng(0) if generator is None else generator
            box = _widened(box, area.shape[1], draws)
        area = dilate(_filled(box, area) & ~face, window) & ~face
    return _picture(dilate(area, window, 2))


def target_found(schp_lip: LabelMap, schp_atr: LabelMap, part: str) -> bool:
    """Whether the picture shows what would be replaced; a mask without it rests on the bare body alone.

    Args:
        schp_lip: HW uint8, 0-19.
        schp_atr: HW uint8, 0-17, same size.
        part: as for `fastfit_agnostic_mask`.
    Raises:
        ValueError: another shape or dtype, sizes that differ, a label out of range, or an unknown part.
    """
    check_parses(schp_lip, schp_atr)
    target = _rules(part, FASTFIT_PARTS).target
    return bool(is_in_lip(schp_lip, target).any() or is_in_atr(schp_atr, target).any())


def protected(maps: LabelMaps, rules: Part, window: int) -> tuple[Mask, Mask]:
    """What is never repainted, and what a region of repaint is cut by before it is smoothed.

    Args:
        maps: of the picture.
        rules: of the garment.
        window: by which hands and feet are grown, px.
    Returns:
        Strong and weak protection, HW bool; weak contains strong.
    """
    limbs = maps.in_either((*ARMS, *LEGS))
    strong = (dilate(maps.in_densepose((*HANDS, *FEET)), window) & limbs) | maps.in_lip(("Face",))
    everywhere = ("Hair", *rules.body, *rules.accessories)
    weak = maps.in_lip((*everywhere, *rules.cloth_lip)) | maps.in_atr((*everywhere, *rules.cloth_atr))
    return strong, weak | strong


def uncovered(maps: LabelMaps, rules: Part, weak: Mask, window: int) -> Mask:
    """What neither map of SCHP calls background and nothing protects, and all that the garment can cover.

    Args:
        maps: of the picture.
        rules: of the garment.
        weak: HW bool, what is protected.
        window: by which the parts of the body are grown at quarter scale, px.
    Returns:
        A new HW bool.
    """
    background = maps.in_lip(("Background",)) & maps.in_atr(("Background",))
    dense = dilate_at_quarter_scale(maps.in_densepose(rules.dense), window, 2)
    return dense | ~(weak | background)


def _rules(part: str, known: Mapping[str, Part]) -> Part:
    if part not in known:
        raise ValueError(f"part must be one of {', '.join(known)}, not {part!r}")
    return known[part]


def _windows(labels: LabelMap, per_window: int, per_blur: int) -> tuple[int, int]:
    longest = max(labels.shape)
    return longest // per_window | 1, longest // per_blur | 1


def _widened(box: Box, picture_width: int, generator: Uniform) -> Box:
    width = box.right - box.left
    left = int(generator.uniform(0, MAX_WIDENING) * width)
    right = int(generator.uniform(0, MAX_WIDENING) * width)
    start = max(0, box.left - left)
    # What the border cuts off on the left is added on the right, as published.
    return Box(start, box.top, min(picture_width, start + width + left + right), box.bottom)


def _filled(box: Box, like: Mask) -> Mask:
    area = np.zeros_like(like)
    area[box.top : box.bottom, box.left : box.right] = True
    return area


def _picture(mask: Mask) -> NDArray[np.uint8]:
    return np.asarray(np.where(mask, 255, 0), np.uint8)
