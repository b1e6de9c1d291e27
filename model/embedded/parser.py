"""Reads a drawn figure: what each pixel shows, and what must be repainted for each type of garment.

The masks are outputs of the network beside the labels, not derived from them: how far the loosest garment would reach
depends on the pose, which labels alone do not give.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional

from model.embedded.canvas import UNITS_WH
from model.embedded.people import LABELS
from model.interface import Image, MaskerOptions, PersonNotFound
from model.weights import WeightsError

WEIGHTS = Path(__file__).with_name("weights") / "parser.safetensors"
MASKS = ("upper", "lower", "overall", "outer")
MASK_OF = {"upper": "upper", "lower": "lower", "overall": "overall", "inner": "upper", "outer": "outer"}
MIN_PERSON_PX = 4_000  # at 192x256; of 128 unseen figures drawn whole the smallest has 8,200
STRIDE = 16  # px at 192x256 that one cell of the coarsest level stands for
MAX_ASPECT = 8.0  # the longest picture that the service takes; a longer one is not read whole

_WIDTHS = (24, 32, 64, 96)  # channels at 1/2, 1/4, 1/8 and 1/16 of the size
_OUTPUTS = len(LABELS) + len(MASKS)


class FigureParser(nn.Module):
    """A fully convolutional network: (B, 3, H, W) in [-1, 1], sides multiples of 16, to (B, 15, H, W) logits.

    The first 11 channels are those of `LABELS`, for a softmax; the others those of `MASKS`, each for a sigmoid.
    """

    def __init__(self) -> None:
        super().__init__()
        half, quarter, eighth, sixteenth = _WIDTHS
        self.stem = _convolution(12, half)
        self.down = nn.ModuleList(
            [
                nn.Sequential(_convolution(half, quarter, stride=2), _Residual(quarter)),
                nn.Sequential(_convolution(quarter, eighth, stride=2), _Residual(eighth)),
                nn.Sequential(_convolution(eighth, sixteenth, stride=2), _Residual(sixteenth, dilation=2)),
            ]
        )
        self.narrow = nn.ModuleList(
            [nn.Conv2d(wide, slim, 1) for wide, slim in ((sixteenth, eighth), (eighth, quarter), (quarter, half))]
        )
        self.up = nn.ModuleList([_Residual(width) for width in (eighth, quarter, half)])
        self.head = nn.Conv2d(half, 4 * _OUTPUTS, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits at the size of the input."""
        levels = [self.stem(functional.pixel_unshuffle(pixels, 2))]  # (B, 24, H/2, W/2)
        for down in self.down:
            levels.append(down(levels[-1]))
        features = levels.pop()  # (B, 96, H/16, W/16)
        for narrow, up in zip(self.narrow, self.up):
            features = functional.interpolate(narrow(features), scale_factor=2.0, mode="nearest")
            features = up(features + levels.pop())
        return functional.pixel_shuffle(self.head(features), 2)


class _Residual(nn.Module):
    """A convolution whose result is added to its input."""

    def __init__(self, width: int, *, dilation: int = 1) -> None:
        super().__init__()
        self.body = _convolution(width, width, dilation=dilation)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        result: torch.Tensor = features + self.body(features)
        return result


def _convolution(taken: int, given: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(taken, given, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(given), nn.ReLU(inplace=True))


@dataclass(frozen=True)
class Reading:
    """What the network sees in a picture, at the size at which it looked.

    Attributes:
        labels: HW uint8, index into LABELS.
        certainty: for each name of MASKS, HW uint8, 255 where it is certain that cloth is repainted.
    """

    labels: Image
    certainty: dict[str, Image]


class EmbeddedMasker:
    """The figure parser behind the `Masker` protocol; immutable after construction.

    Args:
        network: in evaluation mode, on the CPU.
    """

    def __init__(self, network: FigureParser) -> None:
        self._network = network

    def mask(self, person: Image, cloth_type: str) -> Image:
        """Where cloth is repainted for one type.

        Args:
            person: HWC uint8 RGB, upright.
            cloth_type: "upper", "lower", "overall", "inner" or "outer".
        Returns:
            HW uint8 0/255 at the person's size.
        Raises:
            PersonNotFound: the picture shows too little of a person.
            ValueError: another type, shape or dtype.
        """
        return self.masks(person, [cloth_type])[cloth_type]

    def masks(self, person: Image, cloth_types: Sequence[str]) -> dict[str, Image]:
        """What `mask` gives for each type, from one look at the picture."""
        unknown = [name for name in cloth_types if name not in MASK_OF]
        if unknown:
            raise ValueError(f"cloth_type must be one of {', '.join(MASK_OF)}, not {unknown[0]!r}")
        seen = read(self._network, person)
        visible = int(np.count_nonzero(seen.labels))
        if visible < MIN_PERSON_PX:
            raise PersonNotFound(f"{visible} pixels of a person at {UNITS_WH[0]}x{UNITS_WH[1]}, fewer than needed")
        size_wh = (person.shape[1], person.shape[0])
        return {name: _enlarged(seen.certainty[MASK_OF[name]], size_wh) for name in cloth_types}

    def labels(self, person: Image) -> Image:
        """What each pixel shows: HW uint8, index into LABELS, at the person's size."""
        size_wh = (person.shape[1], person.shape[0])
        return np.asarray(cv2.resize(read(self._network, person).labels, size_wh, interpolation=cv2.INTER_NEAREST))


def load(options: MaskerOptions | None = None) -> EmbeddedMasker:
    """The masker with the weights of the repository, on the CPU, where it takes a tenth of a second.

    Args:
        options: none of them matters here.
    Raises:
        WeightsError: the file is missing, damaged or does not fit.
    """
    del options
    return EmbeddedMasker(load_parser(WEIGHTS))


def load_parser(path: Path) -> FigureParser:
    """The network with the weights of a file, float32 on the CPU in evaluation mode.

    Raises:
        WeightsError: the file cannot be read, or is not of this network.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            outputs = (stored.metadata() or {}).get("outputs")
            tensors = {key: stored.get_tensor(key).float() for key in stored.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as exc:
        raise WeightsError(f"{path} cannot be read as safetensors: {exc}") from exc
    if outputs != output_names():
        raise WeightsError(f"{path} was trained for other outputs: {outputs}")
    with torch.device("meta"):  # shapes without memory: every tensor is assigned
        network = FigureParser()
    counters = [name for name in network.state_dict() if name.endswith("num_batches_tracked")]  # unused, not stored
    tensors.update({name: torch.tensor(0) for name in counters})
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as exc:
        raise WeightsError(f"{path} does not fit: {exc}") from exc
    return network.eval()


def output_names() -> str:
    """The network's outputs in their order, as JSON; stored with the weights, which are worthless in another order."""
    return json.dumps({"labels": LABELS, "masks": MASKS})


def read(network: FigureParser, person: Image) -> Reading:
    """Look at a picture at the size at which a figure drawn whole is 192x256.

    Args:
        network: in evaluation mode.
        person: HWC uint8 RGB, any size.
    Raises:
        ValueError: another shape or dtype.
    """
    if person.ndim != 3 or person.shape[2] != 3 or person.dtype != np.uint8 or person.size == 0:
        raise ValueError(f"person must be HWC uint8 RGB and not empty, not {person.dtype} {person.shape}")
    looked_at = _resized(person)
    height, width = looked_at.shape[:2]
    padding = (0, -height % STRIDE, 0, -width % STRIDE)  # top, bottom, left, right
    padded = cv2.copyMakeBorder(looked_at, *padding, cv2.BORDER_REPLICATE)
    with torch.no_grad():
        logits = network(to_tensor(padded[None]))[0, :, :height, :width]  # (15, H, W)
    labels = logits[: len(LABELS)].argmax(0).to(torch.uint8).numpy()
    certain = logits[len(LABELS) :].sigmoid().mul(255).round().to(torch.uint8).numpy()
    return Reading(labels, dict(zip(MASKS, certain)))


def to_tensor(pictures: Image) -> torch.Tensor:
    """(B, H, W, 3) uint8 RGB as (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def _resized(person: Image) -> Image:
    """The whole picture, so small that 192x256 just fits in it."""
    height, width = person.shape[:2]
    scale = max(UNITS_WH[0] / width, UNITS_WH[1] / height)
    # Beyond the longest aspect the picture is squeezed: the work stays bounded.
    longest = MAX_ASPECT * max(UNITS_WH)
    size_wh = (min(round(width * scale), int(longest)), min(round(height * scale), int(longest)))
    shrinks = size_wh[0] < width
    return np.asarray(cv2.resize(person, size_wh, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR))


def _enlarged(certainty: Image, size_wh: tuple[int, int]) -> Image:
    grown = cv2.resize(certainty, size_wh, interpolation=cv2.INTER_LINEAR)
    return np.where(grown >= 128, np.uint8(255), np.uint8(0))
