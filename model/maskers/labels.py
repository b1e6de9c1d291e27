"""What the label maps of SCHP and DensePose mean, and which labels each type of garment concerns."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import cv2
import numpy as np
from numpy.typing import NDArray

LabelMap = NDArray[np.uint8]  # (H, W), one label a pixel
Mask = NDArray[np.bool_]  # (H, W)

ATR_LABELS = (
    "Background",
    "Hat",
    "Hair",
    "Sunglasses",
    "Upper-clothes",
    "Skirt",
    "Pants",
    "Dress",
    "Belt",
    "Left-shoe",
    "Right-shoe",
    "Face",
    "Left-leg",
    "Right-leg",
    "Left-arm",
    "Right-arm",
    "Bag",
    "Scarf",
)
LIP_LABELS = (
    "Background",
    "Hat",
    "Hair",
    "Glove",
    "Sunglasses",
    "Upper-clothes",
    "Dress",
    "Coat",
    "Socks",
    "Pants",
    "Jumpsuits",
    "Scarf",
    "Skirt",
    "Face",
    "Left-arm",
    "Right-arm",
    "Left-leg",
    "Right-leg",
    "Left-shoe",
    "Right-shoe",
)
DENSEPOSE_LABELS = 25  # 0 is background, 1-24 are parts of the body's surface

TORSO = (1, 2)
HANDS = (3, 4)
FEET = (5, 6)
THIGHS = (7, 8, 9, 10)
LOWER_LEGS = (11, 12, 13, 14)
UPPER_ARMS = (15, 16, 17, 18)
FOREARMS = (19, 20, 21, 22)

ARMS = ("Left-arm", "Right-arm")
LEGS = ("Left-leg", "Right-leg")
SHOES = ("Left-shoe", "Right-shoe")
ACCESSORIES = ("Hat", "Glove", "Sunglasses", "Bag", "Scarf", "Socks")
OUTFIT = ("Upper-clothes", "Dress", "Pants", "Skirt", "Coat", "Jumpsuits")
WORN = (*OUTFIT, *SHOES, "Bag", "Socks", "Belt")


@dataclass(frozen=True)
class Part:
    """What one type of garment takes from the label maps.

    Attributes:
        body: names protected in both maps of SCHP, beside those of every type.
        cloth_lip: names protected in LIP.
        cloth_atr: names protected in ATR.
        target: names of what is replaced, in both.
        dense: DensePose's labels of the parts of the body that the garment can cover.
        accessories: names protected in both.
    """

    body: tuple[str, ...]
    cloth_lip: tuple[str, ...]
    cloth_atr: tuple[str, ...]
    target: tuple[str, ...]
    dense: tuple[int, ...]
    accessories: tuple[str, ...] = (*ACCESSORIES, *SHOES)


PARTS: Mapping[str, Part] = MappingProxyType(
    {
        "upper": Part(
            body=LEGS,
            cloth_lip=("Skirt", "Pants"),
            cloth_atr=("Skirt", "Pants"),
            target=("Upper-clothes", "Coat", "Dress", "Jumpsuits"),
            dense=(*TORSO, *UPPER_ARMS, *FOREARMS),
        ),
        "lower": Part(
            body=(*ARMS, "Face"),
            cloth_lip=("Upper-clothes", "Coat"),
            cloth_atr=("Upper-clothes",),
            target=("Pants", "Skirt", "Dress", "Jumpsuits"),
            dense=(*THIGHS, *LOWER_LEGS),
        ),
        "overall": Part(
            body=(),
            cloth_lip=(),
            cloth_atr=(),
            target=OUTFIT,
            dense=(*TORSO, *THIGHS, *LOWER_LEGS, *UPPER_ARMS, *FOREARMS),
        ),
        "inner": Part(
            body=LEGS,
            cloth_lip=("Dress", "Coat", "Skirt", "Pants", "Jumpsuits"),
            cloth_atr=("Dress", "Skirt", "Pants"),
            target=("Upper-clothes",),
            dense=TORSO,
        ),
        "outer": Part(
            body=LEGS,
            cloth_lip=("Upper-clothes", "Dress", "Pants", "Skirt", "Jumpsuits"),
            cloth_atr=("Dress", "Pants", "Skirt"),
            target=("Coat",),
            dense=(*TORSO, *UPPER_ARMS, *FOREARMS),
        ),
    }
)


def _for_fastfit(part: Part, shoes: tuple[str, ...]) -> Part:
    return replace(
        part,
        cloth_lip=(*part.cloth_lip, *shoes),
        cloth_atr=(*part.cloth_atr, *shoes),
        dense=(*part.dense, *FEET),
        accessories=ACCESSORIES,
    )


_FASTFIT_OVERALL = _for_fastfit(PARTS["overall"], SHOES)
FASTFIT_PARTS: Mapping[str, Part] = MappingProxyType(
    {
        "upper": _for_fastfit(PARTS["upper"], ()),
        "lower": _for_fastfit(PARTS["lower"], SHOES),
        "overall": _FASTFIT_OVERALL,
        "inner": _for_fastfit(PARTS["inner"], ()),
        "outer": _for_fastfit(PARTS["outer"], ()),
        "full": _FASTFIT_OVERALL,
        "dresses": _FASTFIT_OVERALL,
    }
)


@dataclass(frozen=True)
class LabelMaps:
    """The maps of one picture, of one size.

    Attributes:
        densepose: HW uint8, 0-24.
        lip: HW uint8, indices into LIP_LABELS.
        atr: HW uint8, indices into ATR_LABELS.
    """

    densepose: LabelMap
    lip: LabelMap
    atr: LabelMap

    def __post_init__(self) -> None:
        """Refuse what is no label map.

        Raises:
            ValueError: another shape or dtype, an empty map, a label out of range, or sizes that differ.
        """
        check_label_map(self.densepose, "densepose", DENSEPOSE_LABELS)
        check_parses(self.lip, self.atr)
        if self.densepose.shape != self.lip.shape:
            raise ValueError(f"densepose is {self.densepose.shape}, the maps of SCHP are {self.lip.shape}")

    def in_lip(self, names: Iterable[str]) -> Mask:
        """Where LIP shows one of the names; a name that it does not have is nowhere."""
        return is_in_lip(self.lip, names)

    def in_atr(self, names: Iterable[str]) -> Mask:
        """Where ATR shows one of the names; a name that it does not have is nowhere."""
        return is_in_atr(self.atr, names)

    def in_either(self, names: Collection[str]) -> Mask:
        """Where LIP or ATR shows one of the names."""
        return self.in_lip(names) | self.in_atr(names)

    def in_densepose(self, parts: Iterable[int]) -> Mask:
        """Where DensePose shows one of the parts of the body."""
        return is_one_of(self.densepose, parts)


def is_in_lip(labels: LabelMap, names: Iterable[str]) -> Mask:
    """Where a map of LIP's labels, HW uint8, shows one of the names; a name that it does not have is nowhere."""
    return is_one_of(labels, _indices(LIP_LABELS, names))


def is_in_atr(labels: LabelMap, names: Iterable[str]) -> Mask:
    """Where a map of ATR's labels, HW uint8, shows one of the names; a name that it does not have is nowhere."""
    return is_one_of(labels, _indices(ATR_LABELS, names))


def is_one_of(labels: LabelMap, members: Iterable[int]) -> Mask:
    """Where a label map holds one of the labels.

    Args:
        labels: HW uint8.
        members: labels, 0-255.
    Returns:
        HW bool.
    """
    table = np.zeros(256, np.uint8)
    table[list(members)] = 1
    # numpy would first widen the labels to 64-bit indices, eight times their memory.
    return np.asarray(cv2.LUT(np.ascontiguousarray(labels), table), np.uint8).view(np.bool_)


def check_label_map(labels: LabelMap, name: str, count: int) -> None:
    """Refuse what is no map of `count` labels; `name` says which one it is.

    Raises:
        ValueError: not a non-empty HW uint8 array, or a label out of range.
    """
    if not isinstance(labels, np.ndarray) or labels.ndim != 2 or labels.dtype != np.uint8 or labels.size == 0:
        found = f"{labels.dtype} {labels.shape}" if isinstance(labels, np.ndarray) else type(labels).__name__
        raise ValueError(f"{name} must be a non-empty HW uint8 array, not {found}")
    highest = int(labels.max())
    if highest >= count:
        raise ValueError(f"{name} has labels 0 to {count - 1}, but the map holds {highest}")


def check_parses(lip: LabelMap, atr: LabelMap) -> None:
    """Refuse what are no maps of SCHP of one picture.

    Raises:
        ValueError: another shape or dtype, an empty map, a label out of range, or sizes that differ.
    """
    check_label_map(lip, "schp_lip", len(LIP_LABELS))
    check_label_map(atr, "schp_atr", len(ATR_LABELS))
    if lip.shape != atr.shape:
        raise ValueError(f"schp_lip is {lip.shape}, schp_atr is {atr.shape}")


def _indices(known: Sequence[str], names: Iterable[str]) -> list[int]:
    wanted = set(names)
    return [index for index, name in enumerate(known) if name in wanted]
