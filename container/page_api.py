"""The page to try the service in, and the routes that it needs beside those of the REST door.

POST /api/mask answers the automatic mask of a photo. POST /api/try-on/stream is /api/try-on with its steps: the same
form makes the same job and the same picture, told as server-sent events. Nothing is stored.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Awaitable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Callable

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from container.errors import InvalidRequest, NotReady
from container.fetch import MAX_BYTES
from container.gate import Gate
from container.images import MAX_ASPECT, MAX_PIXELS, MIN_SIDE, encode, encode_mask
from container.multipart import Form
from container.request import CLOTH_TYPES, OnStep
from container.rest_api import UPLOADS_PER_PLACE, answer_detail, dressed, entered
from container.sharing import Admission
from container.telemetry import StageTimes
from container.vton_api import answered, not_serving, run_admitted, wanted
from container.wiring import App
from model.embedded import demo_pictures
from model.interface import EMBEDDED, FAST_STEPS

FOLDER = Path(__file__).parent / "page"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' blob:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",  # pictures of people, and a page that must fit the process that serves it
}
EVENTS = {
    **HEADERS,
    "Cache-Control": "no-cache",  # Chromium counts a stream that may not be stored as one that was given up
    "Content-Type": "text/event-stream; charset=utf-8",
    "X-Accel-Buffering": "no",
}
EXAMPLE_SEEDS = (1_000_004, 1_000_010, 1_000_017)  # drawn people of the test seeds
MASK_FIELDS = {"person_image", "cloth_type"}
ALIVE_S = 10.0  # between two signs of life to whoever waits: proxies end what is silent

log = structlog.get_logger()


def add_page(api: FastAPI, app: App, gate: Gate) -> None:
    """Opens the page in an application that has the REST door."""
    uploading = Admission(UPLOADS_PER_PLACE * app.settings.max_in_flight, app.worker.retry_after_s)

    @api.get("/page/settings", include_in_schema=False)
    async def settings() -> Response:
        return JSONResponse(_settings(app), headers=HEADERS)

    @api.post("/api/mask")
    async def mask(request: Request) -> Response:
        return await answered(app, request, partial(_mask, app, gate, uploading, request), answer_detail)

    @api.post("/api/try-on/stream")
    async def try_on_stream(request: Request) -> Response:
        def work(on_step: OnStep) -> Awaitable[Response]:
            return answered(app, request, partial(_try_on, app, gate, uploading, request, on_step), answer_detail)

        return EventStream(work)

    _add_examples(api)
    _add_files(api)  # last: its path takes what the others leave


def _add_files(api: FastAPI) -> None:
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in MEDIA_TYPES}

    @api.get("/", include_in_schema=False)
    async def index() -> Response:
        return await file("index.html")

    @api.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return Response(files[name], media_type=MEDIA_TYPES[Path(name).suffix], headers=HEADERS)


def _add_examples(api: FastAPI) -> None:
    drawn: dict[str, asyncio.Future[dict[str, bytes]]] = {}  # a set is drawn once, when it is first asked for

    @api.get("/page/examples/{number}/{name}", include_in_schema=False)
    async def example(number: str, name: str) -> Response:
        if number not in map(str, range(len(EXAMPLE_SEEDS))):
            raise HTTPException(404)
        if number not in drawn:
            drawn[number] = asyncio.ensure_future(run_in_threadpool(_drawn, EXAMPLE_SEEDS[int(number)]))
        files = await asyncio.shield(drawn[number])
        if name not in files:
            raise HTTPException(404)
        return Response(files[name], media_type="image/png", headers=HEADERS)


def _drawn(seed: int) -> dict[str, bytes]:
    """The pictures of an example by the names of their files."""
    pictures = demo_pictures(seed=seed)
    return {f"{name}.png": encode(pictures[name], "png", 100) for name in ("person", "upper", "lower", "dress")}


def _settings(app: App) -> dict[str, object]:
    """What the page must know of the service that it stands before, and how it is, as /health says it.

    A browser writes every 503 to its console, which is for what is wrong; a model that loads is not.
    """
    error = not_serving(app)
    return {
        "status": "healthy" if error is None else "loading" if isinstance(error, NotReady) else "unhealthy",
        "steps": app.settings.steps,
        "fast_steps": min(app.settings.steps, FAST_STEPS),
        "guidance": app.settings.guidance,
        "quality": app.settings.quality,
        "width": app.settings.width,
        "height": app.settings.height,
        "embedded": app.settings.weights == EMBEDDED,
        "needs_key": bool(app.settings.api_keys),
        "examples": len(EXAMPLE_SEEDS),
        "limits": {"bytes": MAX_BYTES, "side": MIN_SIDE, "pixels": MAX_PIXELS, "aspect": MAX_ASPECT},
    }


async def _mask(app: App, gate: Gate, uploading: Admission, request: Request, request_id: str) -> Response:
    form = await entered(app, gate, uploading, request)
    content, cloth_type = _masked(form)
    if not app.masker.available:
        raise InvalidRequest("no automatic masker is configured", field="mask_image")
    deadline = time.monotonic() + app.settings.deadline_s
    times = StageTimes()

    def run(is_wanted: Callable[[], bool]) -> bytes:
        person = app.decoder.decode(content, deadline)
        masks = app.masker.masks(content, person, deadline, times, is_wanted).masks
        return encode_mask(masks[cloth_type])

    async with wanted(request) as is_wanted:
        made = await run_admitted(app, partial(run, is_wanted), deadline)
    log.info("request_done", timings_ms=times.milliseconds())
    return Response(made, media_type="image/png", headers=HEADERS)


def _masked(form: Form) -> tuple[bytes, str]:
    """The photo that a form brings to be masked, and for which type of cloth."""
    unknown = sorted(form.fields.keys() - MASK_FIELDS)
    if unknown:
        raise InvalidRequest("of no use for a mask", field=unknown[0])
    if form.fields.get("person_image") not in form.uploads:
        raise InvalidRequest("no file", field="person_image")
    cloth_type = form.fields.get("cloth_type", CLOTH_TYPES[0])
    if cloth_type not in CLOTH_TYPES:
        raise InvalidRequest("unknown", field="cloth_type")
    return form.uploads[str(form.fields["person_image"])], str(cloth_type)


async def _try_on(
    app: App, gate: Gate, uploading: Admission, request: Request, on_step: OnStep, request_id: str
) -> Response:
    form = await entered(app, gate, uploading, request)
    finished = await dressed(app, request, form, request_id, on_step)
    image = base64.b64encode(finished.content).decode("ascii")
    return JSONResponse({"imageBase64": image, **finished.facts, "timings_ms": finished.timings_ms})


class EventStream(Response):
    """Work that tells its steps, as server-sent events: `progress`, then `result` or `error`.

    What fails before it has a place is answered with its own status, as if there were no events. A slow reader is told
    of the latest step only.

    Args:
        work: makes the response whose body is the last event's, and tells its steps, on any thread.
    """

    def __init__(self, work: Callable[[OnStep], Awaitable[Response]]) -> None:
        super().__init__()
        self._work = work
        self._latest = (0, 0)
        self._changed = asyncio.Event()
        self._sending = asyncio.Lock()
        self._begun = self._over = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Works, and sends; returns when the last event is sent."""
        telling = asyncio.ensure_future(self._tell_steps(send))
        response = await self._work(partial(self._step, asyncio.get_running_loop()))
        self._over = True
        async with self._sending:  # but for a slow reader nothing is waited for: the process may be ending
            await self._end(response, scope, receive, send)
        telling.cancel()

    async def _end(self, response: Response, scope: Scope, receive: Receive, send: Send) -> None:
        if not response.body:  # the caller left
            return
        well = response.status_code == 200
        if not (well or self._begun):
            await response(scope, receive, send)
            return
        payload = json.loads(bytes(response.body))
        if "retry-after" in response.headers:
            payload["retry_after_s"] = int(response.headers["retry-after"])
        await self._send_event(send, "result" if well else "error", payload, last=True)

    def _step(self, loop: asyncio.AbstractEventLoop, done: int, total: int) -> None:
        with suppress(RuntimeError):  # the loop is closed: the process ends
            loop.call_soon_threadsafe(self._note, done, total)

    def _note(self, done: int, total: int) -> None:
        self._latest = (done, total)
        self._changed.set()

    async def _tell_steps(self, send: Send) -> None:
        while not self._over:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), ALIVE_S)
            async with self._sending:
                if not self._over:
                    await self._tell_step(send)

    async def _tell_step(self, send: Send) -> None:
        """The latest step, or a sign of life."""
        if self._changed.is_set():
            self._changed.clear()
            done, total = self._latest
            await self._send_event(send, "progress", {"done": done, "total": total})
        elif self._begun:
            await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})

    async def _send_event(self, send: Send, name: str, payload: dict[str, Any], *, last: bool = False) -> None:
        if not self._begun:
            self._begun = True
            headers = [(key.lower().encode(), value.encode()) for key, value in EVENTS.items()]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        line = f"event: {name}\ndata: {json.dumps(payload)}\n\n"
        await send({"type": "http.response.body", "body": line.encode(), "more_body": not last})
