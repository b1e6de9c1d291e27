"""Processes under test: how they are started, asked, watched and ended."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Protocol

import psutil
from prometheus_client.parser import text_string_to_metric_families

from deploy.demo import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
SERVE = REPOSITORY / "container" / "serve"
LAUNCHER = REPOSITORY / "tests" / "faults" / "launcher.py"
START_LIMIT_S = 240.0  # torch takes half a minute to import where others use the cores
ANSWER_LIMIT_S = 90.0
STOP_LIMIT_S = 40.0
SAMPLE_S = 0.01
KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "OMP_NUM_THREADS", "LD_LIBRARY_PATH")  # of our own environment
JSON_TYPE = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Answer:
    """One HTTP answer and how long it took."""

    status: int
    headers: Mapping[str, str]
    content: bytes
    seconds: float

    def json(self) -> dict[str, Any]:
        """The members of the body."""
        members: dict[str, Any] = json.loads(self.content)
        return members

    def done(self) -> dict[str, Any]:
        """The members of a 200; AssertionError for anything else."""
        assert self.status == 200, f"{self.status} instead of 200: {self.content[:300]!r}"
        return self.json()

    def refused(self, status: int, code: str, **members: object) -> dict[str, Any]:
        """The error; AssertionError unless it has this status, code and members."""
        assert self.status == status, f"{self.status} instead of {status} {code}: {self.content[:300]!r}"
        error: dict[str, Any] = self.json()["error"]
        wanted = {"code": code, **members}
        found = {name: error.get(name) for name in wanted}
        assert found == wanted, f"{found} instead of {wanted}"
        return error


class Process(Protocol):
    """What a child of ours and a child of the zygote have in common."""

    pid: int

    def poll(self) -> int | None:
        """The exit status, None while it lives."""

    def wait(self, timeout: float | None = None) -> int:
        """The exit status."""

    def send_signal(self, sig: int) -> None:
        """Sends a signal."""


@dataclass
class Service:
    """One serving process.

    Attributes:
        folder: its control files and its log.
        seconds_to_ready: from its start to the first 200 of /ping.
        pings: status and seconds of each /ping on the way there.
    """

    name: str
    process: Process
    port: int
    folder: Path
    seconds_to_ready: float = 0.0
    pings: list[tuple[int, float]] = field(default_factory=list)

    @property
    def log(self) -> Path:
        """What it wrote to stderr."""
        return self.folder / "log"

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def call(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Answer:
        """One request on a connection of its own."""
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_LIMIT_S)
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, found, content, time.monotonic() - began)

    def ping(self) -> int:
        """The status of /ping; 0 where there is no answer."""
        try:
            return self.call("GET", "/ping").status
        except (OSError, http.client.HTTPException):
            return 0

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name and these labels."""
        text = self.call("GET", "/metrics").content.decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return sum(
            sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()
        )

    def generations(self) -> int:
        """How many pictures the engine was asked for."""
        begun = self.folder / "begun"
        return len(begun.read_text().splitlines()) if begun.exists() else int(self.metric("vton_generations_total"))

    def lines(self, since: int = 0) -> list[dict[str, Any]]:
        """The log from a byte on; what is no JSON object is {"unreadable": the line}."""
        return [_parsed(line) for line in self.log.read_bytes()[since:].decode().splitlines()]

    def log_size(self) -> int:
        """Bytes in the log, for `lines`."""
        return self.log.stat().st_size

    def processes(self) -> list[psutil.Process]:
        """The process and its children."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def memory(self) -> int:
        """Bytes that the process and its children have in memory, what they share counted once."""
        return sum(_memory_of(process) for process in self.processes())

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """Measures inside the block; the list gets one member at its end: by how many bytes memory grew at most."""
        before, most, over = self.memory(), [0], threading.Event()

        def watch() -> None:
            while not over.wait(SAMPLE_S):
                most[0] = max(most[0], self.memory() - before)

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        grown: list[int] = []
        try:
            yield grown
        finally:
            over.set()
            watching.join()
            grown.append(max(most[0], self.memory() - before))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block the stand-in engine begins pictures and ends none."""
        (self.folder / "hold").touch()
        try:
            yield
        finally:
            (self.folder / "hold").unlink()

    @contextmanager
    def pace(self, seconds: float) -> Iterator[None]:
        """Inside the block the stand-in engine takes so long for a picture."""
        (self.folder / "pace").write_text(str(seconds))
        try:
            yield
        finally:
            (self.folder / "pace").unlink()

    def fail_next(self, kind: str, times: int = 1) -> None:
        """The next pictures fail so."""
        (self.folder / "fault").write_text(json.dumps({"kind": kind, "times": times}))

    def wait_for(self, what: str, wanted: float, limit_s: float = 20.0) -> None:
        """Returns once a metric has that value; AssertionError after the limit."""
        wait_until(lambda: self.metric(what) == wanted, f"{what} {wanted}", limit_s)

    def wait_until_ready(self, limit_s: float = START_LIMIT_S) -> Service:
        """This service once /ping is 200; AssertionError if it ended or took too long."""
        began = time.monotonic()
        while self.ping() != 200:
            assert self.alive, f"{self.name} ended with {self.process.poll()}: {self.log.read_text()[-500:]}"
            assert time.monotonic() - began < limit_s, f"{self.name} was not ready in {limit_s} s"
            time.sleep(0.05)
        return self

    def stop(self) -> int:
        """Ends it as the platform does; its exit status."""
        if self.alive:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            return self.process.wait(STOP_LIMIT_S)


@contextmanager
def pinging(port: int, every_s: float = 0.02) -> Iterator[list[tuple[int, float]]]:
    """Pings inside the block from another process; the list has status and seconds of each at its end."""
    pings: list[tuple[int, float]] = []
    command = [sys.executable, str(Path(__file__).with_name("pinger.py")), str(port), str(every_s)]
    pinger = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    said: list[bytes] = []
    reading = threading.Thread(target=lambda: said.append(pinger.communicate()[0]), daemon=True)
    try:
        yield pings
    finally:
        reading.start()  # `communicate` closes the pinger's stdin, which ends it
        reading.join(ANSWER_LIMIT_S)
        pings += [(status, seconds) for status, seconds in map(json.loads, said[0].splitlines())]


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 30.0) -> None:
    """Returns once the condition holds; AssertionError after the limit."""
    ends = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < ends, f"after {limit_s} s: not {what}"
        time.sleep(0.02)


def patience() -> float:
    """By what limits of milliseconds are multiplied: 1 on a machine that is ours, more where others wait for its cores.

    That is the load per core. What it forgives on a busy machine, it does not on an idle one.
    """
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """These variables and the few of our own that a process needs: no settings, no credentials, no proxies."""
    return {**{name: os.environ[name] for name in KEPT if name in os.environ}, **environ}


def start(
    name: str, folder: Path, environ: Mapping[str, str], *, script: Path = SERVE, before: Sequence[str] = ()
) -> Service:
    """A serving process, not yet ready.

    Args:
        name: what errors call it.
        folder: of its own, for control files and log.
        environ: its settings.
        script: what Python runs.
        before: a command that the interpreter's command is appended to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    whole = clean_environment({**environ, "SAGEMAKER_BIND_TO_PORT": str(port), "FAULTS_CONTROL": str(folder)})
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [*before, sys.executable, str(script)], cwd=REPOSITORY, env=whole, stdin=subprocess.DEVNULL, stderr=log
        )
    return Service(name, process, port, folder)


def _memory_of(process: psutil.Process) -> int:
    try:
        try:
            return int(process.memory_full_info().pss)
        except psutil.AccessDenied:  # a decoder lets only root look
            return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _parsed(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"unreadable": line}


class ZygoteChild:
    """A process that the zygote started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: int | None = None
        self.ended = threading.Event()

    def poll(self) -> int | None:
        """The exit status, None while it lives."""
        return self.status

    def wait(self, timeout: float | None = None) -> int:
        """The exit status."""
        if not self.ended.wait(timeout) or self.status is None:
            raise subprocess.TimeoutExpired("a child of the zygote", timeout or 0.0)
        return self.status

    def send_signal(self, sig: int) -> None:
        """Sends a signal."""
        if self.status is None:
            os.kill(self.pid, sig)


class Zygote:
    """Starts scripts in processes that have torch imported already."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._children: dict[int, ZygoteChild] = {}
        self._lock = threading.Lock()
        command = [sys.executable, str(Path(__file__).with_name("zygote.py"))]
        environ = clean_environment({"PYTHONPATH": str(REPOSITORY)})
        self._process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert select.select([self._process.stdout], [], [], START_LIMIT_S)[0], "torch was not imported in time"
        assert "ready" in json.loads(self._process.stdout.readline())
        self._started: list[int] = []
        self._has_started = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, script: Path, arguments: Sequence[str], environ: Mapping[str, str], log: Path) -> ZygoteChild:
        """A process that runs the script."""
        order = {
            "script": str(script),
            "arguments": list(arguments),
            "environ": clean_environment(environ),
            "log": str(log),
        }
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
            with self._has_started:
                assert self._has_started.wait_for(lambda: self._started, START_LIMIT_S), "the zygote is silent"
                return self._children[self._started.pop()]

    def serve(self, name: str, folder: Path, environ: Mapping[str, str], script: Path = SERVE) -> Service:
        """A serving process, not yet ready."""
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        whole = {**environ, "SAGEMAKER_BIND_TO_PORT": str(port), "FAULTS_CONTROL": str(folder)}
        return Service(name, self.start(script, [], whole, folder / "log"), port, folder)

    def run(self, script: Path, *arguments: str, **environ: str) -> tuple[int, str]:
        """The exit status of a script and what it said."""
        log = self._folder / f"{script.stem}-{time.monotonic_ns()}"
        status = self.start(script, arguments, environ, log).wait(START_LIMIT_S)
        return status, log.read_text()

    def close(self) -> None:
        """Ends the zygote; whoever started children has ended them."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(STOP_LIMIT_S)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            if "started" in said:
                with self._has_started:
                    self._children[said["started"]] = ZygoteChild(said["started"])
                    self._started.append(said["started"])
                    self._has_started.notify_all()
            elif "ended" in said:
                child = self._children[said["ended"]]
                child.status = said["status"]
                child.ended.set()
