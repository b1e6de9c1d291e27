from __future__ import annotations

import cv2
import numpy as np
import pytest

from bench.metrics import (
    ciede2000,
    lab,
    median_colour,
    psnr,
    shrunk,
    squared_error,
    ssim,
    texture,
)

PERIODS_PX = (20.0, 24.0, 28.0, 32.0, 36.0)

# Sharma, Wu and Dalal 2005, table 1, all 34 pairs: L*, a*, b* twice, then the difference.
SHARMA = """
50 2.6772 -79.7751 50 0 -82.7485 2.0425
50 3.1571 -77.2803 50 0 -82.7485 2.8615
50 2.8361 -74.0200 50 0 -82.7485 3.4412
50 -1.3802 -84.2814 50 0 -82.7485 1.0000
50 -1.1848 -84.8006 50 0 -82.7485 1.0000
50 -0.9009 -85.5211 50 0 -82.7485 1.0000
50 0 0 50 -1 2 2.3669
50 -1 2 50 0 0 2.3669
50 2.4900 -0.0010 50 -2.4900 0.0009 7.1792
50 2.4900 -0.0010 50 -2.4900 0.0010 7.1792
50 2.4900 -0.0010 50 -2.4900 0.0011 7.2195
50 2.4900 -0.0010 50 -2.4900 0.0012 7.2195
50 -0.0010 2.4900 50 0.0009 -2.4900 4.8045
50 -0.0010 2.4900 50 0.0010 -2.4900 4.8045
50 -0.0010 2.4900 50 0.0011 -2.4900 4.7461
50 2.5 0 50 0 -2.5 4.3065
50 2.5 0 73 25 -18 27.1492
50 2.5 0 61 -5 29 22.8977
50 2.5 0 56 -27 -3 31.9030
50 2.5 0 58 24 15 19.4535
50 2.5 0 50 3.1736 0.5854 1.0000
50 2.5 0 50 3.2972 0 1.0000
50 2.5 0 50 1.8634 0.5757 1.0000
50 2.5 0 50 3.2592 0.3350 1.0000
60.2574 -34.0099 36.2677 60.4626 -34.1751 39.4387 1.2644
63.0109 -31.0961 -5.8663 62.8187 -29.7946 -4.0864 1.2630
61.2901 3.7196 -5.3901 61.4292 2.2480 -4.9620 1.8731
35.0831 -44.1164 3.7933 35.0232 -40.0716 1.5901 1.8645
22.7233 20.0904 -46.6940 23.0331 14.9730 -42.5619 2.0373
36.4612 47.8580 18.3852 36.2715 50.5065 21.2231 1.4146
90.8027 -2.0831 1.4410 91.1528 -1.6435 0.0447 1.4441
90.9257 -0.5406 -0.9208 88.6381 -0.8985 -0.7239 1.5381
6.7747 -0.2908 -2.4247 5.8714 -0.0985 -2.2286 0.6377
2.0776 0.0795 -1.1350 0.9033 -0.0636 -0.5514 0.9082
"""


@pytest.mark.parametrize("line", SHARMA.strip().splitlines())
def test_ciede2000_is_that_of_the_published_pairs(line) -> None:
    numbers = np.array([float(number) for number in line.split()])
    assert ciede2000(numbers[:3], numbers[3:6]) == pytest.approx(numbers[6], abs=5e-5)


def test_ciede2000_takes_arrays_and_is_symmetric() -> None:
    colours = np.random.default_rng(0).uniform((0, -80, -80), (100, 80, 80), (2, 5, 4, 3))
    there, back = ciede2000(*colours), ciede2000(*colours[::-1])
    assert there.shape == (5, 4)
    assert np.allclose(there, back)
    assert np.allclose(ciede2000(colours[0], colours[0]), 0)


@pytest.mark.parametrize(
    ("rgb", "wanted"),
    [
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((119, 119, 119), (50.03, 0, 0)),
    ],
)
def test_lab_of_known_colours(rgb, wanted) -> None:
    assert lab(np.array(rgb, np.uint8)) == pytest.approx(np.array(wanted), abs=0.02)


def test_psnr_of_a_known_error() -> None:
    black = np.zeros((8, 8, 3), np.uint8)
    region = np.zeros((8, 8), bool)
    region[:4] = True
    grey = np.full_like(black, 16)
    grey[4:] = 255  # outside the region
    assert squared_error(black, grey, region) == 256
    assert psnr(256) == pytest.approx(24.05, abs=0.01)
    assert psnr(0) == 100


def test_an_empty_region_has_no_error() -> None:
    black = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="empty"):
        squared_error(black, black, np.zeros((8, 8), bool))


def test_ssim_is_1_for_equal_pictures_and_falls_with_blur_and_noise() -> None:
    draw = np.random.default_rng(1)
    coarse = draw.integers(0, 256, (16, 12, 3), np.uint8)
    picture = cv2.resize(coarse, (96, 128), interpolation=cv2.INTER_NEAREST)
    everywhere = np.ones(picture.shape[:2], bool)
    assert ssim(picture, picture, everywhere) == pytest.approx(1)
    noisy = np.clip(picture + draw.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)
    noisier = np.clip(picture + draw.normal(0, 40, picture.shape), 0, 255).astype(np.uint8)
    assert 1 > ssim(picture, noisy, everywhere) > ssim(picture, noisier, everywhere) > 0
    assert ssim(picture, 255 - picture, everywhere) < 0


def test_ssim_of_two_flat_pictures_is_that_of_their_means() -> None:
    first, second = np.full((32, 32, 3), 100, np.uint8), np.full((32, 32, 3), 120, np.uint8)
    small = (0.01 * 255) ** 2
    wanted = (2 * 100 * 120 + small) / (100**2 + 120**2 + small)
    assert ssim(first, second, np.ones((32, 32), bool)) == pytest.approx(wanted, abs=1e-6)


def test_a_region_shrinks_from_its_outline_and_from_the_picture_s_border() -> None:
    region = np.zeros((20, 20), bool)
    region[:12, 4:16] = True
    inner = shrunk(region, 3)
    assert np.argwhere(inner).min(axis=0).tolist() == [3, 7]
    assert np.argwhere(inner).max(axis=0).tolist() == [8, 12]


def test_the_median_colour_is_of_the_region_alone() -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[:2] = (10, 20, 30)
    region = np.zeros((4, 4), bool)
    region[:2] = True
    region[2, 0] = True
    assert median_colour(picture, region).tolist() == [10, 20, 30]


def cloth(pattern, period, colours=((210, 60, 60), (60, 110, 190))):
    y, x = np.mgrid[0:60, 0:50].astype(float)
    rows, columns = (y % period < period / 2), (x % period < period / 2)
    accent = {
        "plain": np.zeros_like(rows),
        "horizontal": rows,
        "vertical": columns,
        "checks": rows ^ columns,
        "dots": np.hypot(x % period - period / 2, y % period - period / 2) < 0.28 * period,
    }[pattern]
    return np.where(accent[..., None], np.uint8(colours[1]), np.uint8(colours[0])).astype(np.uint8)


@pytest.mark.parametrize("period", [20, 25, 30])
@pytest.mark.parametrize("pattern", ["plain", "horizontal", "vertical", "checks", "dots"])
def test_a_texture_is_recognised_through_noise(pattern, period) -> None:
    picture = cloth(pattern, period) + np.random.default_rng(2).normal(0, 12, (60, 50, 3))
    region = np.ones((60, 50), bool)
    found = texture(np.clip(picture, 0, 255).astype(np.uint8), region, periods_px=PERIODS_PX, least_contrast=4)
    assert found == pattern


def test_two_colours_that_are_equally_light_are_told_apart() -> None:
    picture = cloth("horizontal", 24, colours=((200, 60, 60), (60, 124, 60)))
    assert texture(picture, np.ones((60, 50), bool), periods_px=PERIODS_PX, least_contrast=4) == "horizontal"


def test_too_little_cloth_is_refused() -> None:
    region = np.zeros((60, 50), bool)
    region[:5, :5] = True
    with pytest.raises(ValueError, match="too few"):
        texture(cloth("plain", 20), region, periods_px=PERIODS_PX, least_contrast=4)


def test_noise_is_no_pattern() -> None:
    draw = np.random.default_rng(3)
    picture = cv2.resize(draw.integers(0, 256, (12, 10, 3), np.uint8), (50, 60), interpolation=cv2.INTER_LINEAR)
    region = np.ones((60, 50), bool)
    assert texture(picture, region, periods_px=PERIODS_PX, least_contrast=4) == "plain"
    assert (
        texture(draw.integers(0, 256, (60, 50, 3), np.uint8), region, periods_px=PERIODS_PX, least_contrast=4)
        == "plain"
    )
