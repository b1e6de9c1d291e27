from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from stand_in import StandInEngine, StandInMasker, box_mask, noise

from container.errors import (
    DeadlineExceeded,
    Draining,
    GenerationFailed,
    GpuFailed,
    NotReady,
    Overloaded,
    PersonNotFound,
)
from container.worker import Admission, KeyLocks, Memory, Models, Worker
from model import interface
from model.interface import BadPicture, DeviceFailed, GenerationSettings, OutOfMemory, TryOnInputs

INPUTS = TryOnInputs(noise(), noise(), box_mask())
SETTINGS = GenerationSettings(steps=2, guidance=2.0, seed=1, width=192, height=256)


def soon(seconds=5.0):
    return time.monotonic() + seconds


def started(engine, capacity=4, masker=None):
    worker = Worker(lambda: Models(engine, masker), lambda _models: None, capacity)
    worker.start()
    assert worker.wait_until_loaded(5)
    return worker


@pytest.fixture
def engine():
    return StandInEngine()


@pytest.fixture
def worker(engine):
    worker = started(engine)
    yield worker
    engine.may_end.set()
    worker.stop(5)


def in_background(call):
    """Runs the call on a thread; `box` gets what it returned or raised."""
    box = []

    def run():
        try:
            box.append(call())
        except Exception as exc:
            box.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, box


def test_a_picture_comes_back_with_its_times(worker):
    generation = worker.run(INPUTS, SETTINGS, soon())
    assert generation.image.shape == (256, 192, 3)
    assert generation.queued_s >= 0
    assert generation.generated_s >= 0


def test_before_the_engine_is_warm_a_job_is_refused_as_not_ready():
    warm = threading.Event()
    worker = Worker(lambda: Models(StandInEngine()), lambda _models: warm.wait(5) and None, 4)
    worker.start()
    with pytest.raises(NotReady):
        worker.run(INPUTS, SETTINGS, soon())
    warm.set()
    assert worker.wait_until_loaded(5)
    assert worker.ready
    worker.stop(5)


def test_a_load_that_fails_is_told_and_leaves_the_worker_unready():
    def load():
        raise ValueError("weights/unet.safetensors is damaged")

    worker = Worker(load, lambda _models: None, 4)
    worker.start()
    assert worker.wait_until_loaded(5)
    assert "damaged" in str(worker.failure)
    assert not worker.ready


def test_a_job_whose_deadline_passes_in_the_queue_is_never_run(worker, engine):
    engine.may_end.clear()
    thread, _ = in_background(lambda: worker.run(INPUTS, SETTINGS, soon()))
    assert engine.begun.wait(5)
    with pytest.raises(DeadlineExceeded):
        worker.run(INPUTS, SETTINGS, soon(0.05))
    engine.may_end.set()
    thread.join(5)
    worker.run(INPUTS, SETTINGS, soon())
    assert len(engine.made) == 2


def test_more_waiting_jobs_than_places_are_refused_at_once(engine):
    worker = started(engine, capacity=1)
    engine.may_end.clear()
    running, _ = in_background(lambda: worker.run(INPUTS, SETTINGS, soon()))
    assert engine.begun.wait(5)
    waiting, _ = in_background(lambda: worker.run(INPUTS, SETTINGS, soon()))
    until(lambda: worker._jobs.full())
    with pytest.raises(Overloaded):
        worker.run(INPUTS, SETTINGS, soon())
    engine.may_end.set()
    running.join(5)
    waiting.join(5)
    worker.stop(5)


def until(condition, seconds=5.0):
    ends = soon(seconds)
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("failure", "error"),
    [(OutOfMemory("9 GiB"), GpuFailed), (BadPicture("NaN"), GenerationFailed), (KeyError("bug"), KeyError)],
)
def test_after_a_failed_picture_the_next_one_is_made(worker, engine, failure, error):
    engine.failures.append(failure)
    with pytest.raises(error):
        worker.run(INPUTS, SETTINGS, soon())
    assert worker.ready
    assert worker.run(INPUTS, SETTINGS, soon()).image.any()


def test_a_failed_device_latches(worker, engine):
    engine.failures.append(DeviceFailed("illegal memory access"))
    for _ in range(2):
        with pytest.raises(GpuFailed):
            worker.run(INPUTS, SETTINGS, soon())
    assert worker.device_failed
    assert not worker.ready
    assert engine.made == []


def test_what_waits_when_the_worker_stops_is_told_to_come_back(worker, engine):
    engine.may_end.clear()
    running, first = in_background(lambda: worker.run(INPUTS, SETTINGS, soon()))
    assert engine.begun.wait(5)
    waiting, second = in_background(lambda: worker.run(INPUTS, SETTINGS, soon()))
    until(lambda: not worker._jobs.empty())
    stopping, _ = in_background(lambda: worker.stop(5))
    time.sleep(0.05)
    engine.may_end.set()
    for thread in (stopping, running, waiting):
        thread.join(5)
    assert isinstance(first[0].image, np.ndarray)
    assert isinstance(second[0], Draining)


def test_admission_counts_and_says_when_to_come_back():
    admission = Admission(2, lambda ahead: 10 * ahead)
    admission.enter()
    admission.enter()
    with pytest.raises(Overloaded) as refused:
        admission.enter()
    assert refused.value.retry_after_s == 20
    admission.leave()
    admission.enter()
    assert admission.taken == 2


def test_a_draining_service_admits_nobody():
    admission = Admission(2, lambda _ahead: 1)
    admission.drain()
    with pytest.raises(Draining):
        admission.enter()


def test_the_second_holder_of_a_key_waits_for_the_first():
    locks = KeyLocks()
    order = []

    def second():
        with locks.hold("a", soon()):
            order.append("second")

    with locks.hold("a", soon()):
        thread, _ = in_background(second)
        time.sleep(0.05)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]


def test_waiting_for_a_key_ends_at_the_deadline():
    locks = KeyLocks()
    with locks.hold("a", soon()), pytest.raises(DeadlineExceeded), locks.hold("a", soon(0.02)):
        pass


def test_other_keys_are_free_and_a_key_is_free_again_after_a_failure():
    locks = KeyLocks()
    with pytest.raises(ZeroDivisionError), locks.hold("a", soon()), locks.hold("b", soon()):
        raise ZeroDivisionError
    with locks.hold("a", soon(0.1)):
        pass


def test_masks_come_back_with_their_times_from_the_same_thread(engine):
    masker = StandInMasker()
    worker = started(engine, masker=masker)
    assert worker.masks
    masking = worker.mask(INPUTS.person, ["upper", "outer"], soon())
    assert list(masking.masks) == ["upper", "outer"]
    assert masking.queued_s >= 0
    assert masking.masked_s >= 0
    worker.stop(5)


def test_a_worker_without_a_masker_says_so(worker):
    assert not worker.masks


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (interface.PersonNotFound("nobody"), PersonNotFound),
        (interface.OutOfMemory("masker"), GpuFailed),
        (interface.EngineError("masker"), GenerationFailed),
    ],
)
def test_the_maskers_failures_are_told_in_the_services_terms(engine, raised, expected):
    masker = StandInMasker()
    masker.failures = [raised]
    worker = started(engine, masker=masker)
    with pytest.raises(expected):
        worker.mask(INPUTS.person, ["upper"], soon())
    assert worker.ready
    assert worker.mask(INPUTS.person, ["upper"], soon()).masks
    worker.stop(5)


def test_a_memory_keeps_the_latest_things():
    memory = Memory(2)
    memory.keep("a", 1)
    memory.keep("b", 2)
    assert memory.recall("a") == 1
    memory.keep("c", 3)
    assert [memory.recall(key) for key in "abc"] == [1, None, 3]
