"""The knobs of the pipeline: at "off" they change nothing, and each does what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from catvton_recipe import build_pipeline
from diffusers import DDIMScheduler, PNDMScheduler
from PIL import Image

from bench.baseline import stock_unet
from model.catvton import published
from model.catvton.inputs import garment_tensor, mask_tensor, person_tensor
from model.catvton.knobs import EXACT, QUALITIES, Knobs
from model.catvton.latent_cache import LatentCache, content_key
from model.catvton.pipeline import CatVTONPipeline
from model.catvton.schedule import LinearSteps, SchedulerSteps, most_steps, solver_like, steps_of

SIZE = {"height": 64, "width": 64}
STEPS = 5


@pytest.fixture(scope="module")
def pipeline() -> CatVTONPipeline:
    return build_pipeline()


def pictures(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    return rng.integers(0, 256, (64, 64, 3), np.uint8), rng.integers(0, 256, (64, 64, 3), np.uint8), mask


def draw(pipeline: CatVTONPipeline, knobs: Knobs = EXACT, **changes: object) -> torch.Tensor:
    options = {**SIZE, "num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 2.5, **changes}
    return pipeline(*pictures(), **options, generator=torch.Generator().manual_seed(3), knobs=knobs).images


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("solver", ["ddim", "dpm++", "unipc"])
def test_a_schedule_has_a_timestep_for_each_of_as_many_steps_as_are_let_through(solver: str, offset: int) -> None:
    scheduler = DDIMScheduler(**{**published.SCHEDULER_CONFIG, "steps_offset": offset})
    most = most_steps(scheduler, solver)
    assert most == 1000 - offset - (solver != "ddim")
    latents = torch.ones(1, 4, 2, 2)
    steps = steps_of(solver_like(scheduler, solver, most), latents, None, eta=0.0)
    assert len(set(steps.timesteps.tolist())) == most
    assert int(steps.timesteps.max()) < scheduler.config.num_train_timesteps
    for index in range(most):
        latents = steps.after(latents, torch.zeros_like(latents), index)
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize(("solver", "most"), [("ddim", 999), ("dpm++", 998), ("unipc", 998)])
def test_more_steps_than_the_schedule_has_room_for_are_refused(
    pipeline: CatVTONPipeline, solver: str, most: int
) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps must be at most {most} with "):
        draw(pipeline, Knobs(solver=solver), num_inference_steps=most + 1)


class Calls:
    """What the UNet was given in each call."""

    def __init__(self, pipeline: CatVTONPipeline) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self._handle = pipeline.unet.register_forward_hook(
            lambda _, inputs, __: self.shapes.append(tuple(inputs[0].shape))
        )

    def __enter__(self) -> list[tuple[int, ...]]:
        return self.shapes

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def test_the_named_qualities_begin_with_the_exact_one() -> None:
    assert list(QUALITIES) == ["exact", "balanced", "fast"]
    assert QUALITIES["exact"] == EXACT == Knobs()


@pytest.mark.parametrize(
    "wrong",
    [
        {"solver": "euler"},
        {"guided_share": 1.5},
        {"guided_share": float("nan")},
        {"garment_interval": 0},
        {"deep_interval": 0},
        {"garment_interval": 2, "deep_interval": 2},
    ],
    ids=str,
)
def test_knobs_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"solver|guided_share|interval"):
        Knobs(**wrong)


@pytest.mark.parametrize(
    ("share", "steps", "guided"), [(0.07, 100, 7), (0.28, 25, 7), (0.5, 5, 3), (0.01, 50, 1), (1, 50, 50)]
)
def test_the_guided_share_is_of_the_steps_in_decimals(share: float, steps: int, guided: int) -> None:
    assert Knobs(guided_share=share).guided_steps(steps) == guided


def test_guidance_on_no_step_is_no_guidance(pipeline: CatVTONPipeline) -> None:
    assert torch.equal(draw(pipeline, Knobs(guided_share=0)), draw(pipeline, guidance_scale=1.0))


def test_guidance_ends_after_its_share_of_the_steps(pipeline: CatVTONPipeline) -> None:
    with Calls(pipeline) as shapes:
        draw(pipeline, Knobs(guided_share=0.5))
    assert [shape[0] for shape in shapes] == [2, 2, 2, 1, 1]


def test_the_unconditional_branch_sees_the_person_alone(pipeline: CatVTONPipeline) -> None:
    with Calls(pipeline) as shapes:
        changed = draw(pipeline, Knobs(person_only_unconditional=True))
    rows = {shape[2] for shape in shapes}
    assert len(rows) == 2
    assert max(rows) == 2 * min(rows)
    assert not torch.allclose(changed, draw(pipeline), atol=1e-3)


def test_the_garments_half_is_computed_in_every_so_many_steps(pipeline: CatVTONPipeline) -> None:
    with Calls(pipeline) as shapes:
        changed = draw(pipeline, Knobs(garment_interval=2))
    whole = shapes[0][2]
    assert [shape[2] * 2 // whole for shape in shapes] == [2, 1, 2, 1, 2]
    exact = draw(pipeline)
    assert not torch.equal(changed, exact)
    assert float((changed - exact).square().mean().sqrt() / exact.std()) < 0.5


def test_the_layers_below_the_last_are_computed_in_every_so_many_steps(pipeline: CatVTONPipeline) -> None:
    computed: list[int] = []
    middle = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].norm1
    hook = middle.register_forward_hook(lambda *_: computed.append(1))
    changed = draw(pipeline, Knobs(deep_interval=2))
    hook.remove()
    assert len(computed) == 3  # of five steps
    exact = draw(pipeline)
    assert 0 < float((changed - exact).square().mean()) < float(exact.square().mean())


def drawn_by_two_forwards(pipeline: CatVTONPipeline, height: int, width: int) -> torch.Tensor:
    """The person's latents by a stock UNet, shown the canvas with the garment and, without one, the person's half."""
    unet, scheduler = stock_unet(pipeline.unet), DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    person, garment, mask = ([Image.fromarray(picture)] for picture in pictures())
    hole = mask_tensor(mask, width, height)
    masked = person_tensor(person, width, height) * (hole < 0.5)
    condition = pipeline.encode_condition(masked, garment_tensor(garment, width, height), hole, guided=True)
    without, shown = condition.chunk(2)
    generator = torch.Generator().manual_seed(3)
    latents = pipeline.prepare_latents(1, height, width, generator)
    rows = latents.shape[-2] // 2
    for timestep in scheduler.timesteps:
        prediction = unet(torch.cat([latents, shown], dim=1), timestep, None).sample
        alone = unet(torch.cat([latents, without], dim=1)[:, :, :rows], timestep, None).sample
        prediction[:, :, :rows] = alone + 2.5 * (prediction[:, :, :rows] - alone)
        latents = scheduler.step(prediction, timestep, latents, eta=1.0, generator=generator).prev_sample
    return pipeline.unscale(latents[:, :, :rows])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (72, 40), (8, 24)])
def test_the_person_alone_is_a_canvas_of_any_height(pipeline: CatVTONPipeline, height: int, width: int) -> None:
    drawn = draw(pipeline, Knobs(person_only_unconditional=True), height=height, width=width)
    with torch.no_grad():
        expected = drawn_by_two_forwards(pipeline, height, width)
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-3)


def odd_height(pipeline: CatVTONPipeline) -> int:
    """Of which the coarsest level has no half."""
    return (2 ** (len(pipeline.unet.up_blocks) - 1) + 1) * pipeline.vae_scale_factor


def test_a_height_without_halves_is_refused_before_a_picture_is_encoded(
    pipeline: CatVTONPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "encode_condition", lambda *_, **__: pytest.fail("encoded"))
    with pytest.raises(ValueError, match="garment_interval above 1 needs a height whose latents can be halved"):
        draw(pipeline, Knobs(garment_interval=2), height=odd_height(pipeline))


def test_a_width_need_not_have_halves(pipeline: CatVTONPipeline) -> None:
    assert torch.isfinite(draw(pipeline, Knobs(garment_interval=2), width=odd_height(pipeline))).all()


def test_one_step_reuses_no_half_and_wants_none(pipeline: CatVTONPipeline) -> None:
    once = {"height": odd_height(pipeline), "num_inference_steps": 1}
    assert torch.equal(draw(pipeline, Knobs(garment_interval=2), **once), draw(pipeline, **once))


@pytest.mark.parametrize("solver", ["dpm++", "unipc"])
def test_few_steps_of_a_solver_are_near_many_of_the_exact_one(pipeline: CatVTONPipeline, solver: str) -> None:
    truth = draw(pipeline, eta=0.0, num_inference_steps=100)
    few = draw(pipeline, Knobs(solver=solver), num_inference_steps=20)
    other = draw(pipeline, eta=0.0, num_inference_steps=5)
    assert float((few - truth).square().mean()) < float((other - truth).square().mean())


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_steps_are_those_of_the_scheduler(prediction_type: str, eta: float) -> None:
    scheduler = DDIMScheduler.from_config(build_pipeline().scheduler.config, prediction_type=prediction_type)
    scheduler.set_timesteps(7)
    latents = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    predictions = torch.randn(7, 2, 4, 8, 6, generator=torch.Generator().manual_seed(1))
    generators = [[torch.Generator().manual_seed(seed) for seed in (5, 6)] for _ in range(2)]
    steps = steps_of(scheduler, latents, generators[0], eta)
    assert isinstance(steps, LinearSteps)
    ours = theirs = latents
    for index, timestep in enumerate(scheduler.timesteps):
        ours = steps.after(ours, predictions[index], index)
        theirs = scheduler.step(predictions[index], timestep, theirs, eta=eta, generator=generators[1]).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [PNDMScheduler, DDIMScheduler], ids=lambda kind: kind.__name__)
def test_any_other_scheduler_steps_by_itself(kind: type) -> None:
    scheduler = kind.from_config(build_pipeline().scheduler.config, **({"clip_sample": True}))
    scheduler.set_timesteps(4)
    assert isinstance(steps_of(scheduler, torch.zeros(1, 4, 8, 6), None, 1.0), SchedulerSteps)


def test_a_picture_that_was_encoded_is_not_encoded_again(pipeline: CatVTONPipeline) -> None:
    pipeline = build_pipeline()
    encoded: list[int] = []
    pipeline.vae.encoder.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
    expected = draw(pipeline)
    pipeline.latent_cache = LatentCache()
    encoded.clear()
    first, second = draw(pipeline), draw(pipeline)
    assert encoded == [1, 1]  # the person and the garment, once
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-3)


def test_the_cache_is_bounded_and_keeps_what_is_used() -> None:
    cache = LatentCache(limit=2)
    for name in (b"a", b"b"):
        cache.keep(name, torch.zeros(1))
    assert cache.recall(b"a") is not None
    cache.keep(b"c", torch.zeros(1))
    assert (len(cache), cache.recall(b"b")) == (2, None)


def test_pictures_have_the_same_key_only_if_they_are_the_same() -> None:
    levels = torch.arange(256).float().reshape(1, 16, 16) / 127.5 - 1
    picture = levels.expand(3, 16, 16)
    assert content_key(picture) == content_key(picture.clone())
    keys = set()
    for level in (*range(256), None):
        changed = picture.clone()
        changed[0, 0, 0] = 0.0 if level is None else level / 127.5 - 1
        keys.add(content_key(changed))
    assert len(keys) == 257
    assert content_key(picture.reshape(3, 8, 32)) != content_key(picture)
