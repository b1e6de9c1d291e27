"""The arms of a comparison: the plain loop, the pipeline, and its recipes, on the same weights, pictures and noise."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, replace
from functools import lru_cache, partial
from typing import Any, Callable, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch.profiler import profile

from bench.baseline import Baseline, Conditions, stock_unet
from bench.compare import Arm, Draw, Pictures, compare
from bench.counters import TERA, Shapes
from bench.recipes import COMBINED, EXACTLY, FULL_STEPS, GUIDANCE, NAMED, SINGLE, Recipe
from bench.sizes import SIZES, Job, random_modules
from bench.stopwatch import Stopwatch, activities_on
from bench.surroundings import device_name
from bench.verdicts import BASELINE, COMPILED_BASELINE, verdicts
from model.catvton import published
from model.catvton.attention import TryOnUNet
from model.catvton.compiling import GRAPHS, INDUCTOR, compile_unet
from model.catvton.engine import to_picture
from model.catvton.kernels import attend, chosen_kernels
from model.catvton.pipeline import CatVTONPipeline
from model.catvton.schedule import solver_like, steps_of

TIMED = (
    "no guidance",
    "guided share 0.5",
    "person-only unconditional",
    "guided share 0.5, person-only",
    "garment interval 2",
    "deep interval 2",
    "balanced",
    "fast",
)
SEED = 0

Module = TypeVar("Module", bound=torch.nn.Module)


class ChosenAttention:
    """The attention of the pipeline in a stock UNet: queries, keys and values as the stock processor makes them."""

    def __call__(self, attention: Any, hidden_states: torch.Tensor, **_options: object) -> torch.Tensor:  # noqa: ANN401
        """(B, tokens, channels) to the same."""
        batch, tokens, _ = hidden_states.shape
        projected = (projection(hidden_states) for projection in (attention.to_q, attention.to_k, attention.to_v))
        mixed = attend(*(each.view(batch, tokens, attention.heads, -1).transpose(1, 2) for each in projected))
        mixed = attention.to_out[0](mixed.transpose(1, 2).reshape(batch, tokens, -1))
        result: torch.Tensor = mixed / attention.rescale_output_factor
        return result


class CudnnSearch:
    """Lets draws search for the fastest of cuDNN's algorithms, which the service does not.

    They run in a thread of their own, since torch keeps what was chosen by thread, and there takes what it has kept
    whether or not it was searched for.

    Args:
        device: of the draws.
    """

    def __init__(self, device: torch.device) -> None:
        self._thread = ThreadPoolExecutor(1, "cudnn-search")
        with profile(activities=activities_on(device)):  # which complains of being used in another thread first
            pass

    def __call__(self, arm: Arm) -> Arm:
        """The same arm, with the search."""

        def draw(watch: Stopwatch) -> Pictures:
            return self._thread.submit(self._searching, arm.draw, watch).result()

        return replace(arm, draw=draw)

    @staticmethod
    def _searching(draw: Draw, watch: Stopwatch) -> Pictures:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            return draw(watch)
        finally:
            torch.backends.cudnn.benchmark = before


def run(
    job: Job,
    *,
    rounds: int,
    limit_s: float,
    compiled: bool,
    keep: Callable[[dict[str, Any]], object] = lambda _report: None,
) -> dict[str, Any]:
    """Build every arm, compare them, and say where.

    Args:
        job: its `steps` are the baseline's; a recipe with fewer steps takes its share of them.
        rounds: of all arms.
        limit_s: no round but the first begins later, counted from the last warm-up.
        compiled: with the arms that go through `torch.compile`.
        keep: given the report of the rounds so far after each of them.
    """

    def located(figures: dict[str, Any]) -> dict[str, Any]:
        report = {
            "config": job.config,
            "device": job.device.type,
            "device_name": device_name(job.device),
            "dtype": str(job.dtype).replace("torch.", ""),
            "height": job.height,
            "width": job.width,
            "guidance": GUIDANCE,
            **figures,
            "chosen_kernels": chosen_kernels(),
        }
        return {**report, "verdicts": [asdict(verdict) for verdict in verdicts(report)]}

    arms = list(make_arms(job, compiled=compiled))
    figures = compare(arms, job.device, rounds=rounds, limit_s=limit_s, keep=lambda each: keep(located(each)))
    return located(figures)


def make_arms(job: Job, *, compiled: bool) -> Iterator[Arm]:
    """The baseline first, then the exact mode before all that share with it what a first call is for.

    So its first call is the one that times the attention kernels, as the first picture of the service is.
    """
    cuda = job.device.type == "cuda"
    searched: Callable[[Arm], Arm] = CudnnSearch(job.device) if cuda else lambda arm: arm
    vae, unet = random_modules(job)
    served = as_served(vae, job.device), as_served(unet, job.device)
    stock, with_attention = stock_unet(unet), stock_unet(unet, ChosenAttention())
    make = ArmMaker(job)
    yield searched(make.plain(BASELINE, vae, stock))
    if compiled:
        quick: Any = torch.compile(stock)
        yield searched(make.plain(COMPILED_BASELINE, vae, stock, quick))
    yield make.ours(EXACTLY.name, *served, EXACTLY)
    if cuda:
        yield make.plain(f"{BASELINE}, no cuDNN search", vae, stock)
        yield searched(make.ours(f"{EXACTLY.name}, cuDNN search", *served, EXACTLY))
        yield make.ours(f"{EXACTLY.name}, contiguous", vae, unet, EXACTLY)
    for name, how in (("compiled", INDUCTOR), ("graphs", GRAPHS)):
        if compiled and (cuda or how != GRAPHS):
            yield make.ours(f"{EXACTLY.name}, {name}", served[0], compiled_copy(served[1], how), EXACTLY)
    yield searched(make.plain(f"{BASELINE}, our attention", vae, with_attention))
    for recipe in (*SINGLE, *COMBINED, *NAMED):
        if recipe.name in TIMED:
            yield make.ours(recipe.name, *served, recipe)


class ArmMaker:
    """Makes arms that draw the same picture of noise.

    Args:
        job: of the arms.
    """

    def __init__(self, job: Job) -> None:
        self._steps = job.steps
        shapes = Shapes(replace(SIZES[job.config], height=job.height, width=job.width), job.dtype)
        self._tflop = lru_cache(maxsize=None)(lambda recipe, steps: shapes.loop(recipe, steps).flop / TERA)
        self._conditions = random_conditions(job)

    def plain(
        self, name: str, vae: AutoencoderKL, unet: UNet2DConditionModel, called: torch.nn.Module | None = None
    ) -> Arm:
        """The baseline's loop.

        Args:
            name: of the arm.
            vae, unet: whose weights it needs.
            called: in the place of the UNet.
        """
        baseline = Baseline(called or unet, vae, DDIMScheduler(**published.SCHEDULER_CONFIG))

        def draw(watch: Stopwatch) -> Pictures:
            return draw_plainly(baseline, self._conditions, self._steps, watch)

        count_tflop = partial(self._tflop, EXACTLY, self._steps)
        return Arm(name, self._steps, count_tflop, exact=True, modules=(unet, vae), draw=draw)

    def ours(self, name: str, vae: AutoencoderKL, unet: TryOnUNet, recipe: Recipe) -> Arm:
        """The pipeline's loop."""
        pipeline = make_pipeline(vae, unet)
        steps = max(1, round(self._steps * recipe.steps / FULL_STEPS))

        def draw(watch: Stopwatch) -> Pictures:
            return draw_with(pipeline, self._conditions, recipe, steps, watch)

        count_tflop = partial(self._tflop, recipe, steps)
        return Arm(name, steps, count_tflop, exact=recipe == EXACTLY, modules=(unet, vae), draw=draw)


def make_pipeline(vae: AutoencoderKL, unet: TryOnUNet) -> CatVTONPipeline:
    """Without a cache of latents: every call encodes its pictures, as the baseline does."""
    pipeline = CatVTONPipeline(vae, unet, DDIMScheduler(**published.SCHEDULER_CONFIG))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def as_served(module: Module, device: torch.device) -> Module:
    """The module as the engine has it: on CUDA a copy in channels_last, since the baseline's own stays as it is."""
    if device.type != "cuda":
        return module
    copy: Any = deepcopy(module)
    served: Module = copy.to(memory_format=torch.channels_last)
    return served


def compiled_copy(unet: TryOnUNet, how: str) -> TryOnUNet:
    """Another UNet on the same weights, compiled as the engine compiles: "inductor" or "graphs"."""
    with torch.device("meta"):
        copy: TryOnUNet = TryOnUNet.from_config(unet.config)
    copy.load_state_dict(unet.state_dict(), assign=True)
    compile_unet(copy.eval(), how)
    return copy


def random_conditions(job: Job) -> Conditions:
    """A person, a garment and a mask of noise, on the job's device."""
    draw = np.random.default_rng(SEED)
    pictures = draw.uniform(-1, 1, (2, 1, 3, job.height, job.width)).astype(np.float32)
    mask = torch.zeros(1, 1, job.height, job.width)
    mask[:, :, job.height // 4 : job.height // 2] = 1
    person, garment = torch.from_numpy(pictures)
    return Conditions(person.to(job.device), garment.to(job.device), mask.to(job.device))


def draw_plainly(baseline: Baseline, conditions: Conditions, steps: int, watch: Stopwatch) -> Pictures:
    """The baseline's guided picture, (1, H, W, 3) uint8."""
    with watch.whole():
        condition = baseline.encode(conditions, guided=True)
        with watch.loop():
            generator = torch.Generator().manual_seed(SEED)
            latents = baseline.denoise(condition, steps=steps, guidance=GUIDANCE, generator=generator)
        return baseline.decode(latents)


@torch.no_grad()
def draw_with(
    pipeline: CatVTONPipeline, conditions: Conditions, recipe: Recipe, steps: int, watch: Stopwatch
) -> Pictures:
    """The pipeline's picture, stage by stage as its call makes it: (1, H, W, 3) uint8."""
    height, width = conditions.mask.shape[-2:]
    with watch.whole():
        masked = conditions.person * (conditions.mask < 0.5)
        condition = pipeline.encode_condition(masked, conditions.garment, conditions.mask, guided=recipe.guided)
        with watch.loop():
            generator = torch.Generator().manual_seed(SEED)
            scheduler = solver_like(pipeline.scheduler, recipe.knobs.solver, steps)
            latents = pipeline.prepare_latents(1, height, width, generator).mul(scheduler.init_noise_sigma)
            prepared = steps_of(scheduler, latents, generator, eta=1.0)
            latents = pipeline.denoise(latents, condition, recipe.guidance, prepared, recipe.knobs)
        pixels = pipeline.decode(pipeline.unscale(latents[..., : latents.shape[-2] // 2, :]))
        return np.stack([to_picture(each) for each in pixels])
