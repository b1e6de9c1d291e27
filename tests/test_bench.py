from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMScheduler

from bench import arms, pipeline
from bench.pipeline import Job, build_pipeline, main, step_flops
from bench.recipes import MOST_STEPS
from bench.sizes import random_modules
from model.catvton import published
from model.catvton.schedule import most_steps

ROOT = Path(__file__).parents[1]


def test_the_tiny_bench_prints_and_writes_what_it_measured(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    arguments = ["--config", "tiny", "--device", "cpu", "--steps", "2", "--repeats", "2", "--json", str(path)]
    command = [sys.executable, "-m", "bench.pipeline", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "medians of 2 runs of 2 guided steps" in done.stdout
    report = json.loads(path.read_text())
    assert (report["config"], report["device"], report["dtype"]) == ("tiny", "cpu", "float32")
    assert (report["height"], report["width"], report["steps"], report["repeats"]) == (128, 96, 2, 2)
    for stage in ("encode_s", "denoise_step_s", "decode_s", "rest_s"):
        assert 0 < report[stage] < 60
    assert report["achieved_tflop_per_s"] == pytest.approx(report["step_tflop"] / report["denoise_step_s"])
    assert report["peak_memory_kind"] == "process_rss"
    assert report["peak_memory_bytes"] > 2**20
    assert set(report["versions"]) == {"python", "torch", "diffusers"}


def test_a_guided_step_of_the_published_model_is_16_6_tflop() -> None:
    job = Job("sd15", torch.device("cpu"), torch.float32, height=1024, width=768, steps=1, repeats=1)
    assert step_flops(job) / 1e12 == pytest.approx(16.605, abs=0.001)


def test_cuda_where_there_is_none_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(main, ["--config", "tiny", "--device", "cuda"])
    assert done.exit_code == 2
    assert "no CUDA device is present" in done.output


@pytest.mark.parametrize("comparing", [[], ["--compare"]])
@pytest.mark.parametrize(
    ("option", "text"),
    [
        (["--height", "100"], "100 is not a multiple of 8"),
        (["--width", "12"], "12 is not a multiple of 8"),
        (["--steps", "1000"], "not in the range 1<=x<=999"),
    ],
)
def test_what_no_arm_could_draw_is_a_usage_error_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, comparing: list[str], option: list[str], text: str
) -> None:
    for module in (arms, pipeline):
        monkeypatch.setattr(module, "random_modules", lambda _job: pytest.fail("built"))
    done = CliRunner().invoke(main, ["--config", "tiny", "--device", "cpu", *comparing, *option])
    assert done.exit_code == 2
    assert text in done.output


def test_the_most_steps_are_those_of_the_published_schedule() -> None:
    scheduler = DDIMScheduler(**published.SCHEDULER_CONFIG)
    assert most_steps(scheduler, "ddim") == MOST_STEPS
    scheduler.set_timesteps(MOST_STEPS)
    assert int(scheduler.timesteps[0]) < len(scheduler.alphas_cumprod)


def test_on_cuda_the_modules_are_laid_out_as_served(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = Job("tiny", torch.device("cpu"), torch.float32, height=64, width=48, steps=1, repeats=1)
    monkeypatch.setattr(pipeline, "random_modules", lambda _job: random_modules(on_cpu))
    for device, is_served in (("cuda", True), ("cpu", False)):
        built = build_pipeline(replace(on_cpu, device=torch.device(device)))
        for weight in (built.unet.conv_in.weight, built.vae.encoder.conv_in.weight):
            assert weight.is_contiguous() is not is_served
            assert weight.is_contiguous(memory_format=torch.channels_last) is is_served


@pytest.mark.parametrize(("measured", "tested", "status"), [(0, 0, 0), (1, 0, 2), (0, 1, 2), (1, 1, 2)])
def test_gpu_tests_that_fail_cost_no_measurement_but_the_status(
    tmp_path: Path, measured: int, tested: int, status: int
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$2" >>{tmp_path}/ran\ntest "$2" = pytest && exit {tested}\nexit {measured}\n')
    python.chmod(0o755)
    command = ["make", "--assume-old=.venv/installed", "--assume-old=install", "gpu", f"PYTHON={python}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (tmp_path / "ran").read_text().split() == ["bench.pipeline", "pytest"], done.stderr
    assert done.returncode == status
