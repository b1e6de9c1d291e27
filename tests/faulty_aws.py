"""An AWS service on loopback that fails as a test says."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3

from container.wiring import AWS


class FaultyAws(ThreadingHTTPServer):
    """Gives every request the next of its answers, (status, headers, body), and the last one for ever."""

    daemon_threads = True

    def __init__(self, *answers):
        super().__init__(("127.0.0.1", 0), _Handler)
        self._answers = list(answers)
        self.calls: list[str] = []
        self.paths: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def next_answer(self):
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.calls.append(self.command)
        self.server.paths.append(self.path)
        status, headers, body = self.server.next_answer()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body)), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = _answer

    def log_message(self, *args):
        pass


@contextmanager
def faulty_aws(*answers) -> Iterator[FaultyAws]:
    with FaultyAws(*answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(5)


def client_of(service, url):
    """A client with the time limits and retries of production."""
    session = boto3.session.Session("AKIAKEY", "s3cr3t", region_name="us-east-1")
    return session.client(service, endpoint_url=url, config=AWS)
