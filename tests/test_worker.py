from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from stand_in import StandInEngine, StandInMasker, box_mask, noise
from structlog.testing import capture_logs

from container.errors import (
    DeadlineExceeded,
    Draining,
    GenerationFailed,
    GpuFailed,
    NotReady,
    Overloaded,
    PersonNotFound,
)
from container.sharing import Admission, KeyLocks, Memory
from container.worker import Abandoned, Models, Worker
from model import interface
from model.interface import BadPicture, DeviceFailed, GenerationSettings, OutOfMemory, TryOnInputs

INPUTS = TryOnInputs(noise(), noise(), box_mask())
SETTINGS = GenerationSettings(steps=2, guidance=2.0, seed=1, width=192, height=256)


def soon(seconds=30.0):
    return time.monotonic() + seconds


def started(engine, capacity=4, masker=None, max_batch=1):
    worker = Worker(lambda: Models(engine, masker), lambda _models: None, capacity, max_batch)
    worker.start()
    assert worker.wait_until_loaded(30)
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
    assert worker.wait_until_loaded(30)
    assert worker.ready
    worker.stop(5)


def test_a_load_that_fails_is_told_and_leaves_the_worker_unready():
    def load():
        raise ValueError("weights/unet.safetensors is damaged")

    worker = Worker(load, lambda _models: None, 4)
    worker.start()
    assert worker.wait_until_loaded(30)
    assert "damaged" in str(worker.failure)
    assert not worker.ready


def test_a_job_whose_deadline_passes_in_the_queue_is_never_run(worker, engine):
    engine.may_end.clear()
    thread, _ = in_background(lambda: worker.run(INPUTS, SETTINGS, soon()))
    assert engine.begun.wait(30)
    with pytest.raises(DeadlineExceeded):
        worker.run(INPUTS, SETTINGS, soon(0.05))
    engine.may_end.set()
    thread.join(30)
    worker.run(INPUTS, SETTINGS, soon())
    assert len(engine.made) == 2


def test_more_waiting_jobs_than_places_are_refused_at_once(engine):
    worker = started(engine, capacity=1)
    engine.may_end.clear()
    running, _ = in_background(lambda: worker.run(INPUTS, SETTINGS, soon()))
    assert engine.begun.wait(30)
    waiting, _ = in_background(lambda: worker.run(INPUTS, SETTINGS, soon()))
    until(lambda: len(worker._waiting) == 1)
    with pytest.raises(Overloaded):
        worker.run(INPUTS, SETTINGS, soon())
    engine.may_end.set()
    running.join(30)
    waiting.join(30)
    worker.stop(5)


def until(condition, seconds=30.0):
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
    assert engine.begun.wait(30)
    waiting, second = in_background(lambda: worker.run(INPUTS, SETTINGS, soon()))
    until(lambda: len(worker._waiting) == 1)
    stopping, _ = in_background(lambda: worker.stop(5))
    time.sleep(0.05)
    engine.may_end.set()
    for thread in (stopping, running, waiting):
        thread.join(30)
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
    thread.join(30)
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


def queued(worker, engine, settings, deadline_s=30.0, **changes):
    """Runs one job, lets others queue behind it, and gives what they all came to, in order; each has its own arrays."""
    engine.may_end.clear()
    started = [in_background(lambda: worker.run(INPUTS, SETTINGS, soon()))]
    assert engine.begun.wait(30)
    for place, each in enumerate(settings, 1):
        inputs = TryOnInputs(noise(), noise(), box_mask())
        started.append(in_background(lambda i=inputs, each=each: worker.run(i, each, soon(deadline_s), **changes)))
        until(lambda place=place: len(worker._waiting) == place)
    engine.may_end.set()
    for thread, _ in started:
        thread.join(30)
    return [box[0] for _, box in started]


def test_waiting_jobs_that_differ_in_the_seed_alone_are_made_as_one_batch(engine):
    worker = started(engine, max_batch=3)
    settings = [replace(SETTINGS, seed=seed) for seed in (2, 3)]
    other = replace(SETTINGS, steps=9, seed=4)
    done = queued(worker, engine, [settings[0], other, settings[1]])
    assert engine.batches == [2]
    assert [made.seed for made in engine.made] == [1, 2, 3, 4]
    alone = started(StandInEngine())
    for generation, each in zip(done, (SETTINGS, settings[0], other, settings[1])):
        assert np.array_equal(generation.image, alone.run(INPUTS, each, soon()).image)
    worker.stop(5)
    alone.stop(5)


@pytest.mark.parametrize("max_batch", [2, 4])
def test_waiting_jobs_of_several_qualities_are_each_made_with_their_like(engine, max_batch):
    worker = started(engine, max_batch=max_batch)
    qualities = ["fast", "exact", "fast", "balanced"]
    done = queued(worker, engine, [replace(SETTINGS, quality=quality) for quality in qualities])
    assert all(isinstance(each.image, np.ndarray) for each in done)
    assert [made.quality for made in engine.made] == ["exact", "fast", "fast", "exact", "balanced"]
    assert engine.batches == [2]
    assert worker.ready
    worker.stop(5)


def test_a_thread_that_cannot_go_on_is_as_a_device_that_failed_and_every_wait_ends(engine):
    def broken():
        raise SystemError("not an answer")

    worker = started(engine)
    with capture_logs() as logs:
        done = queued(worker, engine, [SETTINGS, SETTINGS], is_wanted=broken, deadline_s=2)
    assert isinstance(done[0].image, np.ndarray)
    assert [type(each) for each in done[1:]] == [DeadlineExceeded, GpuFailed]
    assert [entry["event"] for entry in logs] == ["gpu_thread_failed"]
    assert worker.device_failed
    assert not worker.ready
    with pytest.raises(GpuFailed):
        worker.run(INPUTS, SETTINGS, soon())
    worker.stop(5)


def test_a_batch_is_no_larger_than_its_limit_and_one_by_default(engine):
    worker = started(engine, max_batch=2)
    queued(worker, engine, [replace(SETTINGS, seed=seed) for seed in (2, 3, 4)])
    assert engine.batches == [2]
    worker.stop(5)
    engine.batches.clear()
    engine.begun.clear()
    single = started(engine)
    queued(single, engine, [SETTINGS, SETTINGS])
    assert engine.batches == []
    single.stop(5)


@pytest.mark.parametrize("failure", [OutOfMemory("9 GiB"), BadPicture("NaN")])
def test_a_batch_that_fails_is_halved_until_only_what_is_at_fault_fails(engine, failure):
    class Full(StandInEngine):
        def generate_batch(self, inputs, settings):
            self.batches.append(len(inputs))
            raise failure

    engine = Full()
    worker = started(engine, max_batch=4)
    done = queued(worker, engine, [replace(SETTINGS, seed=seed) for seed in (2, 3, 4, 5)])
    assert engine.batches == [4, 2, 2]
    assert all(isinstance(each.image, np.ndarray) for each in done)
    worker.stop(5)


def test_a_device_that_fails_in_one_half_is_not_touched_by_the_other():
    class Failing(StandInEngine):
        def generate_batch(self, inputs, settings):
            self.batches.append(len(inputs))
            raise OutOfMemory("9 GiB") if len(inputs) > 2 else DeviceFailed("illegal memory access")

    engine = Failing()
    worker = started(engine, max_batch=4)
    done = queued(worker, engine, [replace(SETTINGS, seed=seed) for seed in (2, 3, 4, 5)])
    assert engine.batches == [4, 2]
    assert [type(each) for each in done[1:]] == [GpuFailed] * 4
    worker.stop(5)


def test_halves_of_a_batch_that_nobody_waits_for_any_more_are_not_begun():
    class Slow(StandInEngine):
        def generate_batch(self, inputs, settings):
            self.batches.append(len(inputs))
            time.sleep(3)
            raise OutOfMemory("9 GiB")

    engine = Slow()
    worker = started(engine, max_batch=2)
    done = queued(worker, engine, [replace(SETTINGS, seed=seed) for seed in (2, 3)], deadline_s=2)
    assert [type(each) for each in done[1:]] == [DeadlineExceeded] * 2
    worker.run(INPUTS, SETTINGS, soon())
    assert engine.batches == [2]
    assert [made.seed for made in engine.made] == [1, 1]
    worker.stop(5)


def test_when_to_come_again_counts_the_pictures_of_a_batch_as_made_side_by_side():
    class AsFastAsOne(StandInEngine):
        def generate_batch(self, inputs, settings):
            time.sleep(1)
            return [self.generate(*each) for each in zip(inputs, settings)]

    engine = AsFastAsOne()
    worker = started(engine, max_batch=4)
    queued(worker, engine, [replace(SETTINGS, seed=seed) for seed in (2, 3, 4, 5)])
    assert worker.retry_after_s(16) <= 3
    worker.stop(5)


def gone_before_it_began(worker, engine):
    """While a picture is made, two callers one after the other wait for theirs until their deadlines; what they got."""
    engine.may_end.clear()
    making = in_background(lambda: worker.run(INPUTS, SETTINGS, soon()))
    assert engine.begun.wait(30)
    found = []
    for _ in range(2):
        thread, box = in_background(lambda: worker.run(INPUTS, SETTINGS, soon(0.2)))
        thread.join(30)
        found.append(type(box[0]))
    return found, making


def test_a_place_of_a_job_that_nobody_waits_for_any_more_is_free(engine):
    worker = started(engine, capacity=1)
    found, (making, box) = gone_before_it_began(worker, engine)
    assert found == [DeadlineExceeded] * 2
    engine.may_end.set()
    making.join(30)
    assert isinstance(box[0].image, np.ndarray)
    worker.stop(5)


def test_a_stop_passes_over_jobs_that_nobody_waits_for_any_more(engine):
    worker = started(engine)
    gone_before_it_began(worker, engine)
    waiting, box = in_background(lambda: worker.run(INPUTS, SETTINGS, soon()))
    until(lambda: len(worker._waiting) == 3)
    worker.stop(0.1)
    waiting.join(30)
    assert isinstance(box[0], Draining)
    engine.may_end.set()


def test_a_device_that_fails_in_a_batch_fails_all_of_it_once(engine):
    class Broken(StandInEngine):
        def generate_batch(self, inputs, settings):
            self.batches.append(len(inputs))
            raise DeviceFailed("illegal memory access")

    engine = Broken()
    worker = started(engine, max_batch=4)
    done = queued(worker, engine, [replace(SETTINGS, seed=seed) for seed in (2, 3)])
    assert engine.batches == [2]
    assert [type(each) for each in done[1:]] == [GpuFailed, GpuFailed]
    assert worker.device_failed
    worker.stop(5)


def test_what_nobody_waits_for_any_more_is_not_begun(engine):
    worker = started(engine)
    done = queued(worker, engine, [SETTINGS], is_wanted=lambda: False)
    assert isinstance(done[1], Abandoned)
    assert len(engine.made) == 1
    worker.stop(5)
