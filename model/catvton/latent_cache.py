"""Latents of pictures that were encoded before."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import torch

LIMIT = 256  # of 196 KB each at 768x1024


class LatentCache:
    """The latents of the latest pictures, by what the pictures show. For one thread, and for one autoencoder.

    Args:
        limit: how many are kept; the longest unused goes first.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._kept)

    def recall(self, key: bytes) -> torch.Tensor | None:
        """What is kept under the key, which then counts as used."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, key: bytes, latents: torch.Tensor) -> None:
        """Keeps latents under the key."""
        self._kept[key] = latents
        self._kept.move_to_end(key)
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)


def content_key(picture: torch.Tensor) -> bytes:
    """The same for the same picture, (3, H, W) on the CPU, of 8-bit values scaled to [-1, 1], masked or not."""
    halves = picture.half().contiguous()  # tells all of these values apart
    return hashlib.sha256(str(tuple(halves.shape)).encode() + halves.numpy().tobytes()).digest()
