"""The container process as the platform keeps it: pinged, replaced when it dies or falls silent, stopped in order."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NoReturn

import structlog

from deploy.local_invoke import NoAnswer, page

REPOSITORY = Path(__file__).resolve().parent.parent
SERVE = (sys.executable, str(REPOSITORY / "container" / "serve"))  # what the image runs as `serve`
OK = 200
FIRST_PING_EVERY_S = 0.1  # while it starts: who waits for a laptop's endpoint waits for nothing else
LISTENING = ("VTON_HOST", "VTON_PORT")  # they would win over SAGEMAKER_BIND_TO_PORT, which is what is pinged

log = structlog.get_logger()


class ContainerFailed(Exception):
    """The first process ended or was not ready in time, or no other can be started; the text names the log."""


@dataclass(frozen=True)
class ContainerLimits:
    """How the platform watches a container.

    Attributes:
        start_s: from the start of a process to its first good ping; the platform's default is 8 minutes.
        ping_every_s: between two pings of a container that serves.
        ping_timeout_s: of each ping.
        failed_pings: in a row, after which the process is replaced; the platform's number is not documented.
        stop_s: from SIGTERM to SIGKILL.
    """

    start_s: float = 480.0
    ping_every_s: float = 5.0
    ping_timeout_s: float = 2.0
    failed_pings: int = 3
    stop_s: float = 30.0


@dataclass(frozen=True)
class Launch:
    """What is started.

    Attributes:
        log: file that the output of every process is appended to.
        environ: variables beside those of this process; where to listen is not among them.
        command: the process, in the repository; it listens on SAGEMAKER_BIND_TO_PORT.
    """

    log: Path
    environ: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = SERVE


class Container:
    """One container behind an endpoint; a thread watches its process.

    Args:
        launch: what is started.
        limits: how it is watched.
    """

    def __init__(self, launch: Launch, limits: ContainerLimits | None = None) -> None:
        self._launch = launch
        self._limits = limits or ContainerLimits()
        self._changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._url: str | None = None
        self._failure: str | None = None
        self._starts = 0
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="container", daemon=True)

    @property
    def url(self) -> str | None:
        """ "http://host:port" of the process that serves, or None while none does."""
        process = self._process
        return None if process is None or process.poll() is not None else self._url

    @property
    def pid(self) -> int | None:
        """The process's id, of the latest one."""
        return None if self._process is None else self._process.pid

    @property
    def starts(self) -> int:
        """How many processes were started so far."""
        return self._starts

    def start(self) -> None:
        """Starts the first process, and does not wait for it."""
        self._watcher.start()

    def wait_until_ready(self, timeout_s: float) -> str:
        """The URL of a process that serves.

        Raises:
            ContainerFailed: the first process failed, or nothing serves after so many seconds.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._url or self._failure, timeout_s)
            if self._url is None:
                raise ContainerFailed(f"{self._failure or 'the container is not ready'}; see {self._launch.log}")
            return self._url

    def wait_until_failed(self) -> NoReturn:
        """Returns never: it waits for the end of all service.

        Raises:
            ContainerFailed: no process serves, and none will.
        """
        with self._changed:
            while self._failure is None:
                self._changed.wait(3600)
        raise ContainerFailed(f"{self._failure}; see {self._launch.log}")

    def stop(self) -> None:
        """Ends the process as the platform does, and the thread; returns within `stop_s`, two pings and a second."""
        self._stopping.set()
        if self._watcher.is_alive():
            self._watcher.join(self._limits.stop_s + 2 * self._limits.ping_timeout_s + 1)
        self.kill()

    def kill(self) -> None:
        """Ends the process and all that it started at once, and starts no other."""
        self._stopping.set()
        if self._process is not None and self._watcher.is_alive():  # else it has ended, and its id may be another's
            _kill(self._process)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """It serves, until the block ends.

        Raises:
            ContainerFailed: it did not become ready.
        """
        try:
            self.start()
            self.wait_until_ready(self._limits.start_s + 1)
            yield
        finally:
            self.stop()

    def _watch(self) -> None:
        try:
            with self._launch.log.open("ab") as file:
                while not self._stopping.is_set():
                    self._serve_once(file)
        except OSError as exc:  # the log or the command cannot be opened: no repeat would mend that
            self._set(failure=f"the container cannot be started: {exc}")
        except Exception as exc:  # this thread's end is the end of waiting, whatever ends it
            log.exception("container_not_watched")
            self._set(failure=f"the container cannot be started or watched: {exc}")
        finally:
            self._set()

    def _serve_once(self, file: BinaryIO) -> None:
        """One process, from its start to its end."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        environ = {**os.environ, **self._launch.environ, "SAGEMAKER_BIND_TO_PORT": str(port)}
        process = subprocess.Popen(  # noqa: S603 - the command is the caller's own
            list(self._launch.command),
            cwd=REPOSITORY,
            env={name: value for name, value in environ.items() if name not in LISTENING},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C is for the one who owns the process, who ends it in order
        )
        self._process = process
        self._starts += 1
        try:
            reason = self._wait_for_first_ping(process, url)
            if reason is None:
                self._set(url=url)
                reason = self._wait_for_trouble(process, url)
        finally:
            first = self._url is None and self._starts == 1
            self._set()
            _end(process, self._limits.stop_s)
        if self._stopping.is_set():
            return
        if first:
            self._set(failure=reason)
            self._stopping.set()
            return
        log.warning("container_replaced", reason=reason, exit=process.returncode)
        self._stopping.wait(
            min(self._limits.ping_every_s, self._starts * FIRST_PING_EVERY_S)
        )  # it may end at once again

    def _wait_for_first_ping(self, process: subprocess.Popen[bytes], url: str) -> str | None:
        ends = time.monotonic() + self._limits.start_s
        while not self._stopping.wait(FIRST_PING_EVERY_S):
            if process.poll() is not None:
                return f"the container ended with {process.returncode} before it was ready"
            if pings(url, self._limits.ping_timeout_s):
                return None
            if time.monotonic() > ends:
                return f"the container was not ready within {self._limits.start_s:g} s"
        return "stopped"

    def _wait_for_trouble(self, process: subprocess.Popen[bytes], url: str) -> str:
        failed = 0
        while failed < self._limits.failed_pings:
            pinged = time.monotonic()
            while time.monotonic() < pinged + self._limits.ping_every_s:
                if self._stopping.wait(FIRST_PING_EVERY_S):
                    return "stopped"
                if process.poll() is not None:
                    return "it ended"
            failed = 0 if pings(url, self._limits.ping_timeout_s) else failed + 1
        return f"{failed} pings in a row failed"

    def _set(self, url: str | None = None, failure: str | None = None) -> None:
        with self._changed:
            self._url = url
            self._failure = self._failure or failure
            self._changed.notify_all()


@contextmanager
def running(launch: Launch, limits: ContainerLimits | None = None) -> Iterator[Container]:
    """A container that serves, until the block ends.

    Raises:
        ContainerFailed: it did not become ready.
    """
    container = Container(launch, limits)
    with container.serving():
        yield container


def pings(url: str, timeout_s: float) -> bool:
    """Whether /ping has answered 200, to the last byte, in so many seconds."""
    try:
        return asyncio.run(page(lambda: url, "/ping", timeout_s)).head.status == OK
    except NoAnswer:
        return False


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(process: subprocess.Popen[bytes], stop_s: float) -> None:
    """SIGTERM, then SIGKILL to it and all that it started: nothing outlives a container."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(stop_s)
    _kill(process)
    process.wait(stop_s)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
