"""How a layer sees the canvas, whose upper half is the person and whose lower half is the garment.

Three kinds of layer look beyond a pixel: a convolution at the next row, a group norm at the mean and variance of the
whole canvas, an attention at every token. A step that works on the person's half alone takes what these need of the
garment's half from the latest step that worked on all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional

ROW_BELOW = (1, 1, 1, 0)  # zeros left, right and above; below stands the garment's first row


class WholeCanvas:
    """Every layer sees what it is given, which is all there is."""

    def convolve(self, convolution: torch.nn.Conv2d, features: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The convolution of (B, C, rows, columns) with that bias."""
        return functional.conv2d(features, convolution.weight, bias, convolution.stride, convolution.padding)

    def normalise(self, norm: torch.nn.GroupNorm, features: torch.Tensor) -> torch.Tensor:
        """The group norm of (B, C, rows, columns)."""
        return functional.group_norm(features, norm.num_groups, norm.weight, norm.bias, norm.eps)

    def attended(
        self, _attention: torch.nn.Module, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values, (B, heads, tokens, channels), that all queries meet."""
        return keys, values


WHOLE = WholeCanvas()


@dataclass
class GarmentFeatures:
    """What the layers of one forward showed of the garment's half, by layer.

    Attributes:
        rows: first row of what a convolution was given, (B, C, 1, columns).
        moments: mean and variance of each group, (B, groups) float32.
        tokens: keys and values, (B, heads, tokens, channels).
    """

    rows: dict[torch.nn.Module, torch.Tensor] = field(default_factory=dict)
    moments: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    tokens: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class RecordedCanvas(WholeCanvas):
    """The whole canvas; what its layers show of the garment's half is kept.

    Args:
        kept: filled.
    """

    def __init__(self, kept: GarmentFeatures) -> None:
        self._kept = kept

    def convolve(self, convolution: torch.nn.Conv2d, features: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As of the whole canvas."""
        middle = features.shape[-2] // 2
        self._kept.rows[convolution] = features[..., middle : middle + 1, :].clone()
        return super().convolve(convolution, features, bias)

    def normalise(self, norm: torch.nn.GroupNorm, features: torch.Tensor) -> torch.Tensor:
        """As of the whole canvas."""
        self._kept.moments[norm] = _moments(features[..., features.shape[-2] // 2 :, :], norm.num_groups)
        return super().normalise(norm, features)

    def attended(
        self, attention: torch.nn.Module, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As of the whole canvas."""
        middle = keys.shape[-2] // 2
        self._kept.tokens[attention] = (keys[..., middle:, :].clone(), values[..., middle:, :].clone())
        return keys, values


class PersonHalf(WholeCanvas):
    """The person's half of a canvas whose other half was recorded before.

    Args:
        kept: of the garment's half.
    """

    def __init__(self, kept: GarmentFeatures) -> None:
        self._kept = kept

    def convolve(self, convolution: torch.nn.Conv2d, features: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The person's half of the convolution of the canvas."""
        if convolution.stride != (1, 1):  # a step of two never reaches beyond an even number of rows
            return super().convolve(convolution, features, bias)
        joined = torch.cat([features, self._kept.rows[convolution]], dim=-2)
        return functional.conv2d(functional.pad(joined, ROW_BELOW), convolution.weight, bias)

    def normalise(self, norm: torch.nn.GroupNorm, features: torch.Tensor) -> torch.Tensor:
        """The person's half, by the mean and variance of the canvas."""
        mean, variance = _moments(features, norm.num_groups)
        garment_mean, garment_variance = self._kept.moments[norm]
        variance = (variance + garment_variance) / 2 + ((mean - garment_mean) / 2).square()
        mean = (mean + garment_mean) / 2
        per_group = features.shape[1] // norm.num_groups
        scale = (variance + norm.eps).rsqrt().repeat_interleave(per_group, 1) * norm.weight  # (B, C) float32
        shift = norm.bias - mean.repeat_interleave(per_group, 1) * scale
        scaled = features * scale.to(features.dtype)[..., None, None]
        return scaled + shift.to(features.dtype)[..., None, None]

    def attended(
        self, attention: torch.nn.Module, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The person's keys and values before the garment's."""
        garment_keys, garment_values = self._kept.tokens[attention]
        return torch.cat([keys, garment_keys], dim=-2), torch.cat([values, garment_values], dim=-2)


def _moments(features: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each group of (B, C, rows, columns): (B, groups) float32."""
    grouped = features.float().reshape(features.shape[0], groups, -1)
    variance, mean = torch.var_mean(grouped, dim=-1, correction=0)
    return mean, variance
