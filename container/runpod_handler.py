"""The RunPod door: `python -m container.runpod_handler` is a serverless worker on RunPod's own SDK.

A job's input has the REST door's names (`person_image`, `cloth_image`: URLs or base64) and is answered with the
picture, or the SageMaker door's (`person_image_url`, ...) and is answered with its key; `output` chooses the other. A
failed job is an answer too: the SDK would send the traceback of what a handler raises to the caller.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Callable

import structlog

from container.errors import InvalidRequest
from container.form import NAMES, named_by_form
from container.request import AnyRequest, CallContext, MaskRequest
from container.runpod_job import (
    BASE64,
    MAX_RESULT_BYTES,
    Answer,
    Progress,
    ResultTooLarge,
    failed,
    input_of,
    is_form,
    items_of,
    parsed,
    pictured,
    size_of,
    stored,
)
from container.settings import Settings, SettingsError
from container.telemetry import configure_logging
from container.vton_api import INFERENCE_ID_TEXT, not_serving, run_admitted
from container.wiring import App, build
from container.worker import Abandoned

LOAD_LIMIT_S = 3600.0  # of the model, on the slowest disk
STOP_S = 1.0
POST_URL = "RUNPOD_WEBHOOK_POST_OUTPUT"  # the platform sets it, a test run has none

log = structlog.get_logger()
Tell = Callable[[dict[str, str], dict[str, int]], None]  # the job, and how far it is


def _post_nothing(_job: dict[str, str], _progress: dict[str, int]) -> None:
    pass


class Handler:
    """RunPod's handler: a job in, a new dict out. Nothing is raised but the cancellation of the job.

    Args:
        app: the wired service, its models loaded.
        tell: posts how far a job is; must not raise.
        on_device_failed: called when only a new process helps.
    """

    def __init__(
        self, app: App, tell: Tell = _post_nothing, on_device_failed: Callable[[], object] = lambda: None
    ) -> None:
        self._app = app
        self._tell = tell
        self._on_device_failed = on_device_failed

    async def __call__(self, job: object) -> Answer:
        """The answer to a job, done or failed; the SDK may change the dict."""
        request_id = _request_id(job)
        structlog.contextvars.bind_contextvars(request_id=request_id)
        over = asyncio.Event()
        context = CallContext(request_id, inference_id=request_id, is_wanted=lambda: not over.is_set())
        try:
            answered = await self._answer(job, context)
        except asyncio.CancelledError:
            log.info("caller_left")
            raise
        except Exception as exc:
            answered = failed(exc, request_id)
        finally:
            over.set()
        if self._app.worker.device_failed:
            self._on_device_failed()
            answered["refresh_worker"] = True
        return answered

    async def _answer(self, job: object, context: CallContext) -> Answer:
        job_id, asked = input_of(job)
        if (error := not_serving(self._app)) is not None:
            raise error

        def tell(progress: dict[str, int]) -> None:
            if context.is_wanted():  # what is late goes on, and its result is out
                self._tell({"id": job_id}, progress)

        if "items" not in asked:
            return await self._one(asked, replace(context, on_step=Progress(tell, {})), MAX_RESULT_BYTES)
        items, room = items_of(asked), MAX_RESULT_BYTES
        answers: list[Answer] = []
        for number, item in enumerate(items):  # one after another: other jobs want the service's places too
            progress = Progress(tell, {"item": number, "items": len(items)})
            answers.append(await self._one(item, replace(context, on_step=progress), room))
            room = max(0, room - size_of(answers[-1]))
        return {"items": answers, "success": all(answered["success"] is True for answered in answers)}

    async def _one(self, asked: object, context: CallContext, room: int) -> Answer:
        """The answer to one input, done or failed, at most `room` bytes of it."""
        deadline = time.monotonic() + self._app.settings.deadline_s
        try:
            return await run_admitted(self._app, partial(self._worked, asked, deadline, context, room), deadline)
        except Exception as exc:
            return failed(exc, context.request_id)

    def _worked(self, asked: object, deadline: float, context: CallContext, room: int) -> Answer:
        try:
            made = self._made(asked, deadline, context)
            if size_of(made) > room:
                raise ResultTooLarge(f"{size_of(made)} bytes")
        except Abandoned:
            return {}  # nobody reads it
        except Exception as exc:
            return failed(exc, context.request_id)
        log.info("request_done", **{name: made[name] for name in ("job_id", "mask_source", "timings_ms")})
        return made

    def _made(self, asked: object, deadline: float, context: CallContext) -> Answer:
        with named_by_form(NAMES if is_form(asked) else {}):
            return self._made_of(*parsed(asked), deadline, context)

    def _made_of(
        self, request: AnyRequest, output: str, uploads: Mapping[str, bytes], deadline: float, context: CallContext
    ) -> Answer:
        structlog.contextvars.bind_contextvars(user=self._app.pseudonyms.of(request.userId))
        context = replace(context, uploads=uploads)
        if output == BASE64:
            if isinstance(request, MaskRequest):
                raise InvalidRequest("masks are stored, or not made", field="output")
            return pictured(self._app.service.picture(request, deadline, context))
        if self._app.settings.bucket is None and self._app.settings.output_dir is None:
            raise InvalidRequest("there is no place for results", field="output")
        if isinstance(request, MaskRequest):
            return stored(self._app.masks.run(request, deadline, context))
        return stored(self._app.service.run(request, deadline, context))


def _request_id(job: object) -> str:
    """The platform's id of the job where it can stand in a log, else a new one."""
    found = job.get("id") if isinstance(job, dict) else None
    return found if isinstance(found, str) and INFERENCE_ID_TEXT.fullmatch(found) else uuid.uuid4().hex


def serve(app: App, sdk: ModuleType) -> int:
    """Takes jobs until SIGTERM, and finishes those that it has; the exit status."""
    config: dict[str, object] = {"concurrency_modifier": lambda _now: app.settings.max_in_flight}
    tell = partial(_post_progress, sdk) if POST_URL in os.environ else _post_nothing
    config["handler"] = Handler(app, tell, partial(config.update, refresh_worker=True))
    try:
        app.start()
        if not app.worker.wait_until_loaded(LOAD_LIMIT_S) or app.worker.failure is not None:
            log.error("start_refused", reason=str(app.worker.failure), kind=type(app.worker.failure).__name__)
            return 1
        log.info("ready")
        sdk.serverless.start(config)
        asyncio.run(_finish_the_last(config))
    except SystemExit as exc:  # SIGTERM, or the SDK at the end of a single test job
        return exc.code if isinstance(exc.code, int) else 0
    except Exception:
        log.exception("worker_failed")
        return 1
    return 1 if app.worker.device_failed else 0


async def _finish_the_last(config: dict[str, object]) -> None:
    """Does the jobs that the SDK leaves undone: those that come after SIGTERM, with the answer to its last question."""
    from runpod.http_client import AsyncClientSession  # type: ignore[import-untyped]
    from runpod.serverless.modules.rp_job import handle_job  # type: ignore[import-untyped]
    from runpod.serverless.modules.worker_state import JobsProgress  # type: ignore[import-untyped]

    async with AsyncClientSession() as session:
        for job in list(JobsProgress()):
            await handle_job(session, config, {"id": job.id, "input": job.input})


def _post_progress(sdk: ModuleType, job: dict[str, str], progress: dict[str, int]) -> None:
    with suppress(RuntimeError):  # no thread to be had
        sdk.serverless.progress_update(job, progress)


@contextmanager
def runpod_sdk() -> Iterator[ModuleType]:
    """RunPod's SDK inside the block.

    Its last version for Python 3.9 keeps the jobs in flight, photos and all, in a pickle where it was imported, and
    reads what it finds there: that is a new folder, which goes with the block. It also makes its queues between two
    event loops, which that Python's asyncio refuses without a loop.

    Raises:
        ImportError: it is not installed.
    """
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")  # its own default writes pictures into the log
    if sys.version_info < (3, 10):
        _always_have_a_loop()
    here = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="vton-runpod-") as folder:
        os.chdir(folder)
        try:
            import runpod  # type: ignore[import-untyped]
        finally:
            os.chdir(here)
        try:
            yield runpod
        finally:
            for child in multiprocessing.active_children():  # which tells the platform that the worker lives
                child.terminate()
                child.join(STOP_S)


def _always_have_a_loop() -> None:
    """Lets asyncio make an event loop where `asyncio.run` has left none."""

    class AlwaysALoop(asyncio.DefaultEventLoopPolicy):
        def get_event_loop(self) -> asyncio.AbstractEventLoop:
            try:
                return super().get_event_loop()
            except RuntimeError:
                self.set_event_loop(self.new_event_loop())
                return super().get_event_loop()

    asyncio.set_event_loop_policy(AlwaysALoop())


def main(environ: Mapping[str, str] | None = None) -> int:
    """A worker with the settings of the environment; the exit status, 2 where it cannot be started at all.

    The process ends at once after the last job: it waits for no thread whose picture can no longer be delivered.
    """
    signal.signal(signal.SIGTERM, _end)  # the SDK takes it over
    try:
        settings = Settings.from_env(os.environ if environ is None else environ)
        configure_logging(settings.log_level, metrics_namespace=settings.metrics_namespace)
        app = build(settings)
        log.info("starting", **settings.model_dump(mode="json"))
        with runpod_sdk() as sdk:
            status = serve(app, sdk)
    except SettingsError as exc:
        sys.stderr.write(f"start refused: {exc}\n")
        return 2
    except ImportError as exc:
        sys.stderr.write(f"start refused: RunPod's SDK is missing ({exc}); it comes with vton-endpoint[runpod]\n")
        return 2
    app.stop(STOP_S)
    log.info("stopped", status=status)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


def _end(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
