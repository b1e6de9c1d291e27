"""Drawn clothes: what makes one garment, and its outline on a given figure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from model.embedded.body import Skeleton, limb
from model.embedded.canvas import Frame, Part, Points, bend, ellipse
from model.embedded.textures import Colour, Texture, sample_texture

LOWER_CUTS = ("trousers", "skirt")
NECKLINES = ("crew", "v", "scoop", "boat", "high")
_SLEEVES = (0.0, 0.2, 0.38, 0.72, 0.98)  # share of the arm: none, cap, short, three-quarter, long
_LEGS = (0.36, 0.52, 0.86, 0.98)  # share of the leg: shorts, knee, cropped, long
# Half width, height above the shoulder, and depth below it, in units of a figure of size 1.
_NECK_SHAPES = {"crew": (8.5, 5.0, 2.5), "v": (8.5, 5.0, 17.0), "scoop": (12.0, 3.7, 11.0), "boat": (17.0, 2.0, 1.0)}
_PAST_LOGO = 9.0  # widths down the cloth, where a sleeve shows nothing of the logo on the chest


@dataclass(frozen=True)
class Garment:
    """One piece of clothing.

    Attributes:
        cut: "top", "trousers", "skirt" or "dress".
        texture: its cloth.
        sleeve: how much of the arm is covered, 0 (none) to 1 (to the wrist); tops and dresses.
        hem: how far down it reaches; trousers: share of the leg, others: 0 is the shortest and 1 the longest.
        neckline: one of NECKLINES; tops and dresses.
        ease: 0 is tight, 1 loose.
        flare: 0 falls straight, 1 widens much towards the hem.
    """

    cut: str
    texture: Texture
    sleeve: float = 0.0
    hem: float = 0.5
    neckline: str = "crew"
    ease: float = 0.3
    flare: float = 0.3


@dataclass(frozen=True)
class Outfit:
    """What a figure wears: a dress in `upper` and no `lower`, or a top and something below.

    Attributes:
        upper: a top or a dress.
        lower: trousers or a skirt; None under a dress.
        tucked: the top is tucked into the lower garment.
    """

    upper: Garment
    lower: Garment | None
    tucked: bool = False


def sample_outfit(draw: np.random.Generator, *, dress: bool | None = None) -> Outfit:
    """A random outfit whose parts differ clearly in colour; `dress` decides whether it is one piece."""
    if draw.random() < 0.2 if dress is None else dress:
        return Outfit(sample_garment(draw, "dress"), None)
    upper = sample_garment(draw, "top")
    return Outfit(upper, sample_lower(draw, unlike=upper.texture.base), bool(draw.random() < 0.3))


def sample_lower(draw: np.random.Generator, *, unlike: Colour | None = None) -> Garment:
    """Random trousers or a skirt in a colour that differs from `unlike`."""
    return sample_garment(draw, LOWER_CUTS[int(draw.random() < 0.36)], unlike=unlike)


def sample_garment(draw: np.random.Generator, cut: str, *, unlike: Colour | None = None) -> Garment:
    """A random garment of one cut, in a colour that differs from `unlike`."""
    texture = sample_texture(draw, unlike=unlike)
    if cut in LOWER_CUTS and texture.pattern == "logo":  # a logo belongs on a chest
        texture = replace(texture, pattern="plain")
    return Garment(
        cut=cut,
        texture=texture,
        sleeve=_SLEEVES[int(draw.choice(5, p=(0.14, 0.12, 0.32, 0.12, 0.3)))],
        hem=_LEGS[int(draw.choice(4, p=(0.26, 0.14, 0.12, 0.48)))] if cut == "trousers" else float(draw.uniform(0, 1)),
        neckline=NECKLINES[int(draw.choice(5, p=(0.34, 0.2, 0.2, 0.12, 0.14)))],
        ease=float(draw.uniform(0, 1)),
        flare=float(draw.uniform(0, 1)),
    )


def body_parts(garment: Garment, bones: Skeleton) -> list[Part]:
    """The cloth around trunk and legs, without sleeves."""
    if garment.cut in ("top", "dress"):
        hem = top_hem(garment, bones) if garment.cut == "top" else skirt_hem(garment, bones)
        half = _trunk_half(garment, bones, hem)
        return [Part(half_to_whole(half, bones), upper_frame(bones))]
    frame = lower_frame(bones)
    if garment.cut == "skirt":
        waist = np.array([[bones.x + bones.waist_half + 1.5, bones.waist - 2]])
        half = np.concatenate([waist, _skirt_side(garment, bones, skirt_hem(garment, bones))])
        return [Part(half_to_whole(half, bones), frame)]
    return [Part(polygon, frame) for polygon in _trousers(garment, bones)]


def sleeve_parts(garment: Garment, bones: Skeleton, side: int) -> list[Part]:
    """The cloth around one arm (0 is the viewer's left); none when sleeveless."""
    if garment.sleeve <= 0 or garment.cut in LOWER_CUTS:
        return []
    joints, unit = bones.arms[side], bones.unit
    room = (1.6 + 2.2 * garment.ease) * unit
    widths = (6.9 * unit + 0.4 * room, 5.4 * unit + room, 4.2 * unit + room)
    width = upper_frame(bones).width
    start = _PAST_LOGO if garment.texture.pattern == "logo" else 0.16
    upper = Frame(_xy(joints[0]), width, _direction(joints[0], joints[1]), start)
    length = float(np.linalg.norm(joints[1] - joints[0]))
    fore = Frame(_xy(joints[1]), width, _direction(joints[1], joints[2]), start + length / width)
    parts = [
        Part(limb(joints, widths, stop=min(garment.sleeve, 0.56)), upper),
        Part(ellipse(_xy(joints[0]), widths[0], widths[0]), upper),
    ]
    if garment.sleeve > 0.56:
        parts.append(Part(limb(joints, widths, start=0.5, stop=garment.sleeve), fore))
    return parts


def neck_opening(garment: Garment, bones: Skeleton) -> Points:
    """The neckline from the viewer's right to left, (N, 2)."""
    right = _neckline(garment, bones)[::-1]
    left = right[::-1].copy()
    left[:, 0] = 2 * bones.x - left[:, 0]
    return np.concatenate([right, left])


def upper_frame(bones: Skeleton) -> Frame:
    """Where the texture of a top or a dress hangs."""
    return Frame((bones.x, bones.shoulder - 4 * bones.unit), 2 * (bones.shoulder_half - 4 * bones.unit))


def lower_frame(bones: Skeleton) -> Frame:
    """Where the texture of trousers or a skirt hangs."""
    return Frame((bones.x, bones.waist - 2 * bones.unit), 2 * (bones.hip_half + 2 * bones.unit))


def top_hem(garment: Garment, bones: Skeleton) -> float:
    """Height (y) of a top's lower edge: from just below the waist to the crotch."""
    return bones.waist + (8 + 26 * garment.hem) * bones.unit


def skirt_hem(garment: Garment, bones: Skeleton) -> float:
    """Height (y) of a skirt's or a dress's lower edge: from the upper thigh to the calf."""
    return bones.waist + (52 + 58 * garment.hem) * bones.unit


def half_to_whole(half: Points, bones: Skeleton) -> Points:
    """A closed outline from its right half, mirrored at the middle line."""
    mirrored = half[::-1].copy()
    mirrored[:, 0] = 2 * bones.x - mirrored[:, 0]
    return np.concatenate([half, mirrored])


def _neckline(garment: Garment, bones: Skeleton) -> Points:
    """Right half of the neckline, from the middle outwards."""
    x, unit = bones.x, bones.unit
    if garment.neckline == "high":
        collar = bones.neck - 3 * unit
        rise = bend(
            (x + 7 * unit, collar),
            (x + 7 * unit, bones.shoulder - 5 * unit),
            (x + 12 * unit, bones.shoulder - 4 * unit),
        )
        return np.concatenate([np.array([[x, collar + 1.2 * unit]]), rise])
    half, above, depth = (unit * value for value in _NECK_SHAPES[garment.neckline])
    lowest, side = (x, bones.shoulder + depth), (x + half, bones.shoulder - above)
    if garment.neckline == "v":
        return np.array([lowest, side])
    return bend(lowest, (side[0], lowest[1]), side)


def _trunk_half(garment: Garment, bones: Skeleton, hem: float) -> Points:
    """Right half of a top or a dress: neckline, shoulder, side, hem."""
    x, unit = bones.x, bones.unit
    room = (0.8 + 4.2 * garment.ease) * unit
    shoulder, armpit = bones.shoulder, (x + bones.shoulder_half - 4 * unit + 0.4 * room, bones.shoulder + 22 * unit)
    if garment.sleeve > 0:
        tip = bend(
            (x + bones.shoulder_half - 6 * unit, shoulder),
            (x + bones.shoulder_half, shoulder),
            (x + bones.shoulder_half, shoulder + 8 * unit),
        )
    else:
        strap = x + max(bones.shoulder_half * 0.74, bones.shoulder_half - 8 * unit)
        tip = bend((strap, shoulder - 1.2 * unit), (strap - 2 * unit, armpit[1] - 3 * unit), armpit)
    waist_x = x + bones.waist_half + room
    if garment.cut == "dress":
        side = bend(armpit, (waist_x - 1.5 * unit, bones.waist - 16 * unit), (waist_x - 0.5 * room, bones.waist))
        return np.concatenate([_neckline(garment, bones), tip, side, _skirt_side(garment, bones, hem)])
    share = min(1.0, (hem - bones.waist) / (bones.hip - bones.waist))
    # Wide enough there to hide a skirt that starts underneath.
    hem_x = x + bones.waist_half + (bones.hip_half - bones.waist_half) * share + room + (2.4 + 2 * garment.flare) * unit
    side = bend(armpit, (waist_x, bones.waist - 10 * unit), (hem_x, hem))
    return np.concatenate([_neckline(garment, bones), tip, side, np.array([[x, hem + 1.5 * unit]])])


def _skirt_side(garment: Garment, bones: Skeleton, hem: float) -> Points:
    """Right side of a skirt from the hip down, and its hem."""
    x, unit = bones.x, bones.unit
    hip_x = x + bones.hip_half + (1.6 + 1.4 * garment.flare) * unit
    hem_x = hip_x + (1 + 17 * garment.flare * (hem - bones.hip) / (60 * unit)) * unit
    side = bend((hip_x - 1.5 * unit, bones.hip - 6 * unit), (hip_x, bones.hip + 6 * unit), (hem_x, hem))
    return np.concatenate([side, bend((hem_x, hem), (x + (hem_x - x) * 0.55, hem + 3.5 * unit), (x, hem + 3.5 * unit))])


def _trousers(garment: Garment, bones: Skeleton) -> list[Points]:
    unit, x = bones.unit, bones.x
    hip_half = bones.hip_half * 0.5 + (0.8 + garment.ease) * unit
    knee = (8.6 + 1.5 * garment.ease + 1.8 * garment.flare) * unit
    ankle = (6.4 + 1.5 * garment.ease + 5 * garment.flare) * unit
    half = np.array(
        [
            [x + bones.waist_half + 1.5, bones.waist - 2 * unit],
            [x + bones.hip_half + 1.2 * unit, bones.hip - 4 * unit],
            [x + bones.hip_half * 1.02 + (0.8 + garment.ease) * unit, bones.hip + 6 * unit],
            [x, bones.crotch + 3 * unit],
        ]
    )
    return [half_to_whole(half, bones)] + [limb(leg, (hip_half, knee, ankle), stop=garment.hem) for leg in bones.legs]


def _xy(point: Points) -> tuple[float, float]:
    return (float(point[0]), float(point[1]))


def _direction(start: Points, stop: Points) -> tuple[float, float]:
    away = (stop - start) / np.linalg.norm(stop - start)
    return (float(away[0]), float(away[1]))
