"""The one thread that owns the models, and the counters that decide who may wait for them.

All locks of the service live here. Every wait ends at a deadline that was set at admission.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Generic, TypeVar

from container.errors import (
    DeadlineExceeded,
    Draining,
    GenerationFailed,
    GpuFailed,
    NotReady,
    Overloaded,
    PersonNotFound,
)
from model import interface
from model.interface import (
    DeviceFailed,
    Engine,
    EngineError,
    GenerationSettings,
    Image,
    Masker,
    OutOfMemory,
    TryOnInputs,
)

_T = TypeVar("_T")

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
class Masking:
    """The masks of one photo and what they cost.

    Attributes:
        masks: for each type, HW uint8 0/255.
        queued_s: seconds that the photo waited for the masker.
        masked_s: seconds that the masker took.
    """

    masks: dict[str, Image]
    queued_s: float
    masked_s: float


@dataclass(frozen=True)
class Models:
    """What the worker's thread owns; a service without automatic masks has no masker."""

    engine: Engine
    masker: Masker | None = None


@dataclass(frozen=True)
class _Done:
    """What the work of a job gave, and the seconds that it waited and took."""

    result: Any
    waited_s: float
    worked_s: float


@dataclass(frozen=True)
class _Job:
    work: Callable[[Models], Any]
    deadline: float
    submitted: float
    future: Future[_Done]


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


class Memory(Generic[_T]):
    """The latest things by key, at most `limit` of them.

    Args:
        limit: how many are kept; the longest unused one goes first.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _T] = OrderedDict()

    def recall(self, key: str) -> _T | None:
        """What is kept under the key, which then counts as used."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key]

    def keep(self, key: str, thing: _T) -> None:
        """Keeps a thing under the key."""
        with self._lock:
            self._kept[key] = thing
            self._kept.move_to_end(key)
            while len(self._kept) > self._limit:
                self._kept.popitem(last=False)


class Worker:
    """Owns the models: loads them, warms them up, and does one job at a time, in order of arrival.

    Args:
        load: returns the loaded models; run on the worker's own thread.
        warm_up: makes one throw-away picture with them.
        capacity: how many jobs may wait; admission keeps it from ever being reached.
    """

    def __init__(self, load: Callable[[], Models], warm_up: Callable[[Models], None], capacity: int) -> None:
        self._load = load
        self._warm_up = warm_up
        self._jobs: queue.Queue[_Job] = queue.Queue(maxsize=capacity)
        self._thread = threading.Thread(target=self._live, name="gpu", daemon=True)
        self._stop = threading.Event()
        self._loaded = threading.Event()
        self._failure: BaseException | None = None
        self._engine_name = ""
        self._masks = False
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

    @property
    def masks(self) -> bool:
        """True once a masker is loaded."""
        return self._masks

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
        done = self._do(partial(_generate, inputs, settings), deadline)
        self._estimate_s += 0.2 * (done.worked_s - self._estimate_s)  # follows the load within some ten pictures
        return Generation(done.result, done.waited_s, done.worked_s)

    def mask(self, person: Image, cloth_types: Sequence[str], deadline: float) -> Masking:
        """The masks of one photo; returns or raises before `deadline` (time.monotonic()).

        Args:
            person: HWC uint8 RGB, upright.
            cloth_types: which masks.
            deadline: of this call.
        Raises:
            PersonNotFound, and what `run` raises.
        """
        done = self._do(partial(_mask, person, cloth_types), deadline)
        return Masking(done.result, done.waited_s, done.worked_s)

    def _do(self, work: Callable[[Models], Any], deadline: float) -> _Done:
        self._refuse_unless_ready()
        job = _Job(work, deadline, time.monotonic(), Future())
        try:
            self._jobs.put_nowait(job)
        except queue.Full as exc:
            raise Overloaded(retry_after_s=self.retry_after_s(self._jobs.qsize())) from exc
        try:
            return job.future.result(timeout=max(0.0, deadline - time.monotonic()))
        except FutureTimeout as exc:
            job.future.cancel()  # a job that has not begun is dropped undone
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
            models = self._load()
            began = time.monotonic()
            self._warm_up(models)
            self._estimate_s = time.monotonic() - began
            self._engine_name = models.engine.name
            self._masks = models.masker is not None
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
            self._work(models, job)

    def _work(self, models: Models, job: _Job) -> None:
        if not job.future.set_running_or_notify_cancel():
            return
        began = time.monotonic()
        try:
            if began >= job.deadline:
                raise DeadlineExceeded("the deadline passed in the queue")
            if self._device_failed:
                raise GpuFailed("the device failed earlier")
            result = job.work(models)
        except Exception as exc:  # the thread outlives every job; the door answers what it does not know as internal
            self._device_failed = self._device_failed or isinstance(exc.__cause__, DeviceFailed)
            job.future.set_exception(exc)
        else:
            job.future.set_result(_Done(result, began - job.submitted, time.monotonic() - began))


def _generate(inputs: TryOnInputs, settings: GenerationSettings, models: Models) -> Image:
    with _in_terms_of_the_service():
        return models.engine.generate(inputs, settings)


def _mask(person: Image, cloth_types: Sequence[str], models: Models) -> dict[str, Image]:
    if models.masker is None:
        raise ValueError("there is no masker")
    with _in_terms_of_the_service():
        return models.masker.masks(person, cloth_types)


@contextmanager
def _in_terms_of_the_service() -> Iterator[None]:
    """Turns the models' failures into the service's own."""
    try:
        yield
    except interface.PersonNotFound as exc:
        raise PersonNotFound(str(exc)) from exc
    except (OutOfMemory, DeviceFailed) as exc:
        raise GpuFailed(str(exc)) from exc
    except EngineError as exc:
        raise GenerationFailed(str(exc)) from exc
