"""A training job of SageMaker: its folders in, weights or the reason of a failure out."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.training_options import ATTENTION_ONLY, FIGURES, Course, TrainingError, TrainingOptions, parse

BASE_DIR = "/opt/ml"
BASE_VARIABLE = "SAGEMAKER_BASE_DIR"  # of SageMaker's own toolkits; names another place than BASE_DIR
MANIFESTS = ("manifest.csv", "manifest.jsonl")  # in the channel `training`; without the channel, figures are drawn
VAE_FOLDER = "sd-vae-ft-mse"  # in the channel `model`
MAX_FAILURE_CHARACTERS = 1024  # SageMaker shows no more
FROM_CHANNELS = ("data", "weights", "vae", "unet")
COURSE_NUMBERS = ("save_every", "sample_every")


def main(environ: Mapping[str, str]) -> int:
    """Run the job of a container; 0 when it is done or was stopped with a checkpoint, 1 when it failed."""
    base = Path(environ.get(BASE_VARIABLE, BASE_DIR))
    try:
        run_job(base)
    except Exception as exc:  # the platform learns the reason from the file alone
        sentence = str(exc) if isinstance(exc, TrainingError) else f"{type(exc).__name__}: {exc}"
        failure = base / "output" / "failure"
        failure.parent.mkdir(parents=True, exist_ok=True)
        failure.write_text(sentence[:MAX_FAILURE_CHARACTERS], encoding="utf-8")
        sys.stderr.write(sentence + "\n")
        return 1
    return 0


def run_job(base: Path) -> None:
    """Train as `input/` says, go on from `checkpoints/` if it holds any, and write `model/` when it comes to its end.

    Hyperparameters are the names of `TrainingOptions`, save_every and sample_every. The channel `training` holds a
    manifest and its pictures; the channel `model` holds the published weights, or for method from-scratch a VAE.

    Args:
        base: /opt/ml.
    Raises:
        TrainingError: a hyperparameter or a channel does not fit; the text names it.
    """
    output = base / "checkpoints"
    options, numbers = _read_options(base / "input")
    training = importlib.import_module("model.catvton.training")
    resume = importlib.import_module("model.catvton.training_state").has_state(output)
    with tempfile.TemporaryDirectory() as latents:  # they are made again rather than uploaded with the checkpoints
        course = Course(output, resume=resume, latents=Path(latents), **numbers)
        if not training.run(options, course):
            return
    shutil.copytree(output / "export", base / "model", dirs_exist_ok=True)
    for name in ("sheets", "loss.jsonl"):
        _copy(output / name, base / "output" / "data" / name)


def _read_options(folder: Path) -> tuple[TrainingOptions, dict[str, Any]]:
    """Options and the numbers of the course, from `input/`."""
    texts = _hyperparameters(folder / "config" / "hyperparameters.json")
    for name in FROM_CHANNELS:
        if name in texts:
            raise TrainingError(f"{name} is no hyperparameter: it comes from a channel")
    numbers = {name: _whole_number(name, texts.pop(name)) for name in COURSE_NUMBERS if name in texts}
    given = parse(texts)
    method = given.pop("method", ATTENTION_ONLY)
    model = folder / "data" / "model"
    if method == ATTENTION_ONLY:
        given["weights"] = str(model)
    else:
        given["vae"] = str(model / VAE_FOLDER)
    if not model.is_dir():
        raise TrainingError(f"there is no channel model: {method} training starts from the weights in it")
    return TrainingOptions.of_method(method, data=_data(folder / "data" / "training"), **given), numbers


def _hyperparameters(path: Path) -> dict[str, str]:
    try:
        texts: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as exc:
        raise TrainingError(f"{path} cannot be read as JSON: {exc}") from exc
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise TrainingError(f"{path} must hold one JSON object of texts")
    return texts


def _data(channel: Path) -> str:
    if not channel.is_dir():
        return FIGURES
    found = [channel / name for name in MANIFESTS if (channel / name).is_file()]
    if len(found) != 1:
        raise TrainingError(f"the channel training must hold one of {', '.join(MANIFESTS)}")
    return str(found[0])


def _whole_number(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or (name == "save_every" and int(text) < 1):
        raise TrainingError(f"{name} must be a whole number, not {text!r}")
    return int(text)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.is_file():
        shutil.copyfile(source, target)
