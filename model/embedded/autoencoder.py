"""Trains the embedded autoencoder's decoder on drawings: `vton train --part autoencoder`.

The encoder is the projection and never changes, so that whatever was trained on its latents stays valid. Every step
draws its own pictures from numbers that follow from the step: a run that was killed and resumed sees what an
uninterrupted one sees.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional

from model.embedded.autoencoder_weights import build, stages_of
from model.embedded.body import sample_figure
from model.embedded.figures import KINDS, TRAIN_SEEDS, draw_outfit, draw_person
from model.embedded.projection import Floats, Stage, encode, fit
from model.embedded.wardrobe import sample_outfit
from model.training_options import TrainingError

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import Decoder

__all__ = ["CHECK_SEEDS", "PROJECTION_SEEDS", "build", "decode", "picture", "psnr", "run"]

PROJECTION_SEEDS = TRAIN_SEEDS[:500]  # three pictures each; 24 seeds lose 4 dB
CHECK_SEEDS = TRAIN_SEEDS[-16:]  # kept out of the training, to see what has improved

_BATCH = 4
_RATE = 1e-3  # 2e-3 loses the linear inverse at once
_WARM_UP = 100  # steps
_LAST_RATE = 0.01  # of _RATE, where the decay ends
_BETAS = (0.9, 0.99)
_WEIGHT_DECAY = 1e-4
_LARGEST_GRADIENT = 1.0
_AVERAGE = 0.99  # of the weights before, in the moving average that is kept
_NOISE = 0.1  # largest deviation added to latents, whose own is 1: a UNet's are never exact
_ABSOLUTE, _EDGES = 0.1, 0.05  # weights in the loss beside the squared error
_GARMENTS = 0.125  # share of pictures that show no person; a try-on decodes people
_EVERY = 100  # steps from one check and checkpoint to the next

_STATE = "decoder.safetensors"
_LOG = "decoder.jsonl"
_RESULT = "vae"
_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by torch's names

_log = logging.getLogger(__name__)


@dataclass
class _Course:
    """One training: what it was asked for, and what changes from step to step.

    The autoencoder's own decoder is the moving average of the one that learns.
    """

    output: Path
    steps: int
    seed: int
    vae: AutoencoderKL
    stages: Sequence[Stage]
    decoder: Decoder
    optimizer: torch.optim.AdamW
    step: int = 0
    best: float = -math.inf  # dB


def run(output: Path, *, steps: int, seed: int, resume: bool, encoder: Path | None = None) -> None:
    """Train the decoder; `output/vae` holds the best so far in the layout of `from_pretrained`, float32.

    Args:
        output: folder for the result, the log and the checkpoint.
        steps: in all, resumed ones included.
        seed: of the first weights, the pictures and the noise.
        resume: go on from the checkpoint in `output`.
        encoder: folder of an autoencoder to begin with instead of fitting a projection.
    Raises:
        TrainingError: there is nothing to resume from, or it is of other options.
    """
    output.mkdir(parents=True, exist_ok=True)
    facts = _read_facts(output, steps, seed) if resume else {"step": 0, "best": -math.inf}
    first = output / _RESULT if resume else encoder
    if first is None:
        vae = build(fit(PROJECTION_SEEDS), seed=seed, inverse_seeds=PROJECTION_SEEDS[:16])
    else:
        vae = AutoencoderKL.from_pretrained(first, torch_dtype=torch.float32)
    vae = vae.eval().requires_grad_(False)
    decoder = copy.deepcopy(vae.decoder).requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=_RATE, betas=_BETAS, weight_decay=_WEIGHT_DECAY)
    course = _Course(output, steps, seed, vae, stages_of(vae), decoder, optimizer, int(facts["step"]), facts["best"])
    if resume:
        _restore(course)
    else:
        for stale in (_LOG, _STATE):
            (output / stale).unlink(missing_ok=True)
        _save_result(course)
    _train(course)


def picture(seed: int) -> Floats:
    """A drawing that the decoder learns from: (256, 192, 3) float32 RGB in [-1, 1]."""
    draw = np.random.default_rng((seed, len(KINDS)))  # `example` draws from the numbers below
    figure, outfit, of_garment = sample_figure(draw), sample_outfit(draw), draw.random() < _GARMENTS
    image = draw_outfit(outfit) if of_garment else draw_person(figure, outfit).image
    return np.asarray(image.astype(np.float32) / 127.5 - 1, np.float32)


def decode(decoder: Decoder, latents: torch.Tensor) -> torch.Tensor:
    """What `AutoencoderKL.decode` returns, computed in bfloat16 up to the last norm: (B, 3, H, W) float32."""
    with torch.autocast(latents.device.type, torch.bfloat16):
        hidden = decoder.mid_block(decoder.conv_in(latents))
        for block in decoder.up_blocks:
            hidden = block(hidden)
    # Colours pass the norm beside constants of 8, which in bfloat16 would leave them 1/32 apart.
    norm: torch.Tensor = decoder.conv_norm_out(hidden.float())
    last: torch.Tensor = decoder.conv_out(decoder.conv_act(norm))
    return last


def psnr(vae: AutoencoderKL, stages: Sequence[Stage], seeds: Sequence[int]) -> float:
    """Of all pictures together, dB, in float32."""
    squared = 0.0
    for seed in seeds:
        wanted, latents = _tensors(stages, [seed])
        with torch.no_grad():
            squared += float(functional.mse_loss(vae.decode(latents).sample.clamp(-1, 1), wanted)) / 4
    return -10 * math.log10(squared / len(seeds))


def _train(course: _Course) -> None:
    losses: list[float] = []
    started = time.monotonic()
    while course.step < course.steps:
        losses.append(_take_step(course))
        course.step += 1
        if course.step % _EVERY == 0 or course.step == course.steps:
            line = {"step": course.step, "loss": float(np.mean(losses)), "seconds": time.monotonic() - started}
            _check(course, line)
            losses.clear()


def _take_step(course: _Course) -> float:
    """Change the weights once, as the number of the step says; returns the loss before."""
    draw = np.random.default_rng((course.seed, course.step))
    noise = torch.Generator().manual_seed(int(draw.integers(2**62)))
    seeds = draw.integers(TRAIN_SEEDS.start, CHECK_SEEDS.start, _BATCH)
    wanted, latents = _tensors(course.stages, [int(seed) for seed in seeds])
    deviation = _NOISE * torch.rand(_BATCH, 1, 1, 1, generator=noise)
    latents = latents + deviation * torch.randn(latents.shape, generator=noise)
    for group in course.optimizer.param_groups:
        group["lr"] = _rate(course.step, course.steps)
    loss = _loss(decode(course.decoder, latents), wanted)
    course.optimizer.zero_grad()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(course.decoder.parameters(), _LARGEST_GRADIENT)
    course.optimizer.step()
    with torch.no_grad():
        for mean, weight in zip(course.vae.decoder.parameters(), course.decoder.parameters()):
            mean.lerp_(weight, 1 - min(_AVERAGE, course.step / (course.step + 1)))
    return float(loss.detach())


def _tensors(stages: Sequence[Stage], seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (B, 3, 256, 192) and their latents (B, 32, 16, 12)."""
    pictures = np.stack([picture(seed) for seed in seeds])
    wanted, latents = (torch.from_numpy(array).permute(0, 3, 1, 2) for array in (pictures, encode(stages, pictures)))
    return wanted.contiguous(), latents.contiguous()


def _loss(shown: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared and absolute error, and that of the differences between neighbours: plain areas plain, edges sharp."""
    wrong = shown - wanted
    edges = wrong.diff(dim=-1).abs().mean() + wrong.diff(dim=-2).abs().mean()
    return wrong.square().mean() + _ABSOLUTE * wrong.abs().mean() + _EDGES * edges


def _rate(step: int, steps: int) -> float:
    """Constant for half of the steps, then a cosine."""
    decay = max(0.0, 2 * step / steps - 1)
    share = _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * decay)) / 2
    return _RATE * min(1.0, (step + 1) / _WARM_UP) * share


def _check(course: _Course, line: dict[str, float]) -> None:
    """Measure, log, keep the result if it is the best so far, and write a checkpoint."""
    line["psnr"] = psnr(course.vae, course.stages, CHECK_SEEDS)
    if line["psnr"] > course.best:
        course.best = line["psnr"]
        _save_result(course)
    _save_checkpoint(course)
    with (course.output / _LOG).open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
    _log.info("decoder_trained", extra=line)


def _save_result(course: _Course) -> None:
    fresh, result = course.output / f"{_RESULT}.new", course.output / _RESULT
    shutil.rmtree(fresh, ignore_errors=True)
    course.vae.save_pretrained(fresh)
    shutil.rmtree(result, ignore_errors=True)
    fresh.rename(result)


def _save_checkpoint(course: _Course) -> None:
    tensors = {}
    for name, weight in course.decoder.named_parameters():
        tensors[f"weight.{name}"] = weight.detach()
        tensors[f"average.{name}"] = course.vae.decoder.get_parameter(name)
        tensors.update({f"{moment}.{name}": course.optimizer.state[weight][moment] for moment in _MOMENTS})
    facts = {"step": course.step, "steps": course.steps, "seed": course.seed, "best": course.best}
    # The facts lie in the same file as the tensors, so that one rename changes both.
    fresh = course.output / f"{_STATE}.new"
    save_file(tensors, fresh, metadata={"facts": json.dumps(facts)})
    fresh.replace(course.output / _STATE)


def _read_facts(output: Path, steps: int, seed: int) -> dict[str, float]:
    try:
        with safe_open(output / _STATE, "pt") as state:
            facts: dict[str, float] = json.loads(state.metadata()["facts"])
    except (OSError, SafetensorError) as exc:
        raise TrainingError(f"{output} holds no checkpoint to resume from: {exc}") from exc
    if (facts["steps"], facts["seed"]) != (steps, seed):
        raise TrainingError(f"{output} was begun with {facts['steps']:.0f} steps and seed {facts['seed']:.0f}")
    return facts


def _restore(course: _Course) -> None:
    tensors = load_file(course.output / _STATE)
    for name, weight in course.decoder.named_parameters():
        weight.data.copy_(tensors[f"weight.{name}"])
        course.vae.decoder.get_parameter(name).copy_(tensors[f"average.{name}"])
        moments = {moment: tensors[f"{moment}.{name}"].clone() for moment in _MOMENTS}
        course.optimizer.state[weight] = {"step": torch.tensor(float(course.step)), **moments}
