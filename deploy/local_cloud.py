"""The parts of a cloud that stand on this machine: S3, SQS and SNS, a host of pictures, a server of HTTP."""

from __future__ import annotations

import logging
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable

import boto3
import uvicorn
from boto3.exceptions import PythonDeprecationWarning
from botocore.config import Config
from fastapi import FastAPI
from moto.server import ThreadedMotoServer

BUCKET = "vton-demo"
QUEUES = ("vton", "vton-masks")
REGION = "eu-central-1"
START_LIMIT_S = 120.0
STOP_LIMIT_S = 30.0
KEEP_ALIVE_S = 75  # no shorter than a client waits between two calls, or it finds its connection closed
CUT_OFF_S = 2  # for calls that are open when a server ends
ONE_CALL = Config(read_timeout=70, retries={"total_max_attempts": 1})  # the default sends a slow call again
THIS_MACHINE = ("127.0.0.1", "localhost")
IGNORE_URLS = "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"
DIRECTLY = ("NO_PROXY", "no_proxy", IGNORE_URLS)  # what `reach_this_machine` sets
FAKE_KEYS = {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo", "AWS_DEFAULT_REGION": REGION}


@dataclass(frozen=True)
class LocalCloud:
    """S3 and SQS on this machine, with one bucket, a queue for results and one for masks."""

    url: str
    queue_url: str
    mask_queue_url: str

    def client(self, service: str) -> Any:  # noqa: ANN401 - boto3 clients are typed by literal names only
        """A boto3 client of the local S3 or SQS."""
        return client(service, self.url)


def reach_this_machine(environ: MutableMapping[str, str]) -> None:
    """Sends calls of this machine to it, and to no proxy, and those of boto3 to the URLs that are named.

    Args:
        environ: of this process and of what it starts.
    """
    upper = environ.get("NO_PROXY", environ.get("no_proxy", ""))
    lower = environ.get("no_proxy", environ.get("NO_PROXY", ""))  # who reads both believes this one alone
    environ.update({"NO_PROXY": _with_this_machine(upper), "no_proxy": _with_this_machine(lower)})
    environ[IGNORE_URLS] = "false"  # set and not removed, for a profile may say otherwise


def _with_this_machine(hosts: str) -> str:
    if hosts == "*":  # every host, but only where it stands alone
        return hosts
    named = [host.strip() for host in hosts.split(",")]
    return ",".join(filter(None, [hosts, *(host for host in THIS_MACHINE if host not in named)]))


def client(service: str, url: str) -> Any:  # noqa: ANN401 - as above
    """A boto3 client of something on this machine."""
    warnings.filterwarnings("ignore", category=PythonDeprecationWarning)  # Python 3.9 is what the container runs
    make: Callable[..., Any] = boto3.client  # its types know literal names of services only
    return make(
        service,
        endpoint_url=url,
        region_name=REGION,
        aws_access_key_id=FAKE_KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=FAKE_KEYS["AWS_SECRET_ACCESS_KEY"],
        config=ONE_CALL,
    )


@contextmanager
def moto_server() -> Iterator[str]:
    """moto's AWS over HTTP, as its URL, until the block ends."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # moto's web server logs every call
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def local_cloud() -> Iterator[LocalCloud]:
    """moto's S3 and SQS over HTTP, until the block ends."""
    with moto_server() as url:
        s3 = client("s3", url)
        with suppress(s3.exceptions.BucketAlreadyOwnedByYou):  # all of moto's servers in a process are one cloud
            s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
        yield LocalCloud(url, *(client("sqs", url).create_queue(QueueName=name)["QueueUrl"] for name in QUEUES))


@contextmanager
def image_host(files: Mapping[str, bytes]) -> Iterator[str]:
    """A web server with these files, as host:port, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path.partition("?")[0].lstrip("/"))
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_: object) -> None:
            pass

    with _on_loopback(Handler) as host:
        yield host


@contextmanager
def folder_host(folder: Path) -> Iterator[str]:
    """A web server with the files of a folder, as host:port, until the block ends."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with _on_loopback(partial(Handler, directory=str(folder))) as host:
        yield host


@contextmanager
def _on_loopback(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def listening(port: int = 0) -> socket.socket:
    """A socket of this machine that listens; who calls waits until it is served.

    Args:
        port: 0 takes a free one.
    Raises:
        RuntimeError: the port is taken, or not permitted.
    """
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as exc:
        raise RuntimeError(f"port {port} cannot be listened on: {exc.strerror}") from exc


@contextmanager
def http_server(api: FastAPI, listener: socket.socket | None = None) -> Iterator[str]:
    """An ASGI application on a thread of this process, as its URL, until the block ends.

    Args:
        api: the application.
        listener: from `listening`, which is closed at the end; without one it listens on a free port.
    Raises:
        RuntimeError: it does not start.
    """
    listener = listener or listening()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(
        api,
        http="h11",
        loop="asyncio",
        ws="none",
        log_config=None,
        timeout_graceful_shutdown=CUT_OFF_S,
        access_log=False,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        ends = time.monotonic() + START_LIMIT_S
        while not server.started and thread.is_alive() and time.monotonic() < ends:
            time.sleep(0.02)
        if not server.started:
            raise RuntimeError(f"{url} does not start")
        yield url
    finally:
        server.should_exit = True
        thread.join(STOP_LIMIT_S)
        listener.close()
