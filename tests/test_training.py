from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from catvton_recipe import build_scheduler, build_vae, configs, write_published_layout
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file

from model.catvton import published, training
from model.catvton.export import export_weights
from model.catvton.latents import LatentPairs, prepare_latents
from model.catvton.objective import Exercise, exercise, loss, pick
from model.catvton.optimizer import orthogonalised
from model.catvton.pairs import MASK_KINDS, FigurePairs, open_source
from model.catvton.pipeline import CatVTONPipeline
from model.catvton.training import learning_rate, run
from model.embedded.figures import TRAIN_SEEDS, example
from model.training_options import (
    ALL_WEIGHTS,
    ATTENTION_ONLY,
    FROM_SCRATCH,
    Course,
    TrainingError,
    TrainingOptions,
    parse,
)

REPOSITORY = Path(__file__).resolve().parent.parent
SIZE = {"width": 48, "height": 64}
PAIRS = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder of a tiny autoencoder, `vae`, and the configuration of a tiny UNet, `unet.json`."""
    folder = tmp_path_factory.mktemp("start")
    build_vae().save_pretrained(folder / "vae")
    (folder / "unet.json").write_text(json.dumps(configs()["configs"]["tiny2"]["unet"]))
    return folder


@pytest.fixture
def options(files):
    def build(**given):
        usual = {"vae": str(files / "vae"), "unet": str(files / "unet.json"), "pairs": PAIRS, "batch": 2, "steps": 12}
        recipe = {"warmup_steps": 2, "dtype": "float32", **SIZE}
        return TrainingOptions.of_method(FROM_SCRATCH, **{**usual, **recipe, **given})

    return build


def course(folder, **given):
    return Course(folder, **{"save_every": 6, "sample_every": 0, "device": "cpu", "readers": 1, **given})


def curve(folder):
    lines = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["in_mask"], line["lr"]) for line in lines]


def checkpoint(folder):
    (found,) = (folder / "checkpoints").iterdir()
    return load_file(found / "state.safetensors")


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def whole_run(files, tmp_path_factory):
    """Twelve steps without a break."""
    folder = tmp_path_factory.mktemp("whole")
    given = {"vae": str(files / "vae"), "unet": str(files / "unet.json"), "pairs": PAIRS, "batch": 2, "steps": 12}
    whole = TrainingOptions.of_method(FROM_SCRATCH, warmup_steps=2, dtype="float32", **SIZE, **given)
    assert run(whole, course(folder, sample_every=12))
    return folder


def test_the_loss_falls_on_four_pairs(options, tmp_path):
    run(options(steps=40, learning_rate=3e-3, batch=4, noisy_share=0.0), course(tmp_path))
    losses = [line[1] for line in curve(tmp_path)]
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:10])


@pytest.mark.parametrize("broken_at", [6, 9])
def test_a_killed_run_resumes_to_the_same_curve_and_the_same_weights(
    options, whole_run, tmp_path, monkeypatch, broken_at
):
    def log_until_it_breaks(output, line):
        log_step(output, line)
        if line["step"] == broken_at:
            raise KeyboardInterrupt

    log_step = training.log_step
    with monkeypatch.context() as patched:
        patched.setattr(training, "log_step", log_until_it_breaks)
        with pytest.raises(KeyboardInterrupt):
            run(options(), course(tmp_path, save_every=2))
    assert run(options(), course(tmp_path, save_every=2, resume=True))
    assert curve(tmp_path) == curve(whole_run)
    assert same(checkpoint(tmp_path), checkpoint(whole_run))


def test_a_stopped_run_with_muon_resumes_to_the_same_weights(options, tmp_path, monkeypatch):
    def log_and_terminate(output, line):
        log_step(output, line)
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    muon = options(optimizer="muon", steps=6)
    assert run(muon, course(tmp_path / "whole"))
    log_step = training.log_step
    with monkeypatch.context() as patched:
        patched.setattr(training, "log_step", log_and_terminate)
        assert not run(muon, course(tmp_path / "broken"))
    assert run(muon, course(tmp_path / "broken", resume=True))
    tensors = checkpoint(tmp_path / "broken")
    assert same(tensors, checkpoint(tmp_path / "whole"))
    matrices = {key.partition(".")[2] for key in tensors if key.startswith("momentum.")}
    others = {key.partition(".")[2] for key in tensors if key.startswith("exp_avg.")}
    assert "mid_block.resnets.0.conv1.weight" in matrices
    assert {"conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"} <= others
    assert not matrices & others


def test_muon_learns_faster_than_adamw_on_four_pairs(options, tmp_path):
    for optimizer in ("adamw", "muon"):
        run(options(steps=40, batch=4, noisy_share=0.0, optimizer=optimizer), course(tmp_path / optimizer))
    adamw, muon = (np.mean([line[1] for line in curve(tmp_path / name)[-10:]]) for name in ("adamw", "muon"))
    assert muon < adamw


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
def test_an_orthogonalised_matrix_keeps_its_directions_and_evens_their_lengths(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = orthogonalised(matrix)
    assert ((torch.linalg.svdvals(made) > 0.6) & (torch.linalg.svdvals(made) < 1.3)).all()
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ made @ right.T
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-3


def test_a_gradient_of_zeros_moves_no_matrix():
    assert orthogonalised(torch.zeros(3, 5)).eq(0).all()


def test_sigterm_leaves_a_checkpoint_of_that_step_and_the_handler_as_it_was(options, whole_run, tmp_path, monkeypatch):
    def log_and_terminate(output, line):
        log_step(output, line)
        if line["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    log_step, handler = training.log_step, signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(training, "log_step", log_and_terminate)
        assert not run(options(), course(tmp_path))
    assert signal.getsignal(signal.SIGTERM) == handler
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    assert not (tmp_path / "export").exists()
    assert run(options(), course(tmp_path, resume=True))
    assert curve(tmp_path) == curve(whole_run)


def test_a_finished_run_resumed_exports_again(options, tmp_path):
    run(options(steps=1), course(tmp_path))
    before = checkpoint(tmp_path)
    (tmp_path / "export" / published.UNET_FOLDER / published.WEIGHT_FILES[0]).unlink()
    assert run(options(steps=1), course(tmp_path, resume=True))
    assert same(checkpoint(tmp_path), before)
    assert (tmp_path / "export" / published.UNET_FOLDER / published.WEIGHT_FILES[0]).is_file()


def test_the_export_is_the_average_in_float16(whole_run):
    pipeline = CatVTONPipeline.from_published(whole_run / "export")
    average = {
        key.partition(".")[2]: tensor for key, tensor in checkpoint(whole_run).items() if key.startswith("average.")
    }
    stored = pipeline.unet.state_dict()
    assert stored.keys() == average.keys()
    assert all(torch.equal(stored[key], average[key].half().float()) for key in stored)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.vae.config.latent_channels == pipeline.unet.config.out_channels


def test_the_average_is_not_the_weights(whole_run):
    tensors = checkpoint(whole_run)
    assert not torch.equal(tensors["average.conv_in.weight"], tensors["weights.conv_in.weight"])


def test_a_sheet_shows_person_masked_garment_result_and_truth(whole_run):
    (sheet,) = (whole_run / "sheets").iterdir()
    pixels = np.asarray(Image.open(sheet))
    assert sheet.name == "step-00000012.png"
    assert pixels.shape == (training.SHEET_ROWS * SIZE["height"], 5 * SIZE["width"], 3)
    first = FigurePairs(1, (SIZE["width"], SIZE["height"])).sample(0)
    row = np.hsplit(pixels[: SIZE["height"]], 5)
    for at, expected in ((0, first.person), (2, first.garment), (4, first.target)):
        assert np.array_equal(row[at], expected)


def test_attention_only_changes_the_self_attention_alone(tmp_path):
    weights = write_published_layout(tmp_path / "weights")
    given = {"weights": str(weights), "pairs": PAIRS, "batch": 2, "steps": 3, "warmup_steps": 1, "dtype": "float32"}
    options = TrainingOptions.of_method(ATTENTION_ONLY, learning_rate=1e-2, **given, **SIZE)
    assert run(options, course(tmp_path / "run"))
    before = CatVTONPipeline.from_published(weights)
    after = CatVTONPipeline.from_published(tmp_path / "run" / "export")
    old, new = before.unet.state_dict(), after.unet.state_dict()
    changed = {key for key in old if not torch.equal(old[key].half().float(), new[key])}
    assert changed == {key for key in old if ".attn1." in key}
    assert all(
        torch.equal(tensor.half().float(), after.vae.state_dict()[key])
        for key, tensor in before.vae.state_dict().items()
    )
    attention = load_file(tmp_path / "run" / "export" / published.ATTENTION_FOLDERS["mix"] / published.ATTENTION_FILE)
    assert len(attention) == len(changed)


def test_all_weights_starts_from_published_ones_and_changes_them_all(tmp_path):
    weights = write_published_layout(tmp_path / "weights")
    given = {"weights": str(weights), "pairs": PAIRS, "batch": 2, "steps": 2, "warmup_steps": 1, "dtype": "float32"}
    assert run(TrainingOptions.of_method(ALL_WEIGHTS, **given, **SIZE), course(tmp_path / "run"))
    old = CatVTONPipeline.from_published(weights).unet.state_dict()
    new = CatVTONPipeline.from_published(tmp_path / "run" / "export").unet.state_dict()
    moved = {key: (old[key] - new[key]).abs().max() for key in old}
    assert all(0 < distance < 0.01 for distance in moved.values())


def test_bfloat16_trains_close_to_float32(options, whole_run, tmp_path):
    assert run(options(dtype="bfloat16", steps=12), course(tmp_path))
    narrow, wide = ([line[1] for line in curve(folder)] for folder in (tmp_path, whole_run))
    assert narrow != wide
    assert np.allclose(narrow, wide, rtol=0.05)


@pytest.mark.slow
def test_two_processes_share_a_batch(options, whole_run, tmp_path):
    """Each takes half of the pairs, and the gradients are averaged."""
    (tmp_path / "part.py").write_text(
        "import json, sys; from pathlib import Path; from model.catvton.training import run\n"
        "from model.training_options import Course, TrainingOptions\n"
        "given = json.loads(sys.argv[1])\n"
        "run(TrainingOptions(**given), Course(Path(sys.argv[2]), device='cpu', sample_every=0, readers=1))\n"
    )
    given = json.dumps(vars(options()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "part.py"), given, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    together, alone = np.array(curve(tmp_path / "run")), np.array(curve(whole_run))
    assert np.allclose(together[:, 1], alone[:, 1], rtol=1e-3)


@pytest.fixture(scope="module")
def pipeline(files):
    given = {"vae": str(files / "vae"), "unet": str(files / "unet.json")}
    return training._build(TrainingOptions.of_method(FROM_SCRATCH, **given, **SIZE))


@pytest.fixture(scope="module")
def latents(pipeline, tmp_path_factory):
    source = FigurePairs(PAIRS, (SIZE["width"], SIZE["height"]))
    return prepare_latents(source, pipeline, tmp_path_factory.mktemp("latents"), readers=1, stopped=lambda: False)


def test_latents_are_what_the_pipeline_shows_its_unet(latents, pipeline):
    seen = []
    source = FigurePairs(PAIRS, (SIZE["width"], SIZE["height"]))
    hook = pipeline.unet.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    for index in range(PAIRS):
        pair = source.pair(index)
        pipeline(pair.person, pair.garment, pair.mask, **SIZE, num_inference_steps=1, output_type="latent")
    hook.remove()
    channels = latents.target.shape[1]
    for index, shown in enumerate(seen):  # unconditional first
        assert torch.allclose(
            shown[1, channels:], torch.from_numpy(latents.condition[index].astype(np.float32)), atol=5e-3
        )


def test_a_hidden_garment_is_what_the_unconditional_branch_shows(latents, pipeline, options):
    batch = exercise(latents, options(condition_dropout=1.0), pipeline.scheduler, 0, CPU)
    rows = latents.target.shape[-2]
    assert not batch.condition[:, 1:, rows:].any()
    assert batch.condition[:, 1:, :rows].any()
    assert batch.canvas[:, :, rows:].any(), "the garment is still to be predicted"


def test_about_a_tenth_of_the_garments_is_hidden(latents, pipeline, options):
    usual = options(batch=PAIRS)
    rows = latents.target.shape[-2]
    hidden = [
        not condition[1:, rows:].any()
        for step in range(150)
        for condition in exercise(latents, usual, pipeline.scheduler, step, CPU).condition
    ]
    assert 0.06 < np.mean(hidden) < 0.14


def test_a_step_has_the_same_exercise_again_and_another_than_the_next(latents, pipeline, options):
    first, again, following = (exercise(latents, options(), pipeline.scheduler, step, CPU) for step in (5, 5, 6))
    assert all(torch.equal(tensor, vars(again)[name]) for name, tensor in vars(first).items())
    assert not torch.equal(first.noise, following.noise)


def test_more_noise_is_drawn_where_it_is_asked_for(latents, pipeline, options):
    means = [
        np.mean(
            [
                exercise(latents, options(noisy_share=share, batch=16), pipeline.scheduler, step, CPU)
                .timesteps.float()
                .mean()
                .item()
                for step in range(40)
            ]
        )
        for share in (0.0, 1.0)
    ]
    assert means[0] == pytest.approx(500, abs=40)
    assert means[1] == pytest.approx(667, abs=40)


def test_every_pair_comes_once_a_round_in_another_order_each_round():
    drawn = [place for step in range(10) for place in pick(5, 3, step, seed=1)]
    rounds = [drawn[at : at + 5] for at in range(0, 30, 5)]
    assert all(sorted(each) == list(range(5)) for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


def exercise_of(prediction_type, options):
    draw = torch.Generator().manual_seed(0)
    canvas, noise = (torch.randn(2, 4, 8, 3, generator=draw) for _ in range(2))
    covered = torch.zeros(2, 1, 4, 3)
    covered[:, :, :2] = 1
    condition = torch.randn(2, 5, 8, 3, generator=draw)
    scheduler = DDIMScheduler.from_config({**build_scheduler().config, "prediction_type": prediction_type})
    return Exercise(canvas, condition, covered, noise, torch.tensor([30, 900])), scheduler


def truth(batch, scheduler, noisy):
    """What a perfect UNet answers, from the definitions of the two types."""
    alpha = scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noise = (noisy - alpha.sqrt() * batch.canvas) / (1 - alpha).sqrt()
    if scheduler.config.prediction_type == "epsilon":
        return noise
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * batch.canvas


@pytest.mark.parametrize("dream", [-1.0, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_has_no_loss(options, prediction_type, dream):
    batch, scheduler = exercise_of(prediction_type, options)
    made = loss(batch, lambda shown, _: truth(batch, scheduler, shown[:, :4]), options(dream=dream), scheduler)
    assert made.weighted < 1e-8
    assert made.in_mask < 1e-8


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_of_no_prediction_is_the_weighted_square_of_the_schedulers_target(options, prediction_type):
    batch, scheduler = exercise_of(prediction_type, options)
    aim = batch.noise
    if prediction_type == "v_prediction":
        aim = scheduler.get_velocity(batch.canvas, batch.noise, batch.timesteps)
    made = loss(batch, lambda shown, _: torch.zeros_like(shown[:, :4]), options(), scheduler)
    square = aim**2
    by_region = 2.0 * square[:, :, :2].sum() + square[:, :, 2:4].sum() + 0.3 * square[:, :, 4:].sum()
    assert made.weighted == pytest.approx((by_region / square.numel()).item(), rel=1e-5)
    assert made.in_mask == pytest.approx(square[:, :, :2].mean().item(), rel=1e-5)


def test_the_unet_is_shown_noisy_latent_mask_and_pictures(options):
    batch, scheduler = exercise_of("epsilon", options)
    seen = []
    loss(batch, lambda shown, _: seen.append(shown) or torch.zeros_like(shown[:, :4]), options(), scheduler)
    assert torch.equal(seen[0][:, :4], scheduler.add_noise(batch.canvas, batch.noise, batch.timesteps))
    assert torch.equal(seen[0][:, 4:], batch.condition)


def test_dream_moves_noise_and_target_as_its_paper_says(options):
    batch, scheduler = exercise_of("epsilon", options)
    seen = []
    made = loss(
        batch, lambda shown, _: seen.append(shown) or torch.zeros_like(shown[:, :4]), options(dream=2.0), scheduler
    )
    alpha = scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    moved = batch.noise * (1 + (1 - alpha))  # a prediction of zero is wrong by the whole noise
    assert torch.allclose(seen[1][:, :4], scheduler.add_noise(batch.canvas, moved, batch.timesteps), atol=1e-5)
    assert made.in_mask == pytest.approx((moved[:, :, :2] ** 2).mean().item(), rel=1e-4)


def test_the_learning_rate_rises_stays_and_falls(options):
    recipe = options(steps=100, warmup_steps=10, learning_rate=1.0, decay_share=0.4)
    rates = [learning_rate(step, recipe) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert set(rates[10:60]) == {1.0}
    assert rates[80] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.025)


def test_every_kind_of_mask_is_trained_and_inner_is_upper():
    assert set(MASK_KINDS) == {"upper", "lower", "overall", "inner", "outer"}
    source = FigurePairs(len(MASK_KINDS), (48, 64))
    for index, kind in enumerate(MASK_KINDS):
        pair = source.pair(index)
        drawn = example(TRAIN_SEEDS[index], kind if kind in ("lower", "overall") else "upper", size_wh=(48, 64))
        assert np.array_equal(pair.target, drawn.target)
        assert np.array_equal(pair.person[pair.mask == 0], pair.target[pair.mask == 0])
        if kind == "outer":
            assert (pair.mask > 0).sum() > (drawn.mask > 0).sum()
        else:
            assert np.array_equal(pair.mask, drawn.mask)


@pytest.fixture
def photographs(tmp_path):
    """Pictures of two pairs, larger than they are trained, and their names."""
    source = FigurePairs(2, (96, 144))
    rows = []
    for index in range(2):
        pair = source.pair(index)
        row = {}
        for column, pixels in (("person", pair.target), ("garment", pair.garment), ("mask", pair.mask)):
            row[column] = f"{column}-{index}.png"
            Image.fromarray(pixels).save(tmp_path / row[column])
        rows.append(row)
    return rows


def write_manifest(folder, rows, name):
    path = folder / name
    if name.endswith(".csv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.jsonl"])
def test_a_manifest_is_trained_on(options, photographs, tmp_path, monkeypatch, name):
    monkeypatch.setattr(training, "SHEET_ROWS", 1)
    path = write_manifest(tmp_path, photographs, name)
    assert run(options(data=str(path), steps=2), course(tmp_path / "run", sample_every=2))
    condition = np.load(tmp_path / "run" / "latents" / "condition.npy")
    assert condition.shape[0] == 2
    assert condition[:, 0].any()


def test_photographs_are_cropped_as_the_pipeline_crops_them(options, photographs, tmp_path, pipeline):
    path = write_manifest(tmp_path, photographs, "manifest.csv")
    source = open_source(options(data=str(path)))
    made = prepare_latents(source, pipeline, tmp_path / "latents", readers=1, stopped=lambda: False)
    seen = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    pictures = [Image.open(tmp_path / photographs[0][column]) for column in ("person", "garment", "mask")]
    pipeline(*pictures, **SIZE, num_inference_steps=1, output_type="latent", guidance_scale=1)
    hook.remove()
    channels = made.target.shape[1]
    assert torch.allclose(seen[0][0, channels:], torch.from_numpy(made.condition[0].astype(np.float32)), atol=5e-3)


BAD_MANIFESTS = {
    "person,garment\na.png,b.png\n": "pair 1 has no mask",
    "person,garment,mask\n": "names no pairs",
    "person,garment,mask\na.png,,c.png\n": "pair 1 has no garment",
    "person,garment,mask\n/etc/passwd,b.png,c.png\n": "not inside the manifest's folder",
    "person,garment,mask\n../a.png,b.png,c.png\n": "not inside the manifest's folder",
}


@pytest.mark.parametrize("text", BAD_MANIFESTS)
def test_a_bad_manifest_is_refused(options, tmp_path, text):
    (tmp_path / "manifest.csv").write_text(text)
    with pytest.raises(TrainingError, match=BAD_MANIFESTS[text]):
        open_source(options(data=str(tmp_path / "manifest.csv")))


def test_a_manifest_of_other_text_is_refused(options, tmp_path):
    (tmp_path / "manifest.jsonl").write_text("{person")
    with pytest.raises(TrainingError, match="a line that is no JSON"):
        open_source(options(data=str(tmp_path / "manifest.jsonl")))
    with pytest.raises(TrainingError, match="cannot be read as a manifest"):
        open_source(options(data=str(tmp_path / "none.csv")))


def test_a_picture_that_is_none_and_a_mask_of_another_size_are_refused(options, photographs, tmp_path):
    (tmp_path / "person-0.png").write_text("no picture")
    Image.new("L", (9, 9)).save(tmp_path / "mask-1.png")
    source = open_source(options(data=str(write_manifest(tmp_path, photographs, "manifest.csv"))))
    with pytest.raises(TrainingError, match=r"person-0.png cannot be read as a picture"):
        source.pair(0)
    with pytest.raises(TrainingError, match=r"mask-1.png is \(9, 9\) px"):
        source.pair(1)


def test_latents_that_were_interrupted_are_completed(pipeline, latents, tmp_path):
    source = FigurePairs(20, (SIZE["width"], SIZE["height"]))
    folder = tmp_path / "latents"
    prepare_latents(source, pipeline, folder, readers=1, stopped=lambda: True)
    assert json.loads((folder / "progress.json").read_text())["done"] == 16
    made = prepare_latents(source, pipeline, folder, readers=2, stopped=lambda: False)
    assert np.abs(made.target).reshape(20, -1).max(axis=1).min() > 0
    assert np.allclose(made.target[:PAIRS], latents.target, atol=5e-3)


def test_latents_of_other_pairs_or_of_another_autoencoder_are_refused(pipeline, tmp_path, files):
    def prepare(source, by=pipeline):
        return prepare_latents(source, by, tmp_path, readers=1, stopped=lambda: False)

    prepare(FigurePairs(2, (48, 64)))
    with pytest.raises(TrainingError, match="not of figures of 64x64"):
        prepare(FigurePairs(2, (64, 64)))
    with pytest.raises(TrainingError, match="latents of 2 pairs, not of 3"):
        prepare(FigurePairs(3, (48, 64)))
    other = CatVTONPipeline(build_vae(salt=5), pipeline.unet, pipeline.scheduler)
    with pytest.raises(TrainingError, match="another autoencoder"):
        prepare(FigurePairs(2, (48, 64)), other)
    (tmp_path / "target.npy").write_bytes(b"")
    with pytest.raises(TrainingError, match="cannot be read"):
        prepare(FigurePairs(2, (48, 64)))


def test_a_covered_latent_has_any_repainted_pixel(latents):
    assert isinstance(latents, LatentPairs)
    mask = latents.condition[:, :1, : latents.target.shape[-2]]
    assert (latents.covered >= mask).all()
    assert latents.covered.sum() > mask.sum()


def test_a_folder_with_a_training_is_not_started_over(options, whole_run):
    with pytest.raises(TrainingError, match="holds a training already"):
        run(options(), course(whole_run))


def test_resuming_nothing_and_resuming_with_another_option_are_refused(options, whole_run, tmp_path):
    with pytest.raises(TrainingError, match="holds no checkpoint"):
        run(options(), course(tmp_path, resume=True))
    with pytest.raises(TrainingError, match=r"was trained with steps 12, not 13; learning_rate 0.001, not 0.002"):
        run(options(steps=13, learning_rate=2e-3), course(whole_run, resume=True))


def test_a_checkpoint_of_another_unet_or_that_cannot_be_read_is_refused(options, files, tmp_path):
    own = tmp_path / "unet.json"
    own.write_text((files / "unet.json").read_text())
    run(options(steps=1, unet=str(own)), course(tmp_path / "run"))
    config = json.loads(own.read_text())
    own.write_text(json.dumps({**config, "layers_per_block": 1 + config["layers_per_block"]}))
    with pytest.raises(TrainingError, match="is of another UNet"):
        run(options(steps=1, unet=str(own)), course(tmp_path / "run", resume=True))
    (tmp_path / "run" / "checkpoints" / "step-00000001" / "state.safetensors").write_bytes(b"half")
    with pytest.raises(TrainingError, match=r"step-00000001 cannot be read"):
        run(options(steps=1, unet=str(own)), course(tmp_path / "run", resume=True))


def test_a_loss_that_is_no_number_ends_the_training(options, tmp_path):
    with pytest.raises(TrainingError, match="is no number"):
        run(options(learning_rate=1e30, warmup_steps=0), course(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_a_device_that_is_not_there_is_refused(options, tmp_path):
    with pytest.raises(TrainingError, match="there is no CUDA device"):
        run(options(), course(tmp_path, device="cuda"))


BAD_OPTIONS = [
    ({"steps": 0}, "steps must be at least 1"),
    ({"batch": 0}, "batch must be at least 1"),
    ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
    ({"condition_dropout": 1.5}, "condition_dropout must be from 0 to 1"),
    ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
    ({"dtype": "int8"}, "dtype must be one of float32, bfloat16"),
    ({"prediction_type": "sample"}, "prediction_type must be one of epsilon, v_prediction"),
    ({"vae": ""}, "needs vae"),
    ({"method": "other"}, "method must be one of from-scratch, attention-only, all-weights"),
    ({"method": "attention-only"}, "needs weights"),
    ({"method": "all-weights"}, "needs weights"),
    ({"optimizer": "sgd"}, "optimizer must be one of adamw, muon"),
    ({"muon_learning_rate": 0.0}, "muon_learning_rate must be above 0"),
]


@pytest.mark.parametrize(("given", "sentence"), BAD_OPTIONS)
def test_a_bad_option_is_refused_by_name(given, sentence):
    with pytest.raises(TrainingError, match=sentence):
        TrainingOptions(**{"vae": "somewhere", **given})


def test_files_that_are_not_there_or_do_not_fit_are_refused(options, tmp_path):
    for given in ({"vae": str(tmp_path / "none")}, {"unet": str(tmp_path / "none.json")}, {"width": 50}):
        with pytest.raises(TrainingError):
            run(options(**given), course(tmp_path / "run"))
    with pytest.raises(TrainingError, match="at most 1000000"):
        run(options(pairs=2_000_000), course(tmp_path / "run"))
    published_weights = write_published_layout(tmp_path / "weights")
    narrow = TrainingOptions.of_method(ATTENTION_ONLY, weights=str(published_weights), width=50)
    with pytest.raises(TrainingError, match="width must be a positive multiple of 8"):
        run(narrow, course(tmp_path / "run"))
    weights = TrainingOptions.of_method(ATTENTION_ONLY, weights=str(tmp_path / "none"))
    with pytest.raises(TrainingError, match=r"scheduler_config\.json"):
        run(weights, course(tmp_path / "run"))


def test_attention_only_has_the_numbers_of_the_papers():
    options = TrainingOptions.of_method(ATTENTION_ONLY, weights="w", dream=-1.0)
    assert (options.learning_rate, options.mask_weight, options.garment_weight) == (1e-5, 1.0, 1.0)
    assert options.dream == -1.0


def test_options_are_read_from_texts():
    assert parse({"steps": "7", "learning_rate": "1e-4", "data": "figures"}) == {
        "steps": 7,
        "learning_rate": 1e-4,
        "data": "figures",
    }
    with pytest.raises(TrainingError, match=r"steps must be a whole number, not '7\.5'"):
        parse({"steps": "7.5"})
    with pytest.raises(TrainingError, match="speed is no option of the training"):
        parse({"speed": "1"})


def test_an_export_replaces_another(pipeline, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "old").touch()
    export_weights(pipeline, tmp_path / "export", "vitonhd")
    assert not (tmp_path / "export" / "old").exists()
    CatVTONPipeline.from_published(tmp_path / "export", "vitonhd")
