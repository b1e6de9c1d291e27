"""The container's process: how it starts, refuses to start, and stops."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPResponse
from pathlib import Path

import pytest
import requests
from catvton_recipe import write_published_layout
from stand_in import StandInEngine, running_app, usual_request
from structlog.testing import capture_logs

import container.connections
import container.server
from container.server import DrainingServer, configuration
from container.vton_api import create_app
from deploy.demo import free_port
from model.interface import DeviceFailed

SERVE = Path(__file__).resolve().parent.parent / "container" / "serve"


def start(environ, tmp_path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("VTON_", "SAGEMAKER_"))}
    with (tmp_path / "serve.log").open("wb") as log:
        return subprocess.Popen([sys.executable, str(SERVE)], env={**clean, **environ}, stderr=log)


def refused(environ, tmp_path):
    """The exit status and what was said by a process that should not come up."""
    process = start(environ, tmp_path)
    try:
        return process.wait(60), (tmp_path / "serve.log").read_text()
    finally:
        process.kill()
        process.wait(10)


def wait_until_ready(port, process):
    ends = time.monotonic() + 180
    statuses = []
    while time.monotonic() < ends and process.poll() is None:
        try:
            statuses.append(requests.get(f"http://127.0.0.1:{port}/ping", timeout=30).status_code)
        except requests.exceptions.ConnectionError:
            time.sleep(0.02)
            continue
        if statuses[-1] == 200:
            return statuses
        time.sleep(0.02)
    raise AssertionError(f"not ready: {statuses[-3:]}, exit {process.poll()}")


def test_ping_is_503_until_a_picture_was_made_and_sigterm_ends_an_idle_process_with_0(tmp_path):
    port = free_port()
    process = start({"VTON_OUTPUT_DIR": str(tmp_path), "SAGEMAKER_BIND_TO_PORT": str(port)}, tmp_path)
    try:
        statuses = wait_until_ready(port, process)
        assert set(statuses[:-1]) <= {503}
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(10)
    lines = {line["event"]: line for line in map(json.loads, (tmp_path / "serve.log").read_text().splitlines())}
    order = ["starting", "engine_loaded", "models_loaded", "warmed_up", "ready", "draining"]
    assert [event for event in lines if event in order] == order
    spent_ms = [lines[event]["elapsed_ms"] for event in ("weights_read", "models_loaded", "warmed_up")]
    assert all(ms > 0 for ms in [*spent_ms, lines["engine_loaded"]["imports_ms"], lines["engine_loaded"]["load_ms"]])


def test_sigterm_while_the_model_loads_ends_the_process(tmp_path):
    port = free_port()
    process = start({"VTON_OUTPUT_DIR": str(tmp_path), "VTON_PORT": str(port)}, tmp_path)
    try:
        ends = time.monotonic() + 180
        while time.monotonic() < ends:
            try:
                assert requests.get(f"http://127.0.0.1:{port}/ping", timeout=30).status_code == 503
                break
            except requests.exceptions.ConnectionError:
                time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({}, "VTON_BUCKET"),
        ({"VTON_OUTPUT_DIR": "x", "VTON_STEP": "3"}, "unknown setting VTON_STEP"),
        ({"VTON_OUTPUT_DIR": "x", "NUM_STEP": "abc"}, "NUM_STEP: Input should be a valid integer"),
        ({"VTON_OUTPUT_DIR": "x", "VTON_MAX_IN_FLIGHT": "-1"}, "VTON_MAX_IN_FLIGHT: Input should be greater"),
        ({"VTON_OUTPUT_DIR": "x", "VTON_ENGINE": "paint"}, "VTON_ENGINE must be one of: catvton"),
    ],
)
def test_a_wrong_setting_refuses_the_start_with_one_sentence(tmp_path, environ, sentence):
    status, said = refused(environ, tmp_path)
    assert status == 2
    assert sentence in said
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"VTON_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}, "no CUDA device"),
        ({"VTON_WEIGHTS": "/nowhere"}, "/nowhere"),
        ({"VTON_VARIANT": "paint", "VTON_WEIGHTS": "/nowhere"}, "paint"),
    ],
)
def test_a_model_that_cannot_load_refuses_the_start_with_a_sentence(tmp_path, environ, sentence):
    base = {"VTON_OUTPUT_DIR": str(tmp_path), "VTON_PORT": str(free_port())}
    status, said = refused({**base, **environ}, tmp_path)
    assert status == 1
    (event,) = [line for line in map(json.loads, said.splitlines()) if line["event"] == "start_refused"]
    assert sentence in event["reason"]
    assert "Traceback" not in said


def test_published_weights_serve_until_a_byte_of_them_is_flipped(tmp_path):
    weights = write_published_layout(tmp_path / "weights", "quick")
    port = free_port()
    environ = {
        "VTON_OUTPUT_DIR": str(tmp_path),
        "VTON_WEIGHTS": str(weights),
        "VTON_PORT": str(port),
    }
    process = start(environ, tmp_path)
    try:
        wait_until_ready(port, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(10)
    damaged = weights / "sd-vae-ft-mse" / "diffusion_pytorch_model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    status, said = refused(environ, tmp_path)
    assert status == 1
    (event,) = [line for line in map(json.loads, said.splitlines()) if line["event"] == "start_refused"]
    assert "sd-vae-ft-mse/diffusion_pytorch_model.safetensors" in event["reason"]
    assert hashlib.sha256(content).hexdigest()[:12] in event["reason"]


def test_on_sigterm_what_runs_is_finished_and_what_comes_is_refused(tmp_path):
    engine = StandInEngine()
    engine.may_end.clear()
    app_here = running_app(tmp_path, engine=engine)
    with app_here as app, draining_server(app) as (url, server), ThreadPoolExecutor(1) as pool:
        running = pool.submit(requests.post, f"{url}/invocations", json=usual_request(), timeout=60)
        assert engine.begun.wait(30)
        server.handle_exit(signal.SIGTERM, None)
        assert requests.get(f"{url}/ping", timeout=30).status_code == 503
        later = requests.post(f"{url}/invocations", json=usual_request(timestamp="later"), timeout=30)
        assert later.json()["error"]["code"] == "draining"
        engine.may_end.set()
        assert running.result(10).status_code == 200


def test_what_is_not_done_when_the_time_to_drain_is_over_is_told_to_come_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(container.server, "DRAIN_S", 0.2)
    engine = StandInEngine()
    engine.may_end.clear()
    with running_app(tmp_path, engine=engine) as app, ThreadPoolExecutor(2) as pool:
        with draining_server(app) as (url, _server):
            asked = [
                pool.submit(requests.post, f"{url}/invocations", json=usual_request(timestamp=name), timeout=60)
                for name in ("runs", "waits")
            ]
            assert engine.begun.wait(30)
            while app.admission.taken < len(asked):
                time.sleep(0.01)
        answers = [future.result(10) for future in asked]
        engine.may_end.set()
        app.request_pool.shutdown()
        assert app.admission.taken == 0
    assert [record for record in caplog.records if record.exc_info] == []
    assert [answer.status_code for answer in answers] == [503, 503]
    errors = [answer.json()["error"] for answer in answers]
    assert {(error["code"], error["retryable"], error["retry_after_s"]) for error in errors} == {("draining", True, 1)}


def test_a_failed_device_ends_the_process_with_1(tmp_path):
    engine = StandInEngine()
    engine.failures.append(DeviceFailed("CUDA error: an illegal memory access was encountered"))
    with running_app(tmp_path, engine=engine) as app, draining_server(app) as (url, server):
        failed = requests.post(f"{url}/invocations", json=usual_request(), timeout=60)
        assert failed.json()["error"]["code"] == "gpu_failed"
        ends = time.monotonic() + 5
        while not server.should_exit and time.monotonic() < ends:
            time.sleep(0.02)
        assert server.failed


HALF = b"GET /ping HTTP/1.1\r\nHo"
PING = HALF + b"st: x\r\n\r\n"
UNREAD = b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"


def connected(url, sent=b""):
    host, port = url.rpartition("/")[2].split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(sent)
    return connection


def status_of(connection):
    """The status of an answer, read to its end."""
    response = HTTPResponse(connection)
    response.begin()
    response.read()
    return response.status


def until_closed(connection, dripping=b""):
    """Returns when the other side closes the connection without a word, whatever is sent to it now and then."""
    connection.settimeout(0.1 if dripping else 60)
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        try:
            assert connection.recv(65536) == b""
        except socket.timeout:
            with suppress(ConnectionError):
                connection.sendall(dripping)
        except ConnectionError:
            return
        else:
            return
    raise AssertionError("still open")


def wait_a_headers_time(url):
    with connected(url) as silent:
        until_closed(silent)


@pytest.mark.parametrize(
    ("before", "sent", "dripping"),
    [(b"", b"", b""), (b"", HALF, b""), (PING, HALF, b""), (b"", HALF, b"o"), (PING, HALF, b"o")],
)
def test_a_connection_without_a_whole_header_is_closed(tmp_path, monkeypatch, caplog, before, sent, dripping):
    monkeypatch.setattr(container.connections, "HEADER_S", 0.5)
    caplog.set_level(logging.WARNING)
    with running_app(tmp_path) as app, draining_server(app) as (url, _server), connected(url, before) as connection:
        if before:
            assert status_of(connection) == 200
        connection.sendall(sent)
        until_closed(connection, dripping)
    assert caplog.records == []


def test_a_slow_header_a_long_request_and_a_kept_connection_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(container.connections, "HEADER_S", 2.0)
    engine = StandInEngine()
    engine.may_end.clear()
    body = json.dumps(usual_request()).encode()
    asked = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    served = running_app(tmp_path, engine=engine)
    with served as app, draining_server(app) as (url, _server), connected(url, asked[:20]) as connection:
        time.sleep(0.3)
        connection.sendall(asked[20:] % len(body) + body)
        assert engine.begun.wait(30)
        wait_a_headers_time(url)
        engine.may_end.set()
        assert status_of(connection) == 200
        wait_a_headers_time(url)
        connection.sendall(PING)
        assert status_of(connection) == 200


def test_a_body_that_nobody_read_may_come_as_late_as_another_request(tmp_path, monkeypatch):
    monkeypatch.setattr(container.connections, "HEADER_S", 0.5)
    with running_app(tmp_path) as app, draining_server(app) as (url, _server), connected(url, UNREAD) as connection:
        assert status_of(connection) == 404
        for part in (b"1", b"23456789"):
            connection.sendall(part)
            wait_a_headers_time(url)
        connection.sendall(PING)
        assert status_of(connection) == 200


def test_a_body_that_nobody_read_and_that_never_ends_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(container.server, "KEEP_ALIVE_S", 1)
    with running_app(tmp_path) as app, draining_server(app) as (url, _server), connected(url, UNREAD) as connection:
        assert status_of(connection) == 404
        connection.sendall(b"1")
        until_closed(connection)


def test_without_descriptors_one_line_is_logged_and_who_waited_is_served_later(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with running_app(tmp_path) as app, draining_server(app) as (url, _server), socket.socket() as waiting:
        waiting.settimeout(60)
        with capture_logs() as lines:
            lowest_free = os.dup(0)
            os.close(lowest_free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
            try:
                host, port = url.rpartition("/")[2].split(":")
                waiting.connect((host, int(port)))
                waiting.sendall(PING)
                ends = time.monotonic() + 30
                while not lines and time.monotonic() < ends:
                    time.sleep(0.02)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert status_of(waiting) == 200
    assert [line["event"] for line in lines].count("accept_failed") == 1
    assert caplog.records == []


@contextmanager
def draining_server(app):
    """A server on a thread of this process, around a worker that is warm already."""
    port = free_port()
    settings = app.settings.model_copy(update={"host": "127.0.0.1", "port": port})
    server = DrainingServer(configuration(create_app(app), settings), app)
    threads = [threading.Thread(target=server.run), threading.Thread(target=server.watch)]
    for thread in threads:
        thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.handle_exit(signal.SIGTERM, None)
        for thread in threads:
            thread.join(10)
