from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from model.embedded import autoencoder
from model.embedded.figures import TEST_SEEDS, TRAIN_SEEDS
from model.embedded.projection import FACTOR, LATENT_CHANNELS, encode, fit, fold, views
from model.training_options import TrainingError

# diffusers decorates functions with autocast("cuda") at import, which torch 2.7 answers with this on a CPU.
pytestmark = pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning")

STEPS = 4


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads that wait for each other on a busy machine take 20 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stages():
    return fit(TRAIN_SEEDS[:16])


@pytest.fixture(scope="module")
def vae(stages):
    return autoencoder.build(stages, seed=0, inverse_seeds=TRAIN_SEEDS[:5])


@pytest.fixture(scope="module")
def pictures():
    return np.concatenate([views(seed) for seed in TEST_SEEDS[:2]])


@pytest.fixture(scope="module")
def begun(vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def often():
    """A check and a checkpoint every two steps, on few pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder, "_EVERY", 2)
        patch.setattr(autoencoder, "_BATCH", 2)
        patch.setattr(autoencoder, "CHECK_SEEDS", TRAIN_SEEDS[-2:])
        yield


@pytest.fixture(scope="module")
def trained(begun, often, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    autoencoder.run(folder, steps=STEPS, seed=3, resume=False, encoder=begun)
    return folder


def latents_of(vae, pictures):
    with torch.no_grad():
        return vae.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2)).latent_dist


def test_no_test_seed_is_trained_or_fitted_on() -> None:
    for seeds in (autoencoder.PROJECTION_SEEDS, autoencoder.CHECK_SEEDS):
        assert set(seeds) <= set(TRAIN_SEEDS)
    assert set(autoencoder.PROJECTION_SEEDS).isdisjoint(autoencoder.CHECK_SEEDS)


def test_folding_keeps_every_number_and_the_reading_order_of_a_square() -> None:
    codes = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    folded = fold(codes)
    assert folded.shape == (2, 2, 3, 12)
    assert np.array_equal(folded[1, 1, 2].reshape(2, 2, 3), codes[1, 2:4, 4:6])


def test_the_three_views_are_a_person_a_garment_and_the_person_with_a_grey_mask() -> None:
    person, garment, masked = views(TEST_SEEDS[0])
    assert person.min() >= -1
    assert person.max() <= 1
    assert np.all(garment[[0, -1]] == 1)
    assert 0.02 < np.mean(np.all(masked == 0, axis=-1)) < 0.5


def test_latents_have_deviation_one_and_weights_that_float16_holds(stages) -> None:
    latents = encode(stages, np.concatenate([views(seed) for seed in TRAIN_SEEDS[:16]]))
    assert latents.std() == pytest.approx(1, abs=0.01)
    assert np.abs(latents.mean(axis=(0, 1, 2))).max() < 0.01
    for stage in stages:
        for numbers in (stage.matrix, stage.bias):
            assert np.array_equal(numbers, numbers.astype(np.float16).astype(np.float32))


def test_the_encoder_is_the_projection(vae, stages, pictures) -> None:
    wanted = encode(stages, pictures).transpose(0, 3, 1, 2)
    latents = latents_of(vae, pictures)
    assert latents.mode().shape == wanted.shape == (6, LATENT_CHANNELS, 256 // FACTOR, 192 // FACTOR)
    assert np.abs(latents.mode().numpy() - wanted).max() < 5e-4
    assert latents.logvar.max() <= -8


def test_the_mode_of_a_picture_does_not_depend_on_chance_or_neighbours(vae, pictures) -> None:
    first, again = latents_of(vae, pictures).mode(), latents_of(vae, pictures).mode()
    assert torch.equal(first, again)
    assert torch.allclose(first[:1], latents_of(vae, pictures[:1]).mode(), atol=1e-5)


def test_the_stages_are_read_back_from_the_encoder_bit_by_bit(vae, stages) -> None:
    for stage, found in zip(stages, autoencoder.stages_of(vae)):
        assert np.array_equal(stage.matrix, found.matrix)
        assert np.array_equal(stage.bias, found.bias)


def test_another_size_that_sixteen_divides_is_encoded_and_decoded(vae) -> None:
    picture = torch.zeros(1, 3, 128, 96)
    with torch.no_grad():
        latents = vae.encode(picture).latent_dist.mode()
        assert latents.shape == (1, LATENT_CHANNELS, 8, 6)
        assert vae.decode(latents).sample.shape == picture.shape


def test_diffusers_loads_it_and_storing_it_in_half_precision_leaves_the_encoder_as_it_was(vae, tmp_path) -> None:
    vae.half().save_pretrained(tmp_path)
    vae.float()
    found = type(vae).from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert found.config.scaling_factor == 1
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 6e6
    for weight, other in zip(vae.encoder.parameters(), found.encoder.parameters()):
        assert torch.equal(weight, other)


def test_the_decoder_shows_the_picture_before_any_training(vae, stages) -> None:
    assert autoencoder.psnr(vae, stages, TEST_SEEDS[:4]) > 14.5


def test_building_leaves_torchs_global_generator_alone(stages) -> None:
    before = torch.random.get_rng_state()
    first, again = (autoencoder.build(stages, seed=5, inverse_seeds=TRAIN_SEEDS[:1]) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), again.parameters()))


def test_training_decodes_as_the_autoencoder_does(vae, pictures) -> None:
    latents = latents_of(vae, pictures[:2]).mode()
    with torch.no_grad():
        quick, exact = autoencoder.decode(vae.decoder, latents), vae.decode(latents).sample
    assert quick.dtype == torch.float32
    assert (quick - exact).abs().mean() < 0.02


def test_a_few_steps_lower_the_loss_and_leave_the_encoder_alone(vae, trained) -> None:
    lines = [json.loads(line) for line in (trained / "decoder.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["psnr"] > lines[0]["psnr"]
    best = type(vae).from_pretrained(trained / "vae")
    assert all(torch.equal(one, two) for one, two in zip(vae.encoder.parameters(), best.encoder.parameters()))
    assert not torch.equal(vae.decoder.conv_in.weight, best.decoder.conv_in.weight)


def test_a_killed_run_goes_on_to_the_same_bytes(begun, trained, tmp_path, monkeypatch) -> None:
    take_step = autoencoder._take_step

    def killed(course):
        if course.step == 3:
            raise KeyboardInterrupt
        return take_step(course)

    monkeypatch.setattr(autoencoder, "_take_step", killed)
    with pytest.raises(KeyboardInterrupt):
        autoencoder.run(tmp_path, steps=STEPS, seed=3, resume=False, encoder=begun)
    monkeypatch.setattr(autoencoder, "_take_step", take_step)
    autoencoder.run(tmp_path, steps=STEPS, seed=3, resume=True)
    assert (tmp_path / "decoder.safetensors").read_bytes() == (trained / "decoder.safetensors").read_bytes()


def test_only_the_same_training_is_resumed(trained, tmp_path) -> None:
    with pytest.raises(TrainingError, match="no checkpoint"):
        autoencoder.run(tmp_path, steps=STEPS, seed=3, resume=True)
    for steps, seed in ((STEPS + 1, 3), (STEPS, 4)):
        with pytest.raises(TrainingError, match="begun with 4 steps and seed 3"):
            autoencoder.run(trained, steps=steps, seed=seed, resume=True)
