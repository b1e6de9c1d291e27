from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.embedded.body import BACKDROPS, HAIR_STYLES, NEUTRAL, sample_figure, skeleton
from model.embedded.figures import (
    KINDS,
    TEST_SEEDS,
    TRAIN_SEEDS,
    draw_garment,
    draw_outfit,
    draw_person,
    example,
    masks,
)
from model.embedded.people import ARM, DRESS, FACE, HAND, LABELS, LEG, LOWER, SHOE, UPPER
from model.embedded.textures import PATTERNS, PITCH_RANGE, Texture, sample_texture
from model.embedded.wardrobe import (
    LOWER_CUTS,
    NECKLINES,
    Garment,
    Outfit,
    lower_frame,
    sample_garment,
    sample_outfit,
    upper_frame,
)

SIZES = ((192, 256), (96, 128), (200, 230), (768, 1024))
seeds = st.integers(0, 2**32 - 1)


def drawn(seed, size_wh=(192, 256), dress=None):
    draw = np.random.default_rng(seed)
    return draw_person(sample_figure(draw), sample_outfit(draw, dress=dress), size_wh)


def test_the_same_seed_gives_the_same_bytes() -> None:
    first, second = example(7, "overall"), example(7, "overall")
    for name in ("person", "garment", "mask", "target", "labels"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
    assert not np.array_equal(first.person, example(8, "overall").person)


def test_no_seed_is_for_training_and_for_testing() -> None:
    assert set(TRAIN_SEEDS[-2:]).isdisjoint(TEST_SEEDS)
    assert TRAIN_SEEDS.stop <= TEST_SEEDS.start


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size_wh", [*SIZES[:3], (64, 96)])
def test_another_garment_changes_the_picture_inside_the_mask_and_nowhere_else(kind, size_wh) -> None:
    for seed in range(20):
        drawing = example(seed, kind, size_wh=size_wh)
        changed = np.any(drawing.person != drawing.target, axis=-1)
        assert changed.any()
        assert not changed[drawing.mask == 0].any()


@given(seeds)
@settings(deadline=None, max_examples=40)
def test_all_clothes_lie_inside_the_overall_mask_and_tell_nothing_through_it(seed) -> None:
    draw = np.random.default_rng(seed)
    figure = sample_figure(draw)
    first, second = (draw_person(figure, sample_outfit(draw)) for _ in range(2))
    overall = masks(first)["overall"]
    assert np.array_equal(overall, masks(second)["overall"])
    assert np.all(overall[np.isin(first.labels, (UPPER, LOWER, DRESS))] == 255)


@pytest.mark.parametrize("seed", range(8))
def test_the_masks_cover_their_kind_and_leave_face_hands_shoes_and_background(seed) -> None:
    drawing = drawn(seed, dress=False)
    areas = masks(drawing)
    assert set(areas) == {"upper", "lower", "overall", "inner", "outer"}
    for mask in areas.values():
        assert set(np.unique(mask)) == {0, 255}
        assert not mask[[0, -1]].any()
        assert not mask[cv2.erode((drawing.labels == FACE).astype(np.uint8), np.ones((5, 5))) > 0].any()
        assert mask[drawing.labels == HAND].mean() < 160
        assert mask[drawing.labels == SHOE].mean() < 160
        assert mask.mean() < 255 * 0.45
    assert np.all(areas["upper"][np.isin(drawing.labels, (UPPER, ARM))] == 255)
    assert np.all(areas["lower"][np.isin(drawing.labels, (LOWER, LEG))] == 255)
    assert np.all(areas["outer"] >= areas["upper"])
    assert np.all(areas["overall"] >= np.maximum(areas["upper"], areas["lower"]))


def test_every_person_shows_face_hands_shoes_and_clothes() -> None:
    for seed in range(30):
        labels = drawn(seed).labels
        shown = {LABELS[label] for label in np.unique(labels)}
        assert {"background", "face", "shoe", "hand"} <= shown
        assert "dress" in shown or {"upper", "lower"} <= shown


def test_sampling_reaches_every_choice() -> None:
    draw = np.random.default_rng(0)
    people = [sample_figure(draw) for _ in range(200)]
    outfits = [sample_outfit(draw) for _ in range(300)]
    garments = [garment for outfit in outfits for garment in (outfit.upper, outfit.lower) if garment]
    assert {figure.hair_style for figure in people} == set(HAIR_STYLES)
    assert {figure.backdrop for figure in people} == set(BACKDROPS)
    assert {garment.cut for garment in garments} == {"top", "dress", *LOWER_CUTS}
    assert {garment.neckline for garment in garments} == set(NECKLINES)
    assert {garment.texture.pattern for garment in garments} == set(PATTERNS)
    assert {outfit.tucked for outfit in outfits} == {True, False}


def test_the_two_colours_of_a_cloth_and_the_parts_of_an_outfit_differ_clearly() -> None:
    draw = np.random.default_rng(1)
    for _ in range(100):
        texture = sample_texture(draw)
        assert sum(abs(a - b) for a, b in zip(texture.base, texture.accent)) >= 150
        outfit = sample_outfit(draw, dress=False)
        assert sum(abs(a - b) for a, b in zip(outfit.upper.texture.base, outfit.lower.texture.base)) >= 150


def test_the_narrowest_stripe_on_the_slimmest_person_is_ten_pixels_at_work_size() -> None:
    draw = np.random.default_rng(2)
    bones = [skeleton(sample_figure(draw)) for _ in range(500)]
    bones.append(skeleton(replace(NEUTRAL, size=0.91, build=0.9, hips=0.92)))
    for bone in bones:
        assert min(upper_frame(bone).width, lower_frame(bone).width) * PITCH_RANGE[0] >= 10


def stripes(row, texture):
    """How often the cloth changes colour along a row of pixels; seams and background are skipped."""
    near = [np.abs(row.astype(int) - np.array(colour)).sum(-1) < 20 for colour in (texture.base, texture.accent)]
    which = np.where(near[1], 1, 0)[near[0] | near[1]]
    return int(np.count_nonzero(np.diff(which)))


@pytest.mark.parametrize("pattern", ["vertical", "checks"])
@pytest.mark.parametrize("cut", ["top", "skirt", "dress"])
def test_person_and_shop_show_the_same_number_of_stripes(pattern, cut) -> None:
    texture = Texture(pattern, (200, 40, 40), (30, 60, 190), PITCH_RANGE[0])
    garment = Garment(cut, texture, sleeve=0, hem=0.4, ease=0.2, flare=0.1)
    plain = Garment("trousers", Texture("plain", (240, 240, 90), (0, 0, 0), 0.2), hem=0.36)
    if cut == "skirt":
        outfit = Outfit(replace(plain, cut="top", sleeve=0, hem=0), garment)
    else:
        outfit = Outfit(garment, None if cut == "dress" else plain)
    for build in (0.9, 1.1):
        figure = replace(NEUTRAL, build=build, wall=(150, 220, 150))
        person, shop = draw_person(figure, outfit).image, draw_garment(garment)
        counts = [max(stripes(row, texture) for row in image) for image in (person, shop)]
        assert abs(counts[0] - counts[1]) <= 1
        assert counts[1] >= 4


@pytest.mark.parametrize("size_wh", [(192, 256), (192, 128), (768, 512), (64, 200)])
def test_a_garment_in_the_shop_lies_whole_and_centred_on_white(size_wh) -> None:
    draw = np.random.default_rng(3)
    for cut in ("top", "dress", *LOWER_CUTS) * 2:
        image = draw_garment(sample_garment(draw, cut), size_wh)
        assert image.shape == (size_wh[1], size_wh[0], 3)
        ys, xs = np.nonzero(np.any(image < 250, axis=-1))
        assert np.all(image[[0, -1]] == 255)
        assert np.all(image[:, [0, -1]] == 255)
        assert abs(xs.min() - (size_wh[0] - 1 - xs.max())) <= 3
        assert abs(ys.min() - (size_wh[1] - 1 - ys.max())) <= 3 + size_wh[1] // 40


def test_an_outfit_in_the_shop_is_the_upper_above_the_lower_or_one_dress() -> None:
    draw = np.random.default_rng(4)
    pair, dress = sample_outfit(draw, dress=False), sample_outfit(draw, dress=True)
    joined = draw_outfit(pair, (96, 129))
    assert np.array_equal(joined[:64], draw_garment(pair.upper, (96, 64)))
    assert np.array_equal(joined[64:], draw_garment(pair.lower, (96, 65)))
    assert np.array_equal(draw_outfit(dress), draw_garment(dress.upper))


@pytest.mark.parametrize("size_wh", [*SIZES, (64, 64), (300, 100)])
def test_any_size_is_drawn(size_wh) -> None:
    drawing = drawn(5, size_wh)
    assert drawing.image.shape == (size_wh[1], size_wh[0], 3)
    assert drawing.labels.shape == (size_wh[1], size_wh[0])
    assert drawing.image.dtype == drawing.labels.dtype == np.uint8
    assert masks(drawing)["overall"].shape == (size_wh[1], size_wh[0])


def test_a_large_drawing_is_the_small_one_with_finer_edges() -> None:
    small, large = drawn(6).image, drawn(6, (768, 1024)).image
    reduced = cv2.resize(large, (192, 256), interpolation=cv2.INTER_AREA)
    assert np.abs(reduced.astype(int) - small).mean() < 2


def test_bare_arms_show_skin_and_long_sleeves_hide_it() -> None:
    garment = Garment("dress", Texture("plain", (200, 40, 40), (0, 0, 0), 0.2))
    bare, covered = (draw_person(NEUTRAL, Outfit(replace(garment, sleeve=share), None)) for share in (0.0, 0.98))
    assert np.count_nonzero(bare.labels == ARM) > 800
    assert np.count_nonzero(covered.labels == ARM) < 60


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind"):
        example(1, "hat")  # type: ignore[arg-type]
