"""The masks against numbers of the reference implementation, its primitives against slow restatements."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from model.maskers import labels, regions
from model.maskers.agnostic import (
    cloth_agnostic_mask,
    fastfit_agnostic_mask,
    multi_ref_cloth_agnostic_mask,
    protected,
    target_found,
    uncovered,
)
from model.maskers.labels import ATR_LABELS, FASTFIT_PARTS, LIP_LABELS, PARTS, LabelMaps

GOLDENS = Path(__file__).parent / "goldens" / "masking"
CASES = sorted(path.stem for path in (GOLDENS / "mask").glob("mask_*.npz"))
ODD_SIZES = [(1, 1), (1, 2), (3, 1), (3, 5), (1, 90), (70, 2), (299, 401), (302, 400), (257, 129), (51, 250)]
Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]
Maps = tuple[Bytes, Bytes, Bytes]


def load(folder: str, name: str) -> dict[str, Bytes]:
    with np.load(GOLDENS / folder / f"{name}.npz") as archive:
        return {key: archive[key] for key in archive.files}


def maps_of(case: dict[str, Bytes]) -> Maps:
    return case["densepose"], case["lip"], case["atr"]


def random_maps(shape: tuple[int, int], seed: int = 0, cell: int = 1) -> Maps:
    """Label maps of random blocks of cell x cell px."""
    rng = np.random.default_rng(seed)
    blocks = [rng.integers(0, count, (-(-shape[0] // cell), -(-shape[1] // cell))) for count in (25, 20, 18)]
    drawn = [block.repeat(cell, 0).repeat(cell, 1)[: shape[0], : shape[1]].astype(np.uint8) for block in blocks]
    return drawn[0], drawn[1], drawn[2]


def every_mask(maps: Maps) -> Iterator[tuple[str, Bytes]]:
    """All that can be asked of one picture, under the names of the goldens."""
    for part in PARTS:
        yield f"catvton_{part}", cloth_agnostic_mask(*maps, part)
        yield f"fastfit_{part}", fastfit_agnostic_mask(*maps, part)
        yield f"fastfit_{part}_square", fastfit_agnostic_mask(*maps, part, square=True)
    yield "fastfit_multi", multi_ref_cloth_agnostic_mask(*maps)
    yield "fastfit_multi_square", multi_ref_cloth_agnostic_mask(*maps, square=True)
    widened = multi_ref_cloth_agnostic_mask(
        *maps, square=True, horizon_expand=True, generator=np.random.RandomState(123)
    )
    yield "fastfit_multi_square_horizon_seed123", widened


@pytest.mark.parametrize("name", CASES)
def test_every_mask_equals_that_of_the_reference(name: str) -> None:
    case = load("mask", name)
    made = dict(every_mask(maps_of(case)))
    assert {*made, "densepose", "lip", "atr"} == set(case)
    assert {key: int((mask != case[key]).sum()) for key, mask in made.items()} == dict.fromkeys(made, 0)


def test_the_cases_are_complete() -> None:
    assert len(CASES) == 6


TRACES = [
    ("catvton_upper", PARTS["upper"], 1),
    ("catvton_lower", PARTS["lower"], 1),
    ("fastfit_upper", FASTFIT_PARTS["upper"], 1),
]


@pytest.mark.parametrize(("prefix", "rules", "window"), TRACES)
def test_the_first_regions_equal_those_of_the_reference(prefix: str, rules: labels.Part, window: int) -> None:
    trace, maps = load("mask", "trace_a_300x400_tee_pants"), LabelMaps(*maps_of(load("mask", CASES[0])))
    strong, weak = protected(maps, rules, window)
    dense = maps.in_densepose(rules.dense)
    found = {
        "hands_protect_area_1": maps.in_densepose((*labels.HANDS, *labels.FEET)),
        "hands_protect_area_2": strong & ~maps.in_lip(("Face",)),
        "strong_protect_area_1": strong,
        "weak_protect_area_1": weak,
        "strong_mask_area_1": maps.in_either(rules.target),
        "background_area_1": maps.in_lip(("Background",)) & maps.in_atr(("Background",)),
        "mask_dense_area_1": dense,
        "mask_dense_area_2": dense[::4, ::4],
        "mask_dense_area_3": regions.dilate_at_quarter_scale(dense, window, 2),
        "mask_area_1": uncovered(maps, rules, weak, window),
    }
    for key, region in found.items():
        assert np.array_equal(region, trace[f"{prefix}_{key}"]), key


def traced(prefix: str) -> Callable[[int], Bytes]:
    trace = load("mask", "trace_a_300x400_tee_pants")
    return lambda number: trace[f"{prefix}_mask_area_{number}"]


@pytest.mark.parametrize("prefix", ["catvton_upper", "catvton_lower"])
def test_each_later_step_of_catvton_equals_that_of_the_reference(prefix: str) -> None:
    area = traced(prefix)
    strong, weak = protected(LabelMaps(*maps_of(load("mask", CASES[0]))), PARTS[prefix.split("_")[1]], 1)
    assert np.array_equal(regions.convex_hulls(area(1) > 0), area(2))
    assert np.array_equal((area(2) > 0) & ~weak, area(3))
    assert np.array_equal(regions.blur(area(3) > 0, 17), area(4))
    assert np.array_equal(area(4) >= 25, area(6))
    assert not (area(7).astype(bool) & strong).any()


def test_each_later_step_of_fastfit_equals_that_of_the_reference() -> None:
    area = traced("fastfit_upper")
    _, weak = protected(LabelMaps(*maps_of(load("mask", CASES[0]))), FASTFIT_PARTS["upper"], 1)
    assert np.array_equal(regions.blur(area(1) > 0, 9), area(2))
    assert np.array_equal(area(2) >= 100, area(4))
    assert np.array_equal(regions.largest_component(area(4) > 0), area(5))
    assert np.array_equal(regions.convex_hulls(area(5) > 0), area(6))
    assert np.array_equal((area(6) > 0) & ~weak, area(7))
    assert np.array_equal(regions.blur(area(7) > 0, 9), area(8))
    assert np.array_equal(area(8) >= 25, area(10))


def test_each_step_of_an_outfit_equals_that_of_the_reference() -> None:
    trace, maps = load("mask", "trace_a_300x400_tee_pants"), LabelMaps(*maps_of(load("mask", CASES[0])))
    area = traced("fastfit_multi")
    face, worn = maps.in_lip(("Face",)), maps.in_either(labels.WORN)
    dense = regions.dilate_at_quarter_scale(maps.in_densepose(FASTFIT_PARTS["full"].dense), 1, 2)
    assert np.array_equal(face, trace["fastfit_multi_strong_protect_area_1"])
    assert np.array_equal(worn, trace["fastfit_multi_strong_mask_area_1"])
    assert np.array_equal(dense, trace["fastfit_multi_mask_dense_area_3"])
    assert np.array_equal((worn | dense) & ~face, area(1))
    assert np.array_equal(regions.blur(area(1) > 0, 9), area(2))
    assert np.array_equal(regions.convex_hulls(area(4) > 0), area(5))
    assert np.array_equal(regions.blur(area(5) > 0, 9), area(6))
    assert np.array_equal(area(6) >= 25, area(8))


@pytest.mark.parametrize("size", [1, 3, 5, 7, 9, 17, 21, 41])
def test_the_blur_equals_that_of_the_reference(size: int) -> None:
    ops = load("ops", "ops_a")
    assert np.array_equal(regions.blur(ops["blur_in"] > 0, size), ops[f"blur_k{size}"])


def test_hulls_equal_those_of_the_reference() -> None:
    ops = load("ops", "ops_a")
    assert np.array_equal(regions.convex_hulls(ops["hull_in"] > 0), ops["hull_out"])


def test_dilations_equal_those_of_the_reference() -> None:
    ops = load("ops", "ops_a")
    mask = ops["dense_in"] > 0
    assert np.array_equal(regions.dilate(mask, 5), ops["dilate_k5x1"])
    assert np.array_equal(regions.dilate(mask, 3, 2), ops["dilate_k3x2"])
    for size in (1, 3, 5):
        assert np.array_equal(regions.dilate_at_quarter_scale(mask, size, 2), ops[f"dense_out_k{size}"]), size


def small_masks(count: int = 150) -> Iterator[Flags]:
    """Specks, blobs and outlines up to 40 px a side."""
    rng = np.random.default_rng(7)
    for index in range(count):
        height, width = (int(side) for side in rng.integers(1, 40, 2))
        noise = rng.random((height, width)).astype(np.float32)
        if index % 3 == 0:
            yield noise < rng.choice([0.0, 0.03, 0.1, 0.3, 0.6, 1.0])
        elif index % 3 == 1:
            smooth = cv2.blur(noise, (5, 5))
            yield smooth > np.quantile(smooth, rng.uniform(0.4, 0.95))
        else:
            lines = np.zeros((height, width), np.uint8)
            corners = rng.integers(0, [width, height], (int(rng.integers(2, 6)), 2)).astype(np.int32)
            yield cv2.polylines(lines, [corners], True, 1) > 0


def components(mask: Flags) -> list[set[tuple[int, int]]]:
    """The (x, y) of each 8-connected component, by flood."""
    left = {(int(x), int(y)) for y, x in zip(*np.nonzero(mask))}
    found = []
    while left:
        edge = [left.pop()]
        component = set(edge)
        while edge:
            x, y = edge.pop()
            near = {(x + dx, y + dy) for dx, dy in product((-1, 0, 1), repeat=2)} & left
            left -= near
            component |= near
            edge += near
        found.append(component)
    return found


def is_nested(component: set[tuple[int, int]], mask: Flags) -> bool:
    """Whether no path over other pixels, in four directions, leads from the component out of the picture."""
    height, width = mask.shape
    edge, seen = list(component), set(component)
    while edge:
        x, y = edge.pop()
        for step in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)):
            if not (0 <= step[0] < width and 0 <= step[1] < height):
                return False
            if step not in seen and not mask[step[1], step[0]]:
                seen.add(step)
                edge.append(step)
    return True


def hull_corners(points: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Andrew's monotone chain, without collinear points."""
    if len(points) == 1:
        return list(points)
    chains = []
    for ordered in (sorted(points), sorted(points, reverse=True)):
        chain: list[tuple[int, int]] = []
        for x, y in ordered:
            while len(chain) > 1:
                (x0, y0), (x1, y1) = chain[-2:]
                if (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) > 0:
                    break
                chain.pop()
            chain.append((x, y))
        chains += chain[:-1]
    return chains


def bresenham(start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    (x, y), (end_x, end_y) = sorted((start, end))
    width, height, down = end_x - x, abs(end_y - y), 1 if end_y >= y else -1
    major, minor = max(width, height), min(width, height)
    error = major - 2 * minor
    for _ in range(major + 1):
        yield x, y
        aside = error < 0
        if aside:
            error += 2 * major
        error -= 2 * minor
        if width >= height:
            x, y = x + 1, y + (down if aside else 0)
        else:
            x, y = x + (1 if aside else 0), y + down


def slow_hulls(mask: Flags) -> Flags:
    filled = np.zeros_like(mask)
    for component in components(mask):
        if is_nested(component, mask):
            continue
        corners = hull_corners(component)
        edges = list(zip(corners, corners[1:] + corners[:1]))
        for x, y in (pixel for edge in edges for pixel in bresenham(*edge)):
            filled[y, x] = True
        for y in range(mask.shape[0]):
            crossings = []
            for (x0, y0), (x1, y1) in (sorted(edge, key=lambda point: point[1]) for edge in edges):
                if y0 <= y < y1:
                    slope = math.trunc(math.copysign(((abs(x1 - x0) << 16) // (y1 - y0)), x1 - x0))
                    crossings.append((x0 << 16) + slope * (y - y0))
            if crossings:
                filled[y, (min(crossings) + 32768) >> 16 : ((max(crossings) + 32768) >> 16) + 1] = True
    return filled


def test_hulls_are_what_a_slow_scanline_fills() -> None:
    for mask in small_masks():
        hulls = regions.convex_hulls(mask)
        assert np.array_equal(hulls, slow_hulls(mask))
        assert (hulls & mask == mask).all()


def test_the_largest_component_is_what_a_flood_finds() -> None:
    for mask in small_masks():
        found = components(mask)
        largest = regions.largest_component(mask)
        points = {(int(x), int(y)) for y, x in zip(*np.nonzero(largest))}
        assert points in found if found else not points
        assert len(points) == max(map(len, found), default=0)


def taps(size: int) -> list[int]:
    """The fixed-point window: each tap passes what rounding took from it on to the next."""
    small = {1: [256], 3: [64, 128, 64], 5: [16, 64, 96, 64, 16], 7: [8, 28, 56, 72, 56, 28, 8]}
    if size in small:
        return small[size]
    deviation = 0.3 * ((size - 1) / 2 - 1) + 0.8
    weights = [math.exp(-((index - size // 2) ** 2) / (2 * deviation**2)) for index in range(size)]
    side, error = [], 0.0
    for weight in weights[: size // 2]:
        exact = weight / math.fsum(weights) * 256 + error
        side.append(round(exact))
        error = exact - side[-1]
    return [*side, 256 - 2 * sum(side), *reversed(side)]


def slow_blur(mask: Flags, size: int) -> Bytes:
    sums = mask.astype(np.int64) * 255
    for axis in (0, 1):
        # numpy's "reflect" is reflect-101, over and over where the window is wider than the picture
        padded = np.pad(sums, [(size // 2,) * 2 if each == axis else (0, 0) for each in (0, 1)], mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, size, axis)
        sums = windows @ np.array(taps(size))
    return ((sums + (1 << 15)) >> 16).astype(np.uint8)


@pytest.mark.parametrize("size", [1, 3, 5, 7, 9, 11, 13, 15, 17, 21, 27, 33, 41, 61, 97, 161])
def test_the_blur_is_that_of_fixed_point_taps(size: int) -> None:
    """An OpenCV built with another blur must not change masks unseen."""
    for mask in [*small_masks(12), np.ones((1, 1), bool), np.eye(3, 200, dtype=bool), np.eye(211, 190, dtype=bool)]:
        assert np.array_equal(regions.blur(mask, size), slow_blur(mask, size)), mask.shape


def slow_dilate(mask: Flags, reach: int) -> Flags:
    height, width = mask.shape
    grown = np.zeros_like(mask)
    for y, x in product(range(height), range(width)):
        grown[y, x] = mask[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1].any()
    return grown


@pytest.mark.parametrize(("size", "iterations"), [(1, 1), (3, 1), (5, 2), (9, 2)])
def test_a_dilation_takes_nothing_from_beyond_the_picture(size: int, iterations: int) -> None:
    for mask in small_masks(20):
        grown = regions.dilate(mask, size, iterations)
        assert np.array_equal(grown, slow_dilate(mask, iterations * (size // 2)))


@pytest.mark.parametrize("shape", [*product(range(1, 10), repeat=2), (33, 46), (43, 42)])
def test_quarter_scale_covers_every_size(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(3).random(shape) < 0.3
    small = [max(1, round(side / 4)) for side in shape]
    quarter = np.array([[mask[4 * y, 4 * x] for x in range(small[1])] for y in range(small[0])])
    rows, columns = ([min(index // 4, count - 1) for index in range(side)] for side, count in zip(shape, small))
    for size, iterations in ((1, 2), (3, 1), (3, 2)):
        expected = slow_dilate(quarter, iterations * (size // 2))[np.ix_(rows, columns)]
        assert np.array_equal(regions.dilate_at_quarter_scale(mask, size, iterations), expected)


def test_the_box_is_tight() -> None:
    mask = np.zeros((9, 12), bool)
    assert regions.bounding_box(mask) == regions.Box(0, 0, 0, 0)
    mask[2, 5] = mask[6, 3] = True
    assert regions.bounding_box(mask) == regions.Box(3, 2, 6, 7)


@pytest.mark.parametrize("shape", ODD_SIZES)
@pytest.mark.parametrize("cell", [1, 16])
def test_random_maps_of_any_size_give_masks_and_stay_as_they_are(shape: tuple[int, int], cell: int) -> None:
    maps = random_maps(shape, seed=shape[1], cell=cell)
    before = [labels.copy() for labels in maps]
    for each in maps:
        each.flags.writeable = False
    for name, mask in every_mask(maps):
        assert mask.shape == shape, name
        assert mask.dtype == np.uint8, name
        assert set(np.unique(mask)) <= {0, 255}, name
    assert all(np.array_equal(left, right) for left, right in zip(before, maps))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 48)])
def test_empty_maps_give_empty_masks(shape: tuple[int, int]) -> None:
    nothing = np.zeros(shape, np.uint8)
    for name, mask in every_mask((nothing, nothing, nothing)):
        assert not mask.any(), name


def test_views_give_the_masks_of_their_copies() -> None:
    maps = random_maps((90, 70), cell=10)
    views = tuple(labels.T[::-1] for labels in maps)
    copies = tuple(np.ascontiguousarray(view) for view in views)
    for (name, left), (_, right) in zip(every_mask(views), every_mask(copies)):
        assert np.array_equal(left, right), name


def test_full_and_dresses_are_overall() -> None:
    maps = maps_of(load("mask", CASES[0]))
    overall = fastfit_agnostic_mask(*maps, "overall")
    assert np.array_equal(fastfit_agnostic_mask(*maps, "full"), overall)
    assert np.array_equal(fastfit_agnostic_mask(*maps, "dresses"), overall)


def test_widening_repeats_without_a_generator_and_takes_either_kind() -> None:
    maps = maps_of(load("mask", CASES[0]))
    masks = [
        multi_ref_cloth_agnostic_mask(*maps, square=True, horizon_expand=True, generator=generator)
        for generator in (None, None, np.random.default_rng(0), np.random.RandomState(5))
    ]
    assert np.array_equal(masks[0], masks[1])
    assert np.array_equal(masks[0], masks[2])
    assert not np.array_equal(masks[0], masks[3])


class AlwaysMost:
    """Draws the upper end."""

    def uniform(self, low: float, high: float) -> float:
        return high


def test_widening_stops_at_the_border() -> None:
    lip = np.zeros((400, 300), np.uint8)
    lip[100:300, :200] = LIP_LABELS.index("Dress")
    nothing = np.zeros_like(lip)
    mask = multi_ref_cloth_agnostic_mask(nothing, lip, nothing, True, True, AlwaysMost())
    columns = np.flatnonzero(mask.any(axis=0))
    assert (columns[0], columns[-1]) == (0, 281)  # 201 px of blurred dress, and 40 on the right for each side


@pytest.mark.parametrize(("part", "names"), [(part, rules.target) for part, rules in FASTFIT_PARTS.items()])
def test_the_garment_is_found_by_either_map(part: str, names: tuple[str, ...]) -> None:
    nothing = np.zeros((3, 4), np.uint8)
    assert not target_found(nothing, nothing, part)
    for name in LIP_LABELS:
        assert target_found(np.full_like(nothing, LIP_LABELS.index(name)), nothing, part) == (name in names)
    for name in ATR_LABELS:
        assert target_found(nothing, np.full_like(nothing, ATR_LABELS.index(name)), part) == (name in names)


def test_a_picture_without_a_coat_has_an_outer_mask_but_no_target() -> None:
    densepose, lip, atr = maps_of(load("mask", CASES[0]))
    assert cloth_agnostic_mask(densepose, lip, atr, "outer").any()
    assert not target_found(lip, atr, "outer")
    assert target_found(lip, atr, "upper")


TORSO, THIGHS, LOWER_LEGS, ARMS = range(1, 3), range(7, 11), range(11, 15), range(15, 23)
DENSE = {
    "upper": (TORSO, ARMS),
    "lower": (THIGHS, LOWER_LEGS),
    "overall": (TORSO, THIGHS, LOWER_LEGS, ARMS),
    "inner": (TORSO,),
    "outer": (TORSO, ARMS),
}
REPAINTED = {  # of a picture that shows nothing else
    "upper": {"Upper-clothes", "Dress", "Coat", "Jumpsuits", "Left-arm", "Right-arm", "Belt"},
    "lower": {"Pants", "Skirt", "Dress", "Jumpsuits", "Left-leg", "Right-leg", "Belt"},
    "overall": {*labels.OUTFIT, "Left-arm", "Right-arm", "Left-leg", "Right-leg", "Belt"},
    "inner": {"Upper-clothes", "Left-arm", "Right-arm", "Belt"},
    "outer": {"Coat", "Left-arm", "Right-arm", "Belt"},
}
REPAINTED_IN_ATR_TOO = {
    "upper": {"Face"},
    "lower": set(),
    "overall": {"Face"},
    "inner": {"Face"},
    "outer": {"Face", "Upper-clothes"},
}
SHOES = {"Left-shoe", "Right-shoe"}


@pytest.mark.parametrize("part", PARTS)
def test_every_label_is_repainted_or_protected_as_its_table_says(part: str) -> None:
    nothing = np.zeros((8, 6), np.uint8)
    for known, is_lip in ((LIP_LABELS, True), (ATR_LABELS, False)):
        for label, name in enumerate(known):
            shown = np.full_like(nothing, label)
            maps = (nothing, shown, nothing) if is_lip else (nothing, nothing, shown)
            expected = REPAINTED[part] | (set() if is_lip else REPAINTED_IN_ATR_TOO[part])
            shod = expected | (set() if part in ("lower", "overall") else SHOES)
            assert cloth_agnostic_mask(*maps, part).all() == (name in expected), name
            assert fastfit_agnostic_mask(*maps, part).all() == (name in shod), name


def test_an_outfit_is_all_that_is_worn_but_on_the_head() -> None:
    nothing = np.zeros((8, 6), np.uint8)
    worn = {*labels.OUTFIT, *SHOES, "Bag", "Socks", "Belt"}
    for label, name in enumerate(LIP_LABELS):
        assert multi_ref_cloth_agnostic_mask(nothing, np.full_like(nothing, label), nothing).all() == (name in worn)
    for label, name in enumerate(ATR_LABELS):
        assert multi_ref_cloth_agnostic_mask(nothing, nothing, np.full_like(nothing, label)).all() == (name in worn)


@pytest.mark.parametrize(("part", "groups"), DENSE.items())
def test_the_body_that_a_garment_can_cover_is_repainted_even_where_nothing_is_worn(
    part: str, groups: tuple[range, ...]
) -> None:
    nothing, covered = np.zeros((8, 6), np.uint8), {label for group in groups for label in group}
    for label in range(25):
        shown = np.full_like(nothing, label)
        assert cloth_agnostic_mask(shown, nothing, nothing, part).all() == (label in covered), label
        assert fastfit_agnostic_mask(shown, nothing, nothing, part).all() == (label in covered | {5, 6}), label


def test_every_name_in_the_tables_is_a_label() -> None:
    """Names that a map does not have are skipped, so that a misspelt one would be."""
    known = {*LIP_LABELS, *ATR_LABELS}
    for rules in FASTFIT_PARTS.values():
        assert known.issuperset((*rules.body, *rules.target, *rules.accessories))
        assert set(LIP_LABELS).issuperset(rules.cloth_lip)
        assert set(ATR_LABELS).issuperset(rules.cloth_atr)
    assert known.issuperset((*labels.ARMS, *labels.LEGS, *labels.WORN))


@pytest.mark.parametrize("mask_of", [cloth_agnostic_mask, fastfit_agnostic_mask])
def test_an_unknown_part_is_refused_with_the_known_ones(mask_of: Callable[..., Bytes]) -> None:
    maps = random_maps((8, 8))
    with pytest.raises(ValueError, match=r"upper, lower, overall, inner, outer.*'hat'"):
        mask_of(*maps, "hat")
    with pytest.raises(ValueError, match="part must be one of"):
        target_found(*maps[1:], "")


@pytest.mark.parametrize("part", ["full", "dresses"])
def test_catvton_does_not_know_the_names_of_fastfit(part: str) -> None:
    with pytest.raises(ValueError, match="part must be one of"):
        cloth_agnostic_mask(*random_maps((8, 8)), part)


GOOD = np.zeros((8, 6), np.uint8)
BAD = [
    (np.zeros((8, 7), np.uint8), r"\(8, 7\)"),
    (np.zeros((8, 6, 1), np.uint8), "HW uint8"),
    (np.zeros(48, np.uint8), "HW uint8"),
    (np.zeros((8, 6), np.int64), "int64"),
    (np.zeros((8, 6), bool), "bool"),
    (np.zeros((0, 6), np.uint8), "non-empty"),
    (np.full((8, 6), 25, np.uint8), "holds 25"),
    ([[0, 1]], "not list"),
    (None, "not NoneType"),
]


@pytest.mark.parametrize(("bad", "text"), BAD)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_what_is_no_label_map_is_refused(position: int, bad: Bytes, text: str) -> None:
    maps = [GOOD, GOOD, GOOD]
    maps[position] = bad
    for make in (cloth_agnostic_mask, fastfit_agnostic_mask):
        with pytest.raises(ValueError, match=text):
            make(*maps, "upper")
    with pytest.raises(ValueError, match=text):
        multi_ref_cloth_agnostic_mask(*maps)
    if position:
        with pytest.raises(ValueError, match=text):
            target_found(*maps[1:], "upper")


@pytest.mark.parametrize(
    ("position", "name", "count"), [(0, "densepose", 25), (1, "schp_lip", 20), (2, "schp_atr", 18)]
)
def test_each_map_has_its_own_range_of_labels(position: int, name: str, count: int) -> None:
    maps = [GOOD, GOOD, GOOD]
    maps[position] = np.full_like(GOOD, count - 1)
    cloth_agnostic_mask(*maps, "upper")
    maps[position] = np.full_like(GOOD, count)
    with pytest.raises(ValueError, match=f"{name} has labels 0 to {count - 1}"):
        cloth_agnostic_mask(*maps, "upper")


def test_many_components_take_no_longer_than_their_pixels() -> None:
    dots = np.zeros((1024, 768), bool)
    dots[::2, ::2] = True
    bars = np.zeros((1024, 768), bool)
    bars[:, ::2] = True
    for mask in (dots, bars, np.random.default_rng(0).random((1024, 768)) < 0.2):
        started = time.process_time()
        hulls = regions.convex_hulls(mask)
        assert (
            time.process_time() - started < 10
        )  # 0.2 s measured; in time that grows by the square it would be minutes
        assert (hulls & mask == mask).all()
