"""How the composition root loads and warms the models: with no more than the settings need."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import structlog
from catvton_recipe import write_published_layout
from stand_in import StandInEngine

from container import wiring
from container.settings import Settings
from container.storage import LocalStorage
from container.worker import FIRST_ESTIMATE_S, Models, Worker
from model import device_of, without
from model.interface import OutOfMemory, PersonNotFound

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAM = """
import json, sys
from pathlib import Path
from container.settings import Settings
from container.storage import LocalStorage
from container.wiring import _loader, _warm_up
settings = Settings.from_env({"VTON_OUTPUT_DIR": ".", **json.loads(sys.argv[1])})
models = _loader(settings, LocalStorage(Path()), False)()
_warm_up(settings, models)
print(json.dumps({"engine": models.engine.name, "modules": sorted(name for name, m in sys.modules.items() if m)}))
"""


class RememberingEngine(StandInEngine):
    def __init__(self):
        super().__init__()
        self.given = []

    def generate(self, inputs, settings):
        self.given.append(inputs)
        return super().generate(inputs, settings)


class NobodyMasker:
    def __init__(self):
        self.seen = []

    def mask(self, person, cloth_type):
        self.seen.append(person.shape)
        raise PersonNotFound("nobody")


def loaded(environ, tmp_path) -> dict:
    """What a fresh process has imported when it has loaded and warmed the models of these settings."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(environ)]
    given = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_process_that_serves_imports_nothing_that_it_does_not_need(tmp_path):
    weights = write_published_layout(tmp_path / "weights")
    told = loaded({"VTON_WEIGHTS": str(weights), "VTON_MASKER": "off"}, tmp_path)
    assert told["engine"] == "catvton/mix"
    modules = {name.partition(".")[0] for name in told["modules"]} | set(told["modules"])
    assert "diffusers" in modules
    assert not modules & {"transformers", "accelerate", "moto", "aws_cdk", "constructs", "flask"}
    assert not [name for name in told["modules"] if name.startswith("model.maskers")]


def test_with_small_memory_the_process_has_what_offloads(tmp_path):
    told = loaded({"VTON_MEMORY": "small"}, tmp_path)
    assert told["engine"] == "catvton/embedded"
    assert "accelerate" in told["modules"]
    assert "transformers" not in told["modules"]


def test_packages_that_are_left_out_cannot_be_imported_until_the_block_ends():
    with without(["json", "antigravity"]):
        assert import_module("json") is json  # it was imported before
        with pytest.raises(ImportError, match="antigravity"):
            import_module("antigravity")
    assert "antigravity" not in sys.modules
    assert sys.modules["json"] is json


@pytest.mark.parametrize(("device", "made"), [("cpu", (64, 64, 1)), ("cuda", (512, 768, 2))])
def test_a_cpu_is_warmed_up_by_a_small_picture_and_a_card_by_a_full_one(monkeypatch, device, made):
    monkeypatch.setattr(wiring, "device_of", lambda name: {"auto": device}[name])
    engine, masker = RememberingEngine(), NobodyMasker()
    wiring._warm_up(Settings.from_env({"VTON_WIDTH": "512", "VTON_HEIGHT": "768"}), Models(engine, masker))
    (settings,), (inputs,) = engine.made, engine.given
    assert (settings.width, settings.height, settings.steps) == made
    assert (settings.guidance, settings.quality) == (2.5, "exact")
    assert inputs.person.shape == inputs.garment.shape == (*inputs.mask.shape, 3) == (made[1], made[0], 3)
    assert set(np.unique(inputs.mask)) == {0, 255}
    assert masker.seen == [inputs.person.shape]


def test_what_requests_get_by_default_is_warmed_up(monkeypatch):
    monkeypatch.setattr(wiring, "device_of", lambda _name: "cuda")
    engine = RememberingEngine()
    wiring._warm_up(Settings.from_env({"VTON_QUALITY": "fast", "VTON_GUIDANCE": "1"}), Models(engine, None))
    assert [(settings.guidance, settings.quality) for settings in engine.made] == [(1.0, "fast")]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_forward_that_is_compiled_is_compiled_at_the_start(monkeypatch, device):
    monkeypatch.setattr(wiring, "device_of", lambda _name: device)
    engine, batches = RememberingEngine(), set()

    def generate_batch(inputs, settings):
        batches.update((len(inputs), each.guidance > 1, each.quality) for each in settings)
        assert {each.steps for each in settings} == {2}  # in the second, deep layers are reused
        assert {(each.width, each.height) for each in settings} == {(768, 1024)}  # graphs are compiled for a size
        return [engine.generate(*each) for each in zip(inputs, settings)]

    monkeypatch.setattr(engine, "generate_batch", generate_batch, raising=False)
    environ = {"VTON_COMPILE": "inductor", "VTON_MAX_BATCH": "2"}
    wiring._warm_up(Settings.from_env(environ), Models(engine, None))
    assert batches == set(itertools.product((1, 2), (True, False), ("exact", "balanced")))


class SmallEngine(StandInEngine):
    """Finds memory for so many pictures at once."""

    def __init__(self, most):
        super().__init__()
        self.most, self.asked = most, []

    def generate_batch(self, inputs, settings):
        self.asked.append(len(inputs))
        if len(inputs) > self.most:
            raise OutOfMemory("CUDA out of memory")
        return [self.generate(*each) for each in zip(inputs, settings)]


def compiling(max_batch):
    size = {"VTON_WIDTH": "256", "VTON_HEIGHT": "256"}
    return Settings.from_env({"VTON_COMPILE": "inductor", "VTON_MAX_BATCH": str(max_batch), **size})


def test_a_batch_for_which_the_memory_does_not_do_ends_the_warm_up_of_batches_and_not_the_process():
    engine, masker = SmallEngine(4), NobodyMasker()
    with structlog.testing.capture_logs() as lines:
        worker = Worker(lambda: Models(engine, masker), lambda models: wiring._warm_up(compiling(8), models), 8, 8)
        worker.start()
        try:
            assert worker.wait_until_loaded(20)
        finally:
            worker.stop(5)
    assert engine.asked == [count for count in (1, 2, 3, 4) for _ in range(4)] + [5]
    assert len(masker.seen) == 1
    (told,) = [line for line in lines if line["log_level"] == "warning"]
    assert (told["event"], told["pictures"], told["max_batch"]) == ("batch_too_large", 5, 8)


def test_a_single_picture_for_which_the_memory_does_not_do_ends_the_start():
    with pytest.raises(OutOfMemory):
        wiring._warm_up(compiling(8), Models(SmallEngine(0), None))


def test_the_device_is_the_one_that_the_engine_takes():
    assert device_of("cpu") == "cpu"
    with pytest.raises(ValueError, match="unknown device 'tpu'"):
        device_of("tpu")


def test_the_settings_reach_the_engine(monkeypatch, tmp_path):
    given = []

    def load_engine(name, options):
        given.append((name, options))
        return StandInEngine()

    monkeypatch.setattr(wiring, "load_engine", load_engine)
    environ = {"VTON_WEIGHTS": str(tmp_path), "VTON_MEMORY": "small", "VTON_DTYPE": "float32", "VTON_MASKER": "off"}
    wiring._loader(Settings.from_env(environ), LocalStorage(tmp_path), False)()
    ((name, options),) = given
    assert name == "catvton"
    assert (options.weights, options.memory, options.dtype) == (str(tmp_path), "small", "float32")


def test_the_start_asks_the_storage_for_nothing_outside_of_the_prefix(monkeypatch, tmp_path):
    asked = []

    class Storage(LocalStorage):
        def find(self, key):
            asked.append(key)

    monkeypatch.setattr(wiring, "load_engine", lambda *_: StandInEngine())
    environ = {"VTON_WEIGHTS": str(tmp_path), "VTON_MASKER": "off", "VTON_KEY_PREFIX": "shop/"}
    wiring._loader(Settings.from_env(environ), Storage(tmp_path), False)()
    assert asked == ["shop/users/none"]


def test_a_small_warm_up_does_not_promise_that_pictures_are_quick():
    worker = Worker(lambda: Models(StandInEngine()), lambda _models: None, capacity=8)
    worker.start()
    try:
        assert worker.wait_until_loaded(20)
        assert worker.retry_after_s(2) == FIRST_ESTIMATE_S
    finally:
        worker.stop(5)


def test_each_thread_has_a_connection_of_its_own_to_s3_and_sqs(monkeypatch):
    pools = []

    class Session:
        def client(self, service, config):
            pools.append((service, config.max_pool_connections))

    monkeypatch.setattr(wiring, "_session", Session)
    url = "https://sqs.eu-central-1.amazonaws.com/1/results"
    wiring.build(Settings(bucket="results", queue_url=url, max_in_flight=32))
    assert sorted(pools) == [("s3", 128), ("s3", 128), ("sqs", 32), ("sqs", 32)]
