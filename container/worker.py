"""The one thread that owns the engine, and the counters that decide who may wait for it.

All locks of the service live here. Every wait ends at a deadline that was set at admission.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable

from container.errors import DeadlineExceeded, Draining, GenerationFailed, GpuFailed, NotReady, Overloaded
from model.interface import DeviceFailed, Engine, EngineError, GenerationSettings, Image, OutOfMemory, TryOnInputs

IDLE_POLL_S = 0.2  # how soon an idle thread notices that it should stop
FIRST_ESTIMATE_S = 5.0  # of one generation, until the warm-up has measured one


@dataclass(frozen=True)
class Generation:
    """One picture and what it cost.

    Attributes:
        image: HWC uint8 RGB.
        queued_s: seconds it waited for the engine.
        generated_s: seconds that the engine took.
    """

    image: Image
    queued_s: float
    generated_s: float


@dataclass(frozen=True)
class _Job:
    inputs: TryOnInputs
    settings: GenerationSettings
    deadline: float
    submitted: float
    future: Future[Generation]


class Admission:
    """A bounded count of requests in flight. Never blocks."""

    def __init__(self, limit: int, retry_after_s: Callable[[int], int]) -> None:
        self._limit = limit
        self._retry_after_s = retry_after_s
        self._lock = threading.Lock()
        self._taken = 0
        self._draining = False

    @property
    def taken(self) -> int:
        """Requests in flight."""
        return self._taken

    @property
    def draining(self) -> bool:
        """True once no more requests are admitted."""
        return self._draining

    def drain(self) -> None:
        """Admits no more requests."""
        self._draining = True

    def enter(self) -> None:
        """Takes one place, which the caller gives back with `leave`.

        Raises:
            Draining: the process is shutting down.
            Overloaded: all places are taken; says when to come back.
        """
        with self._lock:
            if self._draining:
                raise Draining(retry_after_s=1)
            if self._taken >= self._limit:
                raise Overloaded(retry_after_s=self._retry_after_s(self._taken))
            self._taken += 1

    def leave(self) -> None:
        """Gives one place back."""
        with self._lock:
            self._taken -= 1


class KeyLocks:
    """One holder per key: of two requests for the same object the second waits and then finds it stored."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._held: set[str] = set()

    @contextmanager
    def hold(self, key: str, deadline: float) -> Iterator[None]:
        """Holds the key inside the block.

        Raises:
            DeadlineExceeded: another request held it until `deadline` (time.monotonic()).
        """
        with self._condition:
            if not self._condition.wait_for(lambda: key not in self._held, timeout=deadline - time.monotonic()):
                raise DeadlineExceeded("another request for the same key was still running")
            self._held.add(key)
        try:
            yield
        finally:
            with self._condition:
                self._held.remove(key)
                self._condition.notify_all()


class Worker:
    """Owns the engine: loads it, warms it up, and makes one picture at a time, in order of arrival.

    Args:
        load: returns the loaded engine; run on the worker's own thread.
        warm_up: makes one throw-away picture with it.
        capacity: how many jobs may wait; admission keeps it from ever being reached.
    """

    def __init__(self, load: Callable[[], Engine], warm_up: Callable[[Engine], None], capacity: int) -> None:
        self._load = load
        self._warm_up = warm_up
        self._jobs: queue.Queue[_Job] = queue.Queue(maxsize=capacity)
        self._thread = threading.Thread(target=self._live, name="gpu", daemon=True)
        self._stop = threading.Event()
        self._loaded = threading.Event()
        self._failure: BaseException | None = None
        self._engine_name = ""
        self._estimate_s = FIRST_ESTIMATE_S
        self._device_failed = False

    @property
    def ready(self) -> bool:
        """True from the warm-up picture until the device fails or the worker stops."""
        return self._loaded.is_set() and self._failure is None and not self._device_failed and not self._stop.is_set()

    @property
    def device_failed(self) -> bool:
        """True once the device is unusable; only a new process helps."""
        return self._device_failed

    @property
    def failure(self) -> BaseException | None:
        """What loading or warming up failed with, if it did."""
        return self._failure

    @property
    def engine_name(self) -> str:
        """The loaded engine's name, "" before."""
        return self._engine_name

    def retry_after_s(self, ahead: int) -> int:
        """Whole seconds in which half of `ahead` requests should be done: a repeat then finds a place."""
        return max(1, math.ceil(self._estimate_s * max(1, ahead) / 2))

    def start(self) -> None:
        """Begins to load, on the worker's thread; `ready` or `failure` tells the end of it."""
        self._thread.start()

    def wait_until_loaded(self, timeout_s: float) -> bool:
        """True when loading ended, well or not, within `timeout_s`."""
        return self._loaded.wait(timeout_s)

    def stop(self, timeout_s: float) -> None:
        """Ends the thread after the running picture, or after `timeout_s`; what still waits gets `Draining`."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        while not self._jobs.empty():
            self._jobs.get_nowait().future.set_exception(Draining(retry_after_s=1))

    def run(self, inputs: TryOnInputs, settings: GenerationSettings, deadline: float) -> Generation:
        """One picture; returns or raises before `deadline` (time.monotonic()).

        Raises:
            NotReady, Draining, DeadlineExceeded, GpuFailed, GenerationFailed, Overloaded.
        """
        self._refuse_unless_ready()
        job = _Job(inputs, settings, deadline, time.monotonic(), Future())
        try:
            self._jobs.put_nowait(job)
        except queue.Full as exc:
            raise Overloaded(retry_after_s=self.retry_after_s(self._jobs.qsize())) from exc
        try:
            return job.future.result(timeout=max(0.0, deadline - time.monotonic()))
        except FutureTimeout as exc:
            job.future.cancel()  # a job that has not begun is dropped unrun
            raise DeadlineExceeded("the picture was not made in time") from exc

    def _refuse_unless_ready(self) -> None:
        if self._device_failed:
            raise GpuFailed("the device failed earlier")
        if self._stop.is_set():
            raise Draining(retry_after_s=1)
        if not self.ready:
            raise NotReady(retry_after_s=5)

    def _live(self) -> None:
        try:
            engine = self._load()
            began = time.monotonic()
            self._warm_up(engine)
            self._estimate_s = time.monotonic() - began
            self._engine_name = engine.name
        except BaseException as exc:  # whatever it is, the process must learn of it and end
            self._failure = exc
            return
        finally:
            self._loaded.set()
        while not self._stop.is_set():
            try:
                job = self._jobs.get(timeout=IDLE_POLL_S)
            except queue.Empty:
                continue
            self._make(engine, job)

    def _make(self, engine: Engine, job: _Job) -> None:
        if not job.future.set_running_or_notify_cancel():
            return
        began = time.monotonic()
        try:
            if began >= job.deadline:
                raise DeadlineExceeded("the deadline passed in the queue")
            if self._device_failed:
                raise GpuFailed("the device failed earlier")
            image = _generate(engine, job)
        except Exception as exc:  # the thread outlives every job; the door answers what it does not know as internal
            self._device_failed = self._device_failed or isinstance(exc.__cause__, DeviceFailed)
            job.future.set_exception(exc)
        else:
            generated_s = time.monotonic() - began
            self._estimate_s += 0.2 * (generated_s - self._estimate_s)  # follows the load within some ten pictures
            job.future.set_result(Generation(image, began - job.submitted, generated_s))


def _generate(engine: Engine, job: _Job) -> Image:
    """The engine's picture, its failures in the service's own terms."""
    try:
        return engine.generate(job.inputs, job.settings)
    except (OutOfMemory, DeviceFailed) as exc:
        raise GpuFailed(str(exc)) from exc
    except EngineError as exc:
        raise GenerationFailed(str(exc)) from exc
