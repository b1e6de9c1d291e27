"""CatVTON's loss: a diffusion model over the person and the garment side by side in one latent picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import torch
from diffusers import DDIMScheduler

from model.catvton.latents import LatentPairs
from model.training_options import TrainingOptions

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (UNet input, timesteps) -> prediction


@dataclass(frozen=True)
class Exercise:
    """One batch with its noise; everything float32 on one device.

    Attributes:
        canvas: (B, C, 2h, w), the true person above the garment, without noise.
        condition: (B, 1 + C, 2h, w), what the UNet is shown; the garment is zero where it is hidden.
        covered: (B, 1, h, w), 1 where cloth is repainted.
        noise: like canvas.
        timesteps: (B,) int64.
    """

    canvas: torch.Tensor
    condition: torch.Tensor
    covered: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor


@dataclass(frozen=True)
class Loss:
    """Of one batch.

    Attributes:
        weighted: scalar, what is minimised.
        in_mask: scalar, mean squared error where cloth is repainted.
    """

    weighted: torch.Tensor
    in_mask: torch.Tensor


def pick(count: int, batch: int, step: int, seed: int) -> list[int]:
    """The places of a step's pairs: every pair once per round through all of them, each round in another order."""
    first = step * batch
    orders = {
        number: np.random.default_rng((seed, 0, number)).permutation(count)
        for number in range(first // count, (first + batch - 1) // count + 1)
    }
    return [int(orders[at // count][at % count]) for at in range(first, first + batch)]


def exercise(
    latents: LatentPairs, options: TrainingOptions, scheduler: DDIMScheduler, step: int, device: torch.device
) -> Exercise:
    """The batch of a step. It follows from the seed and the step alone, so a resumed run goes on as it was."""
    places = pick(len(latents), options.batch, step, options.seed)
    draw = torch.Generator().manual_seed(int(np.random.default_rng((options.seed, 1, step)).integers(2**62)))
    condition = torch.from_numpy(latents.condition[places]).float()  # (B, 1 + C, 2h, w)
    target = torch.from_numpy(latents.target[places]).float()  # (B, C, h, w)
    rows = target.shape[-2]
    canvas = torch.cat([target, condition[:, 1:, rows:]], dim=-2)
    hidden = torch.rand(options.batch, generator=draw) < options.condition_dropout
    condition[hidden, 1:, rows:] = 0
    timesteps = _timesteps(options, scheduler.config.num_train_timesteps, draw)
    noise = torch.randn(canvas.shape, generator=draw)
    covered = torch.from_numpy(latents.covered[places]).float()
    return Exercise(*(tensor.to(device) for tensor in (canvas, condition, covered, noise, timesteps)))


def loss(batch: Exercise, predict: Predict, options: TrainingOptions, scheduler: DDIMScheduler) -> Loss:
    """The weighted squared error of the UNet's prediction.

    Args:
        batch: of `exercise`.
        predict: the UNet, from its input of (B, 2C + 1, 2h, w).
        options: weights of the regions, and DREAM.
        scheduler: says what is predicted, and how much noise a timestep has.
    """
    noise = batch.noise
    if options.dream >= 0:
        noise = _rectified(batch, predict, options.dream, scheduler)
    noisy = scheduler.add_noise(batch.canvas, noise, batch.timesteps)
    aim = noise
    if scheduler.config.prediction_type == "v_prediction":
        aim = scheduler.get_velocity(batch.canvas, noise, batch.timesteps)
    predicted = predict(torch.cat([noisy, batch.condition], dim=1), batch.timesteps).float()
    error = (predicted - aim).square()  # (B, C, 2h, w)
    person = 1 + (options.mask_weight - 1) * batch.covered
    weights = torch.cat([person, torch.full_like(person, options.garment_weight)], dim=-2)  # (B, 1, 2h, w)
    repainted = batch.covered.sum().clamp(min=1) * error.shape[1]
    in_mask = (error[..., : person.shape[-2], :] * batch.covered).sum() / repainted
    return Loss((error * weights).mean(), in_mask.detach())


def _timesteps(options: TrainingOptions, count: int, draw: torch.Generator) -> torch.Tensor:
    uniform = torch.rand(options.batch, generator=draw)
    noisy = torch.rand(options.batch, generator=draw) < options.noisy_share
    drawn: torch.Tensor = torch.where(noisy, uniform.sqrt(), uniform).mul(count).long().clamp(max=count - 1)
    return drawn


@torch.no_grad()
def _rectified(batch: Exercise, predict: Predict, power: float, scheduler: Any) -> torch.Tensor:  # noqa: ANN401
    """The noise moved away from what the UNet takes for it now, so that training meets what sampling meets.

    Source: DREAM (arXiv 2312.00210): by the scale sqrt(1 - alpha) ** power.
    """
    alpha = scheduler.alphas_cumprod.to(batch.noise.device)[batch.timesteps].view(-1, 1, 1, 1)
    noisy = scheduler.add_noise(batch.canvas, batch.noise, batch.timesteps)
    predicted = predict(torch.cat([noisy, batch.condition], dim=1), batch.timesteps).float()
    if scheduler.config.prediction_type == "v_prediction":
        predicted = alpha.sqrt() * predicted + (1 - alpha).sqrt() * noisy
    rectified: torch.Tensor = batch.noise + (1 - alpha).sqrt() ** power * (batch.noise - predicted)
    return rectified
