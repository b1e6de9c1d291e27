"""Pictures to train on: drawn figures, or a manifest of photographs, each as a person who wears the garment."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image as Pillow

from model.embedded.body import sample_figure
from model.embedded.figures import KINDS, TEST_SEEDS, TRAIN_SEEDS, Drawing, Example, Kind, example, masks
from model.geometry import MASK_THRESHOLD, crop_resize, fit_pad
from model.interface import Image
from model.training_options import FIGURES, TrainingError, TrainingOptions

COLUMNS = ("person", "garment", "mask")
JSON_LINES = ".jsonl"
MASK_KINDS = (  # of ten figures; the garment of "inner" and "outer" is an upper one, a dress is an "overall"
    *("overall", "upper", "lower", "overall", "outer"),
    *("upper", "overall", "lower", "inner", "overall"),
)
_GARMENT_OF: Mapping[str, Kind] = {"overall": "overall", "lower": "lower"}  # "upper" for the others


@dataclass(frozen=True)
class Pair:
    """One exercise whose solution is known; all pictures of one size.

    Attributes:
        person: HWC uint8 RGB, what a try-on is given.
        garment: HWC uint8 RGB on white.
        mask: HW uint8 0/255, what is repainted.
        target: HWC uint8 RGB, the person in the garment; what the model is trained towards.
    """

    person: Image
    garment: Image
    mask: Image
    target: Image


class PairSource(Protocol):
    """Where pairs come from; another process can be given it."""

    @property
    def name(self) -> str:
        """What it is, so that another one under the same path is noticed."""

    @property
    def count(self) -> int:
        """How many pairs there are to train on."""

    def pair(self, index: int) -> Pair:
        """The pair of that place."""

    def sample(self, index: int) -> Pair:
        """A pair for looking at."""


@dataclass(frozen=True)
class FigurePairs:
    """Drawn people: `count` of TRAIN_SEEDS to train on, TEST_SEEDS to look at.

    Attributes:
        count: at most as many as there are TRAIN_SEEDS.
        size_wh: of the pictures, px.
    """

    count: int
    size_wh: tuple[int, int]

    @property
    def name(self) -> str:
        """What it is, so that another one is noticed."""
        return f"figures of {self.size_wh[0]}x{self.size_wh[1]}"

    def pair(self, index: int) -> Pair:
        """The pair of that place."""
        return self._draw(TRAIN_SEEDS[index], MASK_KINDS[index % len(MASK_KINDS)])

    def sample(self, index: int) -> Pair:
        """A pair for looking at."""
        return self._draw(TEST_SEEDS[index], MASK_KINDS[index % len(MASK_KINDS)])

    def _draw(self, seed: int, mask_kind: str) -> Pair:
        kind = _GARMENT_OF.get(mask_kind, "upper")
        drawn = example(seed, kind, size_wh=self.size_wh)
        mask = drawn.mask if mask_kind in KINDS else _masks_of(drawn, seed, kind)[mask_kind]
        person = np.where(mask[..., None] > 0, drawn.person, drawn.target)
        return Pair(person, drawn.garment, mask, drawn.target)


@dataclass(frozen=True)
class ManifestPairs:
    """Photographs of people who wear the garment.

    Attributes:
        folder: what the paths are relative to.
        rows: (person, garment, mask) paths.
        size_wh: of the pictures, px; people are cropped to its aspect, garments fitted on white.
        name: of the manifest and its content.
    """

    folder: Path
    rows: tuple[tuple[str, str, str], ...]
    size_wh: tuple[int, int]
    name: str

    @property
    def count(self) -> int:
        """How many pairs there are to train on."""
        return len(self.rows)

    def pair(self, index: int) -> Pair:
        """The pair of that place.

        Raises:
            TrainingError: a file cannot be read, or the mask is not of the person's size.
        """
        person, garment, mask = (self._open(path) for path in self.rows[index])
        if person.size != mask.size:
            raise TrainingError(f"{self.rows[index][2]} is {mask.size} px, its person {person.size} px")
        cropped = np.asarray(crop_resize(person.convert("RGB"), *self.size_wh))
        grey = np.asarray(crop_resize(mask.convert("L"), *self.size_wh))
        binary = np.where(grey >= MASK_THRESHOLD, np.uint8(255), np.uint8(0))
        return Pair(cropped, np.asarray(fit_pad(garment.convert("RGB"), *self.size_wh)), binary, cropped)

    def sample(self, index: int) -> Pair:
        """A pair for looking at: the manifest again from its start."""
        return self.pair(index % len(self.rows))

    def _open(self, path: str) -> Pillow.Image:
        try:
            with Pillow.open(self.folder / path) as opened:
                picture: Pillow.Image = opened.copy()
        except (OSError, ValueError) as exc:
            raise TrainingError(f"{self.folder / path} cannot be read as a picture: {exc}") from exc
        return picture


def open_source(options: TrainingOptions) -> PairSource:
    """The pairs that the options name.

    Raises:
        TrainingError: more figures than there are seeds, or a manifest that is none.
    """
    size_wh = (options.width, options.height)
    if options.data == FIGURES:
        if options.pairs > len(TRAIN_SEEDS):
            raise TrainingError(f"pairs must be at most {len(TRAIN_SEEDS)}: there are no more training seeds")
        return FigurePairs(options.pairs, size_wh)
    return _read_manifest(Path(options.data), size_wh)


def _read_manifest(path: Path, size_wh: tuple[int, int]) -> ManifestPairs:
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise TrainingError(f"{path} cannot be read as a manifest: {exc}") from exc
    rows = _json_rows(path, lines) if path.suffix == JSON_LINES else list(csv.DictReader(lines))
    if not rows:
        raise TrainingError(f"{path} names no pairs")
    digest = hashlib.sha256(content).hexdigest()
    name = f"manifest {digest} at {size_wh[0]}x{size_wh[1]}"
    picked = tuple(_paths(path, number, row) for number, row in enumerate(rows, start=1))
    return ManifestPairs(path.parent, picked, size_wh, name)


def _json_rows(path: Path, lines: Sequence[str]) -> list[object]:
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as exc:
        raise TrainingError(f"{path} holds a line that is no JSON: {exc}") from exc


def _paths(manifest: Path, number: int, row: object) -> tuple[str, str, str]:
    cells = row if isinstance(row, dict) else {}
    for column in COLUMNS:
        cell = cells.get(column)
        if not isinstance(cell, str) or not cell:
            raise TrainingError(f"{manifest}: pair {number} has no {column}")
        if Path(cell).is_absolute() or ".." in Path(cell).parts:
            raise TrainingError(f"{manifest}: pair {number} names {cell}, which is not inside the manifest's folder")
    return cells["person"], cells["garment"], cells["mask"]


def _masks_of(drawn: Example, seed: int, kind: Kind) -> dict[str, Image]:
    """All masks of an example's figure, which is the first thing that its seed decides."""
    figure = sample_figure(np.random.default_rng((seed, KINDS.index(kind))))
    return masks(Drawing(drawn.target, drawn.labels, figure))
