from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from model import geometry

sides = st.integers(1, 90)
seeds = st.integers(0, 2**32 - 1)


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def blobs(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """A random mask of rectangles, some of which touch the border; now and then empty or full."""
    draw = np.random.default_rng(seed)
    mask = np.full((height, width), 255 if draw.random() < 0.1 else 0, np.uint8)
    for _ in range(draw.integers(0, 4)):
        top, left = draw.integers(0, height), draw.integers(0, width)
        mask[top : top + draw.integers(1, height + 1), left : left + draw.integers(1, width + 1)] = 255
    return mask


@pytest.mark.parametrize(
    ("size_in", "size", "box"),
    [
        ((768, 1024), (768, 1024), (0, 0, 768, 1024)),
        ((1000, 1000), (768, 1024), (125, 0, 875, 1000)),
        ((600, 1000), (768, 1024), (0, 100, 600, 900)),
        ((1001, 1000), (768, 1024), (125, 0, 875, 1000)),
        ((801, 600), (768, 1024), (175, 0, 625, 600)),
        ((64, 512), (768, 1024), (0, 213, 64, 298)),
        ((8, 1), (1, 8), (3, 0, 4, 1)),
    ],
)
def test_the_crop_box_follows_the_published_integer_arithmetic(
    size_in: tuple[int, int], size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    assert geometry.crop_box(*size_in, *size) == box


@given(sides, sides, sides, sides)
@settings(deadline=None)
def test_the_crop_box_is_centred_inside_the_picture_and_spans_one_side(w_in: int, h_in: int, w: int, h: int) -> None:
    left, top, right, bottom = geometry.crop_box(w_in, h_in, w, h)
    assert 0 <= left < right <= w_in
    assert 0 <= top < bottom <= h_in
    assert (left, right) == (0, w_in) or (top, bottom) == (0, h_in)
    assert abs(left - (w_in - right)) <= 1
    assert abs(top - (h_in - bottom)) <= 1


def test_a_picture_of_the_target_size_keeps_every_pixel() -> None:
    person = noise(40, 30)
    assert np.array_equal(np.asarray(geometry.crop_resize(Image.fromarray(person), 30, 40)), person)


def test_a_mask_cropped_with_nearest_stays_black_and_white() -> None:
    mask = Image.fromarray(blobs(50, 70, 3))
    cropped = geometry.crop_resize(mask, 24, 32, resample=Image.Resampling.NEAREST)
    assert cropped.mode == "L"
    assert set(np.unique(np.asarray(cropped))) <= {0, 255}


@given(sides, sides, sides, sides)
@settings(deadline=None, max_examples=50)
def test_cropping_and_fitting_give_exactly_the_size_asked_for(w_in: int, h_in: int, w: int, h: int) -> None:
    image = Image.fromarray(noise(h_in, w_in))
    assert geometry.crop_resize(image, w, h).size == (w, h)
    assert geometry.fit_pad(image, w, h).size == (w, h)


@pytest.mark.parametrize(
    ("size_in", "filled"),
    [
        ((100, 100), (0, 16, 96, 112)),
        ((60, 100), (10, 0, 86, 128)),
        ((301, 100), (0, 48, 96, 79)),
        ((10, 80), (40, 0, 56, 128)),
        ((800, 100), (0, 58, 96, 70)),
        ((10000, 1), (0, 63, 96, 64)),
        ((1, 10000), (47, 0, 48, 128)),
    ],
)
def test_a_garment_is_fitted_and_centred_as_published(size_in: tuple[int, int], filled: tuple[int, ...]) -> None:
    fitted = np.asarray(geometry.fit_pad(Image.new("RGB", size_in, (0, 0, 0)), 96, 128))
    ys, xs = np.nonzero(fitted[..., 0] == 0)
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == filled
    assert np.all(fitted[(fitted[..., 0] != 0)] == 255)


def test_a_transparent_or_grey_garment_is_fitted_as_rgb() -> None:
    assert geometry.fit_pad(Image.new("L", (10, 10), 7), 16, 16).mode == "RGB"


def test_legacy_joining_is_unscaled_and_leaves_a_black_bar() -> None:
    upper, lower = noise(20, 30, 1), noise(25, 18, 2)
    joined = geometry.join_garments(upper, lower, "legacy")
    assert joined.shape == (45, 30, 3)
    assert np.array_equal(joined[:20], upper)
    assert np.array_equal(joined[20:, :18], lower)
    assert not joined[20:, 18:].any()


def test_clean_joining_scales_to_one_width_and_leaves_no_bar() -> None:
    upper, lower = np.full((20, 30, 3), 90, np.uint8), np.full((24, 15, 3), 160, np.uint8)
    joined = geometry.join_garments(upper, lower)
    assert joined.shape == (20 + 48, 30, 3)
    assert np.all(joined[:20] == 90)
    assert np.all(joined[20:] == 160)


def test_clean_joining_of_huge_photos_is_bounded() -> None:
    joined = geometry.join_garments(np.zeros((500, 4000, 3), np.uint8), np.zeros((800, 100, 3), np.uint8))
    assert joined.shape == (192 + 12288, geometry.MAX_JOINED_WIDTH, 3)


def test_an_unknown_style_of_joining_is_refused() -> None:
    with pytest.raises(ValueError, match="style"):
        geometry.join_garments(noise(4, 4), noise(4, 4), "other")  # type: ignore[arg-type]


def test_binarising_cuts_at_one_half() -> None:
    mask = np.array([[0, 127, 128, 255]], np.uint8)
    assert geometry.binarise(mask).tolist() == [[0, 0, 255, 255]]
    assert geometry.binarise(np.repeat(mask[..., None], 3, 2)).tolist() == [[0, 0, 255, 255]]


def test_smoothing_rounds_the_outline_and_stays_binary() -> None:
    mask = np.zeros((120, 120), np.uint8)
    mask[30:90, 30:90] = 255
    smooth = geometry.smooth_mask(mask)
    assert set(np.unique(smooth)) == {0, 255}
    assert smooth[30, 30] == 0
    assert smooth[60, 60] == 255
    assert smooth[60, 30] == 255


def test_the_soft_edge_is_zero_outside_rises_inside_and_reaches_one() -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[5:35, 10:50] = 255
    alpha = geometry.soft_edge(mask, 5)
    assert alpha.dtype == np.float32
    assert not alpha[mask == 0].any()
    row = alpha[20, 9:20]
    assert np.all(np.diff(row[:6]) > 0)
    assert np.all(row[5:] == 1)


def test_the_border_of_the_picture_is_no_edge_of_the_mask() -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[20:] = 255
    alpha = geometry.soft_edge(mask, 8)
    assert np.all(alpha[-1] == 1)
    assert np.all(alpha[30, [0, -1]] == 1)
    assert np.all(geometry.soft_edge(np.full((8, 8), 255, np.uint8), 4) == 1)
    assert not geometry.soft_edge(np.zeros((8, 8), np.uint8), 4).any()


def test_an_edge_narrower_than_a_pixel_is_refused() -> None:
    with pytest.raises(ValueError, match="width_px"):
        geometry.soft_edge(np.zeros((8, 8), np.uint8), 0)


@given(sides, sides, seeds)
@settings(deadline=None, max_examples=60)
def test_a_repaint_keeps_every_byte_outside_any_mask(height: int, width: int, seed: int) -> None:
    person, result, mask = noise(height, width, seed), noise(height, width, seed + 1), blobs(height, width, seed)
    before = person.copy()
    painted = geometry.repaint(person, result, mask)
    assert np.array_equal(painted[mask == 0], person[mask == 0])
    assert np.array_equal(person, before)
    low, high = np.minimum(person, result), np.maximum(person, result)
    assert np.all((painted >= low) & (painted <= high))


def test_a_repaint_is_the_result_deep_inside_the_mask_across_blend_bands() -> None:
    person, result = noise(700, 40, 1), noise(700, 40, 2)
    mask = np.zeros((700, 40), np.uint8)
    mask[50:650] = 255
    painted = geometry.repaint(person, result, mask)
    assert np.array_equal(painted[57:643], result[57:643])


@given(sides, sides, st.booleans(), seeds)
@settings(deadline=None, max_examples=60)
def test_pasting_back_keeps_every_byte_outside_mask_and_crop(h: int, w: int, masked: bool, seed: int) -> None:
    person, result = noise(h, w, seed), noise(32, 24, seed + 1)
    mask = blobs(h, w, seed)
    pasted = geometry.paste_back(person, result, mask if masked else None)
    left, top, right, bottom = geometry.crop_box(w, h, 24, 32)
    free = np.ones((h, w), bool)
    free[top:bottom, left:right] = mask[top:bottom, left:right] == 0 if masked else False
    assert pasted.shape == person.shape
    assert np.array_equal(pasted[free], person[free])


def test_pasting_back_without_a_mask_is_soft_only_where_the_crop_ends_inside_the_photo() -> None:
    person, result = np.zeros((400, 600, 3), np.uint8), np.full((32, 24, 3), 200, np.uint8)
    pasted = geometry.paste_back(person, result)
    left, top, right, bottom = geometry.crop_box(600, 400, 24, 32)
    assert (left, top, right, bottom) == (150, 0, 450, 400)
    assert np.all(pasted[[0, -1], 300] == 200)
    edge = pasted[200, left : left + 5, 0]
    assert 0 < edge[0] < edge[1] < edge[-1] == 200
    assert 0 < pasted[200, right - 1, 0] < 200


def test_pasting_back_a_mask_that_leaves_the_crop_has_no_hard_seam() -> None:
    person, result = np.zeros((400, 600, 3), np.uint8), np.full((32, 24, 3), 200, np.uint8)
    pasted = geometry.paste_back(person, result, np.full((400, 600), 255, np.uint8))
    assert not pasted[:, :150].any()
    assert np.abs(np.diff(pasted[200, :, 0].astype(int))).max() < 100


def test_pasting_back_at_the_models_size_gives_the_result() -> None:
    person, result = noise(32, 24, 1), noise(32, 24, 2)
    assert np.array_equal(geometry.paste_back(person, result), result)


def test_a_strip_shows_every_picture_at_one_height_on_white() -> None:
    strip = geometry.side_by_side([np.zeros((20, 10, 3), np.uint8), np.zeros((10, 20, 3), np.uint8)], height=40, gap=4)
    assert strip.shape == (40, 20 + 4 + 80, 3)
    assert np.all(strip[:, 20:24] == 255)
    assert not strip[:, :20].any()
    assert not strip[:, 24:].any()


def test_a_masked_person_is_mid_grey_where_cloth_is_repainted() -> None:
    person, mask = noise(30, 20), blobs(30, 20, 5)
    shown = geometry.masked_person(person, mask)
    assert np.all(shown[mask == 255] == 128)
    assert np.array_equal(shown[mask == 0], person[mask == 0])


RGB, GREY = noise(8, 8), np.zeros((8, 8), np.uint8)


@pytest.mark.parametrize(
    "call",
    [
        lambda: geometry.crop_box(0, 4, 4, 4),
        lambda: geometry.fit_pad(Image.new("RGB", (4, 4)), 0, 4),
        lambda: geometry.join_garments(GREY, RGB),
        lambda: geometry.join_garments(RGB, RGB.astype(np.float32)),  # type: ignore[arg-type]
        lambda: geometry.binarise(GREY.astype(bool)),  # type: ignore[arg-type]
        lambda: geometry.binarise(np.zeros((8, 8, 4), np.uint8)),
        lambda: geometry.smooth_mask(np.zeros(8, np.uint8)),
        lambda: geometry.soft_edge(RGB, 2),
        lambda: geometry.repaint(RGB, noise(8, 9), GREY),
        lambda: geometry.repaint(RGB, RGB, np.zeros((9, 8), np.uint8)),
        lambda: geometry.repaint(RGB, RGB, RGB),
        lambda: geometry.paste_back(RGB, RGB, np.zeros((9, 8), np.uint8)),
        lambda: geometry.paste_back(np.zeros((0, 8, 3), np.uint8), RGB),
        lambda: geometry.side_by_side([]),
        lambda: geometry.side_by_side([GREY]),
        lambda: geometry.side_by_side([RGB], height=0),
        lambda: geometry.masked_person(RGB, np.zeros((9, 8), np.uint8)),
    ],
)
def test_a_wrong_shape_dtype_or_size_is_refused_with_a_sentence(call) -> None:
    with pytest.raises(ValueError, match=r"must|needs|is \("):
        call()
