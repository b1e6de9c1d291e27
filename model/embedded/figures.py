"""Drawn people in outfits, their garments as a shop shows them, and masks: all from a seed, at any size.

The same figure can be drawn in another outfit, which is what no photograph offers: the true picture that a try-on
should come to. Wherever the mask of a kind is black, two such drawings are equal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from model.embedded.body import NEUTRAL, Figure, Skeleton, sample_figure, skeleton
from model.embedded.canvas import UNITS_WH, Canvas, oversampling
from model.embedded.people import (
    DRESS,
    LABELS,
    LOWER,
    UPPER,
    paint_arm,
    paint_backdrop,
    paint_behind,
    paint_hands_and_shoes,
    paint_head,
)
from model.embedded.textures import Texture, shade
from model.embedded.wardrobe import (
    LOWER_CUTS,
    NECKLINES,
    Garment,
    Outfit,
    body_parts,
    neck_opening,
    sample_garment,
    sample_lower,
    sample_outfit,
    sleeve_parts,
)
from model.interface import Image

__all__ = [
    "KINDS",
    "LABELS",
    "TEST_SEEDS",
    "TRAIN_SEEDS",
    "Drawing",
    "Example",
    "draw_garment",
    "draw_outfit",
    "draw_person",
    "example",
    "masks",
]

Kind = Literal["upper", "lower", "overall"]

KINDS: tuple[Kind, ...] = ("upper", "lower", "overall")
TRAIN_SEEDS = range(0, 1_000_000)
TEST_SEEDS = range(1_000_000, 1_010_000)  # never trained on

_SHOP_SCALE = 1.3  # a garment in the shop is shown larger than on a person, unless it would not fit
_SHOP_FILL = 0.93  # of the picture's width or height, at most
_MARGIN = 2.5  # figure units; a mask reaches this far beyond what cloth may cover
_PLAIN = Texture("plain", (0, 0, 0), (255, 255, 255), 0.2)
_LONGEST_TOP = Garment("top", _PLAIN, sleeve=1.0, hem=1.0, neckline="high", ease=1.0, flare=1.0)
_TUCKED_HEM = -0.27  # just below the waistband, so that nothing shows beside the trousers


@dataclass(frozen=True)
class Drawing:
    """A drawn person.

    Attributes:
        image: HWC uint8 RGB.
        labels: HW uint8, index into LABELS.
        figure: who is drawn.
    """

    image: Image
    labels: Image
    figure: Figure


@dataclass(frozen=True)
class Example:
    """One exercise of try-on with its solution.

    Attributes:
        person: HWC uint8 RGB, the figure in other clothes.
        garment: HWC uint8 RGB, in-shop picture of what is to be tried on, same size.
        mask: HW uint8 0/255, what is repainted.
        target: HWC uint8 RGB, the figure in that garment; equal to `person` outside the mask.
        labels: HW uint8, index into LABELS, of `target`.
    """

    person: Image
    garment: Image
    mask: Image
    target: Image
    labels: Image


def example(seed: int, kind: Kind, *, size_wh: tuple[int, int] = UNITS_WH) -> Example:
    """The exercise of a seed; the same seed and kind give the same bytes.

    Args:
        seed: from TRAIN_SEEDS or TEST_SEEDS.
        kind: which garment changes; "overall" is top and lower garment, or a dress.
        size_wh: of every picture, px.
    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, not {kind!r}")
    draw = np.random.default_rng((seed, KINDS.index(kind)))
    figure = sample_figure(draw)
    if kind == "overall":
        worn, wanted = sample_outfit(draw), sample_outfit(draw)
        garment = draw_outfit(wanted, size_wh)
    else:
        worn = sample_outfit(draw, dress=False)
        wanted, piece = _with_another(draw, worn, kind)
        garment = draw_garment(piece, size_wh)
    before, target = draw_person(figure, worn, size_wh), draw_person(figure, wanted, size_wh)
    return Example(before.image, garment, masks(before)[kind], target.image, target.labels)


def draw_person(figure: Figure, outfit: Outfit, size_wh: tuple[int, int] = UNITS_WH) -> Drawing:
    """A figure in an outfit, whole and centred.

    Args:
        figure: who.
        outfit: what they wear.
        size_wh: of the picture, px; another aspect than 3:4 shows more background.
    """
    canvas, bones = Canvas.for_figure(size_wh), skeleton(figure)
    paint_backdrop(canvas, figure)
    paint_behind(canvas, figure, bones)
    bare = outfit.upper.sleeve <= 0
    for side in (0, 1) if bare else ():  # an armhole lies on the shoulder, a sleeve's seam on the trunk
        paint_arm(canvas, figure, bones, side)
    if outfit.lower is None:
        trunk = [outfit.upper]
    elif outfit.tucked:
        trunk = [replace(outfit.upper, hem=_TUCKED_HEM), outfit.lower]
    else:
        trunk = [outfit.lower, outfit.upper]
    for garment in trunk:
        _paint_trunk(canvas, garment, bones)
    for side in (0, 1):
        paint_arm(canvas, figure, bones, side, start=0.5 if bare else 0.0)
        sleeve = sleeve_parts(outfit.upper, bones, side)
        if sleeve:
            canvas.cloth(sleeve, outfit.upper.texture, _label(outfit.upper))
    _paint_front(canvas, figure, bones)
    return Drawing(*canvas.finish(), figure)


def draw_garment(garment: Garment, size_wh: tuple[int, int] = UNITS_WH) -> Image:
    """The garment laid flat on white, centred, as a shop shows it: HWC uint8 RGB."""
    bones = skeleton(NEUTRAL)
    sleeves = [sleeve_parts(garment, bones, side) for side in (0, 1)]
    corners = np.concatenate([part.polygon for part in sum(sleeves, body_parts(garment, bones))])
    low, high = corners.min(axis=0), corners.max(axis=0)
    room = np.array(size_wh) * _SHOP_FILL / (high - low)
    scale = min(float(room.min()), _SHOP_SCALE * size_wh[0] / UNITS_WH[0])
    offset = np.array(size_wh) / 2 - (low + high) / 2 * scale
    canvas = Canvas(size_wh, scale, (float(offset[0]), float(offset[1])), oversample=oversampling(size_wh))
    if garment.cut in ("top", "dress"):  # the inside of the back shows above the neckline
        canvas.flat(neck_opening(garment, bones), shade(garment.texture.base, 0.55), _label(garment))
    _paint_trunk(canvas, garment, bones)
    for sleeve in sleeves:
        if sleeve:
            canvas.cloth(sleeve, garment.texture, _label(garment))
    return canvas.finish()[0]


def draw_outfit(outfit: Outfit, size_wh: tuple[int, int] = UNITS_WH) -> Image:
    """All garments of an outfit in one in-shop picture, the upper above the lower: HWC uint8 RGB."""
    if outfit.lower is None:
        return draw_garment(outfit.upper, size_wh)
    width, height = size_wh
    halves = [
        draw_garment(outfit.upper, (width, height // 2)),
        draw_garment(outfit.lower, (width, height - height // 2)),
    ]
    return np.concatenate(halves)


def masks(drawing: Drawing) -> dict[str, Image]:
    """What must be repainted so that any other garment of a kind can be put there.

    They follow from the figure alone and so tell nothing about the clothes it wears. Face, hair before the shoulders,
    hands and shoes stay free. "inner" is what "upper" is; "outer" reaches further down, as a coat does.

    Returns:
        "upper", "lower", "overall", "inner" and "outer", each HW uint8 0/255.
    """
    size_wh = (drawing.labels.shape[1], drawing.labels.shape[0])
    tops = [replace(_LONGEST_TOP, neckline=neckline) for neckline in NECKLINES]
    lowers = [replace(_LONGEST_TOP, cut=cut) for cut in LOWER_CUTS]
    dress = replace(_LONGEST_TOP, cut="dress")
    coat = replace(dress, hem=0.2)
    front = Canvas.for_figure(size_wh)
    _paint_front(front, drawing.figure, skeleton(drawing.figure))
    free = front.wholly_labelled()  # a pixel at the edge of a hand is part cloth
    reach = {
        "upper": _reach(drawing.figure, tops, size_wh),
        "lower": _reach(drawing.figure, lowers, size_wh),
        "overall": _reach(drawing.figure, [*tops, *lowers, dress], size_wh),
        "outer": _reach(drawing.figure, [*tops, coat], size_wh),
    }
    reach["inner"] = reach["upper"]
    return {kind: np.where(area & ~free, np.uint8(255), np.uint8(0)) for kind, area in reach.items()}


def _with_another(draw: np.random.Generator, worn: Outfit, kind: Kind) -> tuple[Outfit, Garment]:
    """The outfit with its upper or lower part changed, and the new part."""
    if kind == "lower" or worn.lower is None:
        piece = sample_lower(draw, unlike=worn.upper.texture.base)
        return replace(worn, lower=piece), piece
    piece = sample_garment(draw, "top", unlike=worn.lower.texture.base)
    return replace(worn, upper=piece), piece


def _reach(figure: Figure, garments: list[Garment], size_wh: tuple[int, int]) -> NDArray[np.bool_]:
    """Where any of the garments may lie, a little widened."""
    bones = skeleton(figure)
    canvas = Canvas.for_figure(size_wh, oversample=1)
    for garment in garments:
        canvas.silhouette(body_parts(garment, bones), _label(garment))
    for side in (0, 1):  # the sleeves of the first are those of all
        canvas.silhouette(sleeve_parts(garments[0], bones, side), _label(garments[0]))
    return np.asarray(cv2.dilate(canvas.labels, _disc(_MARGIN * _scale(size_wh))) > 0)


def _scale(size_wh: tuple[int, int]) -> float:
    return min(size_wh[0] / UNITS_WH[0], size_wh[1] / UNITS_WH[1])


def _disc(radius_px: float) -> Image:
    reach = max(2, int(np.ceil(radius_px)))
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1)), np.uint8)


def _paint_front(canvas: Canvas, figure: Figure, bones: Skeleton) -> None:
    paint_head(canvas, figure, bones)
    paint_hands_and_shoes(canvas, figure, bones)


def _paint_trunk(canvas: Canvas, garment: Garment, bones: Skeleton) -> None:
    canvas.cloth(body_parts(garment, bones), garment.texture, _label(garment))
    _paint_details(canvas, garment, bones)


def _paint_details(canvas: Canvas, garment: Garment, bones: Skeleton) -> None:
    """Collar, waistband, fly and pockets: thin lines in a darker shade."""
    dark, unit = shade(garment.texture.base, 0.6), bones.unit
    if garment.cut in ("top", "dress"):
        canvas.line(neck_opening(garment, bones) + np.array([0, 1.6 * unit]), dark, 1.2 * unit)
        return
    y, half = bones.waist + 2.5 * unit, bones.waist_half + 1.2 * unit
    canvas.line(np.array([[bones.x - half, y], [bones.x + half, y]]), dark, 1.1 * unit)
    if garment.cut == "trousers":
        canvas.line(np.array([[bones.x, y], [bones.x, bones.crotch]]), dark, 0.9 * unit)
        for side in (-1, 1):
            x = bones.x + side * half
            pocket = np.array([[x - side * 8 * unit, y], [x - side * 1.5 * unit, y + 10 * unit]])
            canvas.line(pocket, dark, 0.9 * unit)


def _label(garment: Garment) -> int:
    return {"top": UPPER, "dress": DRESS}.get(garment.cut, LOWER)
