from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from bench.counters import META, Shapes, main
from bench.counting import counting
from bench.recipes import EXACTLY, NAMED, SOLVERS, Recipe, cycle_steps
from bench.sizes import SIZES
from model.catvton.knobs import Knobs
from model.catvton.pipeline import CatVTONPipeline

STEP_TFLOP = {  # of one step at 1024x768, mean over whole cycles of the knobs
    "no guidance": 8.302,
    "guided share 0.75": 14.529,
    "guided share 0.5": 12.453,
    "guided share 0.3": 10.793,
    "person-only unconditional": 11.35,
    "guided share 0.5, person-only": 9.83,
    "garment interval 2": 12.45,
    "garment interval 3": 11.07,
    "garment interval 5": 9.96,
    "garment interval 2, person-only": 9.28,
    "garment interval 3, person-only": 8.58,
    "garment interval 5, person-only": 8.03,
    "deep interval 2": 9.31,
    "deep interval 3": 6.88,
    "deep interval 5": 4.94,
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("counters") / "counters.json"
    done = CliRunner().invoke(main, ["--json", str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())
    assert all(name in done.output for name in found["fast"])
    return found


def test_a_guided_step_of_the_exact_mode_is_16_605_tflop(report):
    assert report["tflop_per_guided_step"] == pytest.approx(16.605, rel=1e-3)


def test_no_parameter_is_kept_that_is_not_used(report):
    assert report["parameters"] == 815_572_804


def test_the_exact_loop_never_reads_from_the_device_and_the_baseline_does(report):
    assert report["host_reads_per_step"] == 0
    assert report["baseline_host_reads_per_step"] == 6


def test_the_exact_step_needs_fewer_operations_and_bytes_than_the_baseline(report):
    assert report["ops_per_step"] <= 560
    assert report["baseline_ops_per_step"] == pytest.approx(668, abs=10)
    assert report["bytes_per_step"] < 29.8e9
    assert report["baseline_bytes_per_step"] == pytest.approx(30.55e9, rel=5e-3)


def test_the_layout_of_cuda_is_counted_beside_the_contiguous_one(report):
    served = report["channels_last"]  # the same in releases of torch whose group norm keeps the layout
    assert report["ops_per_step"] <= served["ops_per_step"] <= 602
    assert report["bytes_per_step"] <= served["bytes_per_step"] < 31.6e9


def test_the_layout_that_is_asked_for_is_that_of_every_weight():
    for layout in (torch.contiguous_format, torch.channels_last):
        shapes = Shapes(SIZES["tiny"], torch.float32, layout)
        for module in (shapes._pipeline.unet, shapes._pipeline.vae):
            weights = [each for each in module.parameters() if each.dim() == 4 and min(each.shape[1:]) > 1]
            assert all(weight.is_contiguous(memory_format=layout) for weight in weights)


def test_the_solvers_alone_take_the_arithmetic_of_an_exact_step_and_a_few_kernels_more(report):
    assert [recipe.name for recipe in SOLVERS] == ["dpm++", "unipc"]
    for recipe, reads in zip(SOLVERS, (0, 1)):  # UniPC solves a system of equations, whose failure torch looks for
        entry = report["fast"][recipe.name]
        assert entry["knobs"] == {**report["fast"]["no guidance"]["knobs"], "solver": recipe.name}
        assert entry["tflop_per_step"] == pytest.approx(report["tflop_per_guided_step"], rel=1e-6)
        assert entry["speedup"] == pytest.approx(1, rel=1e-6)
        assert report["ops_per_step"] < entry["ops_per_step"] < 700
        assert entry["host_reads_per_step"] == reads


@pytest.mark.parametrize("name", STEP_TFLOP)
def test_a_fast_recipe_needs_what_its_arithmetic_says(report, name):
    entry = report["fast"][name]
    assert entry["tflop_per_step"] == pytest.approx(STEP_TFLOP[name], rel=5e-3)
    assert entry["speedup"] == pytest.approx(16.605 / STEP_TFLOP[name], rel=5e-3)


def test_the_qualities_are_counted_as_whole_pictures(report):
    assert report["tflop_per_picture"] == pytest.approx(50 * 16.605 + 2 * 3.556 + 7.750, rel=1e-3)
    for recipe in NAMED:
        entry = report["fast"][recipe.name]
        assert entry["tflop_per_picture"] == pytest.approx(recipe.steps * entry["tflop_per_step"] + 14.862, rel=1e-3)
        assert entry["speedup"] == pytest.approx(report["tflop_per_picture"] / entry["tflop_per_picture"])


def test_the_whole_schedule_of_a_recipe_costs_what_its_cycle_says():
    shapes = Shapes(SIZES["tiny"], torch.float32)
    for knobs in (Knobs(guided_share=0.5, deep_interval=2), Knobs(garment_interval=3, guided_share=0.5)):
        recipe = Recipe("", knobs)
        steps = 4 * cycle_steps(knobs)
        assert shapes.step_flop(recipe) == pytest.approx(shapes.loop(recipe, steps).flop / steps, rel=1e-4)


def test_a_cycle_ends_where_every_knob_began():
    assert cycle_steps(Knobs()) == 1
    assert cycle_steps(Knobs(guided_share=0.75)) == 4
    assert cycle_steps(Knobs(guided_share=0.3, deep_interval=2)) == 20
    assert cycle_steps(Knobs(guided_share=0.5, garment_interval=3)) == 6


def test_the_counter_agrees_with_the_flop_counter_of_torch(monkeypatch):
    shapes = Shapes(SIZES["tiny"], torch.float32)
    own = shapes.loop(EXACTLY, 1).flop
    denoise, counted = CatVTONPipeline.denoise, []

    def watched(*args, **kwargs):
        with FlopCounterMode(display=False) as counter:
            result = denoise(*args, **kwargs)
        counted.append(counter.get_total_flops())
        return result

    monkeypatch.setattr(CatVTONPipeline, "denoise", watched)
    shapes.loop(EXACTLY, 1)
    assert counted == [own]


def test_views_and_allocations_are_no_kernels_and_reads_are_told_apart():
    with counting() as counter:
        first = torch.empty(4, 6).view(6, 4)
        (first.t() @ torch.zeros(6, 5)).sum().item()
    assert (counter.kernels, counter.host_reads) == (3, 1)  # fill, multiply, sum
    assert counter.flop == 2 * 4 * 6 * 5
    assert counter.bytes == 4 * (30 + (24 + 30 + 20) + (20 + 1))


def test_what_the_host_computes_for_itself_is_not_counted_where_one_device_is():
    with counting(META) as counter:
        scale = torch.ones(3).sum()
        scale.item()
        torch.empty(4, 6, device=META).mul(scale)
    assert (counter.kernels, counter.host_reads, counter.flop) == (1, 0, 0)
    assert counter.bytes == 4 * (24 + 1 + 24)
