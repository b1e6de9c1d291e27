"""The optimisers of a training: AdamW for every weight, or Muon for the matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Callable

import torch

from model.training_options import MUON, TrainingOptions

ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names
MUON_MOMENTS = ("momentum",)
MOMENTUM = 0.95
ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)  # a, b, c: singular values s -> a s + b s^3 + c s^5, five times, come near 1
ENDS = ("conv_in.", "conv_out.", "time_embedding.")  # what maps to and from other spaces stays with AdamW


class Muon(torch.optim.AdamW):
    """AdamW whose matrices step along the orthogonalised momentum: all directions of a matrix learn at one speed.

    A kernel of a convolution counts as the matrix (out, in * height * width). Each parameter group has a `share`, the
    factor between its learning rate and that of the schedule, and says whether it `is_matrix`.

    Source: K. Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient; those of matrices are gone afterwards."""
        for group in self.param_groups:
            for parameter in group["params"] if group["is_matrix"] else ():
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - MOMENTUM)
                ahead = parameter.grad.lerp(momentum, MOMENTUM).flatten(1)
                taller = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(orthogonalised(ahead).view_as(parameter), alpha=-group["lr"] * taller)
                parameter.grad = None  # AdamW has nothing to do with it
        return super().step(closure)  # type: ignore[no-any-return]


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with all its singular values brought to between 0.7 and 1.2.

    Newton and Schulz's iteration is a polynomial of the Gram matrix, which is the smaller one: it alone is iterated on.

    Args:
        matrix: (M, N) float32.
    Returns:
        (M, N) float32.
    """
    if matrix.shape[0] > matrix.shape[1]:
        tall: torch.Tensor = orthogonalised(matrix.T).T
        return tall
    scaled = matrix / matrix.norm().clamp(min=1e-12)
    gram = scaled @ scaled.T  # (M, M); in float32: a negative eigenvalue out of rounding would grow without bound
    identity = torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    polynomial: torch.Tensor = identity
    linear, cubic, quintic = QUINTIC
    for _ in range(ITERATIONS):
        factor = linear * identity + cubic * gram + quintic * (gram @ gram)
        polynomial = factor @ polynomial
        gram = factor @ gram @ factor
    brought: torch.Tensor = polynomial @ scaled
    return brought


def build_optimizer(weights: Mapping[str, torch.nn.Parameter], options: TrainingOptions) -> torch.optim.Optimizer:
    """The optimiser that the options name, over the weights to be trained."""
    common: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": (0.9, options.beta2),
        "weight_decay": options.weight_decay,
    }
    if options.optimizer != MUON:
        return torch.optim.AdamW([{"params": list(weights.values()), "share": 1.0}], **common)
    matrices = [weight for name, weight in weights.items() if _is_matrix(name, weight)]
    others = [weight for name, weight in weights.items() if not _is_matrix(name, weight)]
    share = options.muon_learning_rate / options.learning_rate
    groups = [
        {"params": matrices, "is_matrix": True, "share": share},
        {"params": others, "is_matrix": False, "share": 1.0},
    ]
    return Muon([group for group in groups if group["params"]], **common)


def moments_of(name: str, weight: torch.Tensor, options: TrainingOptions) -> tuple[str, ...]:
    """What the optimiser remembers of a weight, by the names in its state."""
    return MUON_MOMENTS if options.optimizer == MUON and _is_matrix(name, weight) else ADAMW_MOMENTS


def _is_matrix(name: str, weight: torch.Tensor) -> bool:
    return weight.ndim >= 2 and not name.startswith(ENDS)
