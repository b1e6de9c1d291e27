"""Human parsing with the published weights of SCHP (Li et al., arXiv 1910.09777).

Two sets of weights are published: of ATR with 18 labels and of LIP with 20.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import nn

from model.interface import BadPicture, Image
from model.maskers.affine import Letterbox, warp_image, warped_argmax
from model.maskers.schp_network import SchpNetwork, enlarge
from model.weights import WeightsError

SIDES = {18: 512, 20: 473}  # classes: side of the square that the network was trained on, px
CHANNEL_ORDERS = ("bgr", "rgb")
MEAN = (0.406, 0.456, 0.485)  # of ImageNet, in the order blue, green, red
STD = (0.225, 0.224, 0.229)
NORM_EPSILON = 1e-5
GAMMA_EPSILON = 1e-5  # of the norm with which the weights were trained, see `abs_gamma`
PREFIX = "module."  # of every published name, left by the parallel training
LAST = "fushion.3"  # the one convolution without a norm; "fushion" is spelt so in the files
NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
UNUSED = frozenset(  # heads that only the training needs
    f"{head}.{kind}" for head in ("decoder.conv4", "edge.conv4", "edge.conv5") for kind in ("weight", "bias")
)
RESAVED = {  # published name: the name in files saved from a module that counts activations and dropout as entries
    "decoder.conv3.2.weight": "decoder.conv3.3.weight",
    **{f"decoder.conv3.3.{kind}": f"decoder.conv3.4.{kind}" for kind in NORM_TENSORS},
    **{f"{LAST}.{kind}": f"fushion.4.{kind}" for kind in ("weight", "bias")},
}
STORED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMED_AT_MOST = 5  # tensors that one error lists

_LOG = logging.getLogger(__name__)


class SCHP:
    """One loaded parser. Immutable after load; called by one thread at a time.

    Attributes:
        classes: how many labels there are: 18 for ATR, 20 for LIP; 0 is the background.
        side: of the square that the network sees, px.
        network: the module, in evaluation mode on its device.
    """

    def __init__(self, network: SchpNetwork, classes: int) -> None:
        self.classes = classes
        self.side = SIDES[classes]
        self.network = network

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, torch.Tensor],
        device: str | torch.device = "cpu",
        *,
        dtype: torch.dtype | None = None,
        abs_gamma: bool = False,
    ) -> SCHP:
        """The parser with these weights; how many labels it has follows from them.

        Args:
            state_dict: the published tensors by name, with or without `module.`, or those of a re-saved file. The six
                tensors of heads that only the training needs and `num_batches_tracked` may be there or not. Unchanged.
            device: where the network runs.
            dtype: of the network: float32, float16 or bfloat16; None is float32.
            abs_gamma: scale norms by |gamma| + 1e-5, as the training did, instead of by gamma.
        Raises:
            WeightsError: a tensor is missing, left over, misshapen, not of floats or not finite; the text names it.
            ValueError: another dtype.
        """
        dtype = torch.float32 if dtype is None else dtype
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype}; one of: {', '.join(map(str, DTYPES))}")
        tensors = _published(state_dict)
        classes = len(tensors[f"{LAST}.weight"])
        with torch.device("meta"):
            network = SchpNetwork(classes)
        network.load_state_dict(_folded(network, tensors, dtype, abs_gamma=abs_gamma), assign=True)
        network.eval().requires_grad_(requires_grad=False)
        return cls(network.to(device), classes)

    @torch.inference_mode()
    def parse(self, image: Image, channel_order: str = "bgr") -> Image:
        """The label of every pixel.

        Args:
            image: HWC uint8 RGB, upright, any size.
            channel_order: in which the network gets the picture: "bgr", as it was trained, or "rgb".
        Returns:
            HW uint8 below `classes` at the image's size. A single pixel is background.
        Raises:
            ValueError: another shape, dtype or order.
            BadPicture: the network gave NaN or infinity.
        """
        _check(image, channel_order)
        height, width = image.shape[:2]
        if height == width == 1:
            return np.zeros((1, 1), np.uint8)
        logits = self.logits(image, channel_order)
        if not torch.isfinite(logits).all():
            raise BadPicture("the human parsing gave NaN or infinity")
        square = enlarge(logits[None], (self.side, self.side))[0]  # (classes, side, side)
        return warped_argmax(square, Letterbox(width, height, self.side).inverse, (width, height))

    @torch.inference_mode()
    def logits(self, image: Image, channel_order: str = "bgr") -> torch.Tensor:
        """What the network says of the picture, fitted into its square.

        Args:
            image: HWC uint8 RGB, upright, at least 2 px on one side.
            channel_order: in which the network gets the picture: "bgr", as it was trained, or "rgb".
        Returns:
            (classes, ceil(side / 4), ceil(side / 4)) float32 on the device.
        Raises:
            ValueError: another shape, dtype or order.
        """
        _check(image, channel_order)
        ordered = image[:, :, ::-1] if channel_order == "bgr" else image
        letterbox = Letterbox(image.shape[1], image.shape[0], self.side)
        square = warp_image(ordered, letterbox.forward, (self.side, self.side))
        weight = self.network.conv1.weight
        picture = normalised(torch.from_numpy(square).to(weight.device)).to(weight.dtype)
        logits: torch.Tensor = self.network(picture)[0].float()
        return logits


def normalised(square: torch.Tensor) -> torch.Tensor:
    """What the network expects of a picture.

    The statistics belong to BGR. They go by position, whatever the order, because the weights' users do so too.

    Args:
        square: (side, side, 3) uint8 on any device.
    Returns:
        (1, 3, side, side) float32.
    """
    mean, std = (torch.tensor(values, device=square.device) for values in (MEAN, STD))
    return ((square.float() / 255 - mean) / std).permute(2, 0, 1)[None]


def published_shapes(classes: int) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that is needed, by its published name without `module.`."""
    with torch.device("meta"):
        network = SchpNetwork(classes)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, convolution in _convolutions(network):
        shapes[f"{name}.weight"] = tuple(convolution.weight.shape)
        if name == LAST:
            shapes[f"{name}.bias"] = (convolution.out_channels,)
        else:
            shapes.update({f"{_norm_of(name)}.{kind}": (convolution.out_channels,) for kind in NORM_TENSORS})
    return shapes


def _check(image: Image, channel_order: str) -> None:
    if channel_order not in CHANNEL_ORDERS:
        raise ValueError(f"unknown channel order {channel_order!r}; one of: {', '.join(CHANNEL_ORDERS)}")
    shape: tuple[int, ...] = getattr(image, "shape", ())
    dtype = getattr(image, "dtype", type(image).__name__)
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise ValueError(f"the image must be HWC uint8 RGB, not {tuple(shape)} {dtype}")


def _published(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The needed tensors by their published names, without `module.`."""
    if not isinstance(state_dict, Mapping):
        raise WeightsError(f"the SCHP weights are a {type(state_dict).__name__}, not tensors by name")
    prefix = PREFIX if any(str(key).startswith(PREFIX) for key in state_dict) else ""
    # The name stands for a norm's scale in one numbering and for a convolution in the other.
    renames = RESAVED if getattr(state_dict.get(f"{prefix}decoder.conv3.3.weight"), "ndim", 0) == 4 else {}
    head = prefix + renames.get(f"{LAST}.weight", f"{LAST}.weight")
    shapes = published_shapes(_class_count(state_dict, head))
    keys = {prefix + renames.get(name, name): name for name in shapes}
    expected = {key: shapes[name] for key, name in keys.items()}
    known = set(expected).union(prefix + name for name in UNUSED)
    # The values are looked at only where everything else fits, because that takes a while.
    faults = [*_misfits(state_dict, expected, known)] or [*_bad_values(state_dict, expected)]
    if faults:
        more = f" and {len(faults) - NAMED_AT_MOST} more" if len(faults) > NAMED_AT_MOST else ""
        raise WeightsError(f"the SCHP weights do not fit: {'; '.join(faults[:NAMED_AT_MOST])}{more}")
    return {name: state_dict[key] for key, name in keys.items()}


def _class_count(state_dict: Mapping[str, torch.Tensor], head: str) -> int:
    if head not in state_dict:
        raise WeightsError(f"the SCHP weights do not fit: {head} is missing")
    shape = list(getattr(state_dict[head], "shape", ()))
    if len(shape) != 4 or shape[0] not in SIDES:
        raise WeightsError(
            f"the SCHP weights do not fit: {head} is {shape}, not of {' or '.join(map(str, SIDES))} classes"
        )
    return int(shape[0])


def _misfits(
    state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], known: Container[str]
) -> Iterator[str]:
    yield from (f"{key} is missing" for key in expected if key not in state_dict)
    for key, tensor in state_dict.items():
        if key not in known and not str(key).endswith(".num_batches_tracked"):
            yield f"{key} is unexpected"
        elif key in expected and not isinstance(tensor, torch.Tensor):
            yield f"{key} is a {type(tensor).__name__}, not a tensor"
        elif key in expected and tensor.dtype not in STORED_DTYPES:
            yield f"{key} is {tensor.dtype}, not of floats"
        elif key in expected and tuple(tensor.shape) != expected[key]:
            yield f"{key} is {list(tensor.shape)}, not {list(expected[key])}"


def _bad_values(state_dict: Mapping[str, torch.Tensor], keys: Iterable[str]) -> Iterator[str]:
    for key in keys:
        if not torch.isfinite(state_dict[key]).all():
            yield f"{key} is not finite"
        elif key.endswith(".running_var") and (state_dict[key] < 0).any():
            yield f"{key} is negative"


def _folded(
    network: SchpNetwork, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, *, abs_gamma: bool
) -> dict[str, torch.Tensor]:
    """The network's state: every norm in the convolution before it, computed in float64."""
    state: dict[str, torch.Tensor] = {}
    negative = 0
    for name, _ in _convolutions(network):
        weight = tensors[f"{name}.weight"].detach().cpu().double()
        if name == LAST:
            bias = tensors[f"{name}.bias"].detach().cpu().double()
        else:
            gamma, beta, mean, variance = (
                tensors[f"{_norm_of(name)}.{kind}"].detach().cpu().double() for kind in NORM_TENSORS
            )
            negative += int((gamma < 0).sum())
            gamma = gamma.abs() + GAMMA_EPSILON if abs_gamma else gamma
            scale = gamma / torch.sqrt(variance + NORM_EPSILON)
            weight, bias = weight * scale[:, None, None, None], beta - mean * scale
        state[f"{name}.weight"] = _converted(weight, f"{name}.weight", dtype)
        state[f"{name}.bias"] = _converted(bias, f"{name}.bias", dtype)
    _LOG.log(
        logging.WARNING if negative else logging.INFO, "schp_norms negative_gamma=%d abs_gamma=%s", negative, abs_gamma
    )
    return state


def _converted(tensor: torch.Tensor, key: str, dtype: torch.dtype) -> torch.Tensor:
    # Channels last is the faster layout on a CPU and on CUDA. A copy, because the caller's tensors stay the caller's.
    layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
    converted = tensor.to(dtype, copy=True, memory_format=layout)
    if not torch.isfinite(converted).all():
        raise WeightsError(f"the SCHP weights do not fit: {key} with its norm is too large for {dtype}")
    return converted


def _convolutions(network: SchpNetwork) -> Iterator[tuple[str, nn.Conv2d]]:
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            yield name, module


def _norm_of(convolution: str) -> str:
    """The published name of the norm behind a convolution: bn2 of conv2, 3 of 2."""
    parent, dot, last = convolution.rpartition(".")
    return f"{parent}{dot}bn{last[4:]}" if last.startswith("conv") else f"{parent}{dot}{int(last) + 1}"
