"""Pictures out of files of strangers, decoded in processes that can do nothing else (`container.sandbox`).

Each thread here owns one process: it starts it, hands it one file at a time, and replaces it when it dies, is overdue
or makes no sense. That costs the one file its picture, and no other.
"""

from __future__ import annotations

import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import structlog

import container.sandbox as sandbox
from container.errors import DeadlineExceeded, Draining, ImageNotDecodable, Refusal, TryOnError
from container.images import MAX_PIXELS, MIN_SIDE
from model.interface import Image

PICTURE_S = 30.0  # for one file that keeps its process without working; one that works ends at `sandbox.CPU_S`
START_S = 30.0  # of a process, on a machine that loads a model beside it; 0.2 s of a core
READY_S = 5.0  # from an answer until the next file may come: milliseconds, more where much memory is given back
KILLED_S = 5.0  # until a killed process is gone
RETRY_S = 1.0  # between two starts that fail
IDLE_POLL_S = 0.2  # how soon an idle process's death, or a killed fork's, is noticed
SEND_BUFFER_BYTES = 2**19  # 36 MB of pixels cross in half the time that the system's default takes (measured)
INHERITED = ("LD_LIBRARY_PATH",)  # where the interpreter may have its libraries
# No threads; and freed memory of some MB is used again, not given back: 12 MP take half the time (measured).
SPARING = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": f"{2**25}", "MALLOC_TRIM_THRESHOLD_": f"{2**31}"}
LAST_WORDS = 2000  # bytes, of why a process did not start
MAIN = "import sys; sys.path.insert(0, sys.argv[1]); from container.sandbox import main; main()"

log = structlog.get_logger()


class _Lost(Exception):
    """The process died, was overdue, or broke the protocol."""


class Decoder(Protocol):
    """What makes pictures of files."""

    def decode(self, content: bytes, deadline: float) -> Image:
        """HWC uint8 RGB, as `container.images.decode` gives it; returns or raises before `deadline`."""

    def decode_mask(self, content: bytes, deadline: float) -> Image:
        """HW uint8, as `container.images.decode_mask` gives it; returns or raises before `deadline`."""

    def start(self) -> None:
        """Makes ready; not waited for."""

    def stop(self, timeout_s: float) -> None:
        """Ends what `start` began, within `timeout_s`."""


@dataclass(frozen=True)
class _Job:
    kind: int
    content: bytes
    deadline: float
    future: Future[Image] = field(default_factory=Future)


class ProcessDecoder:
    """Decodes in processes of its own.

    Args:
        processes: how many files are decoded at a time; each takes up to `sandbox.MEMORY_BYTES` then, 40 MiB idle.
    """

    def __init__(self, processes: int) -> None:
        self._jobs: queue.Queue[_Job] = queue.Queue()
        self._stop = threading.Event()
        self._children: set[_Child] = set()
        self._threads = [
            threading.Thread(target=self._live, name=f"decoder-{number}", daemon=True) for number in range(processes)
        ]

    def start(self) -> None:
        """Begins to start the processes."""
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> None:
        """Kills the processes; what still waits gets `Draining`."""
        self._stop.set()
        for child in list(self._children):
            child.kill()
        ends = time.monotonic() + timeout_s
        for thread in filter(threading.Thread.is_alive, self._threads):
            thread.join(max(0.0, ends - time.monotonic()))
        self._refuse_waiting()

    def command(self) -> Sequence[str]:
        """What starts a process: this interpreter, without its user's and environment's settings."""
        return [sys.executable, "-I", "-B", "-W", "ignore", "-c", MAIN, str(Path(__file__).resolve().parents[1])]

    def decode(self, content: bytes, deadline: float) -> Image:
        """The picture in an image file, as `container.images.decode` gives it, before `deadline` (time.monotonic()).

        Raises:
            ImageNotDecodable: also for a file that kills the process or takes longer than `PICTURE_S`.
            ImageFormatNotPermitted, ImageTooSmall, ImageTooManyPixels, DeadlineExceeded, Draining.
        """
        return self._do(_Job(sandbox.PHOTO, content, deadline))

    def decode_mask(self, content: bytes, deadline: float) -> Image:
        """The grey levels of a mask file, as `container.images.decode_mask` gives them; raises what `decode` raises."""
        return self._do(_Job(sandbox.MASK, content, deadline))

    def _do(self, job: _Job) -> Image:
        self._jobs.put(job)
        if self._stop.is_set():
            self._refuse_waiting()
        try:
            return job.future.result(timeout=max(0.0, job.deadline - time.monotonic()))
        except FutureTimeout as exc:
            job.future.cancel()  # a file that no process has yet is dropped
            raise DeadlineExceeded("no picture was decoded in time") from exc

    def _refuse_waiting(self) -> None:
        with suppress(queue.Empty):
            while True:
                future = self._jobs.get_nowait().future
                if future.set_running_or_notify_cancel():
                    future.set_exception(Draining(retry_after_s=1))

    def _live(self) -> None:
        while not self._stop.is_set():
            try:
                child = _Child(self.command())
            except OSError as exc:
                self._not_started(str(exc))
                continue
            self._children.add(child)
            useful = self._is_up(child)
            while useful and not self._stop.is_set():
                useful = self._next(child)
            child.end()
            self._children.discard(child)

    def _is_up(self, child: _Child) -> bool:
        said = child.said(START_S)
        if said == sandbox.READY_AS_ROOT:
            log.warning("decoder_is_root", why="this process may not become another user")
        if said in (sandbox.READY, sandbox.READY_AS_ROOT):
            return True
        self._not_started(said.decode("ascii", "replace"))
        return False

    def _not_started(self, reason: str) -> None:
        if not self._stop.is_set():
            log.error("decoder_start_failed", reason=reason)
            self._stop.wait(RETRY_S)

    def _next(self, child: _Child) -> bool:
        """Waits for a file and decodes it; False once the process must be replaced."""
        try:
            job = self._jobs.get(timeout=IDLE_POLL_S)
        except queue.Empty:
            return child.lives()
        if not child.lives():  # of something that is not this file's fault
            self._jobs.put(job)
            return False
        return not job.future.set_running_or_notify_cancel() or self._work(child, job)

    def _work(self, child: _Child, job: _Job) -> bool:
        try:
            picture = child.ask(job.kind, job.content, min(job.deadline, time.monotonic() + PICTURE_S))
        except Refusal as refusal:
            job.future.set_exception(refusal)
        except Exception as exc:  # the thread outlives every file; the door answers what it does not know as internal
            job.future.set_exception(self._error(exc, job.deadline) if isinstance(exc, _Lost) else exc)
            return False
        else:
            job.future.set_result(picture)
        return child.is_done()

    def _error(self, lost: _Lost, deadline: float) -> TryOnError:
        if self._stop.is_set():
            return Draining(retry_after_s=1)
        log.warning("decoder_lost", reason=str(lost))
        if time.monotonic() >= deadline:
            return DeadlineExceeded("the decoder was not done in time")
        return ImageNotDecodable(f"the decoder was lost: {lost}")


class _Child:
    """One process and the two sockets to it."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._files, files = socket.socketpair()
        self._state, state = socket.socketpair()
        files.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        with files, state:
            try:
                self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                    arguments,
                    stdin=files.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=state.fileno(),
                    cwd="/",
                    env={**SPARING, **{name: value for name, value in os.environ.items() if name in INHERITED}},
                    start_new_session=True,
                )
            except OSError:
                self._files.close()
                self._state.close()
                raise

    def lives(self) -> bool:
        return self._process.poll() is None

    def said(self, timeout_s: float) -> bytes:
        """READY or READY_AS_ROOT, or why it is not; empty if it said nothing in time."""
        self._state.settimeout(timeout_s)
        try:
            return self._state.recv(LAST_WORDS)
        except OSError:
            return b""

    def ask(self, kind: int, content: bytes, ends: float) -> Image:
        """The picture in a file, before `ends` (time.monotonic()); raises one of REFUSALS, or _Lost."""
        try:
            for part in (sandbox.REQUEST.pack(kind, len(content)), content):
                self._files.settimeout(_left(ends))
                self._files.sendall(part)
            status, first, second = sandbox.ANSWER.unpack(self._receive(sandbox.ANSWER.size, ends))
            if status == sandbox.PICTURE and min(first, second) >= MIN_SIDE and first * second <= MAX_PIXELS:
                shape = (first, second) if kind == sandbox.MASK else (first, second, 3)
                return np.frombuffer(self._receive(math.prod(shape), ends), np.uint8).reshape(shape)
            if status == sandbox.REFUSED and first < len(sandbox.REFUSALS) and second <= sandbox.MAX_REASON:
                raise sandbox.REFUSALS[first](self._receive(second, ends).decode("ascii", "replace"))
        except OSError as exc:
            raise _Lost(type(exc).__name__) from exc
        raise _Lost("an answer that makes no sense")

    def is_done(self) -> bool:
        """Whether it waits for the next file, and has said no more than it was asked."""
        if self.said(READY_S) not in (sandbox.READY, sandbox.READY_AS_ROOT):
            return False
        self._files.setblocking(False)
        try:
            self._files.recv(1)
        except OSError as exc:
            return isinstance(exc, BlockingIOError)
        return False

    def kill(self) -> None:
        """Ends the process and its fork, now."""
        if self.lives():
            with suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Ends the process and leaves nothing of it, no zombie and no descriptor."""
        self.kill()
        self._files.close()
        self._state.close()
        with suppress(subprocess.TimeoutExpired, ChildProcessError):
            self._process.wait(KILLED_S)
            ends = time.monotonic() + KILLED_S
            # Where this is the first process of a container, it has inherited the fork.
            while os.waitpid(-self._process.pid, os.WNOHANG)[0] == 0 and time.monotonic() < ends:
                time.sleep(IDLE_POLL_S)

    def _receive(self, length: int, ends: float) -> bytearray:
        received = bytearray(length)
        view = memoryview(received)
        while view:
            self._files.settimeout(_left(ends))
            count = self._files.recv_into(view)
            if count == 0:
                raise _Lost(self.said(KILLED_S).decode("ascii", "replace") or "it died")
            view = view[count:]
        return received


def _left(ends: float) -> float:
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError("overdue")
    return left
