"""Cloth: colours and patterns that are anchored to the garment, so that every picture of it shows the same pattern."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]  # RGB, 0-255
Floats = NDArray[np.float32]

PATTERNS = ("plain", "horizontal", "vertical", "checks", "dots", "logo", "gradient")
_PATTERN_WEIGHTS = (0.26, 0.17, 0.14, 0.13, 0.12, 0.09, 0.09)
# Of the garment's width. The slimmest figure is 37 px wide there at 192x256, so a stripe has 10 px at least. An
# autoencoder that reduces 16 times cannot show what repeats every 14-18 px: each of its cells would hold the same.
PITCH_RANGE = (0.275, 0.345)
_DOT_RADIUS = 0.28  # of their distance, which is two stripes
_LOGO_MIDDLE = 0.62  # widths below the top edge: under the deepest neckline, above the shortest hem
_LOGO_RADIUS = 0.28  # widths
_LOGO_HOLE = 0.07  # widths
_CLEAR_CONTRAST = 150  # sum of the absolute differences of two RGB colours that are told apart at a glance


@dataclass(frozen=True)
class Texture:
    """One cloth.

    Attributes:
        pattern: one of PATTERNS.
        base: the main colour.
        accent: the second colour; unused when plain.
        pitch: width of a stripe, share of the garment's width.
    """

    pattern: str
    base: Colour
    accent: Colour
    pitch: float

    def share_of_accent(self, across: Floats, along: Floats) -> NDArray[np.uint8]:
        """How much of the accent shows at each point of the garment.

        Args:
            across: from the middle line, in widths of the garment; shape that broadcasts against `along`.
            along: down from the top edge, in widths of the garment.
        Returns:
            uint8, 0 is base and 255 is accent, of the broadcast shape.
        """
        shape = np.broadcast_shapes(across.shape, along.shape)
        if self.pattern == "plain":
            return np.zeros(shape, np.uint8)
        if self.pattern == "gradient":
            return np.broadcast_to(np.clip(along * 170, 0, 255).astype(np.uint8), shape)
        if self.pattern == "logo":
            return _flower(across, along - np.float32(_LOGO_MIDDLE))
        return np.broadcast_to(self._repeats(across, along).astype(np.uint8) * np.uint8(255), shape)

    def _repeats(self, across: Floats, along: Floats) -> NDArray[np.bool_]:
        column = np.floor(across / self.pitch + np.float32(0.5)).astype(np.int32)
        row = np.floor(along / self.pitch).astype(np.int32)
        if self.pattern == "horizontal":
            return np.asarray(row % 2 == 1)
        if self.pattern == "vertical":
            return np.asarray(column % 2 == 1)
        if self.pattern == "checks":
            return np.asarray((row + column) % 2 == 1)
        period = np.float32(2 * self.pitch)
        x = np.mod(across + period / 2, period) - period / 2
        y = np.mod(along, period) - period / 2
        return np.asarray(x * x + y * y < (_DOT_RADIUS * period) ** 2)

    def palette(self) -> NDArray[np.uint8]:
        """(256, 3) uint8 RGB from base to accent."""
        share = np.linspace(0, 1, 256)[:, None]
        return np.asarray(np.rint(np.array(self.base) * (1 - share) + np.array(self.accent) * share), np.uint8)


def sample_texture(draw: np.random.Generator, *, unlike: Colour | None = None) -> Texture:
    """A cloth whose two colours differ clearly; its base differs from `unlike` as well."""
    base = sample_colour(draw, unlike)
    pattern = PATTERNS[int(draw.choice(len(PATTERNS), p=_PATTERN_WEIGHTS))]
    return Texture(pattern, base, sample_colour(draw, base), float(draw.uniform(*PITCH_RANGE)))


def sample_colour(draw: np.random.Generator, unlike: Colour | None = None) -> Colour:
    """A cloth colour: mostly lively, at times white, grey, black, sand or denim."""
    while True:
        hue, saturation, value = draw.random(), draw.uniform(0.35, 0.85), draw.uniform(0.35, 0.95)
        if draw.random() < 0.22:
            hue, saturation, value = draw.choice([0.09, 0.6]), draw.uniform(0, 0.3), draw.uniform(0.12, 0.97)
        colour = from_hsv(float(hue), float(saturation), float(value))
        if unlike is None or sum(abs(a - b) for a, b in zip(colour, unlike)) >= _CLEAR_CONTRAST:
            return colour


def from_hsv(hue: float, saturation: float, value: float) -> Colour:
    """RGB 0-255 from hue, saturation and value in [0, 1]."""
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return (round(red * 255), round(green * 255), round(blue * 255))


def shade(colour: Colour, factor: float) -> Colour:
    """The colour made darker (factor below 1) or lighter (above 1)."""
    red, green, blue = (min(255, round(part * factor)) for part in colour)
    return (red, green, blue)


def _flower(across: Floats, along: Floats) -> NDArray[np.uint8]:
    radius = np.hypot(across, along)
    angle = np.arctan2(across, -along)
    petals = radius < _LOGO_RADIUS * (0.72 + 0.28 * np.cos(5 * angle))
    return np.asarray((petals & (radius > _LOGO_HOLE)).astype(np.uint8) * np.uint8(255))
