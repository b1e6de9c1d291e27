"""The REST door for app back ends: GET /health, and POST /api/try-on with the pictures in a multipart form.

Any picture may be a file or, as text, the URL that `/invocations` takes; the same request makes the same job and the
same picture through either door. Nothing is stored: the answer is the picture.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Callable

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from container.errors import (
    GpuFailed,
    ImageTooLarge,
    InvalidRequest,
    NotReady,
    Overloaded,
    RequestTimeout,
    RequestTooLarge,
    TryOnError,
    UnsupportedContentType,
)
from container.fetch import MAX_BYTES
from container.form import CLOTH_TYPE, IMAGES, try_on_of
from container.gate import Gate, TooOften
from container.get_vton import Finished
from container.request import CallContext, OnStep, TryOnRequest, ignore, upload_reference
from container.sharing import Admission
from container.vton_api import answered, enter, not_serving, run_admitted, wanted
from container.wiring import App
from model.interface import OutOfMemory

NUMBERS: dict[str, Callable[[str], float]] = {"num_inference_steps": int, "guidance_scale": float, "seed": int}
DEFAULTS: dict[str, object] = {"cloth_type": CLOTH_TYPE, "num_inference_steps": 50, "guidance_scale": 2.5, "seed": 42}
TEXTS = {"cloth_type", "composite", "output_size", "output_format", "quality", "userId", "timestamp"}
MAX_FORM_BYTES = len(IMAGES) * MAX_BYTES + 64 * 1024
MAX_TEXT_BYTES = 4096
UPLOAD_S = 30.0  # for the whole form
UPLOADS_PER_PLACE = 2  # forms that are read at a time, for each place of the service
DONE = "Try-on completed successfully"
READY, LOADING, UNWELL = "Service is ready", "Models are still loading. Please wait and try again.", "The GPU failed."
BUSY = "GPU is busy processing another request. Please try again later."
OUT_OF_MEMORY = "GPU out of memory. Image may be too large. Error: {code}"
NOT_A_FORM = "The body must be multipart/form-data."

log = structlog.get_logger()


@dataclass(frozen=True)
class Form:
    """What a form said: the fields of a request, and the files that they name by reference."""

    fields: dict[str, object]
    uploads: dict[str, bytes] = field(default_factory=dict)


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

    @api.get("/health")
    async def health() -> Response:
        error = not_serving(app)
        if error is None:
            return JSONResponse({"status": "healthy", "message": READY})
        loading = isinstance(error, NotReady)
        told = (
            {"status": "loading", "message": LOADING} if loading else {"status": "unhealthy", "message": error.public}
        )
        return JSONResponse(told, status_code=503)

    @api.post("/api/try-on")
    async def try_on(request: Request) -> Response:
        return await answered(app, request, partial(_try_on, app, gate, uploading, request), answer_detail)


def answer_detail(error: TryOnError, request_id: str) -> JSONResponse:
    """The response to a failed request, with the sentence as `detail`."""
    status = NotReady.status if is_busy(error) else error.status
    told = {"detail": sentence(error), "code": error.code, "retryable": error.retryable, "request_id": request_id}
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, (RequestTimeout, RequestTooLarge)):
        headers["Connection"] = "close"
    return JSONResponse(told, status_code=status, headers=headers)


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
        return await read_form(request)
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
        on_step(0, asked.num_inference_steps or app.settings.steps)
        return app.service.picture(asked, deadline, context)

    async with wanted(request) as is_wanted:
        context = CallContext(request_id, is_wanted=is_wanted, uploads=form.uploads, on_step=on_step)
        finished = await run_admitted(app, partial(picture, context), deadline)
    told = {name: finished.facts[name] for name in ("job_id", "mask_source", "engine")}
    log.info("request_done", **told, timings_ms=finished.timings_ms)
    return finished


async def read_form(request: Request) -> Form:
    """The form of a request, read within `UPLOAD_S` and `MAX_FORM_BYTES`.

    Raises:
        UnsupportedContentType, RequestTooLarge, RequestTimeout, ImageTooLarge.
        InvalidRequest: it is no form, or has a field that is unknown, twice there, or no text.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise UnsupportedContentType()
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced[:20]) > MAX_FORM_BYTES:
        raise RequestTooLarge("announced")
    counted = Request(request.scope, _counted(request.receive, MAX_FORM_BYTES))
    try:
        return await asyncio.wait_for(_parsed(counted), UPLOAD_S)
    except asyncio.TimeoutError as exc:
        raise RequestTimeout(f"after {UPLOAD_S} s") from exc
    except (HTTPException, FormParserError) as exc:  # it is no form
        raise InvalidRequest("form") from exc


async def _parsed(request: Request) -> Form:
    fields: dict[str, object] = {}
    uploads: dict[str, bytes] = {}
    async with request.form(
        max_files=len(IMAGES), max_fields=len(TEXTS) + len(NUMBERS) + len(IMAGES), max_part_size=MAX_TEXT_BYTES
    ) as form:
        for name, part in form.multi_items():
            if name in fields or name not in {*IMAGES, *NUMBERS, *TEXTS}:
                raise InvalidRequest("unknown or twice", field=name if name.isidentifier() and len(name) < 64 else None)
            if isinstance(part, UploadFile):
                content = await _content(name, part)
                fields[name] = upload_reference(content)
                uploads[upload_reference(content)] = content
            else:
                fields[name] = part
    return Form(fields, uploads)


async def _content(name: str, part: UploadFile) -> bytes:
    if name not in IMAGES:
        raise InvalidRequest("a file in the place of a text", field=name)
    if part.size is not None and part.size > MAX_BYTES:
        raise ImageTooLarge(f"{part.size} bytes", field=name)
    return await part.read()


def request_of(form: Mapping[str, object]) -> TryOnRequest:
    """The request that the fields of a form make.

    Raises:
        InvalidRequest: with the field of the form that is at fault.
    """
    fields = {**DEFAULTS, **{name: value for name, value in form.items() if value != ""}}
    for name, number in NUMBERS.items():
        fields[name] = _number(name, fields[name], number)
    return try_on_of(fields)


def _number(name: str, value: object, number: Callable[[str], float]) -> object:
    if not isinstance(value, str):
        return value
    try:
        return number(value)
    except ValueError as exc:
        raise InvalidRequest("no number", field=name) from exc


def _counted(receive: Receive, most: int) -> Receive:
    """The same messages, until they hold more than `most` bytes."""
    count = 0

    async def counted() -> Message:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        if count > most:
            raise RequestTooLarge("counted")
        return message

    return counted
