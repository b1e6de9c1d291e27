"""A host of images on loopback whose every path behaves as a row says, and a canary that only counts its callers."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from typing import Any, Callable

HANG_UP_S = 60.0  # after which a connection is given up
TLS_HELLO = b"\x16\x03"
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of no time: the other side reads a reset

Stream = Any  # a socket, with TLS or without
Behaviour = Callable[[Stream], None]


class Listener:
    """A TCP port on loopback that hands every connection to `serve`, each on a thread of its own."""

    def __init__(self, family: int = socket.AF_INET, port: int = 0) -> None:
        address = "127.0.0.1" if family == socket.AF_INET else "::1"
        self._socket = socket.create_server((address, port), family=family, backlog=128)
        self.port: int = self._socket.getsockname()[1]
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        """What happens on a connection; it is closed afterwards."""

    def close(self) -> None:
        """Accepts no more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # the other side hung up, or refused our certificate
            connection.settimeout(HANG_UP_S)
            self.serve(connection)


class Canary(Listener):
    """Whoever reaches it has dialled what it must not."""


class ResettingHost(Listener):
    """Resets the connection in the middle of the TLS handshake."""

    def serve(self, connection: socket.socket) -> None:
        """Reads the greeting and resets."""
        connection.recv(65536)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


class ImageHost(Listener):
    """Answers GET by path: a file that `put` put there, a behaviour that `behave` gave it, else 404.

    Args:
        tls: what it presents; None for plain HTTP.
        base: "https://name" or "http://address", what its URLs begin with; None for its own address on loopback.
    """

    def __init__(self, tls: ssl.SSLContext | None = None, base: str | None = None) -> None:
        self._tls = tls
        self._behaviours: dict[str, Behaviour] = {}
        self.requests: Counter[str] = Counter()  # path without query -> how often it was asked for
        self.sent: Counter[str] = Counter()  # path -> bytes of an endless body
        super().__init__()
        self.base = base or f"http://127.0.0.1:{self.port}"

    def put(self, name: str, content: bytes, content_type: str = "image/png") -> str:
        """The URL under which these bytes are now."""
        return self.behave(name, says(200, content, content_type=content_type))

    def behave(self, name: str, behaviour: Behaviour) -> str:
        """The URL that now behaves so."""
        self._behaviours[f"/{name}"] = behaviour
        return f"{self.base}/{name}"

    def asked(self, name: str) -> int:
        """How often a name was asked for."""
        return self.requests[f"/{name}"]

    def serve(self, connection: socket.socket) -> None:
        """One request, one answer."""
        if self._tls is None:
            self._answer(connection)
            return
        with self._tls.wrap_socket(connection, server_side=True) as stream:
            self._answer(stream)

    def _answer(self, stream: Stream) -> None:
        request = b""
        while b"\r\n\r\n" not in request and not request.startswith(TLS_HELLO):
            received = stream.recv(65536)
            if not received:
                return
            request += received
        path = request.split(b" ", 2)[1].decode("latin-1").partition("?")[0]
        self.requests[path] += 1
        self._behaviours.get(path, says(404))(stream)

    def endless(self, name: str) -> str:
        """The URL of a body without an announced length that never ends; `sent` counts it."""

        def behaviour(stream: Stream) -> None:
            stream.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n")
            while True:
                stream.sendall(b"x" * 65536)
                self.sent[f"/{name}"] += 65536

        return self.behave(name, behaviour)


def says(status: int, body: bytes = b"", **headers: str | None) -> Behaviour:
    """An answer with these headers; `content_length=None` leaves that one out."""
    fields = {"content_length": str(len(body)), "connection": "close", **headers}
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items() if value is not None]
    whole = f"HTTP/1.1 {status} X\r\n{''.join(lines)}\r\n".encode("latin-1") + body
    return lambda stream: stream.sendall(whole)


def drips(piece: bytes, every_s: float, content_length: str) -> Behaviour:
    """Sends the head at once, then a piece every so often."""

    def behaviour(stream: Stream) -> None:
        says(200, content_length=content_length)(stream)
        while True:
            stream.sendall(piece)
            time.sleep(every_s)

    return behaviour


def announces(length: int) -> Behaviour:
    """Announces a length and sends nothing of it until the other side hangs up."""

    def behaviour(stream: Stream) -> None:
        says(200, content_length=str(length))(stream)
        stream.recv(1)

    return behaviour


def resets_in_the_body(stream: Stream) -> None:
    """Sends a part of what it announced, then resets the connection."""
    says(200, b"part", content_length="100000")(stream)
    time.sleep(0.05)  # so that the part arrives before the reset
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
