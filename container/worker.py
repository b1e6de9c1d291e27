"""The one thread that owns the models, and what waits for it.

Every wait ends at a deadline that was set at admission.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable

import structlog

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

IDLE_POLL_S = 0.2  # how soon an idle thread notices that it should stop
FIRST_ESTIMATE_S = 5.0  # of one generation at least, until one was measured

log = structlog.get_logger()


class Abandoned(Exception):
    """The caller left before the work began; nobody reads the answer."""


@dataclass(frozen=True)
class Generation:
    """One picture and what it cost.

    Attributes:
        image: HWC uint8 RGB.
        queued_s: seconds it waited for the engine.
        generated_s: seconds that the engine took, for all pictures of its batch.
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
    """What a job came to, the seconds that it waited and took, and how many jobs were done in these together."""

    result: Any
    waited_s: float
    worked_s: float
    together: int


@dataclass(frozen=True, eq=False)
class _Job:
    """Work for the thread; no other job equals it, whatever is asked for.

    Attributes:
        work: does several orders at once: (models, orders) -> a result for each.
        order: what is asked for.
        kind: jobs of one kind may be done together; None is done alone.
        deadline: time.monotonic() value, after which it is not begun.
        is_wanted: whether the caller is still there.
        submitted: when it began to wait.
        future: gets the result.
    """

    work: Callable[[Models, Sequence[Any]], Sequence[Any]]
    order: Any
    kind: Hashable | None
    deadline: float
    is_wanted: Callable[[], bool]
    submitted: float
    future: Future[_Done]


class _Waiting:
    """Jobs in order of arrival, at most `capacity` of them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: _Job) -> bool:
        """False where all places are taken by jobs that somebody waits for."""
        with self._changed:
            if len(self._jobs) >= self._capacity:
                self._jobs = deque(each for each in self._jobs if not each.future.done())
            if len(self._jobs) >= self._capacity:
                return False
            self._jobs.append(job)
            self._changed.notify()
            return True

    def take(self, most: int, timeout_s: float) -> list[_Job]:
        """The first job, and of those behind it the ones of its kind, up to `most`; none after `timeout_s`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._jobs, timeout_s):
                return []
            first = self._jobs.popleft()
            fellows = [job for job in self._jobs if job.kind is not None and job.kind == first.kind][: most - 1]
            for job in fellows:
                self._jobs.remove(job)
            return [first, *fellows]


class Worker:
    """Owns the models: loads them, warms them up, and works in order of arrival.

    Args:
        load: returns the loaded models; run on the worker's own thread.
        warm_up: makes one throw-away picture with them.
        capacity: how many jobs may wait; where somebody waits for all of them, one more is refused.
        max_batch: pictures that are made at once, if so many compatible ones wait.
    """

    def __init__(
        self, load: Callable[[], Models], warm_up: Callable[[Models], None], capacity: int, max_batch: int = 1
    ) -> None:
        self._load = load
        self._warm_up = warm_up
        self._max_batch = max_batch
        self._waiting = _Waiting(capacity)
        self._thread = threading.Thread(target=self._live, name="gpu", daemon=True)
        self._stop = threading.Event()
        self._loaded = threading.Event()
        self._failure: BaseException | None = None
        self._engine_name = ""
        self._masks = False
        self._estimate_s = FIRST_ESTIMATE_S
        self._is_measured = False
        self._device_failed = False

    @property
    def ready(self) -> bool:
        """True from the warm-up picture until the device fails or the worker stops."""
        return self._loaded.is_set() and self._failure is None and not self._device_failed and not self._stop.is_set()

    @property
    def device_failed(self) -> bool:
        """True once the device, or the thread that drives it, is unusable; only a new process helps."""
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
        for (job,) in iter(lambda: self._waiting.take(1, 0), []):
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(Draining(retry_after_s=1))

    def run(
        self,
        inputs: TryOnInputs,
        settings: GenerationSettings,
        deadline: float,
        is_wanted: Callable[[], bool] = lambda: True,
        late_s: float = 0.0,
    ) -> Generation:
        """One picture; begun before `deadline` (time.monotonic()), or never.

        Args:
            inputs: its pictures.
            settings: how it is made.
            deadline: of this call.
            is_wanted: asked before the work begins; False drops it.
            late_s: seconds after the deadline that are waited for a picture that was begun before it.
        Raises:
            NotReady, Draining, DeadlineExceeded, GpuFailed, GenerationFailed, Overloaded, Abandoned.
        """
        kind = (settings.steps, settings.guidance, settings.width, settings.height, settings.quality)
        done = self._do(_generate, (inputs, settings), kind, deadline, is_wanted, late_s)
        share = 0.2 if self._is_measured else 1.0  # follows the load within some ten pictures; the first ends guessing
        self._estimate_s += share * (done.worked_s / done.together - self._estimate_s)
        self._is_measured = True
        return Generation(done.result, done.waited_s, done.worked_s)

    def mask(
        self,
        person: Image,
        cloth_types: Sequence[str],
        deadline: float,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Masking:
        """The masks of one photo; returns or raises before `deadline` (time.monotonic()).

        Args:
            person: HWC uint8 RGB, upright.
            cloth_types: which masks.
            deadline: of this call.
            is_wanted: as for `run`.
        Raises:
            PersonNotFound, and what `run` raises.
        """
        done = self._do(_mask, (person, cloth_types), None, deadline, is_wanted)
        return Masking(done.result, done.waited_s, done.worked_s)

    def _do(
        self,
        work: Callable[[Models, Sequence[Any]], Sequence[Any]],
        order: object,
        kind: Hashable | None,
        deadline: float,
        is_wanted: Callable[[], bool],
        late_s: float = 0.0,
    ) -> _Done:
        self._refuse_unless_ready()
        job = _Job(work, order, kind, deadline, is_wanted, time.monotonic(), Future())
        if not self._waiting.add(job):
            raise Overloaded(retry_after_s=self.retry_after_s(len(self._waiting)))
        try:
            return job.future.result(timeout=max(0.0, deadline - time.monotonic()))
        except FutureTimeout as exc:
            if job.future.cancel() or not late_s:  # a job that has not begun is dropped undone
                raise DeadlineExceeded("the picture was not made in time") from exc
        try:
            return job.future.result(timeout=late_s)
        except FutureTimeout as exc:
            raise DeadlineExceeded("the picture was not made, however late") from exc

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
            self._estimate_s = max(FIRST_ESTIMATE_S, time.monotonic() - began)  # it may be smaller than a picture
            self._engine_name = models.engine.name
            self._masks = models.masker is not None
        except BaseException as exc:  # whatever it is, the process must learn of it and end
            self._failure = exc
            return
        finally:
            self._loaded.set()
        try:
            while not self._stop.is_set():
                jobs = [job for job in self._waiting.take(self._max_batch, IDLE_POLL_S) if self._begins(job)]
                if jobs:
                    self._finish(models, jobs, time.monotonic())
        except BaseException:  # whatever it is, nothing is made any more: as with a device that failed
            log.exception("gpu_thread_failed")
            self._device_failed = True
            for (job,) in iter(lambda: self._waiting.take(1, 0), []):
                self._begins(job)

    def _begins(self, job: _Job) -> bool:
        """Whether the job is to be done; if not, its caller is told why."""
        return job.future.set_running_or_notify_cancel() and self._is_to_be_done(job)

    def _is_to_be_done(self, job: _Job) -> bool:
        """The same of a job that was taken."""
        refusal: Exception | None = None
        if time.monotonic() >= job.deadline:
            refusal = DeadlineExceeded("the deadline passed in the queue")
        elif self._device_failed:
            refusal = GpuFailed("the device failed earlier")
        elif not job.is_wanted():
            refusal = Abandoned("the caller left")
        if refusal is not None:
            job.future.set_exception(refusal)
        return refusal is None

    def _finish(self, models: Models, jobs: list[_Job], began: float) -> None:
        """Do the jobs together. Where that fails, each half for itself: one may fit, or only one is at fault."""
        try:
            results = jobs[0].work(models, [job.order for job in jobs])
        except Exception as exc:  # the thread outlives every job; the door answers what it does not know as internal
            self._device_failed = self._device_failed or isinstance(exc.__cause__, DeviceFailed)
            if len(jobs) > 1 and not self._device_failed:
                for half in (jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]):
                    if left := [job for job in half if self._is_to_be_done(job)]:
                        self._finish(models, left, time.monotonic())
                return
            for job in jobs:
                job.future.set_exception(exc)
        else:
            worked_s = time.monotonic() - began
            for job, result in zip(jobs, results):
                job.future.set_result(_Done(result, began - job.submitted, worked_s, len(jobs)))


def _generate(models: Models, orders: Sequence[tuple[TryOnInputs, GenerationSettings]]) -> Sequence[Image]:
    with _in_terms_of_the_service():
        if len(orders) == 1:
            return [models.engine.generate(*orders[0])]
        inputs, settings = zip(*orders)
        return models.engine.generate_batch(inputs, settings)


def _mask(models: Models, orders: Sequence[tuple[Image, Sequence[str]]]) -> Sequence[dict[str, Image]]:
    if models.masker is None:
        raise ValueError("there is no masker")
    with _in_terms_of_the_service():
        return [models.masker.masks(person, cloth_types) for person, cloth_types in orders]


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
