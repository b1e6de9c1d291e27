"""The UNet of CatVTON: a stock `UNet2DConditionModel` without cross-attention.

A block adds `attn2(norm2(h))` to `h`. CatVTON has no text, and its `attn2` returns what it is given, so a block adds
`norm2(h)` itself: leaving the term out would be another model.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import torch

# diffusers takes a saved component for a model only if ModelMixin is a name in the module of the component's class.
from diffusers import ModelMixin, UNet2DConditionModel

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
    """

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"\.attn2\."]

    # diffusers reads the names of a config off the signature that wraps() hands on.
    @functools.wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if getattr(module, "attn2", None) is not None:
                module.attn2 = SkippedAttention()


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
