"""Pairs as latents, encoded once and kept on disk."""

from __future__ import annotations

import json
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from torch.nn import functional
from tqdm import tqdm

from model.catvton.inputs import garment_tensor, mask_tensor, person_tensor
from model.catvton.pairs import Pair, PairSource
from model.catvton.pipeline import CatVTONPipeline
from model.training_options import TrainingError

PROGRESS_FILE = "progress.json"
CHUNK = 16  # pairs that are drawn in one go and encoded together
WAITING = 4  # drawn chunks in memory at most, 6 MB each at 192x256
TOLERANCE = 0.02  # between two encodings of one picture: float16, and another number of threads


@dataclass(frozen=True)
class LatentPairs:
    """Memory-mapped latents of N pairs, as the pipeline encodes and scales them.

    Attributes:
        condition: (N, 1 + C, 2h, w) float16, what the UNet is shown: mask, and masked person above garment.
        target: (N, C, h, w) float16, the person in the garment.
        covered: (N, 1, h, w) uint8, 1 where any pixel of a latent is repainted.
    """

    condition: NDArray[np.float16]
    target: NDArray[np.float16]
    covered: NDArray[np.uint8]

    def __len__(self) -> int:
        """How many pairs there are."""
        return len(self.target)


def prepare_latents(
    source: PairSource, pipeline: CatVTONPipeline, folder: Path, *, readers: int, stopped: Callable[[], bool]
) -> LatentPairs:
    """The latents of all pairs of a source; those that the folder already holds are not made again.

    Args:
        source: the pairs.
        pipeline: its VAE encodes.
        folder: holds the latents afterwards.
        readers: processes that draw or read; 1 does it in this process.
        stopped: asked between two chunks; True ends the work early, and the rest of the latents is zero.
    Raises:
        TrainingError: the folder holds latents of other pairs or of another autoencoder.
    """
    first = _encode(pipeline, [source.pair(0)])
    done = _done(folder, source)
    if done == 0:
        _create(folder, first, source.count)
    arrays = _open(folder, "r+")
    _refuse_others(folder, arrays, first, source.count, done)
    bar = tqdm(total=source.count, initial=done, desc="latents", unit="pair")
    for start, pairs in _chunks(source, done, readers):
        made = _encode(pipeline, pairs)
        for name, rows in vars(made).items():
            vars(arrays)[name][start : start + len(pairs)] = rows
        bar.update(len(pairs))
        _note_progress(folder, arrays, source, start + len(pairs))
        if stopped():
            break
    bar.close()
    return _open(folder, "r")


def _chunks(source: PairSource, start: int, readers: int) -> Iterator[tuple[int, list[Pair]]]:
    """(place of its first pair, pairs) of every chunk from start on, in order."""
    places = [range(at, min(at + CHUNK, source.count)) for at in range(start, source.count, CHUNK)]
    if readers == 1 or len(places) <= 1:
        yield from ((place.start, _read(source, place)) for place in places)
        return
    with ProcessPoolExecutor(readers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting: deque[tuple[range, Future[list[Pair]]]] = deque()
        try:
            for place in places:
                waiting.append((place, pool.submit(_read, source, place)))
                if len(waiting) >= WAITING:
                    ready = waiting.popleft()
                    yield ready[0].start, ready[1].result()
            yield from ((place.start, future.result()) for place, future in waiting)
        finally:
            for _, future in waiting:
                future.cancel()


def _read(source: PairSource, place: range) -> list[Pair]:
    return [source.pair(index) for index in place]


@torch.no_grad()
def _encode(pipeline: CatVTONPipeline, pairs: list[Pair]) -> LatentPairs:
    height, width = pairs[0].mask.shape
    device = pipeline.device

    def pictures(name: str) -> list[Any]:
        return [Pillow.fromarray(getattr(pair, name)) for pair in pairs]

    target = person_tensor(pictures("target"), width, height).to(device)
    garment = garment_tensor(pictures("garment"), width, height).to(device)
    mask = mask_tensor(pictures("mask"), width, height).to(device)
    condition = pipeline.encode_condition(target * (mask < 0.5), garment, mask, guided=False)  # (B, 1 + C, 2h, w)
    encoded = pipeline.encode(target)  # (B, C, h, w)
    covered = functional.adaptive_max_pool2d(mask, encoded.shape[-2:])
    return LatentPairs(
        condition.cpu().numpy().astype(np.float16),
        encoded.cpu().numpy().astype(np.float16),
        covered.cpu().numpy().astype(np.uint8),
    )


def _create(folder: Path, like: LatentPairs, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in vars(like).items():
        shape = (count, *rows.shape[1:])
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype=rows.dtype, shape=shape)  # type: ignore[no-untyped-call]


def _open(folder: Path, mode: Any) -> LatentPairs:  # noqa: ANN401 - numpy names the modes one by one
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode=mode) for name in LatentPairs.__annotations__}
    except (OSError, ValueError, EOFError) as exc:
        raise TrainingError(f"{folder} holds latents that cannot be read: {exc}") from exc
    return LatentPairs(**arrays)


def _done(folder: Path, source: PairSource) -> int:
    file = folder / PROGRESS_FILE
    if not file.is_file():
        return 0
    noted = json.loads(file.read_text(encoding="utf-8"))
    if noted["source"] != source.name:
        raise TrainingError(f"{folder} holds latents of {noted['source']}, not of {source.name}")
    return int(noted["done"])


def _note_progress(folder: Path, arrays: LatentPairs, source: PairSource, done: int) -> None:
    for array in vars(arrays).values():
        array.flush()
    fresh = folder / f"{PROGRESS_FILE}.new"
    fresh.write_text(json.dumps({"done": done, "source": source.name}), encoding="utf-8")
    fresh.replace(folder / PROGRESS_FILE)


def _refuse_others(folder: Path, arrays: LatentPairs, first: LatentPairs, count: int, done: int) -> None:
    if len(arrays) != count:
        raise TrainingError(f"{folder} holds latents of {len(arrays)} pairs, not of {count}")
    for name, rows in vars(first).items():
        kept = vars(arrays)[name][:1]
        if done and (kept.shape != rows.shape or np.abs(kept.astype(np.float32) - rows).max() > TOLERANCE):
            raise TrainingError(f"{folder} holds latents of another autoencoder or of other pictures")
