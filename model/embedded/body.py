"""Drawn people: what makes one figure, and where its joints are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model.embedded.canvas import Points
from model.embedded.textures import Colour, from_hsv, sample_colour

HAIR_STYLES = ("short", "long", "bob", "bun", "curly", "ponytail", "bald")
BACKDROPS = ("plain", "gradient", "room", "outdoors")

_SKINS: tuple[Colour, ...] = (
    (255, 224, 196),
    (241, 194, 152),
    (224, 172, 120),
    (190, 130, 82),
    (141, 90, 54),
    (98, 62, 42),
)
_HAIRS: tuple[Colour, ...] = (
    (32, 26, 28),
    (62, 40, 28),
    (110, 70, 38),
    (168, 116, 58),
    (222, 184, 110),
    (150, 62, 34),
    (172, 172, 176),
    (122, 58, 120),
)
_SOLE_Y = 244.0  # figure units; people of every size stand on one line
_MIDDLE_X = 96.0


@dataclass(frozen=True)
class Arm:
    """Angles from hanging straight down, degrees, positive outwards."""

    upper_deg: float
    fore_deg: float


@dataclass(frozen=True)
class Figure:
    """A person without clothes: everything that stays when the outfit changes.

    Attributes:
        size: of the whole person, 1 is 230 units tall.
        build: breadth, about 1.
        hips: breadth of the hips against the shoulders, about 1.
        shift: of the person to the right, figure units.
        arms: left and right as the viewer sees them.
        stance: how far each foot stands from the middle, figure units.
        skin: its colour.
        hair_style: one of HAIR_STYLES.
        hair: its colour.
        shoes: their colour.
        smile: 0 is a hint of it, 1 broad.
        backdrop: one of BACKDROPS.
        wall: colour of the upper part of the background.
        floor: colour of its lower part.
    """

    size: float
    build: float
    hips: float
    shift: float
    arms: tuple[Arm, Arm]
    stance: float
    skin: Colour
    hair_style: str
    hair: Colour
    shoes: Colour
    smile: float
    backdrop: str
    wall: Colour
    floor: Colour


@dataclass(frozen=True)
class Skeleton:
    """Measures of one figure, in figure units.

    Attributes:
        x: the middle line.
        unit: length of what is 1 unit on a figure of size 1.
        head, neck, shoulder, waist, hip, crotch, sole: heights (y).
        neck_half, shoulder_half, waist_half, hip_half: half widths.
        arms: left and right: shoulder, elbow, wrist, each (3, 2).
        legs: left and right: hip, knee, ankle, each (3, 2).
    """

    x: float
    unit: float
    head: float
    neck: float
    shoulder: float
    waist: float
    hip: float
    crotch: float
    sole: float
    neck_half: float
    shoulder_half: float
    waist_half: float
    hip_half: float
    arms: tuple[Points, Points]
    legs: tuple[Points, Points]


def sample_figure(draw: np.random.Generator) -> Figure:
    """A random person in a random pose before a random background."""
    hue, saturation = float(draw.random()), float(draw.uniform(0.03, 0.22))
    backdrop = BACKDROPS[int(draw.integers(len(BACKDROPS)))]
    outdoors = backdrop == "outdoors"
    wall = from_hsv(float(draw.uniform(0.52, 0.6)), 0.25, 0.97) if outdoors else from_hsv(hue, saturation, 0.93)
    floor = from_hsv(float(draw.uniform(0.2, 0.36)), 0.4, 0.78) if outdoors else from_hsv((hue + 0.06) % 1, 0.2, 0.76)
    return Figure(
        size=float(draw.uniform(0.91, 1.0)),
        build=float(draw.uniform(0.9, 1.18)),
        hips=float(draw.uniform(0.92, 1.12)),
        shift=float(draw.uniform(-6, 6)),
        arms=(sample_arm(draw), sample_arm(draw)),
        stance=float(draw.uniform(11, 20)),
        skin=_SKINS[int(draw.integers(len(_SKINS)))],
        hair_style=HAIR_STYLES[int(draw.choice(7, p=(0.24, 0.2, 0.16, 0.12, 0.12, 0.11, 0.05)))],
        hair=_HAIRS[int(draw.integers(len(_HAIRS)))],
        shoes=sample_colour(draw),
        smile=float(draw.uniform(0, 1)),
        backdrop=backdrop,
        wall=wall,
        floor=floor,
    )


def sample_arm(draw: np.random.Generator) -> Arm:
    """An arm that hangs, is spread, rests on the hip, waves, or lies before the body."""
    pose = draw.random()
    if pose < 0.5:
        upper = float(draw.uniform(10, 26))
        return Arm(upper, upper - float(draw.uniform(-4, 14)))
    if pose < 0.62:
        upper = float(draw.uniform(32, 46))
        return Arm(upper, upper - float(draw.uniform(-6, 16)))
    if pose < 0.78:
        return Arm(float(draw.uniform(36, 46)), -float(draw.uniform(36, 46)))
    if pose < 0.88:
        return Arm(float(draw.uniform(34, 52)), float(draw.uniform(140, 162)))
    return Arm(float(draw.uniform(8, 15)), -float(draw.uniform(52, 76)))


NEUTRAL = Figure(
    size=1.0,
    build=1.0,
    hips=1.0,
    shift=0.0,
    arms=(Arm(34, 34), Arm(34, 34)),
    stance=17.0,
    skin=_SKINS[1],
    hair_style="bald",
    hair=_HAIRS[0],
    shoes=(60, 60, 60),
    smile=0.5,
    backdrop="plain",
    wall=(255, 255, 255),
    floor=(255, 255, 255),
)  # who wears the garment in an in-shop picture, unseen


def skeleton(figure: Figure) -> Skeleton:
    """Where the joints of a figure are, in figure units."""
    unit, breadth = figure.size, figure.size * figure.build
    x = _MIDDLE_X + figure.shift

    def height(y: float) -> float:
        return _SOLE_Y - unit * (_SOLE_Y - y)

    shoulder_half, hip_half = 27 * breadth, 22.5 * breadth * figure.hips
    arms = tuple(
        _arm(arm, (x + side * (shoulder_half - 6 * unit), height(71)), side, unit)
        for arm, side in zip(figure.arms, (-1, 1))
    )
    legs = tuple(_leg((x + side * hip_half * 0.52, height(132)), side, figure.stance * unit, x) for side in (-1, 1))
    return Skeleton(
        x=x,
        unit=unit,
        head=height(33),
        neck=height(58),
        shoulder=height(63),
        waist=height(108),
        hip=height(127),
        crotch=height(139),
        sole=height(244),
        neck_half=5.6 * unit,
        shoulder_half=shoulder_half,
        waist_half=18.5 * breadth,
        hip_half=hip_half,
        arms=(arms[0], arms[1]),
        legs=(legs[0], legs[1]),
    )


def limb(joints: Points, half_widths: tuple[float, float, float], *, start: float = 0.0, stop: float = 1.0) -> Points:
    """The outline of an arm, a leg or what covers it.

    Args:
        joints: (3, 2), e.g. shoulder, elbow, wrist.
        half_widths: at the three joints, figure units.
        start: share of the limb's length where the outline begins.
        stop: share where it ends; up to 1.05 reaches a little beyond.
    Returns:
        (2 * 14, 2) polygon.
    """
    t = np.linspace(0, 1.1, 23)
    lengths = np.linalg.norm(np.diff(joints, axis=0), axis=1)
    middle = lengths[0] / lengths.sum()
    beyond = joints[2] + (joints[2] - joints[1]) * (0.1 / (1 - middle))
    stations = np.array([0, middle, 1, 1.1])
    nodes = np.vstack([joints, beyond])
    line = np.stack([np.interp(t, stations, nodes[:, axis]) for axis in (0, 1)], axis=1)
    for _ in range(3):  # rounds the elbow or the knee
        line[1:-1] = (line[:-2] + 2 * line[1:-1] + line[2:]) / 4
    cut = np.linspace(start, stop, 14)
    line = np.stack([np.interp(cut, t, line[:, axis]) for axis in (0, 1)], axis=1)
    tangent = np.gradient(line, axis=0)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], axis=1) / np.linalg.norm(tangent, axis=1, keepdims=True)
    half = np.interp(cut, stations[:3], half_widths)[:, None]
    return np.concatenate([line + normal * half, (line - normal * half)[::-1]])


def _arm(arm: Arm, shoulder: tuple[float, float], side: int, unit: float) -> Points:
    upper, fore = np.deg2rad(arm.upper_deg), np.deg2rad(arm.fore_deg)
    elbow = np.array(shoulder) + 33 * unit * np.array([side * np.sin(upper), np.cos(upper)])
    wrist = elbow + 32 * unit * np.array([side * np.sin(fore), np.cos(fore)])
    return np.stack([np.array(shoulder), elbow, wrist])


def _leg(hip: tuple[float, float], side: int, stance: float, x: float) -> Points:
    ankle = np.array([x + side * stance, _SOLE_Y - 9])
    knee = np.array(hip) * 0.5 + ankle * 0.5 + np.array([side * 0.8, -2])
    return np.stack([np.array(hip), knee, ankle])
