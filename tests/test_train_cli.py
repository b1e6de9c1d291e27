from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from catvton_recipe import build_vae, configs, write_published_layout
from click.testing import CliRunner
from PIL import Image

from container.train_cli import EXIT_REFUSED, EXIT_STOPPED, train
from container.training_job import MAX_FAILURE_CHARACTERS, main, run_job
from model.catvton import published, training
from model.catvton.pairs import FigurePairs
from model.catvton.pipeline import CatVTONPipeline
from model.training_options import TrainingError, parse_size

REPOSITORY = Path(__file__).resolve().parent.parent
QUICK = {"pairs": "2", "batch": "2", "width": "48", "height": "64", "warmup_steps": "1", "dtype": "float32"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    build_vae().save_pretrained(folder / "vae")
    (folder / "unet.json").write_text(json.dumps(configs()["configs"]["tiny2"]["unet"]))
    return folder


@pytest.fixture
def command(files, tmp_path):
    usual = ["--output", str(tmp_path / "run"), "--vae", str(files / "vae"), "--unet", str(files / "unet.json")]
    usual += ["--pairs", "2", "--batch", "2", "--size", "48x64", "--dtype", "float32", "--device", "cpu"]
    usual += ["--readers", "1", "--sample-every", "0"]
    return lambda *given: CliRunner().invoke(train, [*usual, *given])


def test_a_training_leaves_weights_where_it_says(command, tmp_path):
    done = command("--steps", "2", "--lr", "0.001", "--set", "ema_decay=0.9")
    assert done.exit_code == 0, done.output
    assert f"weights: {tmp_path / 'run' / 'export'}" in done.output
    CatVTONPipeline.from_published(tmp_path / "run" / "export")
    kept = json.loads((tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json").read_text())["options"]
    assert (kept["steps"], kept["ema_decay"], kept["width"], kept["height"]) == (2, 0.9, 48, 64)


def test_a_stopped_training_says_how_to_go_on(command, monkeypatch):
    monkeypatch.setattr(training, "run", lambda *_: False)
    done = command("--steps", "2")
    assert done.exit_code == EXIT_STOPPED
    assert "--resume goes on" in done.output


REFUSALS = [
    (["--resume"], "holds no checkpoint to resume from"),
    (["--steps", "0"], "steps must be at least 1"),
    (["--size", "big"], "size must be WIDTHxHEIGHT in pixels, e.g. 192x256, not 'big'"),
    (["--size", "50x64"], "width must be a positive multiple of 8"),
    (["--set", "ema_decay"], "ema_decay must be a number, not ''"),
    (["--set", "speed=2"], "speed is no option of the training"),
    (["--set", "seed=2", "--seed", "3"], "--set seed has an option of its own"),
    (["--set", "method=attention-only"], "--set method has an option of its own"),
    (["--attention-only"], "attention-only training needs weights"),
    (["--data", "none.csv"], "none.csv cannot be read as a manifest"),
]


@pytest.mark.parametrize(("given", "sentence"), REFUSALS)
def test_a_wrong_option_is_refused_with_one_sentence(command, given, sentence):
    done = command(*given)
    assert done.exit_code == EXIT_REFUSED, done.output
    assert sentence in done.output


def test_a_size_is_two_numbers():
    assert parse_size("192x256") == (192, 256)
    for text in ("192", "192x", "-1x4", "192X256", "192x256x3"):
        with pytest.raises(TrainingError, match="size must be"):
            parse_size(text)


@pytest.fixture
def job(tmp_path):
    """The folders of a job with the published layout in its channel `model`; returns a writer of hyperparameters."""
    write_published_layout(tmp_path / "input" / "data" / "model")

    def write(**hyperparameters):
        config = tmp_path / "input" / "config" / "hyperparameters.json"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps({**QUICK, "sample_every": "2", **hyperparameters}))

    write(steps="2")
    return write


def put_pair(channel):
    """A manifest of one pair in a channel."""
    channel.mkdir(parents=True)
    pair = FigurePairs(1, (48, 64)).pair(0)
    for name, pixels in (("p.png", pair.target), ("g.png", pair.garment), ("m.png", pair.mask)):
        Image.fromarray(pixels).save(channel / name)
    (channel / "manifest.csv").write_text("person,garment,mask\np.png,g.png,m.png\n")


def environment(base):
    return {"SAGEMAKER_BASE_DIR": str(base)}


def test_a_job_writes_the_model_and_what_was_seen_on_the_way(job, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SHEET_ROWS", 1)
    put_pair(tmp_path / "input" / "data" / "training")
    (tmp_path / "model").mkdir()
    assert main(environment(tmp_path)) == 0
    CatVTONPipeline.from_published(tmp_path / "model")
    assert (tmp_path / "output" / "data" / "sheets" / "step-00000002.png").is_file()
    assert len((tmp_path / "output" / "data" / "loss.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "output" / "failure").exists()


def test_a_job_from_scratch_needs_only_an_autoencoder_in_its_channel(job, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SMALL_UNET", configs()["configs"]["tiny2"]["unet"])
    job(steps="1", method="from-scratch", sample_every="0")
    run_job(tmp_path)
    config = json.loads((tmp_path / "model" / published.SCHEDULER_FILE).read_text())
    assert config["prediction_type"] == "v_prediction"


def test_a_job_goes_on_from_its_checkpoints(job, tmp_path, monkeypatch):
    log_step = training.log_step

    def log_and_terminate(output, line):
        log_step(output, line)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(training, "log_step", log_and_terminate)
        job(steps="6", sample_every="0")
        assert main(environment(tmp_path)) == 0
    assert not (tmp_path / "model").exists()
    stopped_at = sorted(path.name for path in (tmp_path / "checkpoints" / "checkpoints").iterdir())
    assert stopped_at == ["step-00000002"]
    assert main(environment(tmp_path)) == 0
    lines = (tmp_path / "checkpoints" / "loss.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    CatVTONPipeline.from_published(tmp_path / "model")


FAILURES = [
    ({"steps": "many"}, "steps must be a whole number, not 'many'"),
    ({"speed": "1"}, "speed is no option of the training"),
    ({"data": "elsewhere"}, "data is no hyperparameter: it comes from a channel"),
    ({"save_every": "0"}, "save_every must be a whole number"),
    ({"variant": "x" * 3000}, "unknown variant"),
]


@pytest.mark.parametrize(("hyperparameters", "sentence"), FAILURES)
def test_a_job_that_fails_says_why(job, tmp_path, hyperparameters, sentence):
    job(**hyperparameters)
    assert main(environment(tmp_path)) == 1
    reason = (tmp_path / "output" / "failure").read_text()
    assert sentence in reason
    assert len(reason) <= MAX_FAILURE_CHARACTERS
    assert not (tmp_path / "model").exists()


def test_a_failure_that_nobody_foresaw_has_its_class(job, tmp_path, monkeypatch):
    def run(*_):
        raise MemoryError("too large")

    monkeypatch.setattr(training, "run", run)
    assert main(environment(tmp_path)) == 1
    assert (tmp_path / "output" / "failure").read_text() == "MemoryError: too large"


def test_channels_that_do_not_fit_are_named(job, tmp_path):
    channel = tmp_path / "input" / "data" / "training"
    channel.mkdir(parents=True)
    with pytest.raises(TrainingError, match="channel training must hold one of"):
        run_job(tmp_path)
    with pytest.raises(TrainingError, match="there is no channel model"):
        run_job(tmp_path / "empty")


@pytest.mark.parametrize("text", ["{", "[]", '{"steps": 3}'])
def test_hyperparameters_of_another_form_are_refused(job, tmp_path, text):
    (tmp_path / "input" / "config" / "hyperparameters.json").write_text(text)
    with pytest.raises(TrainingError, match=r"hyperparameters\.json"):
        run_job(tmp_path)


def test_the_image_can_run_the_script(tmp_path):
    script = REPOSITORY / "container" / "train"
    assert os.access(script, os.X_OK)
    done = subprocess.run([sys.executable, str(script)], env={**os.environ, **environment(tmp_path)}, timeout=60)
    assert done.returncode == 1
    assert "there is no channel model" in (tmp_path / "output" / "failure").read_text()


def test_the_command_line_is_read_without_torch():
    code = "import sys, container.train_cli, container.training_job; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
