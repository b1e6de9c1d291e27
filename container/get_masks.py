"""The sign-up step: a photo in, its stored masks out."""

from __future__ import annotations

from collections.abc import Mapping

from container.decoder import Decoder
from container.errors import InvalidRequest, StorageFailed
from container.fetch import Fetcher
from container.images import encode_mask
from container.notify import Notifier, masks_completion
from container.person_masks import PersonMasker, PersonMasks
from container.request import CLOTH_TYPES, CallContext, MaskRequest, MaskResult
from container.sharing import KeyLocks
from container.storage import Storage, StoredObject, mask_key_for, same_job
from container.telemetry import Metrics, StageTimes

MASKED_HERE = "auto"
PNG = "image/png"


class MaskService:
    """Turns photos into stored masks. Holds ports, and no state of any request.

    Args:
        fetcher: where the photo's bytes come from.
        decoder: makes a picture of them.
        masker: makes the masks.
        storage: keeps them.
        notifier: tells of them.
        key_prefix: what every key begins with.
        metrics: counts.
    """

    def __init__(
        self,
        *,
        fetcher: Fetcher,
        decoder: Decoder,
        masker: PersonMasker,
        storage: Storage,
        notifier: Notifier,
        key_prefix: str,
        metrics: Metrics,
    ) -> None:
        self._fetcher = fetcher
        self._decoder = decoder
        self._masker = masker
        self._storage = storage
        self._notifier = notifier
        self._key_prefix = key_prefix
        self._metrics = metrics
        self._keys = KeyLocks()

    def run(self, request: MaskRequest, deadline: float, context: CallContext) -> MaskResult:
        """The masks of all asked types: stored under their keys, one message sent. A repeat finds them and notifies.

        Args:
            request: as parsed.
            deadline: time.monotonic() value; the call returns or raises before it, but for the effects at the end.
            context: what the platform says about the call.
        Raises:
            TryOnError: any of the tree.
            Abandoned: the caller left before the photo was looked at.
        """
        times = StageTimes()
        if not self._masker.available:
            raise InvalidRequest("no automatic masker is configured", field="task")
        with self._keys.hold(f"{request.userId}/{request.timestamp}", deadline):
            stored, cache = self._stored(request), None
            if len(stored) < len(request.cloth_types):
                made = self._make(request, deadline, times, context)
                stored, cache = self._store(request, made, times), made.cache
            with times.measure("notify"):
                self._notifier.send(masks_completion(request, stored, self._storage.bucket, context))
        self._metrics.observe(times)
        return _answer(stored, self._storage.bucket, cache, times)

    def _key(self, request: MaskRequest, cloth_type: str) -> str:
        return mask_key_for(request, self._key_prefix, cloth_type)

    def _stored(self, request: MaskRequest) -> dict[str, StoredObject]:
        """What an earlier run of this job stored, which a fault may have ended half way; a mask of any type counts."""
        found = {name: self._storage.find(self._key(request, name)) for name in CLOTH_TYPES}
        own = {name: same_job(one, request.job_id()) for name, one in found.items() if one is not None}
        return {name: own[name] for name in request.cloth_types if name in own}

    def _make(self, request: MaskRequest, deadline: float, times: StageTimes, context: CallContext) -> PersonMasks:
        with times.measure("fetch"):
            content = self._fetcher.fetch(request.person_image_url, user_id=request.userId, deadline=deadline)
        with times.measure("decode"):
            person = self._decoder.decode(content, deadline)
        return self._masker.masks(content, person, deadline, times, context.is_wanted)

    def _store(self, request: MaskRequest, made: PersonMasks, times: StageTimes) -> dict[str, StoredObject]:
        height, width = next(iter(made.masks.values())).shape
        facts = {"job_id": request.job_id(), "width": str(width), "height": str(height), "mask_source": MASKED_HERE}
        stored: dict[str, StoredObject] = {}
        for name in request.cloth_types:
            with times.measure("encode"):
                content = encode_mask(made.masks[name])
            with times.measure("store"):
                stored[name] = self._storage.put(self._key(request, name), content, PNG, facts)
        return stored


def _answer(stored: Mapping[str, StoredObject], bucket: str | None, cache: str | None, times: StageTimes) -> MaskResult:
    facts = next(iter(stored.values())).facts
    try:
        return MaskResult(
            object_keys={name: one.key for name, one in stored.items()},
            bucket=bucket,
            job_id=facts["job_id"],
            width=int(facts["width"]),
            height=int(facts["height"]),
            mask_source=facts["mask_source"],
            mask_cache=cache,
            timings_ms=times.milliseconds(),
        )
    except (KeyError, ValueError) as exc:
        raise StorageFailed(f"the facts are damaged: {type(exc).__name__}: {exc}", retryable=False) from exc
