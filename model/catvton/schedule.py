"""The steps of a call, computed before the first one: a loop that never reads back from the device."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any, Protocol, Union

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor

Generators = Union[torch.Generator, list[torch.Generator], None]

SOLVER_OF: dict[str, Any] = {"dpm++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}


class Steps(Protocol):
    """The steps of one call.

    Attributes:
        timesteps: (N,) on the device, for the UNet.
    """

    timesteps: torch.Tensor

    def scaled(self, latents: torch.Tensor, index: int) -> torch.Tensor:
        """The latents as the UNet wants them at a step."""

    def after(self, latents: torch.Tensor, prediction: torch.Tensor, index: int) -> torch.Tensor:
        """The latents after a step, given the prediction for them, both float32."""


class LinearSteps:
    """DDIM's steps: each is a sum of latents, prediction and noise with three numbers known beforehand.

    The noise is drawn here, by the same calls of the generator as `DDIMScheduler.step` makes one by one.

    Args:
        scheduler: with its timesteps set.
        like: the latents, (B, C, rows, columns) float32.
        generator: draws the noise.
        eta: share of fresh noise; 0 draws none.
    Source: DDIM (arXiv 2010.02502), equation 12.
    """

    def __init__(
        self,
        scheduler: DDIMScheduler,
        like: torch.Tensor,
        generator: Generators,
        eta: float,
    ) -> None:
        timesteps = [int(timestep) for timestep in scheduler.timesteps.tolist()]
        self._factors = [_factors(scheduler, timestep, eta) for timestep in timesteps]
        self._noise = [
            randn_tensor(like.shape, generator, device=like.device, dtype=like.dtype) for _ in timesteps if eta > 0
        ]
        self.timesteps = scheduler.timesteps.to(like.device)

    def scaled(self, latents: torch.Tensor, _index: int) -> torch.Tensor:
        """The latents themselves."""
        return latents

    def after(self, latents: torch.Tensor, prediction: torch.Tensor, index: int) -> torch.Tensor:
        """The latents after a step."""
        of_latents, of_prediction, of_noise = self._factors[index]
        latents = of_latents * latents + of_prediction * prediction
        return latents + of_noise * self._noise[index] if self._noise else latents


class SchedulerSteps:
    """The steps of any scheduler of diffusers, whose own table stays on the CPU.

    Args:
        scheduler: with its timesteps set, on the CPU.
        options: of each step.
        device: of the latents.
    """

    def __init__(self, scheduler: SchedulerMixin, options: dict[str, Any], device: torch.device) -> None:
        self._scheduler = scheduler
        self._options = options
        self.timesteps = scheduler.timesteps.to(device)

    def scaled(self, latents: torch.Tensor, index: int) -> torch.Tensor:
        """The latents at the scheduler's scale."""
        scaled: torch.Tensor = self._scheduler.scale_model_input(latents, self._scheduler.timesteps[index])
        return scaled

    def after(self, latents: torch.Tensor, prediction: torch.Tensor, index: int) -> torch.Tensor:
        """The latents after the scheduler's step."""
        timestep = self._scheduler.timesteps[index]
        stepped: tuple[torch.Tensor] = self._scheduler.step(
            prediction, timestep, latents, **self._options, return_dict=False
        )
        return stepped[0]


def most_steps(scheduler: SchedulerMixin, solver: str) -> int:
    """The most steps for which a solver by name has a timestep each, of those that the given scheduler was made for."""
    steps: int = scheduler.config.num_train_timesteps - scheduler.config.get("steps_offset", 0)
    return steps - (solver in SOLVER_OF)  # these leave out the last one, which is the picture itself


def solver_like(scheduler: SchedulerMixin, solver: str, steps: int) -> SchedulerMixin:
    """The scheduler for a solver by name, with the noise and the prediction of the given one, and so many steps set.

    Its own table is on the CPU.
    """
    if solver != "ddim":
        scheduler = SOLVER_OF[solver].from_config(scheduler.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of numpy, for how the solvers hand it their tables
        scheduler.set_timesteps(steps)
    return scheduler


def steps_of(scheduler: SchedulerMixin, like: torch.Tensor, generator: Generators, eta: float) -> Steps:
    """The steps of a scheduler whose timesteps are set, for latents like these.

    Args:
        scheduler: any of diffusers.
        like: the latents before the first step, (B, C, rows, columns) float32.
        generator: of the noise in the steps, for schedulers that draw any.
        eta: share of that noise, for schedulers that take it.
    """
    config = scheduler.config
    if isinstance(scheduler, DDIMScheduler) and not (config.clip_sample or config.thresholding):
        return LinearSteps(scheduler, like, generator, eta)
    taken = inspect.signature(scheduler.step).parameters
    options = {key: option for key, option in (("eta", eta), ("generator", generator)) if key in taken}
    return SchedulerSteps(scheduler, options, like.device)


def _factors(scheduler: DDIMScheduler, timestep: int, eta: float) -> tuple[float, float, float]:
    """What latents, prediction and noise are multiplied with in the step from a timestep."""
    before = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alphas: Sequence[float] = scheduler.alphas_cumprod
    alpha = float(alphas[timestep])
    alpha_before = float(alphas[before] if before >= 0 else scheduler.final_alpha_cumprod)
    beta, beta_before = 1 - alpha, 1 - alpha_before
    noise = eta * math.sqrt(beta_before / beta * (1 - alpha / alpha_before))
    to_picture, to_noise = _parts(scheduler.config.prediction_type, alpha)
    picture, direction = math.sqrt(alpha_before), math.sqrt(max(0.0, beta_before - noise**2))
    return (
        picture * to_picture[0] + direction * to_noise[0],
        picture * to_picture[1] + direction * to_noise[1],
        noise,
    )


def _parts(prediction_type: str, alpha: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """The clean picture and the noise as sums of latents and prediction."""
    signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
    if prediction_type == "epsilon":
        return (1 / signal, -noise / signal), (0.0, 1.0)
    if prediction_type == "v_prediction":
        return (signal, -noise), (noise, signal)
    return (0.0, 1.0), (1 / noise, -signal / noise)  # "sample"
