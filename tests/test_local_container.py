"""The container process as the platform keeps it, with a small server in its place."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest
import requests

from deploy.local_container import Container, ContainerFailed, ContainerLimits, Launch, pings, running

SERVER = """
import os, signal, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(os.environ.get("PING", "200")))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass

if os.environ.get("STUBBORN"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        time.sleep(60)
print("listening", os.environ["SAGEMAKER_BIND_TO_PORT"], flush=True)
HTTPServer(("127.0.0.1", int(os.environ["SAGEMAKER_BIND_TO_PORT"])), Handler).serve_forever()
"""
QUICK = ContainerLimits(start_s=20, ping_every_s=0.2, ping_timeout_s=0.5, failed_pings=2, stop_s=5)


def launch(folder, **environ):
    return Launch(folder / "serve.log", environ, (sys.executable, "-c", SERVER))


def until(condition, limit_s=20):
    ends = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_process_that_is_ready_serves_and_ends_with_the_block(tmp_path):
    with running(launch(tmp_path), QUICK) as container:
        process = psutil.Process(container.pid)
        assert requests.get(f"{container.url}/ping", timeout=30).ok
    assert not process.is_running()
    assert container.url is None
    assert "listening" in (tmp_path / "serve.log").read_text()


def test_a_killed_process_is_out_of_service_at_once_and_replaced(tmp_path):
    with running(launch(tmp_path), QUICK) as container:
        first = container.pid
        os.kill(first, signal.SIGKILL)
        until(lambda: container.starts == 2 and container.url)
        assert container.pid != first
        assert requests.get(f"{container.url}/ping", timeout=30).ok


def test_a_process_that_stops_answering_is_replaced(tmp_path):
    limits = ContainerLimits(start_s=20, ping_every_s=0.2, ping_timeout_s=0.3, failed_pings=2, stop_s=0.3)
    with running(launch(tmp_path), limits) as container:
        first = container.pid
        os.kill(first, signal.SIGSTOP)
        until(lambda: container.starts == 2 and container.url)
        assert not psutil.pid_exists(first)


def test_what_ignores_sigterm_is_killed_with_all_that_it_started(tmp_path):
    limits = ContainerLimits(start_s=20, ping_every_s=5, stop_s=0.5)
    with running(launch(tmp_path, STUBBORN="1"), limits) as container:
        family = [psutil.Process(container.pid), *psutil.Process(container.pid).children()]
        assert len(family) == 2
        began = time.monotonic()
    assert 0.4 < time.monotonic() - began < 5
    until(lambda: not any(alive(process) for process in family))


def test_a_ping_has_a_limit_of_its_own_however_often_something_comes():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip():
            caller, _ = listener.accept()
            with caller, suppress(OSError):
                caller.sendall(b"HTTP/1.1 200 OK\r\n")
                for _ in range(80):
                    time.sleep(0.1)
                    caller.sendall(b"x: y\r\n")
                caller.sendall(b"Content-Length: 0\r\n\r\n")

        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        assert not pings(f"http://127.0.0.1:{listener.getsockname()[1]}", 0.5)
        assert time.monotonic() - began < 5


def test_no_process_outlives_a_watch_that_is_held_up(tmp_path, monkeypatch):
    held_up, goes_on = threading.Event(), threading.Event()
    limits = ContainerLimits(start_s=20, ping_every_s=0.2, ping_timeout_s=0.2, stop_s=0.3)
    with running(launch(tmp_path, STUBBORN="1"), limits) as container:
        family = [psutil.Process(container.pid), *psutil.Process(container.pid).children()]
        monkeypatch.setattr("deploy.local_container.pings", lambda *_: held_up.set() or goes_on.wait(60))
        assert held_up.wait(20)
    try:
        until(lambda: not any(alive(process) for process in family))
    finally:
        goes_on.set()


def test_a_first_process_that_ends_is_a_failure_that_names_the_log(tmp_path):
    wrong = Launch(tmp_path / "serve.log", {}, (sys.executable, "-c", "import sys; sys.exit(3)"))
    with pytest.raises(ContainerFailed, match=r"ended with 3 .*serve\.log"), running(wrong, QUICK):
        pass


def test_a_command_that_is_not_there_is_a_failure(tmp_path):
    wrong = Launch(tmp_path / "serve.log", {}, (str(tmp_path / "nothing"),))
    with pytest.raises(ContainerFailed, match="cannot be started"), running(wrong, QUICK):
        pass


def test_what_ends_the_watch_is_a_failure_and_nothing_waits_for_ever(tmp_path):
    with pytest.raises(ContainerFailed, match="cannot be started"), running(Launch(tmp_path / "log", {}, ()), QUICK):
        pass


def test_a_process_that_cannot_be_replaced_is_a_failure_that_names_the_log(tmp_path):
    server = tmp_path / "server"
    server.write_text(f"#!{sys.executable}\n{SERVER}")
    server.chmod(0o755)
    with running(Launch(tmp_path / "serve.log", {}, (str(server),)), QUICK) as container:
        server.unlink()
        os.kill(container.pid, signal.SIGKILL)
        with pytest.raises(ContainerFailed, match=r"cannot be started: .*serve\.log"):
            container.wait_until_failed()
        assert container.url is None


def test_where_to_listen_is_not_the_users_to_say(tmp_path, monkeypatch):
    for name, value in {"VTON_PORT": "1", "VTON_HOST": "192.0.2.1", "VTON_STEPS": "3"}.items():
        monkeypatch.setenv(name, value)
    with running(launch(tmp_path, VTON_PORT="2"), QUICK) as container:
        given = psutil.Process(container.pid).environ()
    assert {name for name in given if name.startswith("VTON_")} == {"VTON_STEPS"}


def test_a_first_process_that_is_not_ready_in_its_budget_is_ended(tmp_path):
    limits = ContainerLimits(start_s=0.8, stop_s=2)
    container = Container(launch(tmp_path, PING="503"), limits)
    container.start()
    with pytest.raises(ContainerFailed, match=r"not ready within 0\.8 s"):
        container.wait_until_ready(20)
    container.stop()
    assert not psutil.pid_exists(container.pid)
