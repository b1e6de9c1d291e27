"""The example of a backend, where it is left in the middle, interrupted, or has nobody to ask."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deploy.demo import FAKE_KEYS, REPOSITORY
from examples import backend

PATIENCE_S = 60.0
LINES = 12
PLACES = 2
BUSY = {"error": {"code": "overloaded", "message": "Come again.", "retryable": True, "retry_after_s": 100}}


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name, value in FAKE_KEYS.items():
        monkeypatch.setenv(name, value)


class Endpoint(ThreadingHTTPServer):
    """Makes each picture at once, or when `gate` opens, where the request is `held`; none where it is `refused`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.gate = threading.Event()
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def until_full(self):
        ends = time.monotonic() + PATIENCE_S
        while len(self.begun) < PLACES:
            assert time.monotonic() < ends
            time.sleep(0.02)


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.begun.append(asked["timestamp"])
        if asked.get("held"):
            self.server.gate.wait(PATIENCE_S)
        self.server.ended.append(asked["timestamp"])
        answer = {"object_key": asked["timestamp"]}
        if asked.get("refused"):
            answer = {"OriginalStatusCode": 429, "OriginalMessage": json.dumps(BUSY)}
        body = json.dumps(answer).encode()
        self.send_response(424 if asked.get("refused") else 200)
        self.send_header("x-amzn-errortype", "ModelError")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.gate.set()
        server.shutdown()
        thread.join(5)


@pytest.fixture
def interruptible():
    """A shell starts what is in its background with SIGINT ignored, and that is inherited; a handler is not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def requests(**of_each):
    """By number: what the request has beside its timestamp."""
    return [{"timestamp": str(number), **of_each.get(f"n{number}", of_each["rest"])} for number in range(LINES)]


def many_of(endpoint, asked):
    runtime = backend.runtime_client(endpoint_url=endpoint.url, places=PLACES)
    return backend.try_on_many(runtime, "vton", asked, places=PLACES)


@contextmanager
def script(*arguments, **environ):
    """The script, and what it says on stderr so far."""
    started = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "examples" / "backend.py"), *arguments],
        env={**os.environ, "PYTHONWARNINGS": "ignore", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with started:
        try:
            yield started
        finally:
            started.kill()


@contextmanager
def many(endpoint, folder, asked):
    file = folder / "many.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in asked))
    with script("many", "--places", str(PLACES), str(file), AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME=endpoint.url) as started:
        yield started


def interrupt(started, endpoint):
    endpoint.until_full()
    time.sleep(0.2)  # the caller has what it waits for
    started.send_signal(signal.SIGINT)


def test_a_loop_that_is_left_begins_nothing_new_and_waits_for_what_is_under_way(endpoint):
    opens = threading.Timer(0.2, endpoint.gate.set)
    for request, _ in many_of(endpoint, requests(n0={}, rest={"held": True})):
        assert request["timestamp"] == "0"
        endpoint.until_full()
        opens.start()
        break
    opens.join()
    assert sorted(endpoint.begun) == sorted(endpoint.ended) == ["0", "1"]


def test_a_loop_that_is_left_does_not_wait_to_ask_again(endpoint):
    began = time.monotonic()
    for _ in many_of(endpoint, requests(n0={"refused": True}, rest={})):
        endpoint.until_full()
        break
    assert time.monotonic() - began < PATIENCE_S < BUSY["error"]["retry_after_s"]
    assert sorted(endpoint.begun) == ["0", "1"]


def test_requests_are_taken_as_there_are_places_for_them(endpoint):
    taken = []

    def asked():
        for each in requests(rest={}):
            taken.append(each)
            yield each

    for told, _ in enumerate(many_of(endpoint, asked()), 1):
        assert len(taken) <= told + PLACES
    assert len(endpoint.ended) == LINES


def test_ctrl_c_begins_nothing_new_and_tells_of_what_was_under_way(endpoint, tmp_path, interruptible):
    with many(endpoint, tmp_path, requests(rest={"held": True})) as started:
        interrupt(started, endpoint)
        assert "2 calls under way" in started.stderr.readline()
        endpoint.gate.set()
        told, said = started.communicate(timeout=PATIENCE_S)
    assert started.returncode == 1
    assert "Traceback" not in said
    assert sorted(json.loads(line)["object_key"] for line in told.splitlines()) == ["0", "1"]
    assert sorted(endpoint.begun) == sorted(endpoint.ended) == ["0", "1"]


def test_ctrl_c_ends_a_wait_to_ask_again_with_the_refusal_for_an_outcome(endpoint, tmp_path, interruptible):
    with many(endpoint, tmp_path, requests(rest={"refused": True})) as started:
        interrupt(started, endpoint)
        told, said = started.communicate(timeout=PATIENCE_S)
    assert started.returncode == 1
    assert "Traceback" not in said
    outcomes = [json.loads(line) for line in told.splitlines()]
    assert [each["error"]["code"] for each in outcomes] == ["overloaded"] * PLACES
    assert sorted(each["timestamp"] for each in outcomes) == sorted(endpoint.begun) == ["0", "1"]


def test_a_reader_that_goes_away_ends_it_quietly_and_nothing_new_begins(endpoint, tmp_path):
    asked = requests(n0={}, n1={"refused": True}, rest={"held": True})
    with many(endpoint, tmp_path, asked) as started:
        assert json.loads(started.stdout.readline())["object_key"] == "0"
        started.stdout.close()
        endpoint.gate.set()
        said = started.stderr.read()
        assert started.wait(PATIENCE_S) == 1
    assert said == ""
    assert sorted(endpoint.begun) == sorted(endpoint.ended) == ["0", "1", "2"]


class Waits(threading.Event):
    """Takes no time, and counts what was to be waited."""

    def __init__(self):
        super().__init__()
        self.asked_s: list[float] = []

    def wait(self, timeout=None):
        self.asked_s.append(timeout)
        return False


@pytest.fixture
def nobody():
    """The URL of a port that no server listens on, and that nobody else gets."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_an_endpoint_that_cannot_be_reached_is_tried_a_few_times_only(nobody):
    waits = Waits()
    with pytest.raises(backend.TryOnFailed, match="Could not connect") as raised:
        backend.try_on(backend.runtime_client(endpoint_url=nobody), "vton", {}, stop=waits)
    assert (raised.value.code, raised.value.retryable) == (backend.UNREACHABLE, True)
    assert len(waits.asked_s) == backend.CONNECTS - 1
    assert 5 < sum(waits.asked_s) < 15


@pytest.mark.parametrize("service", ["SAGEMAKER_RUNTIME", "S3", "SQS"])
def test_an_endpoint_url_that_is_none_ends_it_with_a_sentence(service, nobody):
    environ = {"AWS_ENDPOINT_URL": nobody, f"AWS_ENDPOINT_URL_{service}": "127.0.0.1:18081"}
    command = "one" if service == "SAGEMAKER_RUNTIME" else "async"
    options = [] if command == "one" else ["--bucket", "bucket"]
    with script(command, *options, "--person", "https://images.example/a.jpg", **environ) as started:
        told, said = started.communicate(timeout=PATIENCE_S)
    assert started.returncode == 1
    assert told == ""
    assert said.splitlines()[-1] == "AWS cannot be asked: Invalid endpoint: 127.0.0.1:18081"
    assert "Traceback" not in said
