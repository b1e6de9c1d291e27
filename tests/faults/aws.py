"""moto's S3 and SQS with two things in front of it: a TCP proxy whose connections fail, and an HTTP front whose answers
do."""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Callable

from .image_host import RESET_ON_CLOSE

SILENCE_S = 60.0  # longer than any time limit of the service
HOP_BY_HOP = {"connection", "expect", "transfer-encoding", "content-length", "keep-alive", "host"}
S3_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{text}</Message></Error>"
SQS_ERROR = '{{"__type": "com.amazonaws.sqs#{code}", "message": "{text}"}}'

Act = Callable[["_Handler", bytes], None]


@dataclass
class _Fault:
    method: str
    part: str
    acts: list[Act]
    forever: bool


class AwsFront(ThreadingHTTPServer):
    """Passes requests on to moto, but for those that a row has it fail.

    Args:
        moto_port: of moto on loopback.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, moto_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.moto_port = moto_port
        self.calls: list[tuple[str, str]] = []  # (method, path) of every request
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @contextmanager
    def failing(self, method: str, part: str, *acts: Act, forever: bool = False) -> Iterator[None]:
        """Inside the block, requests of this method with `part` in their path meet the acts, one each.

        Args:
            method: "PUT", "HEAD", "GET", or "POST", which is SQS.
            part: of the path; "" is in all.
            acts: in their order; afterwards, requests pass again.
            forever: the last act repeats.
        """
        fault = _Fault(method, part, list(acts), forever)
        with self._lock:
            self._faults.append(fault)
        try:
            yield
        finally:
            with self._lock:
                self._faults.remove(fault)

    def act_for(self, method: str, path: str) -> Act:
        """What happens to a request."""
        with self._lock:
            self.calls.append((method, path))
            for fault in self._faults:
                if fault.method == method and fault.part in path and fault.acts:
                    return fault.acts[0] if fault.forever and len(fault.acts) == 1 else fault.acts.pop(0)
        return _pass_on

    def count(self, method: str, part: str) -> int:
        """How many requests of a method had `part` in their path."""
        with self._lock:
            return sum(method == called and part in path for called, path in self.calls)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: AwsFront

    def _handle(self) -> None:
        act = self.server.act_for(self.command, self.path)
        if act is _pass_on:
            act(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))
        else:
            act(self, b"")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        """One answer."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read_body(self) -> bytes:
        """The whole body."""
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))


def _pass_on(handler: _Handler, body: bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", handler.server.moto_port, timeout=SILENCE_S)
    headers = {name: value for name, value in handler.headers.items() if name.lower() not in HOP_BY_HOP}
    with contextlib.closing(connection):
        connection.request(handler.command, handler.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        returned = {name: value for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP}
    if handler.command == "HEAD":
        returned["Content-Length"] = answer.headers.get("Content-Length", "0")
    handler.reply(answer.status, returned, content)


def s3_says(status: int, code: str, text: str = "refused") -> Act:
    """An error of S3."""
    return lambda handler, _: _refuse(handler, status, S3_ERROR.format(code=code, text=text))


def sqs_says(status: int, code: str, text: str = "refused") -> Act:
    """An error of SQS."""
    return lambda handler, _: _refuse(handler, status, SQS_ERROR.format(code=code, text=text))


def _refuse(handler: _Handler, status: int, text: str) -> None:
    handler.read_body()
    handler.close_connection = True
    handler.reply(status, {"Content-Type": "application/xml", "Connection": "close"}, text.encode())


def silence(handler: _Handler, _: bytes) -> None:
    """Takes the request and answers nothing until the other side hangs up."""
    handler.read_body()
    handler.close_connection = True
    select.select([handler.connection], [], [], SILENCE_S)


def slow_reading(bytes_per_s: int) -> Act:
    """Reads the body at this speed, and passes on what arrived before the other side gave up: nothing."""

    def act(handler: _Handler, _: bytes) -> None:
        handler.close_connection = True
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        left = int(handler.headers.get("Content-Length", 0))
        ends = time.monotonic() + SILENCE_S
        while left > 0 and time.monotonic() < ends:
            received = handler.rfile.read1(min(left, bytes_per_s // 10))
            if not received:
                return
            left -= len(received)
            time.sleep(0.1)

    return act


class TcpProxy:
    """Carries connections to a port of loopback, until it is told to swallow or to reset them.

    Args:
        to_port: where they go.
    """

    def __init__(self, to_port: int) -> None:
        self._to_port = to_port
        self._open: list[socket.socket] = []
        self._stopped: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listen(0)

    @contextmanager
    def swallowing(self) -> Iterator[None]:
        """Inside the block nobody gets a connection and nobody gets a refusal: the port drops what knocks."""
        self._end()
        full = socket.socket()
        full.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        full.bind(("127.0.0.1", self.port))
        full.listen(0)
        knocking = [socket.socket() for _ in range(4)]  # they fill the queue of those who wait to be accepted
        try:
            for one in knocking:
                one.setblocking(False)
                one.connect_ex(("127.0.0.1", self.port))
            yield
        finally:
            for one in (*knocking, full):
                one.close()
            self._listen(self.port)

    @contextmanager
    def resetting(self) -> Iterator[None]:
        """Inside the block every connection is reset as soon as something is sent on it."""
        self._end()
        self._listen(self.port, carry=self._reset)
        try:
            yield
        finally:
            self._end()
            self._listen(self.port)

    def close(self) -> None:
        """Carries nothing more."""
        self._end()

    def _listen(self, port: int, carry: Callable[[socket.socket], None] | None = None) -> None:
        self._socket = socket.create_server(("127.0.0.1", port), backlog=128)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._socket, carry or self._carry), daemon=True).start()

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with self._lock:
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def _accept(self, listening: socket.socket, carry: Callable[[socket.socket], None]) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=carry, args=(connection,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(("127.0.0.1", self._to_port), timeout=SILENCE_S)
        except OSError:
            near.close()
            return
        with self._lock:
            self._open += [near, far]
        back = threading.Thread(target=_pump, args=(far, near), daemon=True)
        back.start()
        _pump(near, far)
        back.join(SILENCE_S)
        with self._lock:
            self._open = [one for one in self._open if one not in (near, far)]
        near.close()
        far.close()

    def _reset(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            near.recv(65536)
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        source.settimeout(None)
        while received := source.recv(65536):
            sink.sendall(received)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
