"""The UNet of CatVTON: the modules of a stock `UNet2DConditionModel` without cross-attention, and our own forward.

A block adds `attn2(norm2(h))` to `h`. CatVTON has no text, and its `attn2` returns what it is given, so a block adds
`norm2(h)` itself: leaving the term out would be another model.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch

# diffusers takes a saved component for a model only if ModelMixin is a name in the module of the component's class.
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from model.catvton.halves import WHOLE, WholeCanvas
from model.catvton.network import DeepFeatures, check_architecture, predict, time_shifts

__all__ = ["ModelMixin", "SkippedAttention", "TryOnUNet", "without_cross_attention"]


class SkippedAttention(torch.nn.Module):
    """Stands where a cross-attention was; has no parameters."""

    def forward(self, hidden_states: torch.Tensor, *_args: object, **_kwargs: object) -> torch.Tensor:
        """The hidden states, (B, tokens, channels), as they came."""
        return hidden_states


class TryOnUNet(UNet2DConditionModel):  # type: ignore[misc]
    """A `UNet2DConditionModel` whose blocks have a `SkippedAttention` for `attn2`.

    Takes the arguments of `UNet2DConditionModel`. Saves and loads as any diffusers model; `attn2` weights of a file
    written by the stock class are not read.

    Raises:
        ValueError: the arguments describe a UNet that computes something else than CatVTON's.
    """

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"\.attn2\."]

    # diffusers reads the names of a config off the signature that wraps() hands on.
    @functools.wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        check_architecture(self.config)
        for module in self.modules():
            if getattr(module, "attn2", None) is not None:
                module.attn2 = SkippedAttention()

    def time_shifts(self, timesteps: torch.Tensor) -> torch.Tensor:
        """What each of (N,) timesteps adds inside the UNet: (N, channels), a row of which `forward` takes."""
        return time_shifts(self, timesteps.to(self.device)).to(timesteps.device)  # weights may be waiting elsewhere

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: None = None,
        *,
        shifts: torch.Tensor | None = None,
        canvas: WholeCanvas = WHOLE,
        deep: DeepFeatures | None = None,
        return_dict: bool = True,
    ) -> Any:  # noqa: ANN401 - diffusers has no types
        """The prediction for noisy latents and their condition.

        Args:
            sample: (B, in_channels, rows, columns).
            timestep: of all, or (B,).
            encoder_hidden_states: there is no text.
            shifts: (1, channels), the timestep's row of `time_shifts`, where it was computed before.
            canvas: how the layers see the canvas.
            deep: keeps, or brings, what lies below the last layer.
            return_dict: False returns a tuple.
        Returns:
            (B, out_channels, rows, columns).
        """
        if shifts is None:
            shifts = self.time_shifts(torch.as_tensor(timestep, device=sample.device).reshape(-1))
        predicted = predict(self, sample, shifts, canvas, deep)
        return UNet2DConditionOutput(sample=predicted) if return_dict else (predicted,)


def without_cross_attention(unet: UNet2DConditionModel) -> TryOnUNet:
    """The same UNet without cross-attention.

    Args:
        unet: left as it is.
    Returns:
        The UNet itself if it is a `TryOnUNet`, else a new one that shares every other tensor with it.
    """
    stripped: TryOnUNet = unet
    if isinstance(unet, TryOnUNet):
        return stripped
    with torch.device("meta"):
        stripped = TryOnUNet.from_config(unet.config)
    kept = {key: tensor for key, tensor in unet.state_dict().items() if ".attn2." not in key}
    stripped.load_state_dict(kept, assign=True)
    stripped.train(unet.training)
    return stripped
