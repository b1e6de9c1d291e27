"""The SageMaker door: /ping, /invocations, /execution-parameters, /metrics.

Handlers run on the event loop and never block it: a request is admitted or refused there, and its work runs on a
thread of its own. The one table from error to status is `errors`; the one place that applies it is here.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Callable, TypeVar

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from container.errors import (
    DeadlineExceeded,
    Draining,
    GpuFailed,
    Internal,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    NotReady,
    Outage,
    Refusal,
    RequestTimeout,
    RequestTooLarge,
    TryOnError,
    UnsupportedContentType,
)
from container.gate import Gate
from container.request import (
    AnyRequest,
    AnyResult,
    CallContext,
    MaskRequest,
    MaskResult,
    TryOnRequest,
    TryOnResult,
    answer,
    parse,
)
from container.strict_json import loads
from container.wiring import App
from container.worker import Abandoned

MAX_BODY_BYTES = 64 * 1024
MAX_HEADERS = 100  # the platform sends about a dozen
BODY_TIMEOUT_S = 5.0
EFFECTS_S = 1.0  # after the deadline, for a picture that is being stored
CALLER_LEFT = "caller_left"  # in the count of requests
ERRORS = {400, 408, 409, 413, 415, 422, 429, 500, 502, 503, 504}  # statuses of /invocations
INFERENCE_ID = "X-Amzn-SageMaker-Inference-Id"
CUSTOM_ATTRIBUTES = "X-Amzn-SageMaker-Custom-Attributes"
INFERENCE_ID_TEXT = re.compile(r"[\x20-\x7e]{1,64}")
CUSTOM_ATTRIBUTES_TEXT = re.compile(r"[\x20-\x7e]{1,1024}")

log = structlog.get_logger()
_Result = TypeVar("_Result")


def create_app(app: App, gate: Gate | None = None) -> FastAPI:
    """The ASGI application in front of a wired service.

    Args:
        app: the service.
        gate: who may call /invocations; by default what the settings say.
    """
    gate = gate or Gate(app.settings)
    docs = {} if app.settings.docs else {"openapi_url": None, "docs_url": None, "redoc_url": None}
    api = FastAPI(title="vton", redirect_slashes=False, **docs)  # type: ignore[arg-type]

    @api.get("/ping", response_class=Response, responses=_errors({503}))
    async def ping() -> Response:
        return answer_error(error, _request_id(None)) if (error := not_serving(app)) else Response(status_code=200)

    @api.post("/invocations", **(_description() if app.settings.docs else {}))
    async def invocations(request: Request) -> Response:
        return await answered(app, request, partial(_invoke, app, gate, request))

    @api.get("/execution-parameters")
    async def execution_parameters() -> dict[str, object]:
        return {
            "MaxConcurrentTransforms": app.settings.max_in_flight,
            "BatchStrategy": "SINGLE_RECORD",
            "MaxPayloadInMB": 1,
        }

    @api.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(app.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @api.exception_handler(HTTPException)
    async def unrouted(_request: Request, exc: HTTPException) -> Response:
        return answer_error(MethodNotAllowed() if exc.status_code == 405 else NotFound(), _request_id(None))

    api.add_middleware(_HeaderCap)
    return api


def _description() -> dict[str, Any]:
    """What OpenAPI says of /invocations: its body is read by hand, so that FastAPI cannot know it."""
    masks = _schema(MaskRequest)
    masks["required"] = [*masks["required"], "task"]  # without it, the same fields are a try-on's
    results = [_schema(TryOnResult), _schema(MaskResult)]
    for result in results:
        result["required"].remove("mask_cache")  # `answer` leaves it out where no photo was masked
    return {
        "responses": {200: {"content": _json({"oneOf": results})}, **_errors(ERRORS)},
        "openapi_extra": {
            "requestBody": {"required": True, "content": _json({"oneOf": [_schema(TryOnRequest), masks]})}
        },
    }


def _errors(statuses: set[int]) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of the errors with these statuses."""
    described: dict[int | str, dict[str, Any]] = {}
    for status in sorted(statuses):
        codes = [kind.code for kind in (*Refusal.__subclasses__(), *Outage.__subclasses__()) if kind.status == status]
        texts = {name: {"type": "string"} for name in ("message", "request_id", "field", "object_key")}
        error = {
            "type": "object",
            "properties": {
                "code": {"enum": codes},
                "retryable": {"type": "boolean"},
                "retry_after_s": {"type": "integer", "minimum": 1},
                **texts,
            },
            "required": ["code", "message", "retryable", "request_id"],
            "additionalProperties": False,
        }
        body = {"type": "object", "properties": {"error": error}, "required": ["error"], "additionalProperties": False}
        described[status] = {"description": ", ".join(codes), "content": _json(body)}
    return described


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _schema(kind: type) -> dict[str, Any]:
    """The JSON Schema of a type, whose patterns are ECMAScript's: it has neither \\A nor \\z."""
    text = json.dumps(TypeAdapter(kind).json_schema())
    schema: dict[str, Any] = json.loads(text.replace(r"\\A", "^").replace(r"\\z", "$"))
    return schema


class _HeaderCap:
    """Refuses requests with more than `MAX_HEADERS` headers; h11 bounds their bytes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self._app
        if len(scope.get("headers", ())) > MAX_HEADERS:
            app = answer_error(RequestTooLarge("headers"), _request_id(None))
        await app(scope, receive, send)


def answer_error(error: TryOnError, request_id: str) -> JSONResponse:
    """The response to a failed request."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, (RequestTimeout, RequestTooLarge)):
        headers["Connection"] = "close"  # the rest of the body is not waited for
    return JSONResponse(error.body(request_id), status_code=error.status, headers=headers)


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """The body, refused before it is read if it is announced too large, and while it is read if it is.

    Raises:
        RequestTooLarge, RequestTimeout.
    """
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced[:20]) > max_bytes:
        raise RequestTooLarge("announced")

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise RequestTooLarge("counted")
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), timeout_s)
    except asyncio.TimeoutError as exc:
        raise RequestTimeout(f"after {timeout_s} s") from exc


async def answered(
    app: App,
    request: Request,
    handle: Callable[[str], Awaitable[Response]],
    answer_failure: Callable[[TryOnError, str], Response] = answer_error,
) -> Response:
    """The response, well or not, and the one log line at the end of every request.

    Args:
        app: counts and observes.
        request: names its id, or gets one.
        handle: makes the response, given that id.
        answer_failure: makes the response to an error, given that id.
    """
    request_id = _request_id(request.headers.get(INFERENCE_ID))
    structlog.contextvars.bind_contextvars(request_id=request_id)
    began = time.monotonic()
    code = "ok"
    try:
        return await handle(request_id)
    except TryOnError as exc:
        code = exc.code
        level = log.info if isinstance(exc, Refusal) else log.warning
        level("request_failed", code=code, detail=str(exc), field=exc.field)
        return answer_failure(exc, request_id)
    except Abandoned:
        code = CALLER_LEFT
        log.info("caller_left")
        return Response(status_code=499)  # nobody reads it
    except asyncio.CancelledError:  # the server does that to what is not done when its time to drain is over
        code = Draining.code
        log.warning("request_failed", code=code, detail="cut off by the end of the process")
        return answer_failure(Draining(retry_after_s=1), request_id)
    except Exception:
        code = Internal.code
        log.exception("request_failed", code=code)
        return answer_failure(Internal(), request_id)
    finally:
        app.metrics.requests.labels(code).inc()
        app.metrics.request_seconds.observe(time.monotonic() - began)
        structlog.contextvars.clear_contextvars()


def enter(gate: Gate, request: Request) -> None:
    """Lets the caller of a request in; raises what the gate raises."""
    gate.enter(request.headers, request.client.host if request.client else "")


async def _invoke(app: App, gate: Gate, request: Request, request_id: str) -> Response:
    enter(gate, request)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise UnsupportedContentType()
    body = await read_body(request, MAX_BODY_BYTES, BODY_TIMEOUT_S)
    context = _context(request, request_id)
    asked = parse(loads(body))
    structlog.contextvars.bind_contextvars(user=app.pseudonyms.of(asked.userId))
    if (error := not_serving(app)) is not None:
        raise error
    deadline = time.monotonic() + app.settings.deadline_s
    async with wanted(request) as is_wanted:
        context = replace(context, is_wanted=is_wanted)
        result = await run_admitted(app, partial(_run, app, asked, deadline, context), deadline)
    log.info("request_done", **_summary(result), custom_attributes=context.custom_attributes)
    headers = {CUSTOM_ATTRIBUTES: context.custom_attributes} if context.custom_attributes else {}
    return JSONResponse(answer(result), headers=headers)


@asynccontextmanager
async def wanted(request: Request) -> AsyncIterator[Callable[[], bool]]:
    """Inside the block: whether the caller, whose whole body was read, is still there."""
    leaving = asyncio.create_task(_until_it_leaves(request))
    try:
        yield lambda: not leaving.done()
    finally:
        leaving.cancel()


async def _until_it_leaves(request: Request) -> None:
    """Returns when the caller closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _run(app: App, asked: AnyRequest, deadline: float, context: CallContext) -> AnyResult:
    if isinstance(asked, MaskRequest):
        return app.masks.run(asked, deadline, context)
    return app.service.run(asked, deadline, context)


async def run_admitted(app: App, run: Callable[[], _Result], deadline: float) -> _Result:
    """Runs on a thread of the request pool, in one of the places that admission counts.

    What is still running soon after its deadline (time.monotonic()) goes on in its place, and the caller is told.

    Raises:
        Draining, Overloaded, what `run` raises.
        DeadlineExceeded: it is still running.
    """
    app.admission.enter()
    context = contextvars.copy_context()
    try:
        running = asyncio.wrap_future(app.request_pool.submit(context.run, run))
    except BaseException:  # no thread to be had
        app.admission.leave()
        raise
    running.add_done_callback(lambda _: app.admission.leave())
    done, _ = await asyncio.wait({running}, timeout=deadline - time.monotonic() + EFFECTS_S)
    if done:
        return running.result()
    running.add_done_callback(_log_late)
    raise DeadlineExceeded("the work goes on without its caller", retry_after_s=app.worker.retry_after_s(2))


def _log_late(ran: asyncio.Future[Any]) -> None:
    """Tells how the work ended whose caller was told that it took too long."""
    if ran.cancelled():
        return
    error = ran.exception()
    if error is None:
        result = ran.result()
        log.info("late_request_done", **(_summary(result) if isinstance(result, (TryOnResult, MaskResult)) else {}))
    elif isinstance(error, TryOnError):
        log.warning("late_request_failed", code=error.code, detail=str(error))
    else:
        log.error("late_request_failed", code=Internal.code, exc_info=error)


def not_serving(app: App) -> TryOnError | None:
    """Why no request can be taken now, or None."""
    if app.admission.draining:
        return Draining(retry_after_s=1)
    if app.worker.device_failed:
        return GpuFailed("the device failed earlier")
    return None if app.worker.ready else NotReady(retry_after_s=5)


def _context(request: Request, request_id: str) -> CallContext:
    inference_id = request.headers.get(INFERENCE_ID)
    attributes = request.headers.get(CUSTOM_ATTRIBUTES)
    if inference_id is not None and not INFERENCE_ID_TEXT.fullmatch(inference_id):
        raise InvalidRequest("header", field=INFERENCE_ID)
    if attributes is not None and not CUSTOM_ATTRIBUTES_TEXT.fullmatch(attributes):
        raise InvalidRequest("header", field=CUSTOM_ATTRIBUTES)
    return CallContext(request_id, inference_id, attributes)


def _request_id(inference_id: str | None) -> str:
    """The caller's own id where it can stand in a log, else a new one."""
    return inference_id if inference_id and INFERENCE_ID_TEXT.fullmatch(inference_id) else uuid.uuid4().hex


def _summary(result: AnyResult) -> dict[str, object]:
    told: dict[str, object] = {
        "job_id": result.job_id,
        "timings_ms": result.timings_ms,
        "mask_source": result.mask_source,
    }
    return told if isinstance(result, MaskResult) else {**told, "engine": result.engine}
