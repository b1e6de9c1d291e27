"""One call of a container, of its /invocations or of a page, bounded in time and bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Callable, Union

import httpcore

CONNECT_S = 2.0  # the platform wants a socket accepted within 250 ms; a laptop's core may be busy
MAX_PAGE_BYTES = 2**20
TIMED_OUT = (
    "Your invocation timed out while waiting for a response from container primary. Review the latency metrics for "
    "each container in Amazon CloudWatch, resolve the issue, and try again."
)
NO_RESPONSE = "Your invocation got no response from container primary."
NOT_THERE = "Your invocation found no container primary in service."
# What boto3 sends beyond this, its signature above all, does not reach a container.
REQUEST_HEADERS = {  # as boto3 sends it -> as the container gets it
    "content-type": "Content-Type",
    "accept": "Accept",
    "x-amzn-sagemaker-content-type": "Content-Type",
    "x-amzn-sagemaker-accept": "Accept",
    "x-amzn-sagemaker-custom-attributes": "X-Amzn-SageMaker-Custom-Attributes",
    "x-amzn-sagemaker-inference-id": "X-Amzn-SageMaker-Inference-Id",
    "x-amzn-sagemaker-session-id": "X-Amzn-SageMaker-Session-Id",
}
ANSWER_HEADERS = (
    "X-Amzn-SageMaker-Custom-Attributes",
    "X-Amzn-SageMaker-New-Session-Id",
    "X-Amzn-SageMaker-Closed-Session-Id",
)

_BROKEN = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException)

Content = Union[bytes, AsyncIterator[bytes]]
Opening = AbstractAsyncContextManager["tuple[Head, AsyncIterator[bytes]]"]
Where = Callable[[], Union[str, None]]  # "http://host:port" of the container that serves, or None while none does


class NoAnswer(Exception):
    """The container gave no answer that can be passed on; the text is the platform's."""


class NotReached(NoAnswer):
    """There is no container, or none listens: nothing was sent."""


class AnswerTooLarge(NoAnswer):
    """The answer is larger than the platform passes on."""


@dataclass(frozen=True)
class Head:
    """Status and headers of an answer."""

    status: int
    headers: tuple[tuple[str, str], ...]

    @property
    def ok(self) -> bool:
        """Whether the container did what it was asked for."""
        return 200 <= self.status < 300

    def get(self, name: str) -> str | None:
        """A header's value, by its name in any case."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def returned(self) -> dict[str, str]:
        """The headers that a caller gets."""
        found = {name: self.get(name) for name in ANSWER_HEADERS}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Answer:
    """What a container answered."""

    head: Head
    content: bytes


def forwarded(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that a container gets, of those that the caller sent (names in lower case) and that say something."""
    return {theirs: headers[name] for name, theirs in REQUEST_HEADERS.items() if headers.get(name)}


def opened(where: Where, headers: Mapping[str, str], content: Content) -> Opening:
    """The head of an answer and the chunks of its body as they come; the caller limits the time.

    Raises:
        NotReached: there is no container.
        NoAnswer: the connection to it broke, now or while the chunks come.
    """
    return _opened(where, "POST /invocations", headers, content)


@asynccontextmanager
async def _opened(
    where: Where, asked: str, headers: Mapping[str, str], content: Content
) -> AsyncIterator[tuple[Head, AsyncIterator[bytes]]]:
    url = where()
    if url is None:
        raise NotReached(NOT_THERE)
    method, _, path = asked.partition(" ")
    limits = {"timeout": {"connect": CONNECT_S}}
    sent = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    try:
        # A connection for each call: one that is kept may have been closed by a container that is being replaced.
        async with (
            httpcore.AsyncConnectionPool(max_connections=1) as pool,
            pool.stream(method, url + path, headers=sent, content=content, extensions=limits) as response,
        ):
            pairs = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in response.headers)
            yield Head(response.status, pairs), _chunks(response)
    except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
        raise NotReached(NOT_THERE) from exc
    except _BROKEN as exc:
        raise NoAnswer(NO_RESPONSE) from exc


async def _chunks(response: httpcore.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in response.aiter_stream():
            yield chunk
    except _BROKEN as exc:
        raise NoAnswer(NO_RESPONSE) from exc


async def call(where: Where, headers: Mapping[str, str], content: Content, *, limit_s: float, max_bytes: int) -> Answer:
    """The whole answer.

    Raises:
        NoAnswer: none came within `limit_s`, or the connection broke.
        AnswerTooLarge: it has more than `max_bytes`.
    """
    return await _whole(opened(where, headers, content), limit_s, max_bytes)


async def page(where: Where, path: str, limit_s: float) -> Answer:
    """The whole answer to a GET.

    Raises:
        NoAnswer: none came within `limit_s`, or the connection broke, or it has more than `MAX_PAGE_BYTES`.
    """
    return await _whole(_opened(where, f"GET {path}", {}, b""), limit_s, MAX_PAGE_BYTES)


async def _whole(opening: Opening, limit_s: float, max_bytes: int) -> Answer:
    async def exchange() -> Answer:
        body = bytearray()
        async with opening as (head, chunks):
            async for chunk in chunks:
                body += chunk
                if len(body) > max_bytes:
                    raise AnswerTooLarge(f"The response of container primary is larger than {max_bytes} bytes.")
        return Answer(head, bytes(body))

    try:
        return await asyncio.wait_for(exchange(), limit_s)
    except asyncio.TimeoutError as exc:
        raise NoAnswer(TIMED_OUT) from exc
