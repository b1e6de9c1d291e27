"""What the embedded autoencoder keeps of a picture: principal components, halved in size four times.

A picture is folded to half its size with four times the channels, and of these only the directions that vary most over
drawn people and garments are kept; then again. Nothing is learned by descent, so the latents of a picture are known
before any decoder is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.embedded.figures import KINDS, example

Floats = NDArray[np.float32]

FACTOR = 16  # a latent stands for 16x16 px
LATENT_CHANNELS = 32  # 26.9 dB of a person linearly; 24 give 26.0 and 48 give 28.4
KEPT = (12, 24, 48, LATENT_CHANNELS)  # directions at 2 (all of them), 4, 8 and 16 px; more at 4 and 8 add 0.01 dB
_BATCH = 24  # seeds in memory at once


@dataclass(frozen=True)
class Stage:
    """One halving: `fold(codes) @ matrix + bias`.

    Attributes:
        matrix: (4 * channels before, channels after), float32, representable in float16.
        bias: (channels after,), likewise.
    """

    matrix: Floats
    bias: Floats

    def apply(self, codes: Floats) -> Floats:
        """(N, H, W, C) to (N, H / 2, W / 2, channels after)."""
        return np.asarray(fold(codes) @ self.matrix + self.bias, np.float32)


def views(seed: int) -> Floats:
    """The three pictures of a seed that a try-on encodes: a person, a garment, and a person without the masked area.

    Returns:
        (3, 256, 192, 3) float32 RGB in [-1, 1]; the masked area is 0.
    """
    drawing = example(seed, KINDS[seed % len(KINDS)])
    pictures = np.stack([drawing.target, drawing.garment, drawing.person]).astype(np.float32) / 127.5 - 1
    pictures[2][drawing.mask > 0] = 0
    return pictures


def fold(codes: Floats) -> Floats:
    """(N, H, W, C) to (N, H / 2, W / 2, 4 * C), the four pixels of a square in reading order."""
    count, height, width, channels = codes.shape
    squares = codes.reshape(count, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return np.ascontiguousarray(squares).reshape(count, height // 2, width // 2, 4 * channels)


def fit(seeds: Iterable[int]) -> tuple[Stage, ...]:
    """Four stages for the drawings of these seeds; the latents have standard deviation 1 over all of them.

    Between channels the last stage divides by the square root of their deviation: fine detail then weighs less than
    colour, and noise less on what matters.
    """
    chosen = list(seeds)
    stages = [Stage(np.eye(KEPT[0], dtype=np.float32), np.zeros(KEPT[0], np.float32))]
    for kept in KEPT[1:]:
        mean, variance, directions = _principal(chosen, stages, kept)
        matrix, scale = directions, 1.0
        if kept == KEPT[-1]:
            matrix = directions / variance**0.25
            scale = 1 / np.sqrt(np.mean(variance**0.5))
        exact = _half(matrix * scale)
        stages.append(Stage(exact, _half(-mean @ exact)))
    return tuple(stages)


def encode(stages: Iterable[Stage], pictures: Floats) -> Floats:
    """(N, H, W, 3) float32 in [-1, 1] to latents (N, H / 16, W / 16, 32)."""
    codes = pictures
    for stage in stages:
        codes = stage.apply(codes)
    return codes


def _principal(
    seeds: list[int], stages: list[Stage], kept: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean (C,), the largest variances (kept,) and their directions (C, kept) of what the next stage is given."""
    total, square, count = np.zeros(()), np.zeros(()), 0
    for start in range(0, len(seeds), _BATCH):
        pictures = np.concatenate([views(seed) for seed in seeds[start : start + _BATCH]])
        folded = fold(encode(stages, pictures))
        rows = folded.reshape(-1, folded.shape[-1])
        total, square, count = total + rows.sum(0, dtype=np.float64), square + _gram(rows), count + len(rows)
    mean = np.asarray(total / count)
    variance, directions = np.linalg.eigh(square / count - np.outer(mean, mean))
    variance, directions = variance[::-1][:kept], directions[:, ::-1][:, :kept]
    largest = directions[np.abs(directions).argmax(axis=0), np.arange(kept)]
    return mean, variance, directions * np.sign(largest)  # eigenvectors have no sign of their own


def _gram(rows: Floats) -> NDArray[np.float64]:
    return np.asarray((rows.T @ rows).astype(np.float64))


def _half(numbers: NDArray[np.float64]) -> Floats:
    """Rounded to what float16 holds, so that storing the weights in float16 changes nothing."""
    return numbers.astype(np.float16).astype(np.float32)
