"""The three networks behind one masker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model import SCHP_SIGN, choose_masker, load_masker, weights
from model.interface import MaskerOptions, OutOfMemory, PersonNotFound
from model.maskers.agnostic import cloth_agnostic_mask
from model.maskers.auto import AutoMasker
from model.maskers.densepose import Found
from model.maskers.labels import PARTS
from model.maskers.published import PUBLISHED, twin_of
from model.weights import WeightsError

CASE = np.load(Path(__file__).parent / "goldens" / "masking" / "mask" / "mask_a_300x400_tee_pants.npz")
PERSON = np.zeros((*CASE["lip"].shape, 3), np.uint8)


class Parser:
    """Sees the same labels in every picture; counts its runs."""

    def __init__(self, labels):
        self.labels = labels
        self.runs = 0

    def parse(self, image):
        self.runs += 1
        return self.labels


class Body(Parser):
    def find(self, image):
        self.runs += 1
        return None if self.labels is None else Found(self.labels, (0.0, 0.0, 1.0, 1.0), 0.9)


@pytest.fixture
def networks():
    return Body(CASE["densepose"]), Parser(CASE["lip"]), Parser(CASE["atr"])


def test_five_masks_of_one_photo_cost_one_run_of_each_network(networks):
    masks = AutoMasker(*networks).masks(PERSON, list(PARTS))
    assert [network.runs for network in networks] == [1, 1, 1]
    assert list(masks) == list(PARTS)
    for part, mask in masks.items():
        assert np.array_equal(mask, CASE[f"catvton_{part}"])


def test_one_mask_is_that_of_its_type(networks):
    mask = AutoMasker(*networks).mask(PERSON, "lower")
    assert np.array_equal(mask, cloth_agnostic_mask(CASE["densepose"], CASE["lip"], CASE["atr"], "lower"))


def test_a_photo_of_nobody_costs_one_network(networks):
    networks[0].labels = None
    with pytest.raises(PersonNotFound):
        AutoMasker(*networks).mask(PERSON, "upper")
    assert [network.runs for network in networks] == [1, 0, 0]


def test_an_unknown_type_is_refused_before_the_networks_run(networks):
    with pytest.raises(ValueError, match="one of upper, lower, overall, inner, outer"):
        AutoMasker(*networks).masks(PERSON, ["upper", "hat"])
    assert networks[0].runs == 0


def test_memory_that_lacks_is_told_apart(networks):
    import torch

    def fails(_image):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    networks[1].parse = fails
    with pytest.raises(OutOfMemory):
        AutoMasker(*networks).mask(PERSON, "upper")


def test_the_masker_follows_from_the_weights(tmp_path):
    assert choose_masker("embedded") == "embedded"
    assert choose_masker(tmp_path) is None
    (tmp_path / SCHP_SIGN).parent.mkdir(parents=True)
    (tmp_path / SCHP_SIGN).touch()
    assert choose_masker(tmp_path) == "schp"
    assert SCHP_SIGN in {str(twin_of(Path(name))) for name in PUBLISHED}


def test_a_masker_without_its_files_is_refused_by_name(tmp_path):
    with pytest.raises(WeightsError, match="exp-schp"):
        load_masker("schp", MaskerOptions(tmp_path, device="cpu"))


def test_the_files_are_proved_while_they_are_read(tmp_path, monkeypatch):
    asked = []

    def verified(*arguments):
        asked.append(arguments)
        raise WeightsError("changed")

    monkeypatch.setattr(weights, "verified", verified)
    with pytest.raises(WeightsError, match="changed"):
        load_masker("schp", MaskerOptions(tmp_path, device="cpu"))
    assert asked == [(tmp_path, "masker", "schp")]
