"""The core: a request in, a stored picture and its key out."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from PIL import Image as Pillow

from container.decoder import Decoder
from container.errors import (
    DeadlineExceeded,
    ImageSourceTimeout,
    InvalidRequest,
    MaskInvalid,
    PersonNotFound,
    StorageFailed,
)
from container.fetch import Fetcher
from container.images import FILE_OF, MAX_WEBP_SIDE, encode
from container.notify import Notifier, completion
from container.person_masks import PersonMasker
from container.request import MAX_SEED, RANDOM_SEED, CallContext, Quality, TryOnRequest, TryOnResult
from container.sharing import KeyLocks
from container.storage import Storage, StoredObject, all_keys_for, key_for, same_job
from container.telemetry import Metrics, StageTimes
from container.worker import Worker
from model import geometry
from model.interface import EXACT, GenerationSettings, Image, TryOnInputs

MODEL_WIDTH, MODEL_HEIGHT = 768, 1024  # px; what the published weights were trained at
MASK_GIVEN, MASK_AUTO = "given", "auto"
LATE_S = 600.0  # for a picture that was begun in time: its caller is gone, but a repeat finds it


@dataclass(frozen=True)
class Defaults:
    """What a request gets where it says nothing.

    Attributes:
        steps: denoising steps.
        guidance: guidance scale.
        join: how top and bottom become one garment.
        key_prefix: what every key begins with.
        width, height: of the pictures that the model makes, px.
        quality: what is traded for speed.
    """

    steps: int
    guidance: float
    join: Literal["clean", "legacy"] = "clean"
    key_prefix: str = ""
    width: int = MODEL_WIDTH
    height: int = MODEL_HEIGHT
    quality: Quality = EXACT


@dataclass(frozen=True)
class Pictures:
    """The decoded inputs at their own sizes: HWC uint8 RGB, the mask HW uint8 grey."""

    person: Image
    garments: list[Image]
    mask: Image


@dataclass(frozen=True)
class Finished:
    """A finished picture as a file, not yet stored.

    Attributes:
        content: the file, in the format that the request named.
        facts: what is stored with it: `job_id`, `seed`, `width`, `height`, `engine`, `mask_source`.
        cache: where an automatic mask came from ("hit" or "miss"), or None.
        timings_ms: of each stage, once the request is at its end.
    """

    content: bytes
    facts: dict[str, str]
    cache: str | None
    timings_ms: Mapping[str, float] = field(default_factory=dict)


class TryOnService:
    """Turns requests into stored pictures. Holds ports and numbers, and no state of any request.

    Args:
        fetcher: where image bytes come from.
        decoder: makes pictures of them.
        worker: makes the pictures.
        masker: makes the masks that requests do not bring.
        storage: keeps them.
        notifier: tells of them.
        defaults: for what requests leave open.
        fetch_pool: fetches and decodes the images of one request side by side.
        metrics: counts.
    """

    def __init__(
        self,
        *,
        fetcher: Fetcher,
        decoder: Decoder,
        worker: Worker,
        masker: PersonMasker,
        storage: Storage,
        notifier: Notifier,
        defaults: Defaults,
        fetch_pool: Executor,
        metrics: Metrics,
    ) -> None:
        self._fetcher = fetcher
        self._decoder = decoder
        self._worker = worker
        self._masker = masker
        self._storage = storage
        self._notifier = notifier
        self._defaults = defaults
        self._fetch_pool = fetch_pool
        self._metrics = metrics
        self._keys = KeyLocks()

    def run(self, request: TryOnRequest, deadline: float, context: CallContext) -> TryOnResult:
        """The finished try-on: stored under its key, its message sent. A repeat finds it and only notifies.

        A picture that was begun in time is stored however late it is: it has been paid for.

        Args:
            request: as parsed.
            deadline: time.monotonic() value; nothing is begun after it but the effects at the end.
            context: what the platform says about the call.
        Raises:
            TryOnError: any of the tree.
            Abandoned: the caller left before the picture was begun.
        """
        times = StageTimes()
        request = self.complete(request)
        with self._keys.hold(f"{request.userId}/{request.timestamp}", deadline):
            stored, cache = self._stored(request), None
            if stored is None:
                finished = self._make(request, deadline, times, context, LATE_S)
                stored, cache = self._store(request, finished, times), finished.cache
            with times.measure("notify"):
                self._notifier.send(completion(request, stored, self._storage.bucket, context))
        self._metrics.observe(times)
        return _answer(stored, self._storage.bucket, cache, times)

    def picture(self, request: TryOnRequest, deadline: float, context: CallContext) -> Finished:
        """The finished try-on itself, for a caller who keeps it: nothing is stored and nobody is told.

        Args and raises as `run`.
        """
        times = StageTimes()
        finished = self._make(self.complete(request), deadline, times, context)
        self._metrics.observe(times)
        return replace(finished, timings_ms=times.milliseconds())

    def complete(self, request: TryOnRequest) -> TryOnRequest:
        """The request with steps, guidance and quality, by the settings where it has none.

        Raises:
            InvalidRequest: it has no mask, and none can be made.
        """
        if request.mask_image_url is None and not self._masker.available:
            raise InvalidRequest("no automatic masker is configured", field="mask_image_url")
        defaults = self._defaults
        return request.with_defaults(steps=defaults.steps, guidance=defaults.guidance, quality=defaults.quality)

    def _make(
        self, request: TryOnRequest, deadline: float, times: StageTimes, context: CallContext, late_s: float = 0.0
    ) -> Finished:
        contents = self._fetch(request, deadline, times, context)
        pictures, cache = self._pictures(request, contents, deadline, times, context)
        _check_format(request, pictures.person)
        with times.measure("prepare"):
            inputs = prepare(pictures, self._defaults.join, self._defaults.width, self._defaults.height)
        settings = _generation_settings(request, inputs, context)
        generation = self._worker.run(inputs, settings, deadline, context.is_wanted, late_s)
        self._metrics.generations.inc()
        times.add("queue", generation.queued_s)
        times.add("generate", generation.generated_s)
        image = _composite(request, pictures, inputs, generation.image, times)
        with times.measure("encode"):
            content = encode(image, request.output_format, request.output_quality)
        facts = {
            "job_id": request.job_id(),
            "seed": str(settings.seed),
            "width": str(image.shape[1]),
            "height": str(image.shape[0]),
            "engine": self._worker.engine_name,
            "mask_source": MASK_AUTO if request.mask_image_url is None else MASK_GIVEN,
        }
        return Finished(content, facts, cache)

    def _stored(self, request: TryOnRequest) -> StoredObject | None:
        """What an earlier run of this job stored; a result in any format takes the user's timestamp."""
        for key in all_keys_for(request, self._defaults.key_prefix):
            found = self._storage.find(key)
            if found is not None:
                return same_job(found, request.job_id())
        return None

    def _fetch(self, request: TryOnRequest, deadline: float, times: StageTimes, context: CallContext) -> list[bytes]:
        """The bytes of person, garments and mask, in that order, fetched side by side; a mask only where given."""
        refs = [request.person_image_url, *request.garment_urls()]
        if request.mask_image_url is not None:
            refs.append(request.mask_image_url)
        with times.measure("fetch"):
            under_way = [self._fetch_pool.submit(self._file, ref, request.userId, deadline, context) for ref in refs]
            try:
                return [future.result(timeout=max(0.0, deadline - time.monotonic())) for future in under_way]
            except FutureTimeout as exc:
                raise ImageSourceTimeout("the deadline came first") from exc
            finally:
                for future in under_way:
                    future.cancel()

    def _file(self, ref: str, user_id: str, deadline: float, context: CallContext) -> bytes:
        if ref in context.uploads:
            return context.uploads[ref]
        return self._fetcher.fetch(ref, user_id=user_id, deadline=deadline)

    def _pictures(
        self, request: TryOnRequest, contents: list[bytes], deadline: float, times: StageTimes, context: CallContext
    ) -> tuple[Pictures, str | None]:
        """The decoded pictures, and where an automatic mask came from."""
        with times.measure("decode"):
            person, *others = self._decode(contents, deadline, masks=request.mask_image_url is not None)
        if request.mask_image_url is not None:
            return Pictures(person, others[:-1], others[-1]), None
        made = self._masker.masks(contents[0], person, deadline, times, context.is_wanted)
        mask = made.masks[request.cloth_type]
        if not _mask_at(mask, self._defaults.width, self._defaults.height).any():
            raise PersonNotFound(f"nothing to repaint for {request.cloth_type} where the model looks")
        return Pictures(person, others, mask), made.cache

    def _decode(self, contents: list[bytes], deadline: float, masks: int) -> list[Image]:
        """The pictures in files, the last `masks` of which are masks, decoded side by side."""
        photos = [self._decoder.decode] * (len(contents) - masks)
        steps = [*photos, *[self._decoder.decode_mask] * masks]
        left = deadline - time.monotonic()
        try:
            return list(
                self._fetch_pool.map(lambda step, content: step(content, deadline), steps, contents, timeout=left)
            )
        except FutureTimeout as exc:
            raise DeadlineExceeded("the pictures were not decoded in time") from exc

    def _store(self, request: TryOnRequest, finished: Finished, times: StageTimes) -> StoredObject:
        with times.measure("store"):
            _, content_type = FILE_OF[request.output_format]
            key = key_for(request, self._defaults.key_prefix)
            return self._storage.put(key, finished.content, content_type, finished.facts)


def prepare(
    pictures: Pictures, join: Literal["clean", "legacy"], width: int = MODEL_WIDTH, height: int = MODEL_HEIGHT
) -> TryOnInputs:
    """The pictures at the model's size: the person cropped, top and bottom made one garment, the mask black and white.

    Raises:
        MaskInvalid: all black or all white.
    """
    person = geometry.crop_resize(Pillow.fromarray(pictures.person), width, height)
    mask = _mask_at(pictures.mask, width, height)
    if not mask.any() or mask.all():
        raise MaskInvalid("all black or all white at the model's size")
    garment = pictures.garments[0]
    if len(pictures.garments) > 1:
        upper, lower = pictures.garments
        garment = geometry.join_garments(upper, lower, join)
    fitted = geometry.fit_pad(Pillow.fromarray(garment), width, height)
    return TryOnInputs(np.asarray(person), np.asarray(fitted), mask)


def _generation_settings(request: TryOnRequest, inputs: TryOnInputs, context: CallContext) -> GenerationSettings:
    steps, guidance, quality = request.num_inference_steps, request.guidance_scale, request.quality
    if steps is None or guidance is None or quality is None:
        raise ValueError("the request's defaults are still open")
    seed = secrets.randbelow(MAX_SEED) if request.seed == RANDOM_SEED else request.seed
    height, width = inputs.mask.shape
    return GenerationSettings(steps, guidance, seed, width, height, quality, context.on_step)


def _composite(
    request: TryOnRequest, pictures: Pictures, inputs: TryOnInputs, result: Image, times: StageTimes
) -> Image:
    """The result with the person's own pixels where nothing was to change, at the size that was asked for."""
    with times.measure("composite"):
        repaint = request.composite == "repaint"
        if request.output_size == "person":
            return geometry.paste_back(pictures.person, result, _mask_of_photo(pictures, inputs) if repaint else None)
        return geometry.repaint(inputs.person, result, inputs.mask) if repaint else result


def _mask_at(mask: Image, width: int, height: int) -> Image:
    """The mask cropped like the person, its nearest pixels at that size, 0 or 255."""
    nearest = Pillow.Resampling.NEAREST
    return geometry.binarise(np.asarray(geometry.crop_resize(Pillow.fromarray(mask), width, height, resample=nearest)))


def _mask_of_photo(pictures: Pictures, inputs: TryOnInputs) -> Image:
    """The mask at the photo's own size: nothing is repainted beside the part that the model saw."""
    height, width = pictures.person.shape[:2]
    model_height, model_width = inputs.mask.shape
    left, top, right, bottom = geometry.crop_box(width, height, model_width, model_height)
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = _mask_at(pictures.mask, right - left, bottom - top)
    return mask


def _check_format(request: TryOnRequest, person: Image) -> None:
    """Refuses, before the picture is made, a format that cannot hold it."""
    if request.output_format == "webp" and request.output_size == "person" and max(person.shape[:2]) > MAX_WEBP_SIDE:
        raise InvalidRequest(f"{person.shape[1]}x{person.shape[0]} as WebP", field="output_format")


def _answer(stored: StoredObject, bucket: str | None, cache: str | None, times: StageTimes) -> TryOnResult:
    facts = stored.facts
    try:
        return TryOnResult(
            object_key=stored.key,
            bucket=bucket,
            s3_uri=f"s3://{bucket}/{stored.key}" if bucket else None,
            etag=stored.etag,
            job_id=facts["job_id"],
            seed=int(facts["seed"]),
            width=int(facts["width"]),
            height=int(facts["height"]),
            engine=facts["engine"],
            mask_source=facts["mask_source"],
            mask_cache=cache,
            timings_ms=times.milliseconds(),
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise StorageFailed(f"the facts are damaged: {type(exc).__name__}: {exc}", retryable=False) from exc
