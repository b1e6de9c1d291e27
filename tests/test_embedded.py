from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from model import embedded, geometry
from model.embedded import WORK_SIZE_WH, demo_pictures, load_pipeline
from model.interface import GenerationSettings, TryOnInputs

# diffusers decorates functions with autocast("cuda") at import, which torch 2.7 answers with this on a CPU.
pytestmark = pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning")


@pytest.fixture(scope="module")
def pipeline():
    """Loaded once; on one thread, since two that wait for each other on a busy machine take 20 times as long."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loaded = load_pipeline()
    loaded.set_progress_bar_config(disable=True)
    yield loaded
    torch.set_num_threads(threads)


def picture(pipeline, seed, steps=3):
    import torch

    pictures = demo_pictures(size_wh=WORK_SIZE_WH)
    garment = geometry.join_garments(pictures["upper"], pictures["lower"])
    (image,) = pipeline(
        pictures["person"],
        garment,
        pictures["mask"],
        width=WORK_SIZE_WH[0],
        height=WORK_SIZE_WH[1],
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return image


def test_the_package_is_imported_without_torch() -> None:
    code = "import sys, model.embedded; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_model_fits_into_a_repository() -> None:
    total = sum(path.stat().st_size for path in embedded.WEIGHTS_DIR.rglob("*.safetensors"))
    assert total < 24e6


def test_the_pipeline_takes_channels_factor_and_prediction_from_its_parts(pipeline) -> None:
    latent_channels = pipeline.vae.config.latent_channels
    assert pipeline.unet.config.in_channels == 2 * latent_channels + 1
    assert not any(side % pipeline.vae_scale_factor for side in WORK_SIZE_WH)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert {weight.device.type for weight in pipeline.unet.parameters()} == {"cpu"}


def test_the_scheduler_is_the_published_one(pipeline) -> None:
    scheduler = pipeline.scheduler.config
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    assert (scheduler.beta_start, scheduler.beta_end, scheduler.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert (scheduler.num_train_timesteps, scheduler.steps_offset, scheduler.timestep_spacing) == (1000, 1, "leading")
    assert (scheduler.clip_sample, scheduler.set_alpha_to_one) == (False, False)


def test_a_picture_is_finite_varied_and_follows_the_seed(pipeline) -> None:
    first, again, other = picture(pipeline, 1), picture(pipeline, 1), picture(pipeline, 2)
    assert first.shape == (WORK_SIZE_WH[1], WORK_SIZE_WH[0], 3)
    assert np.isfinite(first).all()
    assert first.std() > 0.05
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("size_wh", "most"), [((768, 1024), 4), ((512, 512), 4), ((1024, 512), 4), ((320, 1024), 7)])
def test_outside_the_mask_the_person_stays_in_place_at_every_size(pipeline, size_wh, most) -> None:
    """The narrow one enlarges the most, and so loses the most of its edges."""
    from model.catvton.engine import CatVTONEngine

    pictures = demo_pictures()
    garment = geometry.join_garments(pictures["upper"], pictures["lower"])
    person, mask = (
        np.asarray(geometry.crop_resize(Image.fromarray(pictures[name]), *size_wh)) for name in ("person", "mask")
    )
    inputs = TryOnInputs(person, np.asarray(geometry.fit_pad(Image.fromarray(garment), *size_wh)), mask)
    settings = GenerationSettings(steps=3, guidance=1.0, seed=1, width=size_wh[0], height=size_wh[1])
    engine = CatVTONEngine(pipeline, "catvton/embedded", work_size_wh=WORK_SIZE_WH)
    drawn = engine.generate(inputs, settings)
    assert np.abs(drawn.astype(int) - person)[mask < 128].mean() < most


def test_loading_leaves_torchs_global_generator_alone() -> None:
    import torch

    before = torch.random.get_rng_state()
    load_pipeline()
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_demo_pictures_fit_each_other() -> None:
    pictures = demo_pictures()
    assert list(pictures) == ["person", "upper", "lower", "dress", "mask"]
    assert pictures["person"].shape == (1024, 768, 3)
    assert pictures["mask"].shape == (1024, 768)
    assert set(np.unique(pictures["mask"])) == {0, 255}
    joined = geometry.join_garments(pictures["upper"], pictures["lower"])
    assert joined.shape == pictures["person"].shape


def test_the_demo_pictures_follow_size_and_seed() -> None:
    small = demo_pictures(size_wh=(96, 128))
    assert small["person"].shape == (128, 96, 3)
    assert small["upper"].shape == small["lower"].shape == (64, 96, 3)
    assert not np.array_equal(small["person"], demo_pictures(size_wh=(96, 128), seed=1_000_001)["person"])
    assert embedded.DEMO_SEED >= 1_000_000
