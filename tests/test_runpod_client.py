"""The RunPod client against a loop-back server that speaks RunPod's HTTP, and against the SDK's local one."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from faults.job_plane import STAND_IN, worker_process
from faults.services import wait_until
from stand_in import usual_files

from deploy.demo import free_port
from examples import runpod_client
from examples.runpod_client import Endpoint, TryOnFailed

SCRIPT = Path(runpod_client.__file__)
KEY = "rpa_secret"
PICTURE = base64.b64encode(b"a picture").decode()
DONE = {"status": "COMPLETED", "output": {"result_image": PICTURE, "success": True, "seed": 42}}
ASKED = {"person_image": "https://images.example/p.png", "cloth_image": "https://images.example/c.png"}


def failed(code, *, retryable, after=None, whole=True):
    """A job that failed, with the worker's output or as the local server has it."""
    told = {"success": False, "code": code, "retryable": retryable, "request_id": "1"}
    if after is not None:
        told["retry_after_s"] = after
    job = {"status": "FAILED", "error": f"{code}: A sentence."}
    return {**job, "output": told} if whole else job


class Platform(ThreadingHTTPServer):
    """RunPod's front: answers are taken off a list for each operation; a job that is not in it is not done yet.

    An answer is a job, a status code, or (status code, headers).
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.calls, self.inputs = [], []
        self.answers = {"run": [], "runsync": [], "status": [], "cancel": []}
        self.endless = {}
        self.lock = threading.Lock()
        self.open = self.most = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v2/EP"

    def of(self, operation):
        return [at for name, at in self.calls if name == operation]

    def next(self, operation):
        answers = self.answers[operation]
        return answers.pop(0) if answers else self.endless.get(operation, {"status": "IN_QUEUE"})


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if body:
            self.server.inputs.append(json.loads(body)["input"])
        self.answer()

    def log_message(self, *_):
        pass

    def answer(self):
        operation, _, job_id = self.path.removeprefix("/v2/EP/").partition("/")
        with self.server.lock:
            self.server.calls.append((operation, time.monotonic()))
            job = self.server.next(operation)
            if operation == "run":
                self.server.open += 1
                self.server.most = max(self.server.most, self.server.open)
            if operation == "status" and job["status"] not in ("IN_QUEUE", "IN_PROGRESS"):
                self.server.open -= 1
        status, headers = (job, {}) if isinstance(job, int) else job if isinstance(job, tuple) else (200, {})
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            status = 401
        if status == 0:  # hangs up
            return
        content = json.dumps({"id": job_id or "job-1", **job} if isinstance(job, dict) else {"error": "no"}).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def platform(monkeypatch):
    monkeypatch.setattr(runpod_client, "FIRST_WAIT_S", 0.02)
    server = Platform()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def endpoint(platform, limit_s=20.0):
    return Endpoint(platform.url, KEY, limit_s)


def refusal(call):
    with pytest.raises(TryOnFailed) as raised:
        call()
    return raised.value


# --- one picture


def test_a_synchronous_answer_needs_one_call(platform):
    platform.answers["runsync"] = [DONE]
    assert endpoint(platform).try_on(ASKED)["result_image"] == PICTURE
    assert [name for name, _ in platform.calls] == ["runsync"]
    assert platform.inputs == [ASKED]


def test_a_synchronous_call_that_takes_longer_is_polled(platform):
    platform.answers["runsync"] = [{"status": "IN_PROGRESS"}]
    platform.answers["status"] = [{"status": "IN_QUEUE"}, DONE]
    assert endpoint(platform).try_on(ASKED)["seed"] == 42
    assert [name for name, _ in platform.calls] == ["runsync", "status", "status"]


def test_an_asynchronous_job_is_asked_for_more_and_more_rarely_and_tells_how_far_it_is(platform):
    running = {"status": "IN_PROGRESS", "output": {"steps_done": 5, "steps": 50}}
    platform.answers["status"] = [{"status": "IN_QUEUE"}, *[running] * 6, DONE]
    heard = []
    assert endpoint(platform).try_on(ASKED, wait=False, on_progress=heard.append)["success"] is True
    assert heard == [running["output"]] * 6
    at = platform.of("status")
    assert at[-1] - at[-2] > 2 * 0.02


def test_a_job_can_be_submitted_and_fetched_later(platform):
    asked = endpoint(platform)
    job_id = asked.submit(ASKED)
    platform.answers["status"] = [DONE]
    assert asked.result(job_id, time.monotonic() + 5)["seed"] == 42


def test_questions_that_come_to_nothing_are_asked_again(platform):
    platform.answers["status"] = [429, 500, 503, 502, DONE]
    assert endpoint(platform).try_on(ASKED, wait=False)["seed"] == 42
    assert len(platform.of("run")) == 1


def test_what_is_not_done_in_time_is_cancelled(platform):
    exc = refusal(lambda: endpoint(platform, limit_s=0.3).try_on(ASKED, wait=False))
    assert (exc.code, exc.retryable) == ("too_slow", False)
    assert len(platform.of("cancel")) == 1


# --- repeats


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_retryable_is_asked_again(platform, whole):
    platform.answers["runsync"] = [failed("overloaded", retryable=True, whole=whole), DONE]
    assert endpoint(platform).try_on(ASKED)["seed"] == 42
    assert len(platform.of("runsync")) == 2


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_not_retryable_is_asked_once(platform, whole):
    platform.endless["runsync"] = failed("image_not_found", retryable=False, whole=whole)
    exc = refusal(lambda: endpoint(platform).try_on(ASKED))
    assert (exc.code, exc.retryable, str(exc)) == ("image_not_found", False, "image_not_found: A sentence.")
    assert len(platform.of("runsync")) == 1


def test_the_worker_says_when_to_come_again(platform):
    platform.answers["runsync"] = [failed("overloaded", retryable=True, after=1), DONE]
    endpoint(platform).try_on(ASKED)
    first, second = platform.of("runsync")
    assert second - first >= 1


def test_the_platform_says_when_to_come_again(platform):
    platform.answers["runsync"] = [(429, {"Retry-After": "1"}), 429, DONE]
    endpoint(platform).try_on(ASKED)
    first, second, _ = platform.of("runsync")
    assert second - first >= 1


def test_repeats_end(platform):
    platform.endless["runsync"] = failed("overloaded", retryable=True)
    began = time.monotonic()
    assert refusal(lambda: endpoint(platform, limit_s=0.5).try_on(ASKED)).code == "overloaded"
    assert time.monotonic() - began < 5
    assert len(platform.of("runsync")) >= 2


def test_a_longer_wait_than_there_is_time_for_is_not_begun(platform):
    platform.endless["runsync"] = failed("overloaded", retryable=True, after=3600)
    exc = refusal(lambda: endpoint(platform).try_on(ASKED))
    assert (exc.code, exc.retry_after_s) == ("overloaded", 3600)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (0, "outcome_unknown"),
        (500, "outcome_unknown"),
        (404, "refused"),
        ({"status": "CANCELLED"}, "cancelled"),
        ({"status": "TIMED_OUT"}, "timed_out"),
        ({"status": "FAILED"}, "failed"),
        ({"status": "FAILED", "error": '{"error_type": "x", "error_traceback": "Traceback"}'}, "failed"),
        ({"status": "COMPLETED"}, "failed"),
        ({"state": "?"}, "refused"),
    ],
)
def test_what_may_have_cost_something_or_will_not_change_is_asked_once(platform, answer, code):
    platform.endless["runsync"] = answer
    exc = refusal(lambda: endpoint(platform).try_on(ASKED))
    assert (exc.code, exc.retryable) == (code, False)
    assert "Traceback" not in str(exc)
    assert len(platform.of("runsync")) == 1


def test_what_was_never_sent_is_sent_again(platform):
    exc = refusal(lambda: Endpoint(f"http://127.0.0.1:{free_port()}", KEY, 0.3).try_on(ASKED))
    assert (exc.code, exc.retryable) == ("unreachable", True)


def test_a_wrong_key_is_refused_and_no_key_is_shown(platform):
    wrong = Endpoint(platform.url, "wrong-key")
    assert refusal(lambda: wrong.try_on(ASKED)).code == "refused"
    assert "wrong-key" not in repr(wrong)


@pytest.mark.parametrize(("wait", "most"), [(True, 20_000_000), (False, 10_000_000)])
def test_what_the_platform_does_not_take_is_not_sent(platform, wait, most):
    exc = refusal(lambda: endpoint(platform).try_on({"person_image": "A" * most}, wait=wait))
    assert exc.code == "too_large"
    assert not platform.calls


# --- many


def test_many_are_answered_in_their_order_and_only_so_many_are_asked_for_at_a_time(platform):
    platform.endless["status"] = DONE
    answers = endpoint(platform).try_on_many([{**ASKED, "seed": number} for number in range(7)], places=2)
    assert [answer["seed"] for answer in answers] == [42] * 7
    assert platform.most <= 2
    assert sorted(asked["seed"] for asked in platform.inputs) == list(range(7))


def test_one_of_many_that_fails_leaves_the_others(platform):
    platform.answers["status"] = [failed("image_not_found", retryable=False)]
    platform.endless["status"] = DONE
    answers = endpoint(platform).try_on_many([ASKED] * 3, places=1)
    assert [isinstance(answer, TryOnFailed) for answer in answers] == [True, False, False]


# --- the command line


def run(tmp_path, url, *arguments, key=KEY):
    environ = {"RUNPOD_API_KEY": key, "RUNPOD_ENDPOINT_BASE_URL": url, "PATH": ""}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)


@pytest.fixture
def pictures(tmp_path):
    for name, content in usual_files().items():
        (tmp_path / name).write_bytes(content)
    return ("--person", "person.png", "--cloth", "upper.png", "--mask", "mask.png")


@pytest.mark.parametrize("way", ["sync", "async"])
def test_the_command_sends_files_and_writes_the_picture(platform, tmp_path, pictures, way):
    platform.answers["runsync"] = platform.answers["status"] = [DONE]
    base, _, name = platform.url.rpartition("/")
    done = run(tmp_path, base, way, *pictures, "--output", "dressed.jpg", "--endpoint", name)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dressed.jpg").read_bytes() == b"a picture"
    assert base64.b64decode(platform.inputs[0]["person_image"]) == (tmp_path / "person.png").read_bytes()


def test_the_command_for_many_fills_a_folder_and_tells_of_what_failed(platform, tmp_path, pictures):
    platform.answers["run"] = [404]
    platform.endless["status"] = DONE
    urls = ("--cloth", "https://images.example/red.jpg", "--cloth", "https://images.example/blue.jpg")
    done = run(tmp_path, platform.url, "many", *pictures, *urls, "--output", "folder")
    assert done.returncode == 1
    assert "refused" in done.stderr
    assert len(list((tmp_path / "folder").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--person", "gone.png", "--cloth", "upper.png"), "gone.png"),
        (("--person", "person.png", "--cloth", "upper.png"), "image_not_found: A sentence."),
    ],
)
def test_the_command_says_in_one_line_why_there_is_no_picture(platform, tmp_path, pictures, arguments, said):
    platform.endless["runsync"] = failed("image_not_found", retryable=False)
    done = run(tmp_path, platform.url, "sync", *arguments, "--output", "dressed.jpg")
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "dressed.jpg").exists()


# --- the SDK's own server


@contextmanager
def local_server(folder):
    port = free_port()
    arguments = ("--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port))
    environ = {"VTON_ENGINE": "stand-in", "VTON_MASKER": "off", "VTON_WIDTH": "256", "VTON_HEIGHT": "256"}
    with worker_process(folder, environ, *arguments, what=(str(STAND_IN),)) as process:
        url = f"http://127.0.0.1:{port}"

        def answers():
            try:
                return requests.get(f"{url}/docs", timeout=30).ok
            except requests.exceptions.ConnectionError:
                return process.poll() is not None

        wait_until(answers, "listening", 90)
        yield url


def test_the_client_and_the_worker_understand_each_other(tmp_path, pictures):
    with local_server(tmp_path) as url:
        for way in ("sync", "async"):
            done = run(tmp_path, url, way, *pictures, "--output", f"{way}.jpg", key="")
            assert done.returncode == 0, done.stderr
            assert (tmp_path / f"{way}.jpg").read_bytes().startswith(b"\xff\xd8")
        exc = refusal(lambda: Endpoint(url).try_on({"person_image": "?"}))
        assert (exc.code, exc.retryable) == ("invalid_request", False)
