from __future__ import annotations

import logging
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model import load_masker
from model.embedded import demo_pictures
from model.embedded.augmentation import without_person
from model.embedded.figures import TEST_SEEDS, draw_garment, draw_person, masks
from model.embedded.parser import MASK_OF, WEIGHTS, FigureParser, load, load_parser, output_names
from model.embedded.parser_training import (
    SAVE_EVERY,
    draw_batch,
    draw_sample,
    drawn_person,
    parsing_loss,
    rate,
    restore,
    run,
    start,
)
from model.embedded.people import FACE, HAND, LABELS, SHOE
from model.embedded.textures import Texture
from model.embedded.wardrobe import Garment, Outfit
from model.interface import MaskerOptions, PersonNotFound
from model.weights import WeightsError

TYPES = ("upper", "lower", "overall", "inner", "outer")
UNSEEN = TEST_SEEDS[500:516]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def masker():
    return load()


def overlap(first, second):
    """Intersection over union of two masks."""
    return np.count_nonzero((first > 0) & (second > 0)) / max(1, np.count_nonzero((first > 0) | (second > 0)))


def test_the_masks_of_unseen_figures_are_those_of_the_drawing(masker) -> None:
    assert set(MASK_OF) == set(TYPES)
    overlaps, covered = [], []
    for seed in UNSEEN:
        person = drawn_person(seed)
        truth, found = masks(person), masker.masks(person.image, TYPES)
        assert list(found) == list(TYPES)
        overlaps.append([overlap(found[name], truth[name]) for name in TYPES])
        covered.append([np.mean(found[name][truth[name] > 0] > 0) for name in TYPES])
    assert np.mean(overlaps, axis=0).min() > 0.94
    assert np.min(overlaps) > 0.85
    assert np.mean(covered, axis=0).min() > 0.96


def test_hands_shoes_and_face_stay_free(masker) -> None:
    touched = []
    for seed in UNSEEN:
        person = drawn_person(seed)
        inside = cv2.erode(np.isin(person.labels, (FACE, HAND, SHOE)).astype(np.uint8), np.ones((5, 5))) > 0
        touched.append(np.mean(masker.mask(person.image, "overall")[inside] > 0))
    assert np.mean(touched) < 0.02


def test_the_labels_of_unseen_figures_are_recognised(masker) -> None:
    right = [np.mean(masker.labels(person.image) == person.labels) for person in map(drawn_person, UNSEEN)]
    assert np.mean(right) > 0.93


@pytest.mark.parametrize("size_wh", [(96, 128), (384, 512), (300, 256), (200, 400)])
def test_a_figure_of_any_size_is_masked_at_its_own_size(masker, size_wh) -> None:
    figure = drawn_person(TEST_SEEDS[600]).figure
    garment = Garment("dress", Texture("plain", (200, 40, 40), (0, 0, 0), 0.2), sleeve=0.3)
    person = draw_person(figure, Outfit(garment, None), size_wh)
    found = masker.mask(person.image, "overall")
    assert found.shape == person.labels.shape
    assert found.dtype == np.uint8
    assert set(np.unique(found)) == {0, 255}
    assert overlap(found, masks(person)["overall"]) > 0.88


def test_the_figure_of_the_demo_is_masked(masker) -> None:
    pictures = demo_pictures()
    assert overlap(masker.mask(pictures["person"], "overall"), pictures["mask"]) > 0.93


def test_inner_is_upper_and_outer_reaches_further(masker) -> None:
    found = masker.masks(drawn_person(UNSEEN[0]).image, TYPES)
    assert np.array_equal(found["inner"], found["upper"])
    assert np.count_nonzero(found["outer"]) > 1.1 * np.count_nonzero(found["upper"])


def test_a_jpeg_changes_little(masker) -> None:
    image = drawn_person(UNSEEN[1]).image
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
    again = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED))
    assert overlap(masker.mask(again, "overall"), masker.mask(image, "overall")) > 0.95


@pytest.mark.parametrize("name", ["garment", "white", "backdrop", "noise"])
def test_a_picture_without_a_person_is_refused(masker, name) -> None:
    draw = np.random.default_rng(7)
    picture = {
        "garment": draw_garment(Garment("top", Texture("checks", (200, 40, 40), (30, 60, 190), 0.3))),
        "white": np.full((80, 60, 3), 255, np.uint8),
        "backdrop": without_person(FirstKind(), drawn_person(UNSEEN[2]).figure),
        "noise": draw.integers(0, 256, (256, 192, 3), np.uint8),
    }[name]
    with pytest.raises(PersonNotFound, match="pixels of a person"):
        masker.mask(picture, "upper")


class FirstKind:
    """Draws the lowest of all numbers, which is the backdrop."""

    def integers(self, _high):
        return 0


def test_an_unknown_type_is_refused(masker) -> None:
    with pytest.raises(ValueError, match="'hat'"):
        masker.mask(drawn_person(UNSEEN[0]).image, "hat")


@pytest.mark.parametrize("picture", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)])
def test_what_is_no_picture_is_refused(masker, picture) -> None:
    with pytest.raises(ValueError, match="HWC uint8"):
        masker.mask(picture, "upper")


def test_the_longest_picture_costs_a_bounded_look(masker) -> None:
    assert masker.labels(np.full((3000, 20, 3), 128, np.uint8)).shape == (3000, 20)


def test_maskers_are_registered_by_name() -> None:
    person = drawn_person(UNSEEN[3]).image
    assert load_masker("embedded", MaskerOptions()).mask(person, "lower").shape == person.shape[:2]
    with pytest.raises(ValueError, match="one of: embedded"):
        load_masker("other", MaskerOptions())


def test_importing_the_registry_loads_no_torch() -> None:
    code = "import sys, model; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_weights_are_small_and_of_half_precision() -> None:
    tensors = load_file(WEIGHTS)
    assert WEIGHTS.stat().st_size < 2**20
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert sum(weight.numel() for weight in FigureParser().parameters()) < 300_000


def test_weights_that_do_not_fit_are_refused(tmp_path) -> None:
    path = tmp_path / "parser.safetensors"
    with pytest.raises(WeightsError, match="cannot be read"):
        load_parser(path)
    path.write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_parser(path)
    save_file({"head.weight": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="other outputs"):
        load_parser(path)
    save_file({"head.weight": torch.zeros(1)}, path, metadata={"outputs": output_names()})
    with pytest.raises(WeightsError, match="does not fit"):
        load_parser(path)


def test_a_run_that_is_resumed_ends_with_the_same_weights(tmp_path, monkeypatch, caplog) -> None:
    small(monkeypatch)
    monkeypatch.setattr("model.embedded.parser_training.SAVE_EVERY", 2)
    caplog.set_level(logging.INFO, "vton.train")
    run(tmp_path / "whole", steps=3, seed=5, resume=False)
    killed_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", steps=3, seed=5, resume=False)
    monkeypatch.undo()
    small(monkeypatch)
    run(tmp_path / "parts", steps=3, seed=5, resume=True)
    whole, parts = (load_file(tmp_path / name / "parser.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    losses = [record.loss for record in caplog.records if record.step == 2]
    assert len(losses) == 2
    assert losses[0] == losses[1]
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["parser.safetensors"]


def small(monkeypatch):
    """Two pictures a step, so that a step takes a tenth of a second."""
    monkeypatch.setattr("model.embedded.parser_training.BATCH", 2)


def killed_after(monkeypatch, steps):
    from model.embedded import parser_training

    advance = parser_training.advance

    def killed(training, step, **options):
        if step == steps:
            raise KeyboardInterrupt
        return advance(training, step, **options)

    monkeypatch.setattr(parser_training, "advance", killed)


def test_resuming_needs_the_state_of_the_same_run(tmp_path, monkeypatch) -> None:
    with pytest.raises(WeightsError, match="cannot be read"):
        run(tmp_path, steps=3, seed=5, resume=True)
    small(monkeypatch)
    monkeypatch.setattr("model.embedded.parser_training.SAVE_EVERY", 1)
    killed_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, steps=3, seed=5, resume=False)
    with pytest.raises(ValueError, match="another run"):
        restore(start(5), tmp_path / "parser_state.safetensors", steps=4, seed=5)


def test_what_is_drawn_follows_from_step_and_seed(monkeypatch) -> None:
    small(monkeypatch)
    first, again, other = draw_batch(3, seed=1), draw_batch(3, seed=1), draw_batch(4, seed=1)
    assert all(torch.equal(one, two) for one, two in zip(first, again))
    assert not torch.equal(first[0], other[0])
    pictures, labels, wanted = first
    assert pictures.shape == (2, 3, 256, 192)
    assert labels.shape == (2, 256, 192)
    assert wanted.shape == (2, 4, 256, 192)
    assert labels.max() < len(LABELS)
    assert float(pictures.min()) >= -1
    assert set(wanted.unique().tolist()) <= {0.0, 1.0}


def test_some_pictures_show_nobody() -> None:
    empty = [number for number in range(40) if not draw_sample(number, seed=2).labels.any()]
    assert 1 <= len(empty) <= 8


def test_the_loss_of_a_perfect_answer_is_nothing() -> None:
    _, labels, wanted = draw_batch(0, seed=0)
    names = torch.nn.functional.one_hot(labels[:2], len(LABELS)).permute(0, 3, 1, 2).float()
    perfect = torch.cat([names, wanted[:2]], dim=1).mul(40).sub(20)
    assert float(parsing_loss(perfect, labels[:2], wanted[:2])) < 1e-3
    assert float(parsing_loss(-perfect, labels[:2], wanted[:2])) > 10


def test_the_learning_rate_rises_shortly_and_falls_to_nothing() -> None:
    rates = [rate(step, 200) for step in range(200)]
    assert max(rates) == pytest.approx(1, abs=0.1)
    assert rates[0] < 0.1
    assert rates[-1] < 0.001
    assert rates.index(max(rates)) < 20
    assert SAVE_EVERY > 1
