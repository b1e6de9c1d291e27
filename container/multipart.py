"""A multipart form off the wire: bounded in bytes, parts, headers and time, whole or refused, and never on a disk."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from container.errors import (
    ImageTooLarge,
    InvalidRequest,
    RequestTimeout,
    RequestTooLarge,
    TryOnError,
    UnsupportedContentType,
)
from container.fetch import MAX_BYTES
from container.form import IMAGES
from container.request import upload_reference

MAX_FORM_BYTES = len(IMAGES) * MAX_BYTES + 64 * 1024
MAX_TEXT_BYTES = 4096
MAX_PART_HEADERS = 8  # of each part; browsers and clients send two
MAX_PART_HEADER_BYTES = 4096  # of all of them
UPLOAD_S = 30.0  # for the whole form


@dataclass(frozen=True)
class Form:
    """What a form said: the fields of a request, and the files that they name by reference."""

    fields: dict[str, object]
    uploads: dict[str, bytes] = field(default_factory=dict)


async def read_form(request: Request, texts: frozenset[str]) -> Form:
    """The form of a request, read within `UPLOAD_S` and `MAX_FORM_BYTES`.

    Args:
        request: its body is not read yet.
        texts: the names that a field may have beside those of the pictures, which may be files.
    Raises:
        UnsupportedContentType, RequestTooLarge, RequestTimeout, ImageTooLarge.
        InvalidRequest: it is no form or not a whole one, or has a field that is unknown, twice there, or no text.
        ClientDisconnect: the caller left.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise UnsupportedContentType()
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced[:20]) > MAX_FORM_BYTES:
        raise RequestTooLarge("announced")
    counted = Request(request.scope, _counted(request.receive, MAX_FORM_BYTES))
    try:
        return await asyncio.wait_for(_parsed(counted, texts), UPLOAD_S)
    except asyncio.TimeoutError as exc:
        raise RequestTimeout(f"after {UPLOAD_S} s") from exc


class _Parser(MultiPartParser):
    """Starlette's, which would take a form that breaks off for a whole one, and headers of any length."""

    spool_max_size = MAX_FORM_BYTES  # photos of people stay in memory

    def __init__(self, request: Request, texts: frozenset[str]) -> None:
        super().__init__(
            request.headers,
            request.stream(),
            max_files=len(IMAGES),
            max_fields=len(IMAGES) + len(texts),
            max_part_size=MAX_TEXT_BYTES,
        )
        self.is_whole = False
        self._header_count = self._header_bytes = 0

    def on_part_begin(self) -> None:
        super().on_part_begin()
        self._header_count = self._header_bytes = 0

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        super().on_header_field(data, start, end)

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        super().on_header_value(data, start, end)

    def on_header_end(self) -> None:
        self._header_count += 1
        self._count_header(0)
        super().on_header_end()

    def on_end(self) -> None:
        super().on_end()
        self.is_whole = True

    def close(self) -> None:
        """Lets go of all files, whatever became of the form."""
        for file in self._files_to_close_on_error:
            file.close()

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_PART_HEADER_BYTES or self._header_count > MAX_PART_HEADERS:
            raise InvalidRequest("the headers of a part")


async def _parsed(request: Request, texts: frozenset[str]) -> Form:
    parser = _Parser(request, texts)
    try:
        return await _said(await _parts(parser), texts)
    finally:
        parser.close()


async def _parts(parser: _Parser) -> list[tuple[str, UploadFile | str]]:
    try:
        parts = (await parser.parse()).multi_items()
    except (TryOnError, ClientDisconnect):
        raise
    except Exception as exc:  # of many kinds: the library hands on what `email` stumbles over
        raise InvalidRequest("form") from exc
    if not parser.is_whole:
        raise InvalidRequest("the form breaks off")
    return parts


async def _said(parts: list[tuple[str, UploadFile | str]], texts: frozenset[str]) -> Form:
    form = Form({})
    for name, part in parts:
        if name in form.fields or name not in {*IMAGES, *texts}:
            raise InvalidRequest("unknown or twice", field=name if name.isidentifier() and len(name) < 64 else None)
        if isinstance(part, UploadFile) and not part.filename and not part.size:
            continue  # what a browser sends where nobody chose a file
        if isinstance(part, UploadFile):
            content = await _content(name, part)
            form.fields[name] = upload_reference(content)
            form.uploads[upload_reference(content)] = content
        else:
            form.fields[name] = part
    return form


async def _content(name: str, part: UploadFile) -> bytes:
    if name not in IMAGES:
        raise InvalidRequest("a file in the place of a text", field=name)
    if part.size is not None and part.size > MAX_BYTES:
        raise ImageTooLarge(f"{part.size} bytes", field=name)
    content = await part.read()
    await part.close()
    return content


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
