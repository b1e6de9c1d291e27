from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bench import drift
from bench.cases import draw_cases
from bench.drift import Trial, best, departure, draw, main, markdown, trials
from bench.recipes import COMBINED, EXACTLY, NAMED, SINGLE, Recipe
from bench.record import DRIFT, HERE, held
from model.catvton.knobs import EXACT, Knobs
from model.embedded import load_pipeline
from model.embedded.figures import TEST_SEEDS

FEW = 3  # steps


@pytest.fixture(scope="module")
def cases():
    return draw_cases(2, TEST_SEEDS[100])


@pytest.fixture(scope="module")
def pipeline():
    loaded = load_pipeline()
    loaded.set_progress_bar_config(disable=True)
    return loaded


def few(knobs=EXACT, **settings):
    return Recipe("few", knobs, steps=FEW, **settings)


def test_every_recipe_is_tried_in_the_service_and_every_solver_without_noise():
    tried = {(trial.recipe.name, trial.eta) for trial in trials()}
    assert len(tried) == len(trials())
    assert {(recipe.name, drift.FRESH) for recipe in (*SINGLE, *COMBINED, *NAMED)} <= tried
    assert {(f"{solver}, 20 steps", drift.DETERMINISTIC) for solver in ("ddim", "dpm++", "unipc")} <= tried
    for recipe in NAMED:
        assert (f"{recipe.name}, no fresh noise", drift.DETERMINISTIC) in tried


def test_with_every_knob_off_nothing_departs(pipeline, cases):
    exact, seconds = draw(pipeline, cases, few(), 1.0, batch=2)
    alone, _ = draw(pipeline, cases, few(Knobs()), 1.0, batch=1)
    assert seconds > 0
    assert exact[0].shape == (256, 192, 3)
    same = departure(exact, exact, cases)
    assert (same["psnr_db"], same["psnr_least_db"], same["psnr_in_mask_db"], same["ciede2000"]) == (100, 100, 100, 0)
    assert same["ssim"] == same["ssim_in_mask"] == pytest.approx(1)
    assert departure(alone, exact, cases)["psnr_least_db"] > 50  # a batch may round otherwise


def test_a_turned_knob_departs_and_guidance_off_departs_further(pipeline, cases):
    exact, _ = draw(pipeline, cases, few(), 0.0, batch=2)
    shared, _ = draw(pipeline, cases, few(Knobs(guided_share=0.6)), 0.0, batch=2)
    without, _ = draw(pipeline, cases, few(guided=False), 0.0, batch=2)
    near, far = departure(shared, exact, cases), departure(without, exact, cases)
    assert 100 > near["psnr_db"] > far["psnr_db"] > 10
    assert far["psnr_in_mask_db"] < far["psnr_db"]
    assert near["ssim_in_mask"] > far["ssim_in_mask"]
    assert 0 <= near["ciede2000"] < far["ciede2000"]


def test_a_picture_is_drawn_with_the_knobs_steps_and_noise_that_were_asked_for(cases):
    asked = []

    def fake(people, _garments, _masks, **settings):
        asked.append((len(people), settings))
        return SimpleNamespace(images=np.zeros((len(people), 256, 192, 3), np.float32))

    fake.device = torch.device("cpu")
    knobs = Knobs(deep_interval=2)
    made, _ = draw(fake, cases, Recipe("", knobs, guided=False, steps=7), 0.5, batch=1)
    assert len(made) == 2
    assert [count for count, _ in asked] == [1, 1]
    settings = asked[1][1]
    assert (settings["knobs"], settings["num_inference_steps"], settings["eta"]) == (knobs, 7, 0.5)
    assert settings["guidance_scale"] == 1
    assert settings["generator"][0].initial_seed() == 1


def test_the_operations_are_of_whole_pictures(monkeypatch):
    shapes = SimpleNamespace(
        autoencoder=lambda: SimpleNamespace(flop=100), step_flop=lambda recipe: 10 if recipe.knobs == EXACT else 5
    )
    monkeypatch.setattr(drift, "Shapes", lambda: shapes)
    speedups = drift.Speedups()
    assert speedups.of(EXACTLY) == 1
    assert speedups.of(Recipe("", Knobs(deep_interval=2), steps=20)) == pytest.approx(600 / 200)
    assert speedups.of(Recipe("", Knobs(solver="unipc"), steps=10)) == pytest.approx(600 / 200)


def entry(name, psnr_db, speedup, eta=1.0):
    return {"name": name, "psnr_db": psnr_db, "speedup": speedup, "eta": eta}


def test_the_best_is_the_nearest_that_saves_enough():
    entries = [
        entry("a", 36, 1.8),
        entry("b", 40, 1.7),
        entry("c", 60, 1.5),
        entry("d", 30, 4),
        entry("e", 50, 2, eta=0.0),
    ]
    assert "`b`" in best({"recipes": entries})
    assert "No recipe" in best({"recipes": entries[2:]})


def test_the_command_prints_a_table_writes_it_and_says_what_was_not_measured(tmp_path, monkeypatch):
    shutil.copy(HERE / "README.md", tmp_path)
    monkeypatch.setattr(drift, "HERE", tmp_path)
    monkeypatch.setattr(drift, "trials", lambda: [Trial(few(Knobs(solver="dpm++")), 0.0), Trial(few(), 1.0)])
    path = tmp_path / "drift.json"
    options = ["--pairs", "1", "--exact-steps", "4", "--json", str(path), "--readme"]
    done = CliRunner().invoke(main, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads(path.read_text())
    assert held(tmp_path / "README.md", DRIFT) == markdown(report)
    assert markdown(report) in done.output
    assert "Not measured on the published weights." in done.output
    assert [found["steps"] for found in report["recipes"]] == [FEW, FEW]
    assert report["exact_steps"] == 4
    solver, noisy = report["recipes"]
    assert (solver["eta"], noisy["eta"]) == (0, 1)
    assert solver["speedup"] == pytest.approx(noisy["speedup"]) == pytest.approx(845 / (3 * 16.6 + 14.9), rel=0.01)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--only", "magic"], "unknown recipes: magic"),
        (["--pairs", "1", "--weights", "nowhere"], "nowhere"),
        (["--exact-steps", "1000"], "1<=x<=999"),
    ],
)
def test_what_cannot_be_judged_is_a_usage_error(options, text):
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 2
    assert text in done.output


def test_the_readme_says_which_solver_the_kept_figures_favour():
    kept = json.loads((HERE / "results" / "embedded-drift.json").read_text())
    psnr_db = {found["name"]: found["psnr_db"] for found in kept["recipes"]}
    for steps in drift.SOLVER_STEPS:
        solvers = [f"{solver}, {steps} steps" for solver in ("ddim", "dpm++", "unipc")]
        assert max(solvers, key=psnr_db.get) == solvers[0]
    told = "({:.1f} dB against {:.1f} and {:.1f} at 20)".format(
        *(psnr_db[f"{solver}, 20 steps"] for solver in ("ddim", "dpm++", "unipc"))
    )
    assert told in " ".join((HERE / "README.md").read_text().split())


def test_the_readme_shows_the_drift_that_is_kept():
    kept = json.loads((HERE / "results" / "embedded-drift.json").read_text())
    assert held(HERE / "README.md", DRIFT) == markdown(kept)
