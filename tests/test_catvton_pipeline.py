from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from catvton_recipe import GOLDENS, build_pipeline, build_scheduler, build_unet, build_vae, write_published_layout
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from PIL import Image

from model.catvton.attention import SkippedAttention
from model.catvton.pipeline import CatVTONPipeline

CASES = sorted(path.stem for path in GOLDENS.glob("*.npz"))
SIZE = {"height": 64, "width": 48}
QUICK = {**SIZE, "num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture(scope="module")
def pipeline() -> CatVTONPipeline:
    return build_pipeline()


def pictures(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A person and a mask of 80x60, a garment of 50x70: HWC uint8 and HW uint8."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((80, 60), np.uint8)
    mask[20:60, 15:45] = 255
    return rng.integers(0, 256, (80, 60, 3), np.uint8), rng.integers(0, 256, (50, 70, 3), np.uint8), mask


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def draw(pipeline: CatVTONPipeline, seed: int = 5, **changes: object) -> torch.Tensor:
    return pipeline(*pictures(), **{**QUICK, "generator": seeded(seed), **changes}).images


@dataclass(frozen=True)
class Golden:
    """One case of the goldens, and what this pipeline made of it."""

    expected: dict[str, np.ndarray]
    drawn: dict[str, np.ndarray]
    unet_calls: int
    steps: int
    tolerance: float


@pytest.fixture(scope="module", params=CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    case = json.loads((GOLDENS / f"{request.param}.json").read_text())
    arrays = dict(np.load(GOLDENS / f"{request.param}.npz"))
    pipeline, calls = build_pipeline(case["config"], case["salt"]), []
    pipeline.unet.register_forward_hook(lambda _, inputs, outputs: calls.append((inputs[0], outputs[0])))
    latent = pipeline(
        *([arrays[f"{kind}_{index}"] for index in range(case["batch"])] for kind in ("person", "garment", "mask")),
        height=case["height"],
        width=case["width"],
        num_inference_steps=case["steps"],
        guidance_scale=case["guidance"],
        generator=seeded(case["seed"]),
        output_type="latent",
    ).images
    with torch.no_grad():
        images = pipeline.convert(pipeline.decode(latent), "pil")
    drawn = {
        "first_unet_input": calls[0][0].numpy(),
        "first_noise_pred": calls[0][1].numpy(),
        "final_latent": latent.numpy(),
        "image": np.stack([np.asarray(image) for image in images]),
    }
    tolerance = 5e-2 if request.param == "wide_input" else 1e-3  # Pillow resizes wide pictures a grey level apart
    return Golden(arrays, drawn, len(calls), case["steps"], tolerance)


def test_the_goldens_are_all_there() -> None:
    assert CASES == ["batch2_cfg", "single_cfg", "single_nocfg", "wide_input"]


@pytest.mark.parametrize("name", ["first_unet_input", "first_noise_pred", "final_latent"])
def test_a_tensor_is_the_references(golden: Golden, name: str) -> None:
    np.testing.assert_allclose(golden.drawn[name], golden.expected[name], rtol=0, atol=golden.tolerance)


def test_the_picture_is_the_references_within_two_levels(golden: Golden) -> None:
    drawn, expected = golden.drawn["image"], golden.expected["image"]
    assert drawn.shape == expected.shape
    assert np.abs(drawn.astype(int) - expected).max() <= 2


def test_the_unet_is_called_once_per_step(golden: Golden) -> None:
    assert golden.unet_calls == golden.steps


def test_the_timesteps_are_the_references() -> None:
    case = json.loads((GOLDENS / "single_cfg.json").read_text())
    scheduler = build_scheduler()
    scheduler.set_timesteps(case["steps"])
    assert scheduler.timesteps.tolist() == case["timesteps"]


def test_the_same_seed_draws_the_same_picture_and_another_seed_another(pipeline: CatVTONPipeline) -> None:
    first = draw(pipeline)
    assert torch.equal(first, draw(pipeline))
    assert not torch.allclose(first, draw(pipeline, seed=6))


def test_a_picture_with_its_own_generator_does_not_depend_on_its_neighbours(pipeline: CatVTONPipeline) -> None:
    batch = [list(each) for each in zip(pictures(0), pictures(1))]
    together = pipeline(*batch, **QUICK, generator=[seeded(5), seeded(6)]).images
    for index in (0, 1):
        alone = pipeline(*pictures(index), **QUICK, generator=seeded(5 + index)).images
        torch.testing.assert_close(together[index], alone[0], rtol=0, atol=1e-5)


def test_a_list_of_one_generator_is_that_generator(pipeline: CatVTONPipeline) -> None:
    assert torch.equal(draw(pipeline), draw(pipeline, generator=[seeded()]))


def test_one_generator_serves_a_whole_batch(pipeline: CatVTONPipeline) -> None:
    batch = [[each, each] for each in pictures()]
    first, second = pipeline(*batch, **QUICK, generator=seeded()).images
    assert not torch.allclose(first, second)


def test_pillow_images_and_arrays_are_the_same_input(pipeline: CatVTONPipeline) -> None:
    as_images = pipeline(*map(Image.fromarray, pictures()), **QUICK, generator=seeded()).images
    assert torch.equal(as_images, draw(pipeline))


def test_a_mask_in_rgb_is_the_same_as_in_grey(pipeline: CatVTONPipeline) -> None:
    person, garment, mask = pictures()
    in_rgb = pipeline(person, garment, np.stack([mask] * 3, axis=-1), **QUICK, generator=seeded()).images
    assert torch.equal(in_rgb, draw(pipeline))


def test_what_lies_under_the_mask_does_not_matter(pipeline: CatVTONPipeline) -> None:
    person, garment, mask = pictures()
    person, mask = person[:64, :48].copy(), mask[:64, :48]  # at the drawn size, so that resizing mixes no pixels
    painted = np.where(mask[..., None] > 0, 255 - person, person)
    drawn = [pipeline(each, garment, mask, **QUICK, generator=seeded()).images for each in (person, painted)]
    assert torch.equal(*drawn)


def test_guidance_of_one_runs_a_single_branch() -> None:
    pipeline, batches = build_pipeline(), []
    pipeline.unet.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    draw(pipeline, guidance_scale=1.0)
    draw(pipeline, guidance_scale=1.1)
    assert batches == [1, 1, 2, 2]


def test_eta_zero_takes_fresh_noise_only_once(pipeline: CatVTONPipeline) -> None:
    generator = seeded()
    draw(pipeline, eta=0.0, generator=generator)
    once = seeded()
    torch.randn(1, 4, 16, 6, generator=once)
    assert torch.equal(generator.get_state(), once.get_state())


def test_output_types_are_one_picture_in_four_forms(pipeline: CatVTONPipeline) -> None:
    as_tensor = draw(pipeline)
    as_array = draw(pipeline, output_type="np")
    (as_image,) = draw(pipeline, output_type="pil")
    latent = draw(pipeline, output_type="latent")
    assert as_tensor.shape == (1, 3, 64, 48)
    assert as_tensor.min() >= 0
    assert as_tensor.max() <= 1
    assert as_array.dtype == np.float32
    np.testing.assert_array_equal(as_array, as_tensor.permute(0, 2, 3, 1).numpy())
    assert as_image.size == (48, 64)
    np.testing.assert_array_equal(np.asarray(as_image), (as_array[0] * 255).round().astype(np.uint8))
    assert latent.shape == (1, 4, 8, 6)
    with torch.no_grad():
        assert torch.equal(pipeline.decode(latent), as_tensor)


def test_return_dict_false_gives_a_tuple(pipeline: CatVTONPipeline) -> None:
    images, flags = pipeline(*pictures(), **QUICK, generator=seeded(), return_dict=False)
    assert torch.equal(images, draw(pipeline))
    assert flags is None


def test_the_callback_sees_every_step_and_may_replace_the_latents(pipeline: CatVTONPipeline) -> None:
    seen = []

    def blank(caller: object, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        seen.append((caller is pipeline, step, int(timestep), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latent = draw(pipeline, output_type="latent", callback_on_step_end=blank)
    assert seen == [(True, 0, 501, (1, 4, 16, 6)), (True, 1, 1, (1, 4, 16, 6))]
    assert not latent.any()


def test_a_callback_that_answers_nothing_changes_nothing(pipeline: CatVTONPipeline) -> None:
    assert torch.equal(draw(pipeline, callback_on_step_end=lambda *_: {}), draw(pipeline))


def test_vae_tiling_can_be_switched_on_and_off(pipeline: CatVTONPipeline) -> None:
    whole = draw(pipeline, height=128, width=96)
    pipeline.enable_vae_tiling()
    tiled = draw(pipeline, height=128, width=96)
    pipeline.disable_vae_tiling()
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    assert torch.equal(draw(pipeline, height=128, width=96), whole)


def test_model_offload_changes_no_pixel(pipeline: CatVTONPipeline) -> None:
    offloaded = build_pipeline()
    offloaded.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(offloaded), draw(pipeline))


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), PNDMScheduler(skip_prk_steps=True)])
def test_a_scheduler_whose_step_takes_no_eta_works(scheduler: object) -> None:
    pipeline = CatVTONPipeline(build_vae(), build_unet(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    assert torch.isfinite(draw(pipeline)).all()


def test_a_model_with_six_latent_channels_and_v_prediction_runs() -> None:
    shared = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
    vae = AutoencoderKL(
        latent_channels=6,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        shift_factor=0.1,
        scaling_factor=0.5,
        **shared,
    )
    unet = UNet2DConditionModel(
        in_channels=13,
        out_channels=6,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        cross_attention_dim=8,
        attention_head_dim=4,
        **shared,
    )
    pipeline = CatVTONPipeline(vae, unet, DDIMScheduler(prediction_type="v_prediction", clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    latent = draw(pipeline, output_type="latent")
    assert latent.shape == (1, 6, 32, 24)  # this VAE halves the size
    assert torch.isfinite(draw(pipeline)).all()


def test_half_precision_draws_nearly_the_same_picture() -> None:
    whole = draw(build_pipeline())
    half = draw(build_pipeline().to(torch.bfloat16))
    assert half.dtype == torch.float32
    assert (half - whole).abs().mean() < 0.05


def test_a_flagged_picture_is_black_and_the_other_is_not() -> None:
    pipeline = build_pipeline()
    pipeline.register_modules(safety_checker=FlagsTheFirst(), feature_extractor=ShowsMeans())
    batch = [[each, each] for each in pictures()]
    output = pipeline(*batch, **QUICK, generator=seeded())
    assert output.nsfw_detected == [True, False]
    assert not output.images[0].any()
    assert output.images[1].any()


class FlagsTheFirst(torch.nn.Module):
    """A safety checker with the signature of Stable Diffusion's."""

    device = torch.device("cpu")
    dtype = torch.float32

    def forward(self, images: torch.Tensor, clip_input: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
        assert len(clip_input) == len(images)
        images[0] = 0
        return images, [True, False]


class ShowsMeans:
    """A feature extractor that keeps one number per picture."""

    def __call__(self, images: list[Image.Image], return_tensors: str) -> ShowsMeans:
        assert return_tensors == "pt"
        self.pixel_values = torch.tensor([np.asarray(image).mean() for image in images])
        return self


def test_a_saved_pipeline_comes_back_bit_equal_in_a_fresh_process(tmp_path: Path) -> None:
    pipeline = build_pipeline()
    pipeline.save_pretrained(tmp_path / "saved")
    np.savez(tmp_path / "pictures.npz", *pictures())
    program = f"""
import numpy, torch
from model.catvton.pipeline import CatVTONPipeline
pipeline = CatVTONPipeline.from_pretrained({str(tmp_path / "saved")!r})
images = numpy.load({str(tmp_path / "pictures.npz")!r}).values()
generator = torch.Generator("cpu").manual_seed(5)
drawn = pipeline(*images, **{QUICK!r}, generator=generator).images
numpy.save({str(tmp_path / "drawn.npy")!r}, drawn.numpy())
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "newly initialized" not in done.stderr
    assert "were not used" not in done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "drawn.npy"), draw(pipeline).numpy())


def test_the_published_files_make_the_pipeline_of_the_goldens(tmp_path: Path, pipeline: CatVTONPipeline) -> None:
    published = CatVTONPipeline.from_published(write_published_layout(tmp_path))
    published.set_progress_bar_config(disable=True)
    assert torch.equal(draw(published), draw(pipeline))


def test_a_skipped_cross_attention_still_adds_the_second_norm() -> None:
    block = next(module for module in build_pipeline().unet.modules() if hasattr(module, "attn2"))
    assert isinstance(block.attn2, SkippedAttention)
    hidden = torch.randn(2, 5, block.dim, generator=seeded())
    with torch.no_grad():
        after_self = hidden + block.attn1(block.norm1(hidden))
        after_cross = after_self + block.norm2(after_self)
        expected = after_cross + block.ff(block.norm3(after_cross))
        torch.testing.assert_close(block(hidden), expected)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"height": 60}, "height must be a positive multiple of 8"),
        ({"width": 0}, "width must be a positive multiple of 8"),
        ({"width": 48.0}, "width must be a positive multiple of 8"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number"),
        ({"guidance_scale": "2.5"}, "guidance_scale must be a number"),
        ({"eta": -0.1}, "eta must be a number of at least 0"),
        ({"output_type": "tensor"}, "output_type must be one of pil, np, pt, latent"),
        ({"generator": 42}, "generator must be"),
        ({"generator": []}, "0 generators were given for 1 pictures"),
        ({"generator": [seeded(), seeded()]}, "2 generators were given for 1 pictures"),
        ({"person_image": []}, "person_image is an empty list"),
        ({"person_image": "person.jpg"}, "person_image must be a Pillow image"),
        ({"person_image": [None]}, "person_image holds"),
        ({"person_image": np.zeros((80, 60, 3), np.float32)}, "person_image must be HWC uint8"),
        ({"person_image": np.zeros((80, 60, 4), np.uint8)}, "person_image must be HWC uint8"),
        ({"garment_image": np.zeros((0, 60, 3), np.uint8)}, "garment_image must be HWC uint8"),
        ({"garment_image": [np.zeros((8, 8, 3), np.uint8)] * 2}, "1 people, 2 garments and 1 masks"),
        ({"mask_image": np.zeros((60, 80), np.uint8)}, "mask_image is"),
    ],
)
def test_a_wrong_argument_is_refused_with_a_sentence(pipeline: CatVTONPipeline, changes: dict, text: str) -> None:
    images = dict(zip(("person_image", "garment_image", "mask_image"), pictures()))
    with pytest.raises(ValueError, match=text):
        pipeline(**{**images, **QUICK, "generator": seeded(), **changes})


def test_components_that_do_not_fit_are_refused() -> None:
    config = dict(build_unet().config)
    with pytest.raises(ValueError, match="the unet takes 4 channels, the vae needs 9"):
        CatVTONPipeline(build_vae(), UNet2DConditionModel.from_config({**config, "in_channels": 4}), build_scheduler())
    with pytest.raises(ValueError, match="needs a feature_extractor"):
        CatVTONPipeline(build_vae(), build_unet(), build_scheduler(), FlagsTheFirst())
