"""One call's predictions: which branches and which layers are computed in a step, and what is reused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from model.catvton.halves import WHOLE, GarmentFeatures, PersonHalf, RecordedCanvas, WholeCanvas
from model.catvton.knobs import Knobs
from model.catvton.network import DeepFeatures

HALVES = "garment_interval above 1 needs a height whose latents can be halved at every level of the unet"


@dataclass
class Branch:
    """What one branch of guidance keeps between steps.

    Attributes:
        since: the step in which it was last computed whole, or None.
        garment: what the layers showed of the garment's half then.
        garment_prediction: of that half, (B, C, rows / 2, columns).
        deep: what the last layer was given then.
    """

    since: int | None = None
    garment: GarmentFeatures = field(default_factory=GarmentFeatures)
    garment_prediction: torch.Tensor | None = None
    deep: DeepFeatures = field(default_factory=DeepFeatures)


class Denoising:
    """The predictions of one call.

    Args:
        unet: a `TryOnUNet`.
        condition: (B or 2B, 1 + C, rows, columns), of both branches where guided, unconditional first.
        batch: B.
        guidance: scale; counts where the condition has two branches.
        knobs: what may be reused.
        timesteps: (N,), on the device.
    Raises:
        ValueError: as of `check_halves`.
    """

    def __init__(
        self,
        unet: Any,  # noqa: ANN401 - diffusers has no types
        condition: torch.Tensor,
        batch: int,
        guidance: float,
        knobs: Knobs,
        timesteps: torch.Tensor,
    ) -> None:
        check_halves(unet, condition.shape[-2] // 2, knobs, len(timesteps))
        self._unet = unet
        self._guidance = guidance
        self._knobs = knobs
        self._timesteps = timesteps
        self._shifts = unet.time_shifts(timesteps)  # (N, channels)
        self._condition = condition.to(unet.dtype)
        self._batch = batch
        self._guided_steps = knobs.guided_steps(len(timesteps)) if condition.shape[0] > batch else 0
        self._middle = condition.shape[-2] // 2
        self._branches: dict[str, Branch] = {}
        self._is_compiled = getattr(unet, "_compiled_call_impl", None) is not None

    def predict(self, latents: torch.Tensor, index: int) -> torch.Tensor:
        """The guided prediction for (B, C, rows, columns) latents at a step; float32."""
        if self._is_compiled:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        latents = latents.to(self._unet.dtype)
        with_garment = self._condition[-self._batch :]
        if index >= self._guided_steps:
            return self._branch("garment", latents, with_garment, index).float()
        if not self._knobs.person_only_unconditional:
            both = self._branch("both", torch.cat([latents] * 2), self._condition, index).float()
            unconditional, conditional = both.chunk(2)
            return unconditional + self._guidance * (conditional - unconditional)
        conditional = self._branch("garment", latents, with_garment, index).float()
        rows = slice(0, self._middle)
        without = self._condition[: self._batch, :, rows]
        unconditional = self._computed("person", latents[:, :, rows], without, index, WHOLE).float()
        person, garment = conditional[:, :, rows], conditional[:, :, self._middle :]
        return torch.cat([unconditional + self._guidance * (person - unconditional), garment], dim=-2)

    def _branch(self, name: str, latents: torch.Tensor, condition: torch.Tensor, index: int) -> torch.Tensor:
        """A prediction for the whole canvas, of which the garment's half may be an earlier step's."""
        if self._knobs.garment_interval == 1:
            return self._computed(name, latents, condition, index, WHOLE)
        branch = self._branches.setdefault(name, Branch())
        if branch.since is None or index - branch.since >= self._knobs.garment_interval:
            branch.since = index
            whole = self._computed(name, latents, condition, index, RecordedCanvas(branch.garment))
            branch.garment_prediction = whole[:, :, self._middle :]
            return whole
        rows = slice(0, self._middle)
        person = self._computed(name, latents[:, :, rows], condition[:, :, rows], index, PersonHalf(branch.garment))
        if branch.garment_prediction is None:
            raise RuntimeError("a branch that was computed has a prediction")
        return torch.cat([person, branch.garment_prediction], dim=-2)

    def _computed(
        self, name: str, latents: torch.Tensor, condition: torch.Tensor, index: int, canvas: WholeCanvas
    ) -> torch.Tensor:
        deep = None
        if self._knobs.deep_interval > 1:
            branch = self._branches.setdefault(name, Branch())
            deep, since = branch.deep, branch.since
            deep.reuse = since is not None and index - since < self._knobs.deep_interval
            branch.since = since if deep.reuse else index
        # What a replayed graph returns is overwritten by the next step's: what is kept longer is made outside of it.
        forward = self._unet.forward if self._is_compiled and isinstance(canvas, RecordedCanvas) else self._unet
        predicted: torch.Tensor = forward(
            torch.cat([latents, condition], dim=1),
            self._timesteps[index],
            encoder_hidden_states=None,
            shifts=self._shifts[index : index + 1],
            canvas=canvas,
            deep=deep,
            return_dict=False,
        )[0]
        if self._is_compiled and deep is not None and deep.kept is not None and not deep.reuse:
            deep.kept = deep.kept.clone()
        return predicted


def check_halves(unet: Any, rows: int, knobs: Knobs, steps: int) -> None:  # noqa: ANN401 - diffusers has no types
    """Raise ValueError where a step is to compute the person's half alone, and some level of the UNet has none.

    Args:
        unet: a `TryOnUNet`.
        rows: of the person's latents.
        knobs: of the call; with person_only_unconditional alone, the person is a canvas of its own, of any height.
        steps: of the call; the first computes both halves.
    """
    if knobs.garment_interval > 1 and steps > 1 and rows % 2 ** (len(unet.up_blocks) - 1):
        raise ValueError(HALVES)
