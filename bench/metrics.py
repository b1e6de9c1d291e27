"""How near a picture is to the truth, and whether a garment arrived: arrays in, numbers out, without torch.

Pictures are HWC uint8 RGB, regions HW bool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from model.interface import Image

Region = NDArray[np.bool_]
Floats = NDArray[np.float64]

MAX_PSNR = 100.0  # dB, for equal pictures
TEXTURES = ("plain", "horizontal", "vertical", "checks", "dots")

_SSIM_WINDOW = (11, 11)  # px, with _SSIM_SIGMA as in Wang et al. 2004
_SSIM_SIGMA = 1.5
_SSIM_CONSTANTS = ((0.01 * 255) ** 2, (0.03 * 255) ** 2)
_XYZ_OF_RGB = np.array(  # sRGB, white point D65 (IEC 61966-2-1)
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = _XYZ_OF_RGB.sum(axis=1)
_FAR_CHROMA = 25.0**7  # of CIEDE2000

_LEAST_EXPLAINED = 0.4  # share of the variance; true patterns have 0.52 at least, noise of cells below 8 px less
_NO_VARIANCE = 1e-9
_RIDGE = 0.01

# Where the strength of a cloth's pattern lies: along y, along x, and in their product. Dots of radius 0.28 periods
# have 0.37, 0.37 and 0.26 by their Fourier series.
_STRENGTH_OF = {
    "horizontal": (1.0, 0.0, 0.0),
    "vertical": (0.0, 1.0, 0.0),
    "checks": (0.0, 0.0, 1.0),
    "dots": (0.37, 0.37, 0.26),
}


@dataclass(frozen=True)
class PatternFit:
    """How a pattern of one period fits a cloth.

    Attributes:
        strengths: of its first harmonic along y, along x, and of their product; variances in L*a*b* units squared.
        explained: share of the variance of the cloth's colours, along their main axis, that these account for.
    """

    strengths: tuple[float, float, float]
    explained: float


def squared_error(first: Image, second: Image, region: Region) -> float:
    """Mean over the region's pixels and channels of the squared difference, in grey levels squared."""
    if not region.any():
        raise ValueError("the region is empty")
    difference = first[region].astype(np.float64) - second[region]
    return float(np.mean(difference**2))


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error, at most 100."""
    return min(MAX_PSNR, float(10 * np.log10(255.0**2 / max(error, 1e-12))))


def ssim(first: Image, second: Image, region: Region) -> float:
    """Mean structural similarity over the region's pixels and the three channels.

    The window, a Gaussian of 1.5 px, looks a little beyond the region.
    """
    x, y = first.astype(np.float64), second.astype(np.float64)
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    small, large = _SSIM_CONSTANTS
    likeness = (2 * mean_x * mean_y + small) * (2 * covariance + large)
    likeness /= (mean_x**2 + mean_y**2 + small) * (var_x + var_y + large)
    return float(likeness[region].mean())


def lab(colours: NDArray[np.generic]) -> Floats:
    """CIE L*a*b* (D65) of sRGB colours 0-255: (..., 3) to (..., 3)."""
    share = np.asarray(colours, np.float64) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _XYZ_OF_RGB.T / _WHITE
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = root[..., 0], root[..., 1], root[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def ciede2000(first: NDArray[np.generic], second: NDArray[np.generic]) -> Floats:
    """Colour difference of L*a*b* colours, (..., 3) each; below 1 nobody sees it, 6 is another shade.

    Source: Sharma, Wu and Dalal, "The CIEDE2000 color-difference formula", 2005; all factors k are 1.
    """
    (light_1, chroma_1, hue_1), (light_2, chroma_2, hue_2) = _lch_primed(
        np.asarray(first, float), np.asarray(second, float)
    )
    grey = chroma_1 * chroma_2 == 0
    turn = np.where(grey, 0.0, (hue_2 - hue_1 + 180) % 360 - 180)
    turn = np.where((turn == -180) & (hue_2 > hue_1), 180.0, turn)
    hue: Floats = np.where(grey, hue_1 + hue_2, _mean_hue(hue_1, hue_2))
    light, chroma = (light_1 + light_2) / 2, (chroma_1 + chroma_2) / 2
    delta_hue = 2 * np.sqrt(chroma_1 * chroma_2) * _sin(turn / 2)
    t = 1 - 0.17 * _cos(hue - 30) + 0.24 * _cos(2 * hue) + 0.32 * _cos(3 * hue + 6) - 0.20 * _cos(4 * hue - 63)
    by_light = (light_2 - light_1) / (1 + 0.015 * (light - 50) ** 2 / np.sqrt(20 + (light - 50) ** 2))
    by_chroma = (chroma_2 - chroma_1) / (1 + 0.045 * chroma)
    by_hue = delta_hue / (1 + 0.015 * chroma * t)
    rotation = -2 * np.sqrt(chroma**7 / (chroma**7 + _FAR_CHROMA)) * _sin(60 * np.exp(-(((hue - 275) / 25) ** 2)))
    squared = by_light**2 + by_chroma**2 + by_hue**2 + rotation * by_chroma * by_hue
    return np.asarray(np.sqrt(np.maximum(squared, 0)))


def median_colour(image: Image, region: Region) -> Floats:
    """The median of each channel over a region: (3,) RGB 0-255."""
    return np.asarray(np.median(image[region], axis=0))


def shrunk(region: Region, margin_px: int) -> Region:
    """The region without what lies within a margin of its outline; the picture's border is outside."""
    padded = np.pad(region.astype(np.uint8), 1)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    return np.asarray(distance > margin_px)


def texture(image: Image, region: Region, *, periods_px: Sequence[float], least_contrast: float) -> str:
    """Which of TEXTURES the cloth of a region has, by where its strength lies in the spectrum.

    The colours are reduced to the one axis along which they vary most, since two colours may be equally light.

    Args:
        image: HWC uint8 RGB.
        region: the cloth, without sleeves: it has to hang straight.
        periods_px: how often a pattern may repeat, px; the one that fits best counts.
        least_contrast: L*a*b* units; a pattern that is weaker (root mean square of its first harmonic) is none.
    Returns:
        "plain" as well where no pattern explains what is there, as in noise.
    """
    fits = [fit_pattern(image, region, period) for period in periods_px]
    best = max(fits, key=lambda fit: fit.explained)
    strength = sum(best.strengths)
    if strength < least_contrast**2 or best.explained < _LEAST_EXPLAINED:
        return "plain"
    shares = np.array(best.strengths) / strength
    return min(_STRENGTH_OF, key=lambda name: float(np.square(shares - _STRENGTH_OF[name]).sum()))


def fit_pattern(image: Image, region: Region, period_px: float) -> PatternFit:
    """What a cloth shows of a pattern that repeats every `period_px`.

    Raises:
        ValueError: the region is too small for that period.
    """
    if np.count_nonzero(region) < period_px**2 / 2:
        raise ValueError(f"{np.count_nonzero(region)} px are too few for a pattern that repeats every {period_px} px")
    colours = lab(image[region])
    centred = colours - colours.mean(axis=0)
    signal = centred @ np.linalg.eigh(centred.T @ centred)[1][:, -1]
    y, x = np.nonzero(region)
    waves = [np.exp(2j * np.pi * place / period_px) for place in (y, x)]
    products = [waves[0] * waves[1], waves[0] * waves[1].conj()]
    columns = [part for wave in (*waves, *products) for part in (wave.real, wave.imag)]
    basis = np.stack([np.ones(len(y)), *columns], axis=1)
    # A little ridge: a cloth barely wider than one period cannot tell its waves apart.
    gram = basis.T @ basis + np.diag([0.0] + [_RIDGE * len(y)] * len(columns))
    weights = np.linalg.solve(gram, basis.T @ signal)
    power = weights[1:] ** 2 / 2
    strengths = (float(power[:2].sum()), float(power[2:4].sum()), float(power[4:].sum()))
    return PatternFit(strengths, 1 - float((signal - basis @ weights).var() / max(signal.var(), _NO_VARIANCE)))


def _blurred(values: Floats) -> Floats:
    return np.asarray(cv2.GaussianBlur(values, _SSIM_WINDOW, _SSIM_SIGMA, borderType=cv2.BORDER_REFLECT_101))


def _lch_primed(first: Floats, second: Floats) -> tuple[tuple[Floats, Floats, Floats], tuple[Floats, Floats, Floats]]:
    """Lightness, chroma and hue in degrees of both, with a* stretched where both are pale."""
    chroma = (np.hypot(first[..., 1], first[..., 2]) + np.hypot(second[..., 1], second[..., 2])) / 2
    stretch = 1.5 - 0.5 * np.sqrt(chroma**7 / (chroma**7 + _FAR_CHROMA))

    def polar(colour: Floats) -> tuple[Floats, Floats, Floats]:
        a, b = colour[..., 1] * stretch, colour[..., 2]
        return colour[..., 0], np.hypot(a, b), np.degrees(np.arctan2(b, a)) % 360

    return polar(first), polar(second)


def _mean_hue(first: Floats, second: Floats) -> Floats:
    total = first + second
    opposite = np.abs(first - second) > 180
    return np.where(opposite, np.where(total < 360, total + 360, total - 360), total) / 2


def _sin(degrees: Floats) -> Floats:
    return np.asarray(np.sin(np.radians(degrees)))


def _cos(degrees: Floats) -> Floats:
    return np.asarray(np.cos(np.radians(degrees)))
