"""Verdicts on a set of pictures whose truth is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.cases import Case, Piece, recognised
from bench.metrics import TEXTURES, ciede2000, lab, median_colour, psnr, squared_error, ssim
from model.embedded.figures import Example
from model.geometry import repaint
from model.interface import Image

PATTERNED = ("horizontal", "vertical", "checks")  # told from plain; dots are in the table of textures only


@dataclass(frozen=True)
class Likeness:
    """How near pictures are to their truth inside the mask.

    Attributes:
        psnr_db: mean over the pictures of each one's PSNR.
        psnr_pooled_db: PSNR of all pixels of all pictures together; bad pictures weigh more.
        ssim: mean over the pictures.
    """

    psnr_db: float
    psnr_pooled_db: float
    ssim: float


def likeness(pictures: Sequence[Image], exercises: Sequence[Example]) -> Likeness:
    """How near the pictures are to the exercises' truth."""
    regions = [one.mask > 0 for one in exercises]
    triples = list(zip(pictures, (one.target for one in exercises), regions))
    errors = [squared_error(*triple) for triple in triples]
    sizes = [np.count_nonzero(region) for region in regions]
    return Likeness(
        psnr_db=float(np.mean([psnr(error) for error in errors])),
        psnr_pooled_db=psnr(float(np.average(errors, weights=sizes))),
        ssim=float(np.mean([ssim(*triple) for triple in triples])),
    )


def colour_differences(pictures: Sequence[Image], cases: Sequence[Case]) -> list[float]:
    """CIEDE2000 between the cloth in the shop and on the person (medians), for every plain garment that shows."""
    return [
        float(ciede2000(lab(piece.colour), lab(median_colour(picture, piece.cloth))))
        for picture, case in zip(pictures, cases)
        for piece in case.pieces
        if piece.pattern == "plain" and piece.cloth.any()
    ]


def texture_table(pictures: Sequence[Image], cases: Sequence[Case]) -> dict[str, dict[str, int]]:
    """Garments by the texture that they have (outer) and that is seen on the person (inner)."""
    judged: list[tuple[Image, Piece]] = [
        (picture, piece) for picture, case in zip(pictures, cases) for piece in case.pieces if piece.judged
    ]
    seen = Counter((piece.pattern, recognised(picture, piece)) for picture, piece in judged)
    return {true: {found: seen[true, found] for found in TEXTURES} for true in TEXTURES}


def texture_accuracy(table: dict[str, dict[str, int]]) -> float:
    """Share of the plain garments that look plain and of the striped and checked ones that do not."""
    right = table["plain"]["plain"] + sum(sum(table[name].values()) - table[name]["plain"] for name in PATTERNED)
    return right / max(1, sum(sum(table[name].values()) for name in ("plain", *PATTERNED)))


def class_accuracy(table: dict[str, dict[str, int]]) -> float:
    """Share of all judged garments whose texture is seen as what it is."""
    return sum(table[name][name] for name in TEXTURES) / max(1, sum(sum(row.values()) for row in table.values()))


def unmasked_difference(pictures: Sequence[Image], exercises: Sequence[Example]) -> int:
    """The largest change outside the masks after compositing, in grey levels; 0 unless something is broken."""
    differences = [
        np.abs(repaint(one.person, picture, one.mask).astype(int) - one.person)[one.mask == 0].max()
        for picture, one in zip(pictures, exercises)
    ]
    return int(max(differences))
