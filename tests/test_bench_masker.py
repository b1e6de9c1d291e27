from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bench import masker as bench
from model.maskers.auto import AutoMasker


class OneLabel:
    def __init__(self, label):
        self.label = label

    def parse(self, picture):
        return np.full(picture.shape[:2], self.label, np.uint8)

    labels = parse


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bench, "_random", lambda _device, _dtype: AutoMasker(OneLabel(1), OneLabel(5), OneLabel(4)))


def test_every_stage_is_printed_and_written(quick, tmp_path):
    done = CliRunner().invoke(bench.main, ["--device", "cpu", "--repeats", "1", "--json", str(tmp_path / "m.json")])
    assert done.exit_code == 0, done.output
    stages = ("DensePose", "SCHP LIP", "SCHP ATR", "five masks", "all")
    assert all(stage in done.output for stage in stages)
    figures = json.loads((tmp_path / "m.json").read_text())
    assert {f"{stage}_s" for stage in stages} <= set(figures)
    assert (figures["width"], figures["height"], figures["weights"]) == (768, 1024, "random")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--device", "cuda"], "no CUDA device is present"),
        (["--device", "cpu", "--weights", "nowhere"], "nowhere"),
        (["--device", "cpu", "--photo", __file__], "cannot identify image file"),
    ],
)
def test_what_cannot_be_masked_is_a_usage_error(quick, monkeypatch, options, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(bench.main, options)
    assert (done.exit_code, type(done.exception)) == (2, SystemExit)
    assert text in done.output
