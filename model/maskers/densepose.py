"""Which part of the body each pixel of a picture shows, for the person that stands out most.

Source: DensePose (arXiv 1802.00434), published as densepose_rcnn_R_50_FPN_s1x.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Union

import cv2
import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from model.interface import BadPicture, Image
from model.maskers.densepose_network import DensePoseNetwork
from model.maskers.detection import Detections, clip, is_filled, select_detections, select_proposals
from model.weights import WeightsError

MEAN_BGR = (103.530, 116.280, 123.675)  # of the pictures that the network was trained on, 0..255
SHORT_SIDE_PX = 800  # of what the network sees, small pictures enlarged
LONG_SIDE_PX = 1333  # at most
STRIDE_PX = 32  # the network's input has sides that are multiples of it
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMED_AT_MOST = 5  # tensors that one error lists

_CONSTANT = re.compile(r"(^|\.)(pixel_mean|pixel_std|cell_anchors\.[0-4]|num_batches_tracked)$")

Array = Union[Tensor, NDArray[np.floating[Any]]]


@dataclass(frozen=True)
class Found:
    """The person that stands out most.

    Attributes:
        labels: HW uint8 at the picture's size: 0 where that person is not, else the part of the body. 1 and 2 torso, 3
            right and 4 left hand, 5 and 6 feet, 7 to 10 thighs, 11 to 14 lower legs, 15 to 18 upper arms, 19 to 22
            forearms, 23 and 24 head.
        box: (x0, y0, x1, y1) in px of the picture.
        score: 0.8..1, the network's certainty that the box shows a person.
    """

    labels: Image
    box: tuple[float, float, float, float]
    score: float


class DensePose:
    """The network behind `find` and `labels`; immutable, and it keeps nothing of the pictures that it has seen.

    Args:
        network: with its weights, in evaluation mode; used where it is and in the dtype that it has, never changed.
    """

    def __init__(self, network: DensePoseNetwork) -> None:
        self.network = network
        weight = next(network.parameters())
        self._device, self._dtype = weight.device, weight.dtype

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Array],
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> DensePose:
        """DensePose with the published weights.

        Args:
            state_dict: the 335 tensors by their published names, of any floating dtype; copied. The constants that
                the published file may hold beside them are ignored.
            device: where it computes.
            dtype: of the convolutions: float32 (None), float16 or bfloat16. Boxes are float32 in any case.
        Raises:
            ValueError: another dtype.
            WeightsError: a tensor is missing, left over, of the wrong shape or kind, or not finite.
        """
        dtype = torch.float32 if dtype is None else dtype
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, not {dtype}")
        with torch.device("meta"):  # shapes without memory: every tensor is assigned below
            network = DensePoseNetwork().eval().requires_grad_(False)
        network.load_state_dict(_checked(state_dict, network), assign=True)
        network.fold_norms()
        for name, module in network.named_modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                if not all(parameter.isfinite().all() for parameter in module.parameters()):
                    raise WeightsError(f"{name} with its norm is not finite in {dtype}")
        return cls(network.to(device))

    def labels(self, image: Image, longest_side: int = 1024) -> Image:
        """The labels of `find`, all 0 where it finds nobody: HW uint8 0..24 at the picture's size."""
        found = self.find(image, longest_side)
        return np.zeros(image.shape[:2], np.uint8) if found is None else found.labels

    def find(self, image: Image, longest_side: int = 1024) -> Found | None:
        """The person that stands out most, or None where there is nobody.

        Args:
            image: HWC uint8 RGB, upright, of any size.
            longest_side: px to which a larger picture is shrunk first, >= 1.
        Returns:
            The best-scoring person only; others of the picture are not in the labels.
        Raises:
            ValueError: another shape or dtype, or a size of 0.
            BadPicture: the network's numbers are not finite, which float16 can do to large ones.
        """
        _check(image, longest_side)
        picture = shrunk(image, longest_side)
        picture_hw, network_hw = _size(picture), network_size(_size(picture))
        with torch.inference_mode():
            pixels = network_input(resized(picture, network_hw), self._device)
            pyramid = self.network.pyramid(pixels.to(self._dtype))
            people = self._people(pyramid, network_hw)
            boxes = clip(people.boxes * _ratio(people.boxes, network_hw, picture_hw), picture_hw)
            best = is_filled(boxes).nonzero()[:1, 0]
            if not len(best):
                return None
            features = self.network.surface_features(pyramid, people.boxes[best])
            parts, inside = (self.network.surface(features, name) for name in ("index_uv", "ann_index"))
            _require_finite(parts, inside)
            canvas = painted(parts, inside, boxes[best[0]], picture_hw)
            x0, y0, x1, y1 = (boxes * _ratio(boxes, picture_hw, _size(image)))[best[0]].tolist()
        return Found(at_size(canvas, _size(image)), (x0, y0, x1, y1), float(people.scores[best]))

    def _people(self, pyramid: list[Tensor], size_hw: tuple[int, int]) -> Detections:
        """Everybody in the picture, by falling score."""
        levels = self.network.proposals(pyramid)
        _require_finite(*(level.scores for level in levels))
        proposals = select_proposals(levels, size_hw).boxes
        return select_detections(*self.network.people(pyramid, proposals), size_hw)


def shrunk(image: Image, longest_side: int) -> Image:
    """A picture whose sides are at most that many px; one that is small enough comes back as it is."""
    height, width = _size(image)
    if max(height, width) <= longest_side:
        return image
    factor = longest_side / max(height, width)
    size_wh = (max(1, int(width * factor)), max(1, int(height * factor)))
    return np.asarray(cv2.resize(np.ascontiguousarray(image), size_wh, interpolation=cv2.INTER_LINEAR), np.uint8)


def network_size(size_hw: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in px at which the network sees a picture of that height and width, before the padding."""
    height, width = size_hw
    scale = SHORT_SIDE_PX / min(height, width)
    down, across = (SHORT_SIDE_PX, scale * width) if height < width else (scale * height, SHORT_SIDE_PX)
    if max(down, across) > LONG_SIDE_PX:
        cap = LONG_SIDE_PX / max(down, across)
        down, across = down * cap, across * cap
    return max(1, int(down + 0.5)), max(1, int(across + 0.5))


def resized(image: Image, size_hw: tuple[int, int]) -> Image:
    """A picture at another height and width in px, averaged where it shrinks."""
    height, width = size_hw
    return np.array(PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.BILINEAR))


def network_input(image: Image, device: torch.device) -> Tensor:
    """What the network takes of a picture that has the size at which it is seen.

    Args:
        image: HWC uint8 RGB.
        device: where the answer is made.
    Returns:
        (1, 3, H, W) float32 BGR less its mean, with 0 below and to the right up to multiples of 32 px.
    """
    height, width = _size(image)
    bgr = torch.tensor(image, device=device).flip(2).float() - torch.tensor(MEAN_BGR, device=device)
    padded = functional.pad(bgr, (0, 0, 0, -width % STRIDE_PX, 0, -height % STRIDE_PX))
    return padded.permute(2, 0, 1)[None]  # channels stay last in memory


def painted(parts: Tensor, inside: Tensor, box: Tensor, size_hw: tuple[int, int]) -> Image:
    """A person's labels in an otherwise empty picture.

    Args:
        parts: (1, 25, 112, 112) logits of the background and the 24 parts over the box.
        inside: (1, 2, 112, 112) logits of the background and the body over the box.
        box: (4,) float32 px, within the picture; one narrower or lower than a pixel stays empty.
        size_hw: (height, width) of the picture in px.
    Returns:
        HW uint8 0..24.
    """
    x, y = (int(edge) for edge in box[:2])
    width, height = (int(side) for side in box[2:] - box[:2])
    canvas = np.zeros(size_hw, np.uint8)
    if width == 0 or height == 0:
        return canvas
    of_parts, of_inside = (
        functional.interpolate(logits, (height, width), mode="bilinear").argmax(1)[0] for logits in (parts, inside)
    )
    canvas[y : y + height, x : x + width] = (of_parts * (of_inside > 0)).to(torch.uint8).cpu().numpy()
    return canvas


def at_size(labels: Image, size_hw: tuple[int, int]) -> Image:
    """Labels at another height and width in px, each pixel that of the nearest one."""
    height, width = size_hw
    return np.array(PIL.Image.fromarray(labels).resize((width, height), PIL.Image.Resampling.NEAREST))


def _size(image: Image) -> tuple[int, int]:
    height, width = image.shape[:2]
    return height, width


def _ratio(boxes: Tensor, old_hw: tuple[int, int], new_hw: tuple[int, int]) -> Tensor:
    """(4,) factors that take boxes from one size of a picture to another."""
    across, down = new_hw[1] / old_hw[1], new_hw[0] / old_hw[0]
    return boxes.new_tensor([across, down, across, down])


def _check(image: Image, longest_side: int) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        raise ValueError(f"the picture must be a uint8 array, not {getattr(image, 'dtype', type(image).__name__)}")
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"the picture must be (height, width, 3) with sides above 0, not {image.shape}")
    if longest_side < 1:
        raise ValueError(f"longest_side must be at least 1 px, not {longest_side}")


def _require_finite(*values: Tensor) -> None:
    if not all(value.isfinite().all() for value in values):
        raise BadPicture("DensePose made numbers that are not finite")


def _checked(state_dict: Mapping[str, Array], network: nn.Module) -> dict[str, Tensor]:
    """Float32 copies of exactly the tensors that the network needs."""
    wanted = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    stored = {key: tuple(getattr(value, "shape", ())) for key, value in state_dict.items() if not _CONSTANT.search(key)}
    problems = [f"{key} is missing" for key in wanted if key not in stored]
    problems += [f"{key} is unexpected" for key in stored if key not in wanted]
    problems += [
        f"{key} is {list(stored[key])}, not {list(shape)}"
        for key, shape in wanted.items()
        if stored.get(key, shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - NAMED_AT_MOST} more" if len(problems) > NAMED_AT_MOST else ""
        raise WeightsError(f"the weights of DensePose do not fit: {'; '.join(problems[:NAMED_AT_MOST])}{more}")
    return {key: _copied(key, state_dict[key]) for key in wanted}


def _copied(key: str, value: Array) -> Tensor:
    if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating):
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
            tensor = torch.from_numpy(np.array(value, dtype=np.float32))
    elif isinstance(value, Tensor) and value.is_floating_point():
        tensor = value.detach().to("cpu", torch.float32, copy=True)
    else:
        raise WeightsError(f"{key} is {getattr(value, 'dtype', type(value).__name__)}, not an array of floats")
    if not tensor.isfinite().all():
        raise WeightsError(f"{key} is not finite")
    if key.endswith("running_var") and (tensor < 0).any():
        raise WeightsError(f"{key} is negative: it is no variance")
    return tensor
