"""The network of Self-Correction for Human Parsing (Li et al., arXiv 1910.09777), for inference only.

A ResNet-101 of output stride 16, pyramid pooling over its last features, a decoder of the parsing features, a branch
of edge features, and the fusion of both, which gives the logits. Every norm is folded into the convolution before it,
so that a convolution has a weight and a bias; it keeps the name that it has in the published file.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

LEAKY_SLOPE = 0.01  # of every activation after the backbone
POOLED_SIDES = (1, 2, 3, 6)  # of the pyramid's average-pooled maps, cells
LAYERS = {  # name: blocks, width, stride, dilation
    "layer1": (3, 64, 1, 1),
    "layer2": (4, 128, 2, 1),
    "layer3": (23, 256, 2, 1),
    "layer4": (3, 512, 1, 2),
}
EXPANSION = 4  # a bottleneck gives that many times its width
STEM_CHANNELS = 128
CONTEXT_CHANNELS = 512
BRANCH_CHANNELS = 256
SHALLOW_CHANNELS = 48  # of the early features in the decoder


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a shortcut; the 3x3 carries the stride and the dilation."""

    def __init__(self, channels: int, width: int, *, stride: int, dilation: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=dilation, dilation=dilation)
        self.conv3 = nn.Conv2d(width, EXPANSION * width, 1)
        self.downsample = nn.Sequential(nn.Conv2d(channels, EXPANSION * width, 1, stride)) if project else nn.Identity()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) to (B, 4 * width, H / stride, W / stride)."""
        hidden = functional.relu_(self.conv1(features))
        hidden = functional.relu_(self.conv2(hidden))
        hidden = self.conv3(hidden)
        hidden += self.downsample(features)
        return functional.relu_(hidden)


class Context(nn.Module):
    """Pyramid pooling: the features beside their averages over 1, 4, 9 and 36 parts of the picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Conv2d(channels, CONTEXT_CHANNELS, 1), _leaky())
            for side in POOLED_SIDES
        )
        gathered = channels + len(POOLED_SIDES) * CONTEXT_CHANNELS
        self.bottleneck = nn.Sequential(nn.Conv2d(gathered, CONTEXT_CHANNELS, 3, padding=1), _leaky())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) to (B, 512, H, W)."""
        pooled = [_resize(stage(features), like=features) for stage in self.stages]
        fused: torch.Tensor = self.bottleneck(torch.cat([*pooled, features], dim=1))
        return fused


class Decoder(nn.Module):
    """The context, brought back to a quarter of the picture's size, beside the features of layer 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _unit(CONTEXT_CHANNELS, BRANCH_CHANNELS)
        self.conv2 = _unit(channels, SHALLOW_CHANNELS)
        self.conv3 = nn.Sequential(
            *_unit(BRANCH_CHANNELS + SHALLOW_CHANNELS, BRANCH_CHANNELS), *_unit(BRANCH_CHANNELS, BRANCH_CHANNELS)
        )

    def forward(self, context: torch.Tensor, shallow: torch.Tensor) -> torch.Tensor:
        """(B, 512, H/16, W/16) and (B, channels, H/4, W/4) to (B, 256, H/4, W/4)."""
        deep = _resize(self.conv1(context), like=shallow)
        features: torch.Tensor = self.conv3(torch.cat([deep, self.conv2(shallow)], dim=1))
        return features


class Edge(nn.Module):
    """What layers 1, 2 and 3 say of edges, all at a quarter of the picture's size."""

    def __init__(self, channels: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (_unit(count, BRANCH_CHANNELS) for count in channels)

    def forward(self, first: torch.Tensor, second: torch.Tensor, third: torch.Tensor) -> torch.Tensor:
        """Features at 1/4, 1/8 and 1/16 of the picture's size to (B, 768, H/4, W/4)."""
        edge = self.conv1(first)
        return torch.cat([edge, *(_resize(deep, like=edge) for deep in (self.conv2(second), self.conv3(third)))], dim=1)


class SchpNetwork(nn.Module):
    """Human parsing of one or more square pictures.

    Args:
        classes: how many labels there are, the background included.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, STEM_CHANNELS, 3, padding=1)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = [STEM_CHANNELS]
        for name, (blocks, width, stride, dilation) in LAYERS.items():
            self.add_module(name, _layer(channels[-1], width, blocks, stride=stride, dilation=dilation))
            channels.append(EXPANSION * width)
        _, first, second, third, fourth = channels
        self.context_encoding = Context(fourth)
        self.decoder = Decoder(first)
        self.edge = Edge((first, second, third))
        self.fushion = nn.Sequential(
            *_unit(4 * BRANCH_CHANNELS, BRANCH_CHANNELS), nn.Identity(), nn.Conv2d(BRANCH_CHANNELS, classes, 1)
        )

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        """Logits at a quarter of the size.

        Args:
            picture: (B, 3, H, W), normalised.
        Returns:
            (B, classes, ceil(H / 4), ceil(W / 4)).
        """
        stem = picture
        for convolution in (self.conv1, self.conv2, self.conv3):
            stem = functional.relu_(convolution(stem))
        first = self.layer1(self.maxpool(stem))
        second = self.layer2(first)
        third = self.layer3(second)
        context = self.context_encoding(self.layer4(third))
        features = torch.cat([self.decoder(context, first), self.edge(first, second, third)], dim=1)
        logits: torch.Tensor = self.fushion(features)
        return logits


def enlarge(features: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    """(B, C, h, w) resized bilinearly to (B, C, H, W), corner pixel onto corner pixel."""
    resized: torch.Tensor = functional.interpolate(features, size=size_hw, mode="bilinear", align_corners=True)
    return resized


def _layer(channels: int, width: int, blocks: int, *, stride: int, dilation: int) -> nn.Sequential:
    first = Bottleneck(channels, width, stride=stride, dilation=dilation, project=True)
    wide = EXPANSION * width
    rest = (Bottleneck(wide, width, stride=1, dilation=dilation, project=False) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def _unit(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 1), _leaky())


def _leaky() -> nn.LeakyReLU:
    return nn.LeakyReLU(LEAKY_SLOPE, inplace=True)


def _resize(features: torch.Tensor, *, like: torch.Tensor) -> torch.Tensor:
    return enlarge(features, (like.shape[-2], like.shape[-1]))
