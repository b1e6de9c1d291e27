"""What a RunPod job asks for, how far it is, and how it is answered: plain values that the platform can carry."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from typing import Callable

import structlog

from container.errors import Internal, InvalidRequest, Refusal, RequestTooLarge, TryOnError
from container.form import IMAGES, try_on_of, with_uploads
from container.get_vton import Finished
from container.request import AnyRequest, AnyResult, answer, parse

MAX_ITEMS = 16
MAX_RESULT_BYTES = 20_000_000 - 4096  # the platform's 20 MB, less what it wraps around a result
OUTPUTS = BASE64, S3 = "base64", "s3"
PROGRESS_S = 1.0  # between two reports, and what must be left of a picture for another

log = structlog.get_logger()
Answer = dict[str, object]


class ResultTooLarge(RequestTooLarge):
    """The platform would drop the result."""

    code = "result_too_large"
    public = "The result is too large for the platform; ask for a smaller one, fewer at once, or output s3."


class Progress:
    """Tells of a picture's steps now and then, and not near its end: a report on its way must not overtake the result.

    Args:
        tell: posts a report; must not raise.
        place: what is told beside the steps: which item of a batch it is.
    """

    def __init__(self, tell: Callable[[dict[str, int]], None], place: Mapping[str, int]) -> None:
        self._tell = tell
        self._place = place
        self._first: tuple[int, float] | None = None
        self._told = 0.0

    def __call__(self, done: int, steps: int) -> None:
        """One more step is done; the arguments are those of `CallContext.on_step`."""
        now = time.monotonic()
        if self._first is None:
            self._first = (done, now)
        step_s = (now - self._first[1]) / max(1, done - self._first[0])
        if now - self._told >= PROGRESS_S and step_s * (steps - done) >= PROGRESS_S:
            self._told = now
            self._tell({**self._place, "steps_done": done, "steps": steps})


def input_of(job: object) -> tuple[str, Mapping[str, object]]:
    """The id of a job, and its input.

    Raises:
        InvalidRequest: it has none, or no id, by which alone it can be answered.
    """
    if not isinstance(job, dict) or not isinstance(job.get("id"), str):
        raise InvalidRequest("the job has no id", field="id")
    asked = job.get("input")
    if not isinstance(asked, dict):
        raise InvalidRequest("the job's input is no object", field="input")
    return job["id"], asked


def items_of(asked: Mapping[str, object]) -> list[object]:
    """The inputs of a batch.

    Raises:
        InvalidRequest: they are no list, none, too many, or not alone.
    """
    items = asked["items"]
    if not isinstance(items, list) or not 1 <= len(items) <= MAX_ITEMS or len(asked) > 1:
        raise InvalidRequest(f"not 1 to {MAX_ITEMS} of them and nothing else", field="items")
    return items


def is_form(asked: object) -> bool:
    """Whether an input names its pictures as forms do, and not as /invocations does."""
    return isinstance(asked, dict) and any(name in asked for name in IMAGES)


def parsed(asked: object) -> tuple[AnyRequest, str, dict[str, bytes]]:
    """The request in an input, where its result goes, and the files that came along, by reference.

    Raises:
        InvalidRequest, ImageTooLarge: with the field at fault.
    """
    if not isinstance(asked, dict):
        raise InvalidRequest("an item is no object", field="items")
    fields, form = dict(asked), is_form(asked)
    output = fields.pop("output", BASE64 if form else S3)
    if output not in OUTPUTS:
        raise InvalidRequest("neither base64 nor s3", field="output")
    if not form:
        return parse(fields), output, {}
    for name in ("userId", "timestamp") if output == S3 else ():
        if name not in fields:
            raise InvalidRequest("no key without it", field=name)
    fields, uploads = with_uploads(fields)
    return try_on_of(fields), output, uploads


def pictured(finished: Finished) -> Answer:
    """The answer with a picture in it."""
    facts = finished.facts
    cache = {} if finished.cache is None else {"mask_cache": finished.cache}
    return {
        "result_image": base64.b64encode(finished.content).decode("ascii"),
        "success": True,
        **{name: facts[name] for name in ("job_id", "engine", "mask_source")},
        **{name: int(facts[name]) for name in ("seed", "width", "height")},
        **cache,
        "timings_ms": dict(finished.timings_ms),
    }


def stored(result: AnyResult) -> Answer:
    """The answer with the key of what lies in S3: that of the SageMaker door."""
    return {**answer(result), "success": True}


def failed(exc: Exception, request_id: str) -> Answer:
    """The answer to what failed, which is logged. Its `error` is a text: the platform takes nothing else."""
    error = exc if isinstance(exc, TryOnError) else Internal()
    if isinstance(exc, TryOnError):
        level = log.info if isinstance(exc, Refusal) else log.warning
        level("request_failed", code=exc.code, detail=str(exc), field=exc.field)
    else:
        log.error("request_failed", code=error.code, exc_info=exc)
    told = error.body(request_id)["error"]
    field = "" if error.field is None else f" ({error.field})"
    return {"error": f"{error.code}: {told.pop('message')}{field}", "success": False, **told}


def size_of(answered: Answer) -> int:
    """Bytes of its JSON."""
    return len(json.dumps(answered))
