"""What boto3's `sagemaker-runtime` client needs of SageMaker, over HTTP, in front of a container on this machine.

One endpoint: real-time, with response streams, or asynchronous. The platform's way with errors is kept: whatever the
container refuses, the caller sees a ModelError 424 with the container's status and body inside.
Source: botocore's service model of sagemaker-runtime.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass

import structlog
from fastapi import FastAPI, Request, Response
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy import event_stream
from deploy.local_async import AsyncEndpoint
from deploy.local_invoke import TIMED_OUT, Answer, Head, NoAnswer, Where, call, forwarded, opened
from deploy.platform_errors import (
    ACCOUNT,
    NO_STATUS,
    PlatformError,
    content_too_long,
    model_error,
    validation_error,
)

ENDPOINT_NAME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?")
MAX_BODY_BYTES = 6_291_456  # of a real-time request and of its answer
MAX_DISCARDED_BYTES = 2**26  # of a body that is too large, read so that its sender hears the refusal
MAX_LEFT_RUNNING = 100  # invocations that go on after their callers were told of the time limit
VARIANT = "primary"
INVOKED = {"x-Amzn-Invoked-Production-Variant": VARIANT}
ASCII = re.compile(r"[\x00-\x7f]{0,1024}")
HEADER_RULES = {  # as the service model has them
    **dict.fromkeys(("content-type", "accept", "x-amzn-sagemaker-content-type", "x-amzn-sagemaker-accept"), ASCII),
    "x-amzn-sagemaker-inference-id": re.compile(r"[\x21-\x7e][\x20-\x7e]{0,63}"),
    "x-amzn-sagemaker-custom-attributes": ASCII,
    "x-amzn-sagemaker-target-variant": re.compile(VARIANT),
    "x-amzn-sagemaker-session-id": re.compile(r"(?=.{1,256}\Z)(NEW_SESSION|[a-zA-Z0-9](-*[a-zA-Z0-9])*)"),
}
OTHER_ENDPOINTS = {  # header -> the one kind of endpoint that takes it, and its name in the refusal
    "x-amzn-sagemaker-target-model": ("a multi-model endpoint", "target model"),
    "x-amzn-sagemaker-target-container-hostname": ("a multi-container endpoint", "target container hostname"),
    "x-amzn-sagemaker-inference-component": ("an endpoint of inference components", "inference component name"),
    "x-amzn-sagemaker-enable-explanations": ("an endpoint with an explainer", "enable explanations"),
}

log = structlog.get_logger()


@dataclass(frozen=True)
class RuntimeLimits:
    """What the platform allows one call.

    Attributes:
        model_s: from the call to the whole answer; of a stream, to its first byte.
        stream_s: from the call to the end of a stream.
        left_s: how long a container may go on with an invocation whose caller was told that it timed out.
        body_s: for the caller to send the body.
        body_bytes: of the body, and of an answer that is not streamed.
    """

    model_s: float = 60.0
    stream_s: float = 480.0
    left_s: float = 3600.0
    body_s: float = 60.0
    body_bytes: int = MAX_BODY_BYTES


def create_runtime(
    container: str | Where,
    *,
    name: str | None = None,
    limits: RuntimeLimits | None = None,
    asynchronous: AsyncEndpoint | None = None,
) -> FastAPI:
    """The runtime in front of a container.

    Args:
        container: "http://host:port" of its /invocations, or what gives that of the one that serves now.
        name: of the one endpoint that there is; without one, every name is its name.
        limits: of a call.
        asynchronous: makes it an asynchronous endpoint, which takes asynchronous calls only, as on the platform.
    """
    where = container if callable(container) else lambda: container
    endpoint = _Endpoint(where, limits or RuntimeLimits(), name)
    api = FastAPI(openapi_url=None, lifespan=asynchronous.lifespan(where) if asynchronous else None)
    api.add_middleware(_RequestId)

    @api.exception_handler(PlatformError)
    async def refused(_request: Request, exc: PlatformError) -> Response:
        return exc.response()

    def refusal(asked: str) -> PlatformError:
        kind = "a real-time" if asynchronous is None else "an asynchronous"
        return validation_error(f"Endpoint {asked} of account {ACCOUNT} is {kind} endpoint: call it as one.")

    # A name is whatever stands there, "a/b" too: `check` refuses it with the platform's sentence.
    @api.post("/endpoints/{asked:path}/invocations")
    async def invoke(asked: str, request: Request) -> Response:
        endpoint.check(asked, request.headers)
        if asynchronous is not None:
            raise refusal(asked)
        return await endpoint.invoke(asked, request)

    @api.post("/endpoints/{asked:path}/invocations-response-stream")
    async def invoke_with_response_stream(asked: str, request: Request) -> Response:
        endpoint.check(asked, request.headers)
        if asynchronous is not None:
            raise refusal(asked)
        return await endpoint.stream(asked, request)

    @api.post("/endpoints/{asked:path}/async-invocations")
    async def invoke_async(asked: str, request: Request) -> Response:
        endpoint.check(asked, request.headers)
        if asynchronous is None:
            raise refusal(asked)
        too_long = validation_error(f"Body must have at most {asynchronous.config.inline_bytes} bytes.")
        body = await read_body(request, asynchronous.config.inline_bytes, endpoint.limits.body_s, too_long)
        return asynchronous.submit(asked, request.headers, body).accepted()

    return api


async def read_body(request: Request, max_bytes: int, limit_s: float, too_long: PlatformError) -> bytes:
    """The body of a call. One that is too large is read to its end, and not kept, so that its sender hears of it.

    Raises:
        PlatformError: `too_long`, or the body did not come.
    """

    async def read() -> bytes:
        body, size = bytearray(), 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= max_bytes:
                body += chunk
            elif size > max_bytes + MAX_DISCARDED_BYTES:
                break
        if size > max_bytes:
            raise too_long
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), limit_s)
    except (asyncio.TimeoutError, ClientDisconnect) as exc:
        raise PlatformError(408, "RequestTimeoutException", "The body of the call did not come.") from exc


class _Endpoint:
    def __init__(self, where: Where, limits: RuntimeLimits, name: str | None) -> None:
        self.limits = limits
        self._where = where
        self._name = name
        self._left_running: set[asyncio.Task[Answer]] = set()

    def check(self, asked: str, headers: Mapping[str, str]) -> None:
        """Refuses names that are not this endpoint's, and headers that it or the service model does not take."""
        if not ENDPOINT_NAME.fullmatch(asked) or self._name not in (None, asked):
            raise validation_error(f"Endpoint {asked[:80]} of account {ACCOUNT} not found.")
        for name, (kind, words) in OTHER_ENDPOINTS.items():
            if name in headers:
                raise validation_error(f"Endpoint {asked} is not {kind} and does not support {words} header.")
        for name, rule in HEADER_RULES.items():
            value = headers.get(name)
            if value is not None and not rule.fullmatch(value):
                raise validation_error(f"{name} has a value that is not permitted.")

    async def invoke(self, asked: str, request: Request) -> Response:
        body = await self._body(request)
        try:
            answer = await self._answer(forwarded(request.headers), body)
        except NoAnswer as exc:
            raise model_error(asked, NO_STATUS, str(exc)) from exc
        if not answer.head.ok:
            raise model_error(asked, answer.head.status, answer.content.decode(errors="replace"))
        headers = {**INVOKED, **answer.head.returned()}
        return Response(answer.content, media_type=answer.head.get("Content-Type"), headers=headers)

    async def stream(self, asked: str, request: Request) -> Response:
        body = await self._body(request)
        began = time.monotonic()
        kept = AsyncExitStack()
        reads_s = self.limits.stream_s + self.limits.body_s
        try:
            opening = kept.enter_async_context(opened(self._where, forwarded(request.headers), body))
            head, chunks = await asyncio.wait_for(opening, self.limits.model_s)
        except asyncio.TimeoutError:
            return _EventStream(_once(_time_exceeded()), INVOKED, kept, reads_s)
        except NoAnswer as exc:
            raise model_error(asked, NO_STATUS, str(exc)) from exc
        if not head.ok:
            raise model_error(asked, head.status, await self._text(kept, chunks))
        return _EventStream(self._events(chunks, began), _stream_headers(head), kept, reads_s)

    async def _body(self, request: Request) -> bytes:
        limit = self.limits.body_bytes
        return await read_body(request, limit, self.limits.body_s, content_too_long(limit))

    async def _answer(self, headers: Mapping[str, str], body: bytes) -> Answer:
        """The container's answer. One that is late is left to finish, as the platform leaves it: it was paid for."""
        limits = self.limits
        calling = call(self._where, headers, body, limit_s=limits.left_s, max_bytes=limits.body_bytes)
        task = asyncio.create_task(calling)
        try:
            return await asyncio.wait_for(asyncio.shield(task), limits.model_s)
        except asyncio.TimeoutError as exc:
            self._leave_running(task)
            raise NoAnswer(TIMED_OUT) from exc

    def _leave_running(self, task: asyncio.Task[Answer]) -> None:
        if len(self._left_running) >= MAX_LEFT_RUNNING:
            task.cancel()
        self._left_running.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[Answer]) -> None:
        self._left_running.discard(task)
        if not task.cancelled():
            log.info("late_answer", answered=task.exception() is None)

    async def _events(self, chunks: AsyncIterator[bytes], began: float) -> AsyncIterator[bytes]:
        """The chunks as events; what goes wrong is the last one."""
        ends = began + self.limits.model_s
        while True:
            try:
                chunk = await asyncio.wait_for(chunks.__anext__(), ends - time.monotonic())
            except StopAsyncIteration:
                return
            except asyncio.TimeoutError:
                yield _time_exceeded()
                return
            except NoAnswer:
                yield _stream_error("StreamBroken", "The connection to container primary was closed.")
                return
            ends = began + self.limits.stream_s
            for start in range(0, len(chunk), event_stream.MAX_PAYLOAD_BYTES):
                yield event_stream.payload_part(chunk[start : start + event_stream.MAX_PAYLOAD_BYTES])

    async def _text(self, kept: AsyncExitStack, chunks: AsyncIterator[bytes]) -> str:
        """The body of a refusal."""
        body = bytearray()

        async def read() -> None:
            async for chunk in chunks:
                body.extend(chunk[: self.limits.body_bytes - len(body)])

        try:
            await asyncio.wait_for(read(), self.limits.model_s)
        except (asyncio.TimeoutError, NoAnswer):
            log.info("refusal_cut_off")
        finally:
            await kept.aclose()
        return body.decode(errors="replace")


class _RequestId:
    """Names every answer, a refusal too, for `ResponseMetadata.RequestId`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-amzn-RequestId"] = str(uuid.uuid4())
            await send(message)

        await self._app(scope, receive, named)


class _EventStream(StreamingResponse):
    """Events, for as long as the platform allows and the client reads; then the container's connection is closed."""

    def __init__(
        self, events: AsyncIterator[bytes], headers: Mapping[str, str], opened: AsyncExitStack, limit_s: float
    ) -> None:
        super().__init__(events, headers=headers, media_type=event_stream.CONTENT_TYPE)
        self._opened = opened
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), self._limit_s)
        except asyncio.TimeoutError:
            log.info("stream_not_read")
        finally:
            await self._opened.aclose()


def _stream_headers(head: Head) -> dict[str, str]:
    content_type = head.get("Content-Type")
    kind = {} if content_type is None else {"X-Amzn-SageMaker-Content-Type": content_type}
    return {**INVOKED, **head.returned(), **kind}


async def _once(event: bytes) -> AsyncIterator[bytes]:
    yield event


def _time_exceeded() -> bytes:
    return _stream_error("ModelInvocationTimeExceeded", TIMED_OUT)


def _stream_error(code: str, message: str) -> bytes:
    return event_stream.exception("ModelStreamError", {"Message": message, "ErrorCode": code})
