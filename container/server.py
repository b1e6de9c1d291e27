"""Runs the service over HTTP until it is told to stop, and lets admitted requests finish first."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from container.connections import Connection, TooManyConnections
from container.gate import Gate
from container.page_api import add_page
from container.rest_api import add_rest
from container.settings import Settings, SettingsError
from container.telemetry import configure_logging
from container.vton_api import create_app
from container.wiring import App, build

DRAIN_S = 25.0  # SageMaker kills 30 s after SIGTERM
POLL_S = 0.05
KEEP_ALIVE_S = 75  # above the platform's 5 s between pings, so that its pooled connections are not cut
BACKLOG = 512  # connections; asyncio accepts as many at once, and without descriptors sets a timer for each failure
FAILED_EXIT_S = 1.0  # for the last answers to leave, once the device has failed

log = structlog.get_logger()


class DrainingServer(uvicorn.Server):
    """Keeps listening after SIGTERM, refusing politely, until nothing is in flight or `DRAIN_S` are over."""

    def __init__(self, config: uvicorn.Config, app: App) -> None:
        super().__init__(config)
        self._app = app
        self._finished = threading.Event()
        self.failed = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        asyncio.get_running_loop().set_exception_handler(TooManyConnections())
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: stop now."""
        if self._app.admission.draining:
            self.should_exit = True
        self._app.admission.drain()

    def watch(self) -> None:
        """On a thread of its own: waits for the model, then for the end, and brings that about."""
        worker, admission = self._app.worker, self._app.admission
        while not worker.wait_until_loaded(POLL_S) and not admission.draining:
            pass
        if worker.failure is not None:
            log.error("start_refused", reason=str(worker.failure), kind=type(worker.failure).__name__)
            self.failed = self.should_exit = True
            return
        log.info("ready")
        while not (admission.draining or worker.device_failed or self._finished.wait(POLL_S)):
            pass
        if worker.device_failed:
            self.failed = True
            log.error("device_failed")
            time.sleep(FAILED_EXIT_S)
        elif not self._finished.is_set():
            log.info("draining", in_flight=admission.taken)
            ends = time.monotonic() + DRAIN_S
            while admission.taken and time.monotonic() < ends and not self._finished.wait(POLL_S):
                pass
        self.should_exit = True

    def run_to_the_end(self) -> int:
        """Serves; the exit status of the process: 0 after a clean drain, 1 where the model or the device failed."""
        self._app.start()
        watcher = threading.Thread(target=self.watch, name="watch", daemon=True)
        watcher.start()
        self.run()
        self._finished.set()
        watcher.join(POLL_S * 4)
        self._app.stop(POLL_S * 4)
        log.info("stopped", failed=self.failed)
        return 1 if self.failed else 0


def main(environ: Mapping[str, str] | None = None, *, page: bool = False) -> int:
    """A SageMaker endpoint with the settings of the environment; the exit status, 2 where a setting refuses the start.

    The process ends at once after serving: it waits for no thread whose picture can no longer be delivered, and not for
    torch, which takes a second to unload.

    Args:
        environ: the environment, by default that of this process.
        page: serve the page too, which calls the REST door.
    """
    try:
        settings = Settings.from_env(os.environ if environ is None else environ).require_a_place_for_results()
        configure_logging(settings.log_level, metrics_namespace=settings.metrics_namespace)
        app = build(settings)
    except SettingsError as exc:
        sys.stderr.write(f"start refused: {exc}\n")
        return 2
    log.info("starting", **settings.model_dump(mode="json"))
    if settings.trusted_hosts:
        log.warning("trusted_hosts", hosts=settings.trusted_hosts, why="private addresses, plain http: local work only")
    status = serve(doors(app, page=page), app)
    logging.shutdown()
    os._exit(status)


def doors(app: App, *, page: bool = False) -> FastAPI:
    """The doors that the settings open, and the page where it is wanted."""
    gate = Gate(app.settings)
    api = create_app(app, gate)
    if app.settings.rest:
        add_rest(api, app, gate)
    if page:
        add_page(api, app, gate)
    return api


def serve(api: FastAPI, app: App) -> int:
    """Serves until SIGTERM; the exit status."""
    return DrainingServer(configuration(api, app.settings), app).run_to_the_end()


def configuration(api: FastAPI, settings: Settings) -> uvicorn.Config:
    """How the application is served."""
    return uvicorn.Config(
        api,
        host=settings.host,
        port=settings.port,
        http=Connection,  # and these as they are tested, whatever else is installed
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.getLevelName(settings.log_level),
        access_log=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=2,
        server_header=False,
    )
