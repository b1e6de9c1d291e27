"""What the quality bench asks for: held-out figures, each to be dressed twice, with the truth for both."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bench.metrics import TEXTURES, Floats, Region, median_colour, shrunk, texture
from model.embedded.body import Figure, sample_figure, skeleton
from model.embedded.canvas import UNITS_WH, Canvas
from model.embedded.figures import (
    KINDS,
    TEST_SEEDS,
    Example,
    Kind,
    draw_garment,
    draw_outfit,
    draw_person,
    example,
)
from model.embedded.people import DRESS, LOWER, UPPER
from model.embedded.wardrobe import (
    Garment,
    Outfit,
    body_parts,
    sample_garment,
    sample_lower,
    sample_outfit,
    sleeve_parts,
)
from model.interface import Image

OTHER = "other"  # logo and gradient: neither plain nor repeated
PERIODS_PX = tuple(float(period) for period in range(20, 46, 2))  # 2 stripes of 10-22 px on the figures of 192x256
LEAST_CONTRAST = 5.0  # L*a*b* units; true drawings: plain cloth has 2 at most, patterned 8 at least
_MARGIN_PX = 3  # seams, and edges that are half cloth
_LEAST_CLOTH_PX = 1_000  # half a square of the longest period

_LABEL_OF = {"top": UPPER, "dress": DRESS, "trousers": LOWER, "skirt": LOWER}


@dataclass(frozen=True)
class Piece:
    """One garment of a truth.

    Attributes:
        pattern: one of TEXTURES, or "other".
        colour: (3,) RGB 0-255 of its cloth in the in-shop picture; the main one where there are two.
        cloth: where it shows on the person, without its edges.
        trunk: the part of `cloth` that hangs straight: no sleeves.
    """

    pattern: str
    colour: Floats
    cloth: Region
    trunk: Region

    @property
    def judged(self) -> bool:
        """Whether enough of it shows to recognise a texture."""
        return self.pattern != OTHER and int(np.count_nonzero(self.trunk)) >= _LEAST_CLOTH_PX


@dataclass(frozen=True)
class Case:
    """One figure.

    Attributes:
        paired: the exercise of the seed.
        swapped: the same person and mask, with another garment and its truth.
        pieces: the garments of `swapped`: two where an outfit is changed that is no dress.
    """

    paired: Example
    swapped: Example
    pieces: tuple[Piece, ...]


def draw_cases(count: int, first: int, *, size_wh: tuple[int, int] = UNITS_WH) -> list[Case]:
    """The figures of `count` held-out seeds from the given one on, "upper", "lower" and "overall" in turn.

    Raises:
        ValueError: a seed is not among TEST_SEEDS.
    """
    seeds = range(first, first + count)
    if not seeds or seeds[0] not in TEST_SEEDS or seeds[-1] not in TEST_SEEDS:
        raise ValueError(
            f"seeds must lie between {TEST_SEEDS[0]} and {TEST_SEEDS[-1]}, not {first} to {first + count - 1}"
        )
    return [draw_case(seed, KINDS[place % len(KINDS)], size_wh=size_wh) for place, seed in enumerate(seeds)]


def draw_case(seed: int, kind: Kind, *, size_wh: tuple[int, int] = UNITS_WH) -> Case:
    """The exercise of a seed and kind, and a second garment for the same person."""
    paired = example(seed, kind, size_wh=size_wh)
    first = (seed, KINDS.index(kind))
    draw = np.random.default_rng(first)  # as `example` starts
    figure = sample_figure(draw)
    worn = sample_outfit(draw, dress=None if kind == "overall" else False)
    wanted, changed = _other_outfit(np.random.default_rng((*first, 1)), worn, kind)
    garment = draw_outfit(wanted, size_wh) if kind == "overall" else draw_garment(changed[0], size_wh)
    truth = draw_person(figure, wanted, size_wh)
    swapped = Example(paired.person, garment, paired.mask, truth.image, truth.labels)
    return Case(paired, swapped, tuple(_piece(figure, part, truth.labels) for part in changed))


def recognised(picture: Image, piece: Piece) -> str:
    """Which of TEXTURES a piece has in a picture; ask only for pieces that are `judged`."""
    return texture(picture, piece.trunk, periods_px=PERIODS_PX, least_contrast=LEAST_CONTRAST)


def _other_outfit(draw: np.random.Generator, worn: Outfit, kind: Kind) -> tuple[Outfit, list[Garment]]:
    """The outfit to change into, and what of it is new."""
    if kind == "overall":
        outfit = sample_outfit(draw)
        return outfit, [part for part in (outfit.upper, outfit.lower) if part is not None]
    if kind == "lower" or worn.lower is None:
        lower = sample_lower(draw, unlike=worn.upper.texture.base)
        return replace(worn, lower=lower), [lower]
    upper = sample_garment(draw, "top", unlike=worn.lower.texture.base)
    return replace(worn, upper=upper), [upper]


def _piece(figure: Figure, garment: Garment, labels: Image) -> Piece:
    shop = draw_garment(garment)
    cloth = shrunk(labels == _LABEL_OF[garment.cut], _MARGIN_PX)
    bones, size_wh = skeleton(figure), (labels.shape[1], labels.shape[0])
    straight = Canvas.for_figure(size_wh, oversample=1)
    straight.silhouette(body_parts(garment, bones), 1)
    for side in (0, 1):
        straight.silhouette(sleeve_parts(garment, bones, side), 0)
    pattern = garment.texture.pattern if garment.texture.pattern in TEXTURES else OTHER
    colour = median_colour(shop, np.any(shop != 255, axis=-1)) if pattern == "plain" else garment.texture.base
    return Piece(pattern, np.asarray(colour, np.float64), cloth, cloth & shrunk(straight.labels > 0, _MARGIN_PX))
