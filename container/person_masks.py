"""The masks of photos: out of memory where the same photo was seen before, else from the worker."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Callable, Literal

import numpy as np

from container.request import CLOTH_TYPES
from container.sharing import KeyLocks, Memory
from container.telemetry import Metrics, StageTimes
from container.worker import Worker
from model import geometry
from model.interface import Image

LONGEST_SIDE = 1024  # px, of what the masker looks at: the parsers see no more than that
REMEMBERED = 256  # photos; their masks take 10 to 30 kB, and 500 kB at the very most

Lookup = Literal["hit", "miss"]


@dataclass(frozen=True)
class PersonMasks:
    """The masks of one photo.

    Attributes:
        masks: for every cloth type, HW uint8 0/255 at the photo's size.
        cache: whether they were remembered.
    """

    masks: Mapping[str, Image]
    cache: Lookup


@dataclass(frozen=True)
class _Packed:
    """A mask as compressed bits."""

    bits: bytes
    shape: tuple[int, int]

    @classmethod
    def of(cls, mask: Image) -> _Packed:
        height, width = mask.shape
        return cls(zlib.compress(np.packbits(mask > 0).tobytes()), (height, width))

    def mask(self) -> Image:
        height, width = self.shape
        bits = np.frombuffer(zlib.decompress(self.bits), np.uint8)
        return (np.unpackbits(bits, count=height * width) * np.uint8(255)).reshape(self.shape)


class PersonMasker:
    """Finds the masks of photos, and remembers the latest ones by the photo's content.

    All types are made at once: the parsers are the work, and the next try-on of the person may want another type.

    Args:
        worker: has the masker.
        metrics: counts hits and misses.
    """

    def __init__(self, worker: Worker, metrics: Metrics) -> None:
        self._worker = worker
        self._metrics = metrics
        self._photos = KeyLocks()
        self._memory: Memory[dict[str, _Packed]] = Memory(REMEMBERED)

    @property
    def available(self) -> bool:
        """Whether photos can be masked at all."""
        return self._worker.masks

    def masks(
        self,
        content: bytes,
        person: Image,
        deadline: float,
        times: StageTimes,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> PersonMasks:
        """The masks of a photo.

        Args:
            content: of its file, by which it is remembered.
            person: the same, decoded: HWC uint8 RGB.
            deadline: time.monotonic() value.
            times: gets the stages "mask_queue" and "mask".
            is_wanted: whether the caller is still there.
        Raises:
            PersonNotFound, and what `Worker.mask` raises.
        """
        key = hashlib.sha256(content).hexdigest()
        with self._photos.hold(key, deadline):
            packed = self._memory.recall(key)
            cache: Lookup = "miss" if packed is None else "hit"
            self._metrics.mask_cache.labels(cache).inc()
            if packed is None:
                packed = self._make(person, deadline, times, is_wanted)
                self._memory.keep(key, packed)
        with times.measure("mask"):
            size_wh = (person.shape[1], person.shape[0])
            return PersonMasks(
                {name: geometry.resize_mask(one.mask(), *size_wh) for name, one in packed.items()}, cache
            )

    def _make(
        self, person: Image, deadline: float, times: StageTimes, is_wanted: Callable[[], bool]
    ) -> dict[str, _Packed]:
        with times.measure("mask"):
            looked_at = geometry.fit_within(person, LONGEST_SIDE)
        made = self._worker.mask(looked_at, CLOTH_TYPES, deadline, is_wanted)
        times.add("mask_queue", made.queued_s)
        times.add("mask", made.masked_s)
        return {name: _Packed.of(mask) for name, mask in made.masks.items()}
