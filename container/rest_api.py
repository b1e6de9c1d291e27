"""The REST door for app back ends: GET /health, and POST /api/try-on with the pictures in a multipart form.

Any picture may be a file or, as text, the URL that `/invocations` takes; the same request makes the same job and the
same picture through either door. Nothing is stored: the answer is the picture.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from functools import partial
from typing import Callable, cast

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse

from container.errors import (
    GpuFailed,
    InvalidRequest,
    NotReady,
    Overloaded,
    TryOnError,
    UnsupportedContentType,
)
from container.form import CLOTH_TYPE, named_by_form, try_on_of
from container.gate import Gate, TooOften
from container.get_vton import Finished
from container.multipart import Form, read_form
from container.openapi import describe_form
from container.request import CallContext, OnStep, TryOnRequest, ignore
from container.sharing import Admission
from container.vton_api import answered, enter, error_response, not_serving, run_admitted, wanted
from container.wiring import App
from model.interface import OutOfMemory

NUMBERS: dict[str, Callable[[str], float]] = {
    "num_inference_steps": int,
    "guidance_scale": float,
    "seed": int,
    "output_quality": int,
}
DEFAULTS: dict[str, object] = {"cloth_type": CLOTH_TYPE, "seed": 42}
TEXTS = {"cloth_type", "composite", "output_size", "output_format", "quality", "userId", "timestamp"}
UPLOADS_PER_PLACE = 2  # forms that are read at a time, for each place of the service
DONE = "Try-on completed successfully"
READY, LOADING, UNWELL = "Service is ready", "Models are still loading. Please wait and try again.", "The GPU failed."
BUSY = "GPU is busy processing another request. Please try again later."
OUT_OF_MEMORY = "GPU out of memory. Image may be too large. Error: {code}"
NOT_A_FORM = "The body must be multipart/form-data."

log = structlog.get_logger()


def add_rest(api: FastAPI, app: App, gate: Gate) -> None:
    """Opens the REST door in an application that has the SageMaker door."""
    uploading = Admission(UPLOADS_PER_PLACE * app.settings.max_in_flight, app.worker.retry_after_s)
    if app.settings.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=list(app.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "X-API-Key", "Content-Type"],
            expose_headers=["Retry-After", "X-Job-Id", "X-Seed"],
        )

    api.state.answers.update({"/api/": answer_detail, "/health": answer_detail})

    @api.get("/health", responses={503: {"description": "It loads, or the GPU failed."}})
    async def health() -> Response:
        error = not_serving(app)
        if error is None:
            return JSONResponse({"status": "healthy", "message": READY})
        loading = isinstance(error, NotReady)
        told = (
            {"status": "loading", "message": LOADING} if loading else {"status": "unhealthy", "message": error.public}
        )
        return JSONResponse(told, status_code=503)

    @api.post("/api/try-on", **(describe_form({*NUMBERS, *TEXTS}) if app.settings.docs else {}))
    async def try_on(request: Request) -> Response:
        return await answered(app, request, partial(_try_on, app, gate, uploading, request), answer_detail)


def answer_detail(error: TryOnError, request_id: str) -> JSONResponse:
    """The response to a failed request, with the sentence as `detail`."""
    status = NotReady.status if is_busy(error) else error.status
    told = {"detail": sentence(error), "code": error.code, "retryable": error.retryable, "request_id": request_id}
    return error_response(error, status, told)


def sentence(error: TryOnError) -> str:
    """What a person reads."""
    if is_busy(error):
        return BUSY
    if isinstance(error, NotReady):
        return LOADING
    if isinstance(error, GpuFailed) and isinstance(error.__cause__, OutOfMemory):
        return OUT_OF_MEMORY.format(code=error.code)
    if isinstance(error, UnsupportedContentType):
        return NOT_A_FORM
    return error.public if error.field is None else f"{error.public} ({error.field})"


def is_busy(error: TryOnError) -> bool:
    """Whether all places are taken; a caller who asks too often is told that instead."""
    return isinstance(error, Overloaded) and not isinstance(error, TooOften)


async def _try_on(app: App, gate: Gate, uploading: Admission, request: Request, request_id: str) -> Response:
    form = await entered(app, gate, uploading, request)
    finished = await dressed(app, request, form, request_id)
    image = base64.b64encode(finished.content).decode("ascii")
    return JSONResponse(
        {"success": True, "imageBase64": image, "message": DONE},
        headers={"X-Job-Id": finished.facts["job_id"], "X-Seed": finished.facts["seed"]},
    )


async def entered(app: App, gate: Gate, uploading: Admission, request: Request) -> Form:
    """The form of a caller who may ask, of a service that serves; so many are read at a time.

    Raises:
        TryOnError: of the gate, of a service that does not serve, of `uploading`, and of `read_form`.
    """
    enter(gate, request)
    if (error := not_serving(app)) is not None:
        raise error
    uploading.enter()
    try:
        return await read_form(request, frozenset({*NUMBERS, *TEXTS}))
    finally:
        uploading.leave()


async def dressed(app: App, request: Request, form: Form, request_id: str, on_step: OnStep = ignore) -> Finished:
    """The finished picture that a form asks for.

    Args:
        app: makes it.
        request: whose caller may leave.
        form: read.
        request_id: for the log.
        on_step: as of `CallContext`, and told (0, steps) when the request has a place.
    Raises:
        TryOnError: what `TryOnService.picture` raises, and InvalidRequest.
    """
    asked = request_of(form.fields)
    structlog.contextvars.bind_contextvars(user=app.pseudonyms.of(asked.userId))
    deadline = time.monotonic() + app.settings.deadline_s

    def picture(context: CallContext) -> Finished:
        with named_by_form():
            complete = app.service.complete(asked)
            on_step(0, cast(int, complete.num_inference_steps))
            return app.service.picture(complete, deadline, context)

    async with wanted(request) as is_wanted:
        context = CallContext(request_id, is_wanted=is_wanted, uploads=form.uploads, on_step=on_step)
        finished = await run_admitted(app, partial(picture, context), deadline)
    told = {name: finished.facts[name] for name in ("job_id", "mask_source", "engine")}
    log.info("request_done", **told, timings_ms=finished.timings_ms)
    return finished


def request_of(form: Mapping[str, object]) -> TryOnRequest:
    """The request that the fields of a form make.

    Raises:
        InvalidRequest: with the field of the form that is at fault.
    """
    fields = {**DEFAULTS, **{name: value for name, value in form.items() if value != ""}}
    for name in NUMBERS.keys() & fields.keys():
        fields[name] = _number(name, fields[name], NUMBERS[name])
    return try_on_of(fields)


def _number(name: str, value: object, number: Callable[[str], float]) -> object:
    if not isinstance(value, str):
        return value
    try:
        return number(value)
    except ValueError as exc:
        raise InvalidRequest("no number", field=name) from exc
