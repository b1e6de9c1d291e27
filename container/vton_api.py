"""The SageMaker door: /ping, /invocations, /execution-parameters, /metrics.

Handlers run on the event loop and never block it: a request is admitted or refused there, and its work runs on a
thread of its own. The one table from error to status is `errors`; the one place that applies it is here.
"""

from __future__ import annotations

import asyncio
import contextvars
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Callable, TypeVar

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
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
    Refusal,
    RequestTimeout,
    RequestTooLarge,
    TryOnError,
    UnsupportedContentType,
)
from container.gate import Gate
from container.openapi import describe_errors, describe_invocations
from container.request import (
    AnyRequest,
    AnyResult,
    CallContext,
    MaskRequest,
    MaskResult,
    TryOnResult,
    answer,
    parse,
)
from container.strict_json import loads
from container.wiring import App
from container.worker import Abandoned

MAX_BODY_BYTES = 64 * 1024
MAX_HEADERS = 100  # the platform sends about a dozen
MAX_DISCARDED_BYTES = 8 * 1024 * 1024  # more than the platform hands on in real time
MAX_TRANSFORMS = 100  # of 1 MB each; the platform refuses more
BODY_TIMEOUT_S = 5.0
LINGER_S = 1.5
EFFECTS_S = 1.0  # after the deadline, for a picture that is being stored
CALLER_LEFT = "caller_left"  # in the count of requests
INFERENCE_ID = "X-Amzn-SageMaker-Inference-Id"
CUSTOM_ATTRIBUTES = "X-Amzn-SageMaker-Custom-Attributes"
INFERENCE_ID_TEXT = re.compile(r"[\x20-\x7e]{1,64}")
CUSTOM_ATTRIBUTES_TEXT = re.compile(r"[\x20-\x7e]{1,1024}")

log = structlog.get_logger()
_Result = TypeVar("_Result")
AnswerFailure = Callable[[TryOnError, str], Response]  # given the request's id


def create_app(app: App, gate: Gate | None = None) -> FastAPI:
    """The ASGI application in front of a wired service.

    Args:
        app: the service.
        gate: who may call /invocations; by default what the settings say.
    """
    gate = gate or Gate(app.settings)
    docs = {} if app.settings.docs else {"openapi_url": None, "docs_url": None, "redoc_url": None}
    api = FastAPI(title="vton", redirect_slashes=False, **docs)  # type: ignore[arg-type]

    @api.get("/ping", response_class=Response, responses=describe_errors({503}))
    async def ping() -> Response:
        return answer_error(error, _request_id(None)) if (error := not_serving(app)) else Response(status_code=200)

    @api.post("/invocations", **(describe_invocations() if app.settings.docs else {}))
    async def invocations(request: Request) -> Response:
        return await answered(app, request, partial(_invoke, app, gate, request))

    @api.get("/execution-parameters")
    async def execution_parameters() -> dict[str, object]:
        return {
            "MaxConcurrentTransforms": min(app.settings.max_in_flight, MAX_TRANSFORMS),
            "BatchStrategy": "SINGLE_RECORD",
            "MaxPayloadInMB": 1,
        }

    @api.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(app.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @api.exception_handler(HTTPException)
    async def unrouted(request: Request, exc: HTTPException) -> Response:
        return answer_at(request.scope, MethodNotAllowed() if exc.status_code == 405 else NotFound())

    api.state.answers = {}
    api.add_middleware(_HeaderCap)
    return api


class _HeaderCap:
    """Refuses requests with more than `MAX_HEADERS` headers; h11 bounds their bytes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self._app
        if len(scope.get("headers", ())) > MAX_HEADERS:
            app = answer_at(scope, RequestTooLarge("headers"))
        await app(scope, receive, send)


def answer_at(scope: Scope, error: TryOnError) -> Response:
    """The response to what reached no route, as the door answers to which its path belongs (`state.answers`)."""
    doors: dict[str, AnswerFailure] = scope["app"].state.answers
    answers = (answer for beginning, answer in doors.items() if scope["path"].startswith(beginning))
    return next(answers, answer_error)(error, _request_id(None))


class LingeringResponse(JSONResponse):
    """The answer to a body that is too large, and then the rest of it, unread, for a while.

    Most callers send all before they read: where the connection closed on them, they would not see the answer.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers at once; returns when the rest has come, or `MAX_DISCARDED_BYTES` of it, or after `LINGER_S`."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_discard(receive), LINGER_S)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    discarded, more = 0, True
    while more and discarded <= MAX_DISCARDED_BYTES:
        message = await receive()
        discarded += len(message.get("body", b""))
        more = message.get("more_body", False)


def answer_error(error: TryOnError, request_id: str) -> JSONResponse:
    """The response to a failed request."""
    return error_response(error, error.status, error.body(request_id))


def error_response(error: TryOnError, status: int, told: Mapping[str, object]) -> JSONResponse:
    """The response with this status and body, and the headers that go with the error."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, (RequestTimeout, RequestTooLarge)):
        headers["Connection"] = "close"  # the rest of the body is not waited for
    kind = LingeringResponse if isinstance(error, RequestTooLarge) else JSONResponse
    return kind(told, status_code=status, headers=headers)


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """The body, refused before it is read if it is announced too large, and while it is read if it is.

    Raises:
        RequestTooLarge, RequestTimeout, ClientDisconnect.
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
    answer_failure: AnswerFailure = answer_error,
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
    except (Abandoned, ClientDisconnect):
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
    context, loop = contextvars.copy_context(), asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    try:
        running = app.request_pool.submit(context.run, run)
    except BaseException:  # no thread to be had
        app.admission.leave()
        raise

    def end(_: Future[_Result]) -> None:
        app.admission.leave()
        with suppress(RuntimeError):  # the loop is closed: the process ends
            loop.call_soon_threadsafe(ended.set_result, None)

    running.add_done_callback(end)
    done, _ = await asyncio.wait({ended}, timeout=deadline - time.monotonic() + EFFECTS_S)
    if done:
        return running.result()
    running.add_done_callback(lambda ran: context.run(_log_late, ran))
    raise DeadlineExceeded("the work goes on without its caller", retry_after_s=app.worker.retry_after_s(2))


def _log_late(ran: Future[Any]) -> None:
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
    if attributes and not CUSTOM_ATTRIBUTES_TEXT.fullmatch(attributes):
        raise InvalidRequest("header", field=CUSTOM_ATTRIBUTES)
    return CallContext(request_id, inference_id, attributes or None)


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
