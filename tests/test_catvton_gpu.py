"""CatVTON on a CUDA device: what half precision, its kernels and its memory come to. `make gpu` runs these."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from catvton_recipe import build_pipeline, build_scheduler, write_published_layout

from bench.baseline import Baseline, Conditions, stock_unet
from bench.memory import LIMIT_BYTES, peak_of, settled
from bench.sizes import Job, random_modules
from model.catvton.compiling import GRAPHS, INDUCTOR
from model.catvton.engine import load
from model.catvton.knobs import QUALITIES
from model.catvton.pipeline import CatVTONPipeline
from model.catvton.schedule import solver_like, steps_of
from model.interface import EngineOptions, GenerationSettings, TryOnInputs

pytestmark = pytest.mark.gpu

CARD = torch.device("cuda")
SETTINGS = GenerationSettings(steps=4, guidance=2.5, seed=11, width=48, height=64)
GREY_LEVELS = 2.0  # mean difference that rounding in half precision may make of a picture
CALLS = 3  # a graph is captured in the second call of a shape and replayed in the third


def inputs(width: int = 70, height: int = 90) -> TryOnInputs:
    rng = np.random.default_rng(3)
    person, garment = rng.integers(0, 256, (2, height, width, 3), np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[height // 3 : 2 * height // 3] = 255
    return TryOnInputs(person, garment, mask)


def pipeline(dtype: torch.dtype) -> CatVTONPipeline:
    """The tiny pipeline as the engine has it on the card."""
    built = build_pipeline().to(CARD, dtype)
    built.unet.to(memory_format=torch.channels_last)
    built.vae.to(memory_format=torch.channels_last)
    return built


def conditions() -> Conditions:
    drawn = torch.rand(3, 1, 3, 64, 48, generator=torch.Generator().manual_seed(5)).to(CARD)
    return Conditions(drawn[0] * 2 - 1, drawn[1] * 2 - 1, (drawn[2, :, :1] > 0.5).float())


def prepared(built: CatVTONPipeline, quality: str = "exact") -> tuple[Any, ...]:
    """What `denoise` takes: latents, condition, guidance, steps, knobs."""
    shown, knobs = conditions(), QUALITIES[quality]
    condition = built.encode_condition(
        shown.person * (shown.mask < 0.5), shown.garment, shown.mask, guided=SETTINGS.guidance > 1
    )
    generator = torch.Generator().manual_seed(SETTINGS.seed)
    scheduler = solver_like(built.scheduler, knobs.solver, SETTINGS.steps)
    latents = built.prepare_latents(1, SETTINGS.height, SETTINGS.width, generator)
    steps = steps_of(scheduler, latents, generator, eta=1.0)
    return latents, condition, SETTINGS.guidance, steps, knobs


def exact_latents(dtype: torch.dtype) -> torch.Tensor:
    built = pipeline(dtype)
    return built.denoise(*prepared(built))


def plain_latents(dtype: torch.dtype) -> torch.Tensor:
    built = pipeline(dtype)
    plain = Baseline(stock_unet(built.unet), built.vae, build_scheduler())
    return plain.denoise(
        plain.encode(conditions(), guided=True),
        steps=SETTINGS.steps,
        guidance=SETTINGS.guidance,
        generator=torch.Generator().manual_seed(SETTINGS.seed),
    )


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The root of the mean square of the difference, relative to that of what is expected."""
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Whatever makes the host wait for the card raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not see everything that waits
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def whole_float32() -> Iterator[None]:
    """Neither convolutions nor products of matrices round float32 to TF32."""
    convolutions, matrices = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(matrices)


@torch.no_grad()
def test_in_half_precision_the_exact_loop_is_as_near_to_the_truth_as_the_plain_one() -> None:
    with whole_float32():
        truth = plain_latents(torch.float32)
    plain, exact = plain_latents(torch.float16), exact_latents(torch.float16)
    rounding = distance(plain, truth)
    assert 0 < rounding < 2e-2
    assert distance(exact, truth) <= 1.25 * rounding
    assert distance(exact, plain) <= 2 * rounding


@pytest.mark.parametrize("quality", QUALITIES)
@torch.no_grad()
def test_the_loop_never_makes_the_host_wait(quality: str) -> None:
    built = pipeline(torch.float16)
    built.denoise(*prepared(built, quality))  # in which the attention kernels are timed
    arguments = prepared(built, quality)
    with waiting_refused():
        latents = built.denoise(*arguments)
    assert bool(torch.isfinite(latents).all())


@torch.no_grad()
def test_waiting_would_be_noticed() -> None:
    with waiting_refused(), pytest.raises(RuntimeError, match="synchron"):
        torch.ones(1, device=CARD).item()


@pytest.mark.parametrize("quality", QUALITIES)
def test_each_quality_draws_in_half_precision(tmp_path: Path, quality: str) -> None:
    engine = load(EngineOptions(weights=write_published_layout(tmp_path), device=CARD.type, dtype="float16"))
    settings = replace(SETTINGS, quality=quality)
    pictures = [engine.generate(inputs(), settings) for _ in range(2)]
    assert pictures[0].shape == (SETTINGS.height, SETTINGS.width, 3)
    np.testing.assert_array_equal(*pictures)


def test_a_picture_of_the_published_size_takes_at_most_4_5_gb() -> None:
    job = Job("sd15", CARD, torch.float16, height=1024, width=768, steps=2, repeats=1)
    vae, unet = (module.to(memory_format=torch.channels_last) for module in random_modules(job))
    built = CatVTONPipeline(vae, unet, build_scheduler())
    built.set_progress_bar_config(disable=True)
    one = inputs(job.width, job.height)
    before = settled(CARD)
    for _ in range(2):  # the first call has the attention kernels timed
        settled(CARD)
        made: Any = built(
            one.person,
            one.garment,
            one.mask,
            height=job.height,
            width=job.width,
            num_inference_steps=job.steps,
            output_type="pt",
        )
    assert made.images.shape == (1, 3, job.height, job.width)
    assert before is not None
    peak = peak_of((vae, unet), before, CARD)
    assert max(peak.allocated, peak.reserved) <= LIMIT_BYTES


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
@pytest.mark.parametrize("quality", ["exact", "balanced"])
@pytest.mark.parametrize("how", [INDUCTOR, GRAPHS])
def test_a_compiled_engine_draws_the_picture_of_an_eager_one(tmp_path: Path, how: str, quality: str) -> None:
    options = EngineOptions(weights=write_published_layout(tmp_path), device=CARD.type, dtype="float16")
    settings = replace(SETTINGS, quality=quality)
    expected = load(options).generate(inputs(), settings).astype(int)
    compiled = load(replace(options, compilation=how))
    try:
        pictures = [compiled.generate(inputs(), settings) for _ in range(CALLS)]
    finally:
        torch._dynamo.reset()
    for picture in pictures:
        assert np.abs(picture - expected).mean() < GREY_LEVELS
