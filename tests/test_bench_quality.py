from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from bench import quality
from bench.cases import draw_case, draw_cases, recognised
from bench.judge import (
    class_accuracy,
    colour_differences,
    likeness,
    texture_accuracy,
    texture_table,
    unmasked_difference,
)
from bench.metrics import TEXTURES
from bench.quality import Job, dress, few_of_many_steps, main, seed_variation
from model.embedded.body import sample_figure
from model.embedded.figures import KINDS, TEST_SEEDS, draw_person
from model.embedded.wardrobe import sample_outfit

REQUIRED = (
    "psnr_in_mask",
    "ssim_in_mask",
    "psnr_in_mask_blank_garment",
    "ciede2000_plain_median",
    "texture_accuracy",
    "unmasked_max_difference",
)
JOB = Job(steps=2, guidance=2.0, eta=0.0, batch=4)


@pytest.fixture(scope="module")
def cases():
    return draw_cases(30, TEST_SEEDS[700])


class KnowsAll:
    """A pipeline that finds the garment among the cases and answers with the truth, plus the noise it is told."""

    device = torch.device("cpu")

    def __init__(self, cases, noise=0.0):
        exercises = [one for case in cases for one in (case.paired, case.swapped)]
        self.truth = {(one.person.tobytes(), one.garment.tobytes()): one.target for one in exercises}
        self.noise = noise
        self.calls = []

    def __call__(self, people, garments, masks, *, generator, **settings):
        self.calls.append((len(people), settings))
        pictures = [
            self.truth.get((person.tobytes(), garment.tobytes()), person) / 255
            for person, garment in zip(people, garments)
        ]
        drawn = [torch.rand(picture.shape, generator=one).numpy() for picture, one in zip(pictures, generator)]
        return SimpleNamespace(images=np.clip(np.array(pictures) + self.noise * (np.array(drawn) - 0.5), 0, 1))


def test_both_garments_of_a_case_are_for_the_same_person_and_mask(cases) -> None:
    for case in cases:
        assert np.array_equal(case.paired.person, case.swapped.person)
        assert np.array_equal(case.paired.mask, case.swapped.mask)
        assert not np.array_equal(case.paired.garment, case.swapped.garment)
        changed = np.any(case.swapped.person != case.swapped.target, axis=-1)
        assert changed.any()
        assert not changed[case.paired.mask == 0].any()
        assert case.pieces


def test_a_case_swaps_from_what_the_example_wears() -> None:
    for place, kind in enumerate(KINDS):
        draw = np.random.default_rng((TEST_SEEDS[5], place))
        figure, worn = sample_figure(draw), sample_outfit(draw, dress=None if kind == "overall" else False)
        assert np.array_equal(draw_case(TEST_SEEDS[5], kind).paired.person, draw_person(figure, worn).image)


def test_the_regions_lie_inside_the_mask(cases) -> None:
    for case in cases:
        for piece in case.pieces:
            assert not (piece.cloth & (case.swapped.mask == 0)).any()
            assert not (piece.trunk & ~piece.cloth).any()


def test_the_textures_of_true_drawings_are_recognised(cases) -> None:
    judged = [(case.swapped.target, piece) for case in cases for piece in case.pieces if piece.judged]
    assert {piece.pattern for _, piece in judged} == set(TEXTURES)
    assert all(recognised(picture, piece) == piece.pattern for picture, piece in judged)


def test_the_truth_has_the_best_figures(cases) -> None:
    paired, swapped = [case.paired for case in cases], [case.swapped for case in cases]
    made, other = (dress(KnowsAll(cases), part, JOB) for part in (paired, swapped))
    near = likeness(made, paired)
    assert (near.psnr_db, near.psnr_pooled_db) == (100, 100)
    assert near.ssim == pytest.approx(1)
    assert max(colour_differences(other, cases)) < 0.5
    table = texture_table(other, cases)
    assert texture_accuracy(table) == class_accuracy(table) == 1
    assert unmasked_difference([*made, *other], [*paired, *swapped]) == 0


def test_an_unchanged_person_has_bad_figures(cases) -> None:
    swapped = [case.swapped for case in cases]
    blank = dress(KnowsAll(cases), swapped, JOB, blank=True)
    assert likeness(blank, swapped).psnr_db < 20
    assert np.median(colour_differences(blank, cases)) > 20
    assert class_accuracy(texture_table(blank, cases)) < 0.6


def test_a_change_outside_the_mask_is_composited_away(cases) -> None:
    exercise = cases[0].paired
    assert unmasked_difference([255 - exercise.person], [exercise]) == 0


def test_pictures_do_not_depend_on_the_batch(cases) -> None:
    exercises = [case.paired for case in cases[:5]]
    pipeline = KnowsAll(cases, noise=0.2)
    by_four, by_two = (dress(pipeline, exercises, Job(2, 2.0, 0.0, batch)) for batch in (4, 2))
    assert all(np.array_equal(one, two) for one, two in zip(by_four, by_two))
    assert [count for count, _ in pipeline.calls] == [4, 1, 2, 2, 1]


def test_the_variation_between_seeds_is_that_of_the_noise(cases) -> None:
    exercises = [case.paired for case in cases[:2]]
    assert seed_variation(KnowsAll(cases), exercises, JOB) == 0
    assert 3 < seed_variation(KnowsAll(cases, noise=0.1), exercises, JOB) < 8


def test_few_steps_are_compared_with_many_without_noise(cases) -> None:
    pipeline = KnowsAll(cases)
    found = few_of_many_steps(pipeline, [cases[0].paired], Job(5, 2.0, 1.0, 4))
    assert found == {"psnr_20_of_200_steps": 100, "psnr_20_of_200_steps_in_mask": 100}
    assert [(call["num_inference_steps"], call["eta"]) for _, call in pipeline.calls] == [(20, 0.0), (200, 0.0)]


def test_accuracy_asks_whether_a_pattern_is_seen_not_which() -> None:
    table = {true: dict.fromkeys(TEXTURES, 0) for true in TEXTURES}
    table["plain"].update(plain=3, dots=1)
    table["checks"].update(horizontal=2, plain=2)
    table["dots"].update(plain=9)
    assert texture_accuracy(table) == 5 / 8
    assert class_accuracy(table) == 3 / 17


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning")
def test_the_command_prints_a_table_and_writes_figures_and_sheet(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(quality, "NOISE_FIGURES", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sheet, path = tmp_path / "sheet.png", tmp_path / "quality.json"
    options = ["--pairs", "3", "--seed", "1000050", "--steps", "1", "--many-steps-figures", "0"]
    done = CliRunner().invoke(main, [*options, "--sheet", str(sheet), "--json", str(path)], catch_exceptions=False)
    torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    assert "3 figures from seed 1000050" in done.output
    assert "PSNR in mask" in done.output
    report = json.loads(path.read_text())
    assert set(REQUIRED) <= report.keys()
    assert (report["pairs"], report["seed"], report["steps"], report["weights"]) == (3, 1000050, 1, "embedded")
    assert report["unmasked_max_difference"] == 0
    assert report["psnr_in_mask_autoencoder"] < 100
    with Image.open(sheet) as opened:
        assert opened.size == (8 * 196, 20 + 3 * 260)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--seed", "7"], "1000000<=x<=1009999"),
        (["--pairs", "3", "--seed", "1009998"], "seeds must lie"),
        (["--pairs", "1", "--weights", "nowhere"], "nowhere"),
        (["--steps", "1000"], "1<=x<=999"),
    ],
)
def test_what_cannot_be_judged_is_a_usage_error(options, text) -> None:
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 2
    assert text in done.output
