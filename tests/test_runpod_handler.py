"""The RunPod door: jobs in, answers out, and the SDK's own server and worker loop around it."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import requests
from faults.job_plane import STAND_IN, job_plane, worker_process
from faults.services import wait_until
from stand_in import (
    FakeFetcher,
    RecordingNotifier,
    StandInEngine,
    StandInMasker,
    noise,
    png,
    running_app,
    usual_files,
    usual_request,
)

import container.runpod_job
from container.fetch import MAX_BYTES
from container.form import MAX_BASE64
from container.images import encode
from container.runpod_handler import Handler, runpod_sdk
from container.runpod_job import MAX_ITEMS, Progress
from container.server import doors
from deploy.demo import free_port, http_server
from model.embedded import demo_pictures
from model.interface import DeviceFailed, OutOfMemory

FILES = usual_files()
URLS = {
    "person_image": "https://images.example/person.png",
    "cloth_image": "https://images.example/upper.png",
    "mask_image": "https://images.example/mask.png",
}
STEPS = {"num_inference_steps": 50, "guidance_scale": 2.5}


def base64_of(content):
    return base64.b64encode(content).decode()


def wire(**changes):
    """The input of the usual job; a change to None takes a field away."""
    fields = {
        "person_image": base64_of(FILES["person.png"]),
        "cloth_image": base64_of(FILES["upper.png"]),
        "mask_image": base64_of(FILES["mask.png"]),
        **changes,
    }
    return {name: value for name, value in fields.items() if value is not None}


class Door:
    """A handler and what stands behind it."""

    def __init__(self, app, engine, fetcher, notifier, folder):
        self.app, self.engine, self.fetcher, self.notifier, self.folder = app, engine, fetcher, notifier, folder
        self.told, self.ended = [], []
        self.handler = Handler(
            app, lambda job, progress: self.told.append((job, progress)), lambda: self.ended.append(1)
        )

    def ask(self, asked, job_id="job-1"):
        return self.send({"id": job_id, "input": asked})

    def send(self, job):
        answered = asyncio.run(self.handler(job))
        json.dumps(answered, allow_nan=False)
        return answered

    def untouched(self):
        return not (self.engine.made or self.notifier.events or any(self.folder.iterdir()))


@contextmanager
def opened(tmp_path, *, engine=None, **settings):
    engine, fetcher, notifier = engine or StandInEngine(), FakeFetcher(), RecordingNotifier()
    parts = {"engine": engine, "fetcher": fetcher, "notifier": notifier, "masker": StandInMasker()}
    with running_app(tmp_path, **parts, **settings) as app:
        yield Door(app, engine, fetcher, notifier, tmp_path)
        assert app.admission.taken == 0


@pytest.fixture
def door(tmp_path):
    with opened(tmp_path) as door:
        yield door


def refused(answered, code, *, field=None, retryable=False):
    assert answered["success"] is False, answered
    assert (answered["code"], answered["retryable"], answered.get("field")) == (code, retryable, field), answered
    assert isinstance(answered["error"], str)
    assert answered["error"].startswith(f"{code}: ")
    assert set(answered) <= {"error", "success", "code", "retryable", "request_id", "retry_after_s", "field"}
    return answered


# --- what comes back


def test_two_files_are_answered_with_the_picture_and_nothing_is_fetched_stored_or_told(door):
    answered = door.ask(wire(mask_image=None))
    assert base64.b64decode(answered["result_image"], validate=True).startswith(b"\xff\xd8")
    facts = {name: answered[name] for name in ("success", "seed", "width", "height", "engine", "mask_source")}
    assert facts == {
        "success": True,
        "seed": 42,
        "width": 768,
        "height": 1024,
        "engine": "stand-in",
        "mask_source": "auto",
    }
    assert len(answered["job_id"]) == 64
    assert not door.fetcher.asked
    assert not door.notifier.events
    assert not any(door.folder.iterdir())


def test_a_data_url_is_the_file_in_it(door):
    plain = door.ask(wire())
    prefixed = door.ask(wire(person_image=f"data:image/png;base64,{base64_of(FILES['person.png'])}"))
    assert prefixed["job_id"] == plain["job_id"]


def test_base64_may_be_in_lines(door):
    plain = door.ask(wire())
    in_lines = base64.encodebytes(FILES["person.png"]).decode()
    assert "\n" in in_lines.strip()
    for person in (in_lines, in_lines.replace("\n", "\r\n"), f"data:image/png;base64,{in_lines}"):
        assert door.ask(wire(person_image=person))["job_id"] == plain["job_id"]


def test_steps_and_guidance_are_the_settings_where_a_job_names_none(tmp_path):
    with opened(tmp_path, steps=3, guidance=1.5) as door:
        door.ask(wire())
        door.ask(wire(num_inference_steps=7, guidance_scale=4, seed=5))
        made = [(settings.steps, settings.guidance, settings.seed) for settings in door.engine.made]
    assert made == [(3, 1.5, 42), (7, 4.0, 5)]


def test_the_same_request_makes_the_same_job_and_the_same_picture_through_all_doors(tmp_path):
    fields = usual_request(cloth_type="upper", lower_cloth_url=None, output_format="jpeg", **STEPS)
    caller = {name: fields[name] for name in ("userId", "timestamp", "cloth_type")}
    with opened(tmp_path, rest=True) as door, http_server(doors(door.app)) as url:
        by_http = requests.post(f"{url}/invocations", json=fields, timeout=60).json()
        form = {name: (None, value) for name, value in {**URLS, **caller}.items()}
        by_rest = requests.post(f"{url}/api/try-on", files=form, timeout=60)
        by_job = door.ask({**URLS, **caller, **STEPS})
        by_key = door.ask(fields)
        stored = (door.folder / by_http["object_key"]).read_bytes()
    assert by_job["job_id"] == by_http["job_id"] == by_rest.headers["X-Job-Id"] == by_key["job_id"]
    assert base64.b64decode(by_job["result_image"]) == stored == base64.b64decode(by_rest.json()["imageBase64"])
    assert (by_key["object_key"], by_key["etag"]) == (by_http["object_key"], by_http["etag"])


def test_the_same_files_make_the_same_job_as_an_upload(tmp_path):
    with opened(tmp_path, rest=True) as door, http_server(doors(door.app)) as url:
        files = {
            "person_image": FILES["person.png"],
            "cloth_image": FILES["upper.png"],
            "mask_image": FILES["mask.png"],
        }
        by_rest = requests.post(f"{url}/api/try-on", files=files, timeout=60)
        by_job = door.ask(wire(**STEPS))
    assert by_job["job_id"] == by_rest.headers["X-Job-Id"]
    assert by_job["result_image"] == by_rest.json()["imageBase64"]


def test_our_own_fields_are_answered_with_the_key(door):
    answered = door.ask(usual_request())
    assert answered["success"] is True
    assert answered["object_key"] == "users/7/vton_result/241108-230001/result.png"
    assert (door.folder / answered["object_key"]).exists()
    (event,) = door.notifier.events
    assert "job-1" in str(event)


def test_our_own_fields_are_answered_with_the_picture_where_that_is_asked_for(door):
    answered = door.ask({**usual_request(), "output": "base64"})
    assert base64.b64decode(answered["result_image"]).startswith(b"\x89PNG")
    assert not door.notifier.events


def test_files_are_stored_where_that_is_asked_for(door):
    answered = door.ask(wire(output="s3", userId="7", timestamp="t1"))
    assert answered["object_key"] == "users/7/vton_result/t1/result.jpg"
    assert (door.folder / answered["object_key"]).read_bytes().startswith(b"\xff\xd8")
    assert "result_image" not in answered


@pytest.mark.parametrize("missing", ["userId", "timestamp"])
def test_nothing_is_stored_under_a_key_that_nobody_named(door, missing):
    asked = wire(**{"output": "s3", "userId": "7", "timestamp": "t1", missing: None})
    refused(door.ask(asked), "invalid_request", field=missing)
    assert door.untouched()


def test_masks_are_stored(door):
    asked = {"task": "mask", "person_image_url": URLS["person_image"], "userId": "7", "timestamp": "t1"}
    answered = door.ask(asked)
    assert answered["success"] is True
    assert len(answered["object_keys"]) == 5
    refused(door.ask({**asked, "output": "base64"}), "invalid_request", field="output")


def test_without_a_place_for_results_only_pictures_are_answered(tmp_path):
    with opened(tmp_path) as door:
        settings = door.app.settings.model_copy(update={"output_dir": None})
        object.__setattr__(door.app, "settings", settings)
        refused(door.ask(usual_request()), "invalid_request", field="output")
        assert door.untouched()
        assert door.ask(wire())["success"] is True


# --- refusals


@pytest.mark.parametrize(
    ("job", "field"),
    [
        (None, "id"),
        ([], "id"),
        ("job", "id"),
        ({}, "id"),
        ({"input": {}}, "id"),
        ({"id": 5, "input": {}}, "id"),
        ({"id": "1"}, "input"),
        ({"id": "1", "input": None}, "input"),
        ({"id": "1", "input": []}, "input"),
        ({"id": "1", "input": "text"}, "input"),
        ({"id": "1", "input": {}}, "person_image_url"),
    ],
)
def test_a_job_without_id_or_input_is_answered(door, job, field):
    answered = refused(door.send(job), "invalid_request", field=field)
    assert answered["request_id"]
    assert door.untouched()


LONE_SURROGATE = "\ud800"


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"person_image": None}, "invalid_request", "person_image"),
        ({"cloth_image": None}, "invalid_request", "cloth_image"),
        ({"person_image": ""}, "invalid_request", "person_image"),
        ({"person_image": 5}, "invalid_request", "person_image"),
        ({"person_image": ["a"]}, "invalid_request", "person_image"),
        ({"person_image": "not base64!"}, "invalid_request", "person_image"),
        ({"person_image": "QUJD QUJD"}, "invalid_request", "person_image"),
        ({"person_image": "QUJ"}, "invalid_request", "person_image"),
        ({"person_image": LONE_SURROGATE}, "invalid_request", "person_image"),
        ({"person_image": "sha256:" + "0" * 64}, "invalid_request", "person_image"),
        ({"mask_image": "data:image/png,abc"}, "invalid_request", "mask_image"),
        ({"mask_image": "data:image/png;base64,"}, "invalid_request", "mask_image"),
        ({"mask_image": "data:" + "x" * 200 + ";base64,QUJD"}, "invalid_request", "mask_image"),
        ({"cloth_image": "A" * (MAX_BASE64 + 4)}, "image_too_large", "cloth_image"),
        ({"cloth_image": base64_of(b"no picture")}, "image_not_decodable", None),
        ({"cloth_image": "https://" + "x" * 2100}, "invalid_request", "cloth_image"),
        ({"lower_cloth_image": "QUJD"}, "invalid_request", "lower_cloth_image"),
        ({"cloth_type": "hat"}, "invalid_request", "cloth_type"),
        ({"cloth_type": None, "seed": "42"}, "invalid_request", "seed"),
        ({"num_inference_steps": 0}, "invalid_request", "num_inference_steps"),
        ({"num_inference_steps": True}, "invalid_request", "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "invalid_request", "guidance_scale"),
        ({"seed": 10**30}, "invalid_request", "seed"),
        ({"userId": "../x"}, "invalid_request", "userId"),
        ({"colour": "red"}, "invalid_request", "colour"),
        ({"upper_cloth_url": "https://images.example/upper.png"}, "invalid_request", "upper_cloth_url"),
        ({"output": "ftp"}, "invalid_request", "output"),
        ({"output": ["s3"]}, "invalid_request", "output"),
        ({"task": "mask"}, "invalid_request", "task"),
    ],
)
def test_a_wrong_field_is_named_and_nothing_runs(door, changes, code, field):
    refused(door.ask(wire(**changes)), code, field=field)
    assert door.untouched()


def test_a_file_of_the_largest_size_is_not_too_long():
    assert len(base64_of(bytes(MAX_BYTES))) == MAX_BASE64


def test_the_answer_names_the_job(door):
    assert refused(door.ask({}, job_id="sync-7-u1"), "invalid_request", field="person_image_url")["request_id"] == (
        "sync-7-u1"
    )


# --- failures


def test_an_answer_belongs_to_the_sdk_which_takes_parts_out_of_it(door):
    first = door.ask({})
    first.clear()
    assert door.ask({})["error"].startswith("invalid_request: ")


def test_all_places_taken_is_an_answer_that_says_when_to_come_again(tmp_path):
    with opened(tmp_path, max_in_flight=1) as door:
        door.app.admission.enter()
        answered = refused(door.ask(wire()), "overloaded", retryable=True)
        door.app.admission.leave()
        assert answered["retry_after_s"] >= 1
        assert door.ask(wire())["success"] is True


def test_what_nobody_foresaw_is_internal_and_tells_nothing(door):
    door.engine.failures.append(KeyError("/app/secret"))
    answered = refused(door.ask(wire()), "internal", retryable=True)
    assert "secret" not in json.dumps(answered)


def test_a_failed_device_asks_for_another_worker(door):
    door.engine.failures.append(DeviceFailed("CUDA error"))
    for _ in range(2):
        answered = door.ask(wire())
        assert answered.pop("refresh_worker") is True
        refused(answered, "gpu_failed", retryable=True)
    assert len(door.ended) == 2
    assert door.ask({"items": [wire()]})["refresh_worker"] is True


def test_a_picture_too_large_for_the_memory_costs_no_worker(door):
    door.engine.failures.append(OutOfMemory("CUDA out of memory"))
    refused(door.ask(wire()), "gpu_failed", retryable=True)
    assert not door.ended


def test_a_job_ends_at_its_deadline(tmp_path):
    with opened(tmp_path, deadline_s=1) as door:
        door.engine.may_end.clear()
        refused(door.ask(wire()), "deadline_exceeded", retryable=True)
        door.engine.may_end.set()
        wait_until(lambda: door.app.admission.taken == 0, "left")


def test_a_result_that_the_platform_would_drop_is_an_error(door):
    large = noise(2000, 2600, seed=9)  # which PNG cannot make smaller than its 16 MB, 21 MB in base64
    asked = {"person_image": base64_of(encode(large, "jpeg", 80)), "mask_image": base64_of(png(np.eye(200, 260) > 0))}
    refused(door.ask(wire(**asked, output_size="person", output_format="png")), "result_too_large")


# --- batches


def test_each_item_of_a_batch_has_its_own_answer(door):
    answered = door.ask({"items": [wire(), wire(seed=-2), usual_request(), "text"]})
    assert answered["success"] is False
    done, wrong, key, text = answered["items"]
    assert base64.b64decode(done["result_image"])
    refused(wrong, "invalid_request", field="seed")
    assert key["object_key"]
    refused(text, "invalid_request", field="items")
    assert door.ask({"items": [wire()]})["success"] is True


@pytest.mark.parametrize(
    "asked", [{"items": []}, {"items": {}}, {"items": [{}] * (MAX_ITEMS + 1)}, {"items": [{}], "seed": 1}]
)
def test_a_batch_is_a_list_of_some_items_and_nothing_else(door, asked):
    refused(door.ask(asked), "invalid_request", field="items")


def test_a_batch_in_a_batch_is_refused(door):
    answered = door.ask({"items": [{"items": [wire()]}]})
    refused(answered["items"][0], "invalid_request", field="person_image_url")


def test_a_batch_is_as_large_as_a_result_may_be(door, monkeypatch):
    one = len(json.dumps(door.ask(wire())))
    monkeypatch.setattr("container.runpod_handler.MAX_RESULT_BYTES", int(2.5 * one))
    codes = [item.get("code") for item in door.ask({"items": [wire()] * 3})["items"]]
    assert codes == [None, None, "result_too_large"]


# --- cancellation and progress


def test_what_is_cancelled_while_it_waits_is_not_made(door):
    async def two_jobs():
        first = asyncio.create_task(door.handler({"id": "runs", "input": wire()}))
        await asyncio.get_running_loop().run_in_executor(None, door.engine.begun.wait, 10)
        second = asyncio.create_task(door.handler({"id": "waits", "input": wire(seed=5)}))
        while door.app.admission.taken < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # it is decoded, and waits for the engine
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        door.engine.may_end.set()
        return await first

    door.engine.may_end.clear()
    assert asyncio.run(two_jobs())["success"] is True
    wait_until(lambda: door.app.admission.taken == 0, "left")
    assert [settings.seed for settings in door.engine.made] == [42]


class SteppingEngine(StandInEngine):
    """Takes many steps, and tells of each."""

    def generate(self, inputs, settings):
        for done in range(1, 61):
            time.sleep(0.05)
            settings.on_step(done, 60)
        return super().generate(inputs, settings)


@pytest.mark.parametrize("deadline_s", [30, 2])
def test_a_job_tells_how_far_it_is_until_it_is_answered(tmp_path, deadline_s):
    with opened(tmp_path, engine=SteppingEngine(), deadline_s=deadline_s) as door:
        answered = door.ask(wire())
        told = list(door.told)
        wait_until(lambda: door.app.admission.taken == 0, "left")
    assert answered["success"] is (deadline_s == 30)
    assert told == door.told
    assert told[0][0] == {"id": "job-1"}
    assert set(told[0][1]) == {"steps_done", "steps"}


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(container.runpod_job, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize(
    ("step_s", "steps", "told"),
    [(0.125, 50, [2, 10, 18, 26, 34, 42]), (5.0, 4, [2, 3]), (0.1, 5, []), (0.4, 1, []), (0.01, 20, [])],
)
def test_progress_is_told_now_and_then_and_not_near_the_end(clock, step_s, steps, told):
    reports = []
    progress = Progress(reports.append, {"item": 0})
    for done in range(1, steps + 1):
        clock.now += step_s
        progress(done, steps)
    assert [report["steps_done"] for report in reports] == told
    assert all(report == {"item": 0, "steps_done": report["steps_done"], "steps": steps} for report in reports)


# --- the SDK


def test_the_sdks_own_runner_takes_what_a_handler_answers(door, monkeypatch):
    monkeypatch.setenv("RUNPOD_LOG_LEVEL", "ERROR")
    with runpod_sdk():
        from runpod.serverless.modules.rp_job import run_job

        run = partial(run_job, door.handler)
        good = asyncio.run(run({"id": "1", "input": wire()}))
        bad = [asyncio.run(run({"id": "1", **rest})) for rest in ({}, {"input": None}, {"input": []})]
        door.engine.failures.append(DeviceFailed("CUDA error"))
        last = asyncio.run(run({"id": "1", "input": wire()}))
    assert set(good) == {"output"}
    for result in bad:
        assert result["error"].startswith("invalid_request: ")
        assert result["output"]["code"] == "invalid_request"
    assert (last["stopPod"], last["output"]["code"]) == (True, "gpu_failed")


HEARS_OF_STOPS = tuple(map(int, version("runpod").split(".")[:2])) >= (1, 12)  # not the one for Python 3.9
STAND_IN_SETTINGS = {"VTON_ENGINE": "stand-in", "VTON_MASKER": "off", "VTON_WIDTH": "256", "VTON_HEIGHT": "256"}
stand_in_worker = partial(worker_process, what=(str(STAND_IN),))


def lines(folder):
    return [json.loads(line) for line in (folder / "err").read_text().splitlines() if line.startswith("{")]


def events(folder):
    return [line["event"] for line in lines(folder)]


def wait_until_ready(folder, process):
    wait_until(lambda: "ready" in events(folder) or process.poll() is not None, "ready", 90)
    assert process.poll() is None, (folder / "err").read_text()[-2000:]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The SDK's local server around the real worker with the embedded model: its URL and its folder."""
    folder, port = tmp_path_factory.mktemp("local"), free_port()
    arguments = ("--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port))
    environ = {"VTON_STEPS": "1", "VTON_OUTPUT_DIR": str(folder / "results")}
    with worker_process(folder, environ, *arguments) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: process.poll() is not None or answers(url), "listening", 90)
        assert process.poll() is None, (folder / "err").read_text()[-2000:]
        yield url, folder
        process.terminate()
        assert process.wait(30) == 0
        assert "stopped" in events(folder)


def answers(url):
    try:
        return requests.get(f"{url}/docs", timeout=30).status_code == 200
    except requests.exceptions.ConnectionError:
        return False


def ask_local(local, asked):
    answer = requests.post(f"{local[0]}/runsync", json={"input": asked}, timeout=90)
    assert answer.status_code == 200
    return answer.json()


def demo_input():
    pictures = demo_pictures()
    roles = {"person_image": "person", "cloth_image": "upper", "mask_image": "mask"}
    return {name: base64_of(png(pictures[role])) for name, role in roles.items()}


def test_the_local_server_answers_good_jobs(local):
    done = ask_local(local, demo_input())
    assert done["status"] == "COMPLETED", done
    assert done["output"]["engine"] == "catvton/embedded"
    submitted = requests.post(f"{local[0]}/run", json={"input": demo_input()}, timeout=30).json()
    again = requests.post(f"{local[0]}/status/{submitted['id']}", timeout=90).json()
    assert again["output"]["result_image"] == done["output"]["result_image"]


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({}, "invalid_request: "),
        ({"person_image": "?"}, "invalid_request: "),
        ({"person_image": "aGVsbG8=", "cloth_image": "aGVsbG8="}, "image_"),
        ({"person_image": "https://localhost/x", "cloth_image": "https://localhost/x"}, "url_not_permitted: "),
        ({"items": 5}, "invalid_request: "),
    ],
)
def test_the_local_server_answers_bad_jobs(local, asked, error):
    failed = ask_local(local, asked)
    assert failed["status"] == "FAILED"
    assert failed["error"].startswith(error)
    assert "Traceback" not in json.dumps(failed)


def test_the_log_has_no_pictures(local):
    asked = demo_input()
    done = ask_local(local, asked)
    said = (local[1] / "out").read_text() + (local[1] / "err").read_text()
    assert asked["person_image"][40:80] not in said
    assert done["output"]["result_image"][40:80] not in said
    assert "request_done" in events(local[1])


def test_a_worker_takes_jobs_tells_how_far_they_are_and_drains(tmp_path):
    with job_plane() as plane, worker_process(tmp_path, plane.environment()) as process:
        plane.put(
            {"id": "long", "input": {**demo_input(), "num_inference_steps": 30}},
            {"id": "wrong", "input": None},
            {"id": "none"},
        )
        wait_until(lambda: plane.progress("long") or process.poll() is not None, "progress", 90)
        process.send_signal(signal.SIGTERM)
        result = plane.result("long")
        assert result["output"]["success"] is True
        assert process.wait(60) == 0
        for name in ("wrong", "none"):
            answered = plane.results()[name]
            assert answered["output"]["code"] == "invalid_request"
            assert "Traceback" not in json.dumps(answered)
        report = plane.progress("long")[0]
        assert (report["steps"], 0 < report["steps_done"] < 30) == (30, True)
        assert plane.posts[-1].job_id != "long" or "output" in plane.posts[-1].body
        assert plane.pings
    assert not [line for line in lines(tmp_path) if line["level"] == "error"]


def test_jobs_run_side_by_side_and_at_sigterm_those_are_finished_that_nobody_stopped(tmp_path):
    environ = {**STAND_IN_SETTINGS, "VTON_MAX_IN_FLIGHT": "3"}
    with job_plane() as plane, stand_in_worker(tmp_path, {**plane.environment(), **environ}) as process:
        wait_until_ready(tmp_path, process)
        (tmp_path / "begun").unlink()  # by the picture that warms up
        (tmp_path / "hold").touch()
        plane.put({"id": "job-0", "input": wire(seed=0)})
        wait_until(lambda: (tmp_path / "begun").exists(), "begun", 60)
        plane.put({"id": "job-1", "input": wire(seed=1)}, {"id": "stopped", "input": wire(seed=2)})
        wait_until(lambda: "Jobs in progress: 3" in (tmp_path / "out").read_text(), "three in progress", 60)
        if HEARS_OF_STOPS:
            plane.stop_job("stopped")
            wait_until(lambda: "caller_left" in events(tmp_path), "stopped", 30)
        process.send_signal(signal.SIGTERM)
        time.sleep(2.0)  # its last question for jobs is answered by now
        plane.put({"id": "late", "input": wire()})
        (tmp_path / "hold").unlink()
        assert process.wait(60) == 0
        finished = {"job-0", "job-1"} if HEARS_OF_STOPS else {"job-0", "job-1", "stopped"}
        assert set(plane.results()) == finished
        assert all(result["output"]["success"] for result in plane.results().values())
        assert len((tmp_path / "begun").read_text().split()) == len(finished)
        assert max(plane.batches) == 3
        assert plane.take(1)[0]["id"] == "late"


def test_a_job_that_comes_with_the_last_answer_before_the_end_is_done(tmp_path):
    with job_plane() as plane, stand_in_worker(tmp_path, {**plane.environment(), **STAND_IN_SETTINGS}) as process:
        plane.hold_s = 4.0
        wait_until_ready(tmp_path, process)
        time.sleep(2.0)  # it asks, and is made to wait for the answer
        process.send_signal(signal.SIGTERM)
        time.sleep(1.0)  # the SDK's runner of jobs has ended
        plane.put({"id": "last", "input": wire()})
        assert plane.result("last")["output"]["success"] is True
        assert process.wait(60) == 0


def test_a_worker_whose_device_failed_asks_for_its_end_and_takes_no_more_jobs(tmp_path):
    environ = {**STAND_IN_SETTINGS, "VTON_MAX_IN_FLIGHT": "1"}
    with job_plane() as plane, stand_in_worker(tmp_path, {**plane.environment(), **environ}) as process:
        wait_until_ready(tmp_path, process)
        (tmp_path / "fault").write_text(json.dumps({"kind": "device", "times": 1}))
        plane.put({"id": "last", "input": wire()})
        result = plane.result("last")
        assert (result["stopPod"], result["output"]["code"]) == (True, "gpu_failed")
        assert process.wait(60) == 1


@pytest.mark.parametrize(
    ("environ", "arguments", "status", "sentence"),
    [
        ({"VTON_STEP": "3"}, (), 2, "start refused: unknown setting VTON_STEP"),
        ({"VTON_WEIGHTS": "/nowhere"}, (), 1, "/nowhere"),
        (STAND_IN_SETTINGS, ("--test_input", '{"input": {"person_image": "?"}}'), 1, "invalid_request"),
    ],
)
def test_what_cannot_start_or_a_single_job_that_fails_ends_with_a_status(
    tmp_path, environ, arguments, status, sentence
):
    with stand_in_worker(tmp_path, environ, *arguments) as process:
        assert process.wait(60) == status
    said = (tmp_path / "err").read_text()
    assert sentence in said
    assert "Traceback" not in said


def test_sigterm_while_the_model_loads_ends_the_worker(tmp_path):
    with job_plane() as plane, worker_process(tmp_path, plane.environment()) as process:
        wait_until(lambda: "starting" in events(tmp_path), "starting", 60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert not plane.posts


def test_without_the_sdk_the_start_is_refused_with_a_sentence():
    code = "import sys; sys.modules['runpod'] = None; from container.runpod_handler import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "start refused: RunPod's SDK is missing" in done.stderr
    assert "Traceback" not in done.stderr
