"""The pyramid of features that DensePose reads pictures with: a ResNet-50 whose maps are merged from coarse to fine.

Every module bears the name that the published weights give it. Maps are BCHW.

Source: ResNet (arXiv 1512.03385) with the stride in the first convolution of a block; FPN (arXiv 1612.03144).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 256  # channels of the pyramid
NORM_EPSILON = 1e-5
STAGES = (
    ("res2", 64, 64, 3),
    ("res3", 256, 128, 4),
    ("res4", 512, 256, 6),
    ("res5", 1024, 512, 3),
)  # name, channels in, channels of its 3x3s, blocks


class _FrozenNorm(nn.Module):
    """A batch norm with the statistics of its training."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, features: Tensor) -> Tensor:
        """The same shape."""
        return functional.batch_norm(
            features, self.running_mean, self.running_var, self.weight, self.bias, eps=NORM_EPSILON
        )


class Convolution(nn.Conv2d):
    """A convolution that keeps the size at stride 1, with a bias or a frozen norm."""

    def __init__(self, taken: int, given: int, kernel: int, *, stride: int = 1, normed: bool = False) -> None:
        super().__init__(taken, given, kernel, stride, padding=kernel // 2, bias=not normed)
        self.norm = _FrozenNorm(given) if normed else None

    def forward(self, features: Tensor) -> Tensor:
        """(B, taken, H, W) to (B, given, H/stride, W/stride)."""
        result = super().forward(features)
        return result if self.norm is None else self.norm(result)

    def fold_norm(self) -> None:
        """Put the norm, if there is one, into the weight and a bias."""
        if self.norm is None:
            return
        scale = self.norm.weight.double() / (self.norm.running_var.double() + NORM_EPSILON).sqrt()
        bias = self.norm.bias.double() - self.norm.running_mean.double() * scale
        weight = self.weight.double() * scale[:, None, None, None]
        self.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        self.bias = nn.Parameter(bias.to(self.weight.dtype), requires_grad=False)
        self.norm = None


class RectifiedConvolution(Convolution):
    def forward(self, features: Tensor) -> Tensor:
        """As a convolution, negative values set to 0."""
        return super().forward(features).relu_()


class _Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = Convolution(3, 64, 7, stride=2, normed=True)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 64, H/4, W/4)."""
        return functional.max_pool2d(self.conv1(pixels).relu_(), 3, stride=2, padding=1)


class _Bottleneck(nn.Module):
    """A residual block whose first 1x1 convolution carries the stride."""

    def __init__(self, taken: int, narrow: int, *, stride: int) -> None:
        super().__init__()
        given = 4 * narrow
        self.shortcut = Convolution(taken, given, 1, stride=stride, normed=True) if taken != given else None
        self.conv1 = Convolution(taken, narrow, 1, stride=stride, normed=True)
        self.conv2 = Convolution(narrow, narrow, 3, normed=True)
        self.conv3 = Convolution(narrow, given, 1, normed=True)

    def forward(self, features: Tensor) -> Tensor:
        """(B, taken, H, W) to (B, 4 narrow, H/stride, W/stride)."""
        result = self.conv2(self.conv1(features).relu_()).relu_()
        shortcut = features if self.shortcut is None else self.shortcut(features)
        summed: Tensor = self.conv3(result).add_(shortcut).relu_()
        return summed


class _ResNet50(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _Stem()
        for name, taken, narrow, blocks in STAGES:
            first = _Bottleneck(taken, narrow, stride=1 if name == "res2" else 2)
            rest = [_Bottleneck(4 * narrow, narrow, stride=1) for _ in range(blocks - 1)]
            self.add_module(name, nn.Sequential(first, *rest))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """res2 to res5: 256 to 2048 channels, strides 4 to 32."""
        maps = [self.stem(pixels)]
        for name, *_ in STAGES:
            maps.append(self.get_submodule(name)(maps[-1]))
        return maps[1:]


class FeaturePyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bottom_up = _ResNet50()
        for level, (_, _, narrow, _) in enumerate(STAGES, start=2):
            self.add_module(f"fpn_lateral{level}", Convolution(4 * narrow, WIDTH, 1))
            self.add_module(f"fpn_output{level}", Convolution(WIDTH, WIDTH, 3))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """p2 to p6, 256 channels each."""
        maps: list[Tensor] = []
        merged = None
        for level, features in reversed(list(enumerate(self.bottom_up(pixels), start=2))):
            lateral = self.get_submodule(f"fpn_lateral{level}")(features)
            if merged is not None:
                lateral += functional.interpolate(merged, scale_factor=2.0, mode="nearest")
            merged = lateral
            maps.insert(0, self.get_submodule(f"fpn_output{level}")(merged))
        return [*maps, maps[-1][:, :, ::2, ::2]]
