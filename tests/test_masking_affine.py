from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.maskers import affine
from model.maskers.affine import Letterbox, warp_image, warp_plane, warped_argmax

GOLDENS = Path(__file__).parent / "goldens" / "masking"
SIDES = {"atr": 512, "lip": 473}
WARPED = [
    "atr_300x400_bgr",
    "atr_300x400_rgb",
    "atr_640x360_rgb",
    "atr_64x48_rgb",
    "lip_300x400_bgr",
    "lip_300x400_rgb",
]
FITS = [(61, 47, 23), (9, 14, 31), (1, 6, 12), (7, 1, 12), (33, 33, 33), (2, 2, 9), (2049, 3, 16), (5, 4097, 16)]
SHIFT = np.array([[1.0, 0, 2], [0, 1, 0]])


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


def planes(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(8).standard_normal(shape).astype(np.float32))


def pixel_by_pixel(
    source: np.ndarray, matrix: np.ndarray, size_wh: tuple[int, int], mix: Callable[..., Any]
) -> list[Any]:
    """What `mix` makes of the four corners and the two fractions of every pixel, row by row."""

    def corner(x: int, y: int) -> Any:
        inside = 0 <= x < source.shape[1] and 0 <= y < source.shape[0]
        return source[y, x] if inside else np.zeros_like(source[0, 0])

    determinant = 1 / (matrix[0, 0] * matrix[1, 1])
    across, down = matrix[1, 1] * determinant, matrix[0, 0] * determinant
    mixed = []
    for y in range(size_wh[1]):
        position_y = (round(1024 * (down * y - down * matrix[1, 2])) + 16) >> 5
        for x in range(size_wh[0]):
            position_x = (round(1024 * -across * matrix[0, 2]) + 16 + round(1024 * across * x)) >> 5
            left, top = position_x >> 5, position_y >> 5
            corners = [corner(left + i, top + j) for j in (0, 1) for i in (0, 1)]
            mixed.append(mix(corners, position_x & 31, position_y & 31))
    return mixed


def mix_bytes(corners: list[Any], x: int, y: int) -> Any:
    weights = [(32 - x) * (32 - y), x * (32 - y), (32 - x) * y, x * y]
    total = sum(corner.astype(np.int64) * weight * 32 for corner, weight in zip(corners, weights))
    return (total + 2**14) >> 15


def mix_floats(corners: list[Any], x: int, y: int) -> Any:
    weights = [(32 - x) * (32 - y), x * (32 - y), (32 - x) * y, x * y]
    first, second, third, fourth = (corner * np.float32(weight / 1024) for corner, weight in zip(corners, weights))
    return first + second + third + fourth


@pytest.mark.parametrize("row", json.loads((GOLDENS / "schp" / "affine_table.json").read_text()), ids=str)
def test_a_letterbox_has_the_numbers_of_the_reference(row: dict[str, Any]) -> None:
    letterbox = Letterbox(row["w"], row["h"], row["input_size"][0])
    assert list(letterbox.center) == row["center"]
    assert [letterbox.scale] * 2 == row["scale"]
    np.testing.assert_allclose(letterbox.forward, row["fwd"], rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(letterbox.inverse, row["inv"], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("width", "height", "side"), FITS)
def test_the_ends_of_the_longer_side_land_on_those_of_the_square(width: int, height: int, side: int) -> None:
    letterbox = Letterbox(width, height, side)
    ends = np.array([[0, 0, 1], [width - 1, height - 1, 1]], np.float64)
    longer = 0 if width >= height else 1
    np.testing.assert_allclose((ends @ letterbox.forward.T)[:, longer], [0, side - 1], atol=1e-9)
    there = np.vstack([letterbox.forward, [0, 0, 1]])
    np.testing.assert_allclose(letterbox.inverse @ there, [[1, 0, 0], [0, 1, 0]], atol=1e-9)


@pytest.mark.parametrize(("width", "height", "side"), [(1, 1, 512), (0, 5, 512), (5, 0, 512), (5, 5, 1), (-3, 9, 512)])
def test_a_picture_without_a_scale_has_no_letterbox(width: int, height: int, side: int) -> None:
    with pytest.raises(ValueError, match="cannot be fitted"):
        Letterbox(width, height, side)


@pytest.mark.parametrize("name", WARPED)
def test_a_letterboxed_picture_is_that_of_opencv_4(name: str) -> None:
    dataset, size, order = name.split("_")
    picture = np.asarray(Image.open(GOLDENS / "schp" / f"img_{size}.png"))
    picture = picture[:, :, ::-1] if order == "bgr" else picture
    side = SIDES[dataset]
    warped = warp_image(picture, Letterbox(picture.shape[1], picture.shape[0], side).forward, (side, side))
    np.testing.assert_array_equal(warped, np.asarray(Image.open(GOLDENS / "schp" / f"warped_{name}.png")))


def test_bytes_and_floats_are_those_of_opencv_4() -> None:
    golden = np.load(GOLDENS / "ops" / "ops_a.npz")
    matrix = golden["warp_M"]
    image = warp_image(golden["warp_src_u8"], matrix, (70, 64))
    plane = warp_plane(torch.from_numpy(golden["warp_src_f32"]), matrix, (70, 64))
    np.testing.assert_array_equal(image, golden["warp_dst_u8"])
    np.testing.assert_array_equal(plane.numpy(), golden["warp_dst_f32"])


@pytest.mark.parametrize(("width", "height", "side"), FITS)
def test_every_pixel_mixes_four_corners_of_the_source(width: int, height: int, side: int) -> None:
    letterbox = Letterbox(width, height, side)
    picture, plane = noise(height, width, 3), planes(side, side)
    warped = warp_image(picture, letterbox.forward, (side, side)).reshape(-1, 3)
    back = warp_plane(plane, letterbox.inverse, (width, height)).flatten()
    np.testing.assert_array_equal(warped, pixel_by_pixel(picture, letterbox.forward, (side, side), mix_bytes))
    np.testing.assert_array_equal(back, pixel_by_pixel(plane.numpy(), letterbox.inverse, (width, height), mix_floats))


@pytest.mark.parametrize(("width", "height", "side"), FITS)
def test_the_argmax_of_the_warp_is_that_of_all_warped_planes(width: int, height: int, side: int) -> None:
    letterbox, stack = Letterbox(width, height, side), planes(6, side, side).round(decimals=1)
    labels = warped_argmax(stack, letterbox.inverse, (width, height))
    warped = torch.stack([warp_plane(plane, letterbox.inverse, (width, height)) for plane in stack])
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, warped.numpy().argmax(axis=0))


def test_the_first_of_equal_planes_wins() -> None:
    stack = planes(3, 8, 8)[[1, 0, 2, 0, 1, 2]]
    assert warped_argmax(stack, SHIFT, (12, 8)).max() == 2
    assert not warped_argmax(stack, SHIFT, (12, 8))[:, :2].any()  # outside all planes are 0


@pytest.mark.parametrize("tile_pixels", [7, 37, 100, 1000])
def test_the_tiles_leave_no_trace(monkeypatch: pytest.MonkeyPatch, tile_pixels: int) -> None:
    letterbox, stack = Letterbox(37, 29, 16), planes(5, 16, 16)
    whole = warped_argmax(stack, letterbox.inverse, (37, 29))
    monkeypatch.setattr(affine, "TILE_PIXELS", tile_pixels)
    np.testing.assert_array_equal(warped_argmax(stack, letterbox.inverse, (37, 29)), whole)


@pytest.mark.parametrize(("width", "height"), [(1, 24_000_000), (24_000_000, 1), (6000, 4000), (40_000, 600)])
def test_no_tile_of_a_large_picture_is_large(width: int, height: int) -> None:
    tiles = list(affine._tiles((width, height)))
    areas = [(row.stop - row.start) * (column.stop - column.start) for row, column in tiles]
    assert max(areas) <= affine.TILE_PIXELS
    assert sum(areas) == width * height


def test_the_inputs_stay_as_they_are() -> None:
    picture, stack, matrix = noise(9, 8, 3), planes(3, 9, 8), SHIFT.copy()
    for array in (picture, stack.numpy(), matrix):
        array.setflags(write=False)
    before = picture.copy(), stack.clone(), matrix.copy()
    warp_image(picture, matrix, (8, 9))
    warp_plane(stack[0], matrix, (8, 9))
    warped_argmax(stack, matrix, (8, 9))
    for array, copy in zip((picture, stack, matrix), before):
        np.testing.assert_array_equal(array, copy)


WRONG_CALLS: dict[str, Callable[[], Any]] = {
    "an image of floats": lambda: warp_image(noise(4, 4, 3).astype(np.float32), SHIFT, (4, 4)),
    "an image without channels": lambda: warp_image(noise(4, 4), SHIFT, (4, 4)),
    "an empty image": lambda: warp_image(noise(0, 4, 3), SHIFT, (4, 4)),
    "a plane of doubles": lambda: warp_plane(planes(4, 4).double(), SHIFT, (4, 4)),
    "several planes": lambda: warp_plane(planes(1, 4, 4), SHIFT, (4, 4)),
    "an empty plane": lambda: warp_plane(planes(4, 0), SHIFT, (4, 4)),
    "no planes": lambda: warped_argmax(planes(0, 4, 4), SHIFT, (4, 4)),
    "more planes than labels": lambda: warped_argmax(planes(257, 1, 1), SHIFT, (4, 4)),
    "one plane of logits": lambda: warped_argmax(planes(4, 4), SHIFT, (4, 4)),
    "logits in half precision": lambda: warped_argmax(planes(2, 4, 4).half(), SHIFT, (4, 4)),
    "an empty result": lambda: warp_image(noise(4, 4, 3), SHIFT, (4, 0)),
    "a rotation": lambda: warp_image(noise(4, 4, 3), np.array([[1, 0.1, 0], [0, 1, 0]]), (4, 4)),
    "a matrix without inverse": lambda: warp_image(noise(4, 4, 3), np.array([[1.0, 0, 0], [0, 0, 0]]), (4, 4)),
    "a matrix with NaN": lambda: warp_image(noise(4, 4, 3), np.array([[1, 0, np.nan], [0, 1, 0]]), (4, 4)),
    "a square matrix": lambda: warp_image(noise(4, 4, 3), np.eye(3), (4, 4)),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_a_wrong_call_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match="must"):
        WRONG_CALLS[case]()
