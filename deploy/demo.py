"""The main job on one machine, with nothing stubbed but the cloud: real boto3, real HTTP, the real serving process.

moto stands for S3 and SQS, `local_runtime` for SageMaker's front; the container process is the one that is deployed.
"""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable

import boto3
import click
import numpy as np
import requests
import uvicorn
from boto3.exceptions import PythonDeprecationWarning
from botocore.config import Config
from fastapi import FastAPI
from moto.server import ThreadedMotoServer
from PIL import Image as Pillow

from container.get_vton import Pictures, prepare
from deploy.local_runtime import create_runtime
from model import geometry
from model.embedded import demo_pictures
from model.interface import Image

REPOSITORY = Path(__file__).resolve().parent.parent
ENDPOINT_NAME = "vton-demo"
BUCKET = "vton-demo"
QUEUES = ("vton", "vton-masks")
REGION = "eu-central-1"
START_LIMIT_S = 120.0
STOP_LIMIT_S = 30.0
STEPS = 20
ONE_CALL = Config(read_timeout=70, retries={"total_max_attempts": 1})  # the default sends a slow call again
OUTFITS = {"result": ("upper", "lower"), "result_dress": ("dress",)}  # picture -> garments, with the drawn mask
UNMASKED = ("result_no_mask", ("upper", "lower"))  # without one
GARMENT_FIELDS = {"upper": "upper_cloth_url", "lower": "lower_cloth_url", "dress": "overall_cloth_url"}
WHAT_IT_IS = (
    "The embedded model is a small CatVTON trained on drawn figures at 192x256 and enlarged: it shows the way of a\n"
    "request and that the garment arrives. Photographs need the published weights."
)
FAKE_KEYS = {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo", "AWS_DEFAULT_REGION": REGION}


@dataclass(frozen=True)
class LocalCloud:
    """S3 and SQS on this machine, with one bucket, a queue for results and one for masks."""

    url: str
    queue_url: str
    mask_queue_url: str

    def client(self, service: str) -> Any:
        """A boto3 client of the local S3 or SQS."""
        return client(service, self.url)


def client(service: str, url: str) -> Any:
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
def local_cloud() -> Iterator[LocalCloud]:
    """moto's S3 and SQS over HTTP, until the block ends."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        client("s3", url).create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
        yield LocalCloud(url, *(client("sqs", url).create_queue(QueueName=name)["QueueUrl"] for name in QUEUES))
    finally:
        server.stop()


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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving(environ: Mapping[str, str], log: Path) -> Iterator[str]:
    """The container's own process, as its URL, ready; stopped as SageMaker stops it when the block ends.

    Raises:
        RuntimeError: it ended or was not ready in time; the text names the log.
    """
    port = free_port()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "container" / "serve")],
            env={**os.environ, **environ, "SAGEMAKER_BIND_TO_PORT": str(port)},
            stderr=file,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        ends = time.monotonic() + START_LIMIT_S
        while not _pings(url):
            if process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"the container did not become ready; see {log}")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(STOP_LIMIT_S)


@contextmanager
def http_server(api: FastAPI) -> Iterator[str]:
    """An ASGI application on a thread of this process, as its URL, until the block ends."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=port, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        ends = time.monotonic() + START_LIMIT_S
        while not server.started and time.monotonic() < ends:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(STOP_LIMIT_S)


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def container_environment(cloud: LocalCloud, trusted_host: str) -> dict[str, str]:
    """What the container process is told: where S3 and SQS are, and which host may be private."""
    return {
        **FAKE_KEYS,
        "AWS_ENDPOINT_URL_S3": cloud.url,
        "AWS_ENDPOINT_URL_SQS": cloud.url,
        "VTON_BUCKET": BUCKET,
        "VTON_QUEUE_URL": cloud.queue_url,
        "VTON_MASK_QUEUE_URL": cloud.mask_queue_url,
        "VTON_TRUSTED_HOSTS": trusted_host,
        "VTON_STEPS": str(STEPS),
    }


def run_demo(output: Path) -> None:
    """Dresses a drawn figure through a local endpoint: with its mask, in a dress, and without a mask.

    Pictures go to `output`.
    """
    output.mkdir(parents=True, exist_ok=True)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # moto's web server logs every call
    pictures = demo_pictures()
    files = {f"{name}.png": png(picture) for name, picture in pictures.items()}
    for name, content in files.items():
        (output / name).write_bytes(content)
    with ExitStack() as stack:
        cloud = stack.enter_context(local_cloud())
        host = stack.enter_context(image_host(files))
        click.echo("starting the container process ...")
        container = stack.enter_context(serving(container_environment(cloud, host), output / "serve.log"))
        runtime = stack.enter_context(http_server(create_runtime(container)))
        stage = _Stage(cloud, host, runtime, time.strftime("%y%m%d-%H%M%S"))
        rows = []
        for name, garments in OUTFITS.items():
            picture = stage.dress(name, garments, masked=True)
            (output / f"{name}.png").write_bytes(png(picture))
            rows.append(_row(pictures, garments, pictures["mask"], picture))
        masks = stage.mask()
        for cloth_type, mask in masks.items():
            (output / f"mask_{cloth_type}.png").write_bytes(png(mask))
        name, garments = UNMASKED
        picture = stage.dress(name, garments, masked=False)
        (output / f"{name}.png").write_bytes(png(picture))
        rows.append(_row(pictures, garments, masks["overall"], picture))
    (output / "sheet.png").write_bytes(png(np.vstack(rows)))
    click.echo(f"pictures     {output}/sheet.png  (person | masked | garment | result), and each of them beside it")
    click.echo(WHAT_IT_IS)


@dataclass(frozen=True)
class _Stage:
    """Where the demo's calls go."""

    cloud: LocalCloud
    images: str
    runtime: str
    timestamp: str

    def dress(self, name: str, garments: Sequence[str], *, masked: bool) -> Image:
        """The picture of one try-on."""
        without = "" if masked else ", without a mask"
        click.echo(f"calling boto3 sagemaker-runtime invoke_endpoint: {' and '.join(garments)}{without} ...")
        mask = {"mask_image_url": self._url("mask")} if masked else {}
        urls = {GARMENT_FIELDS[garment]: self._url(garment) for garment in garments}
        answer = self._invoke({**urls, **mask, "output_format": "png", "timestamp": f"{self.timestamp}-{name}"})
        _report(answer, _message(self.cloud, self.cloud.queue_url))
        return self._stored(answer["object_key"], "RGB")

    def mask(self) -> dict[str, Image]:
        """The masks of the person, as they are stored at sign-up."""
        click.echo("calling boto3 sagemaker-runtime invoke_endpoint: the masks of the photo ...")
        answer = self._invoke({"task": "mask", "timestamp": self.timestamp})
        for key in answer["object_keys"].values():
            click.echo(f"object key   {key}")
        click.echo(f"SQS message  {json.dumps(_message(self.cloud, self.cloud.mask_queue_url))}")
        return {name: self._stored(key, "L") for name, key in answer["object_keys"].items()}

    def _url(self, name: str) -> str:
        return f"http://{self.images}/{name}.png"

    def _invoke(self, fields: Mapping[str, str]) -> dict[str, Any]:
        return _invoke(self.runtime, {"userId": "7", "person_image_url": self._url("person"), **fields})

    def _stored(self, key: str, mode: str) -> Image:
        found = self.cloud.client("s3").get_object(Bucket=BUCKET, Key=key)
        with Pillow.open(io.BytesIO(found["Body"].read())) as opened:
            return np.asarray(opened.convert(mode))


def _invoke(runtime: str, request: Mapping[str, str]) -> dict[str, Any]:
    response = client("sagemaker-runtime", runtime).invoke_endpoint(
        EndpointName=ENDPOINT_NAME, ContentType="application/json", Body=json.dumps(request), InferenceId="demo-1"
    )
    answer: dict[str, Any] = json.loads(response["Body"].read())
    return answer


def _message(cloud: LocalCloud, queue_url: str) -> dict[str, Any]:
    sqs = cloud.client("sqs")
    (received,) = sqs.receive_message(QueueUrl=queue_url, WaitTimeSeconds=5)["Messages"]
    sqs.delete_message(QueueUrl=queue_url, ReceiptHandle=received["ReceiptHandle"])
    message: dict[str, Any] = json.loads(received["Body"])
    return message


def _row(pictures: Mapping[str, Image], garments: Sequence[str], mask: Image, result: Image) -> Image:
    inputs = prepare(Pictures(pictures["person"], [pictures[name] for name in garments], mask), "clean")
    masked = geometry.masked_person(inputs.person, inputs.mask)
    return geometry.side_by_side([inputs.person, masked, inputs.garment, result])


def _report(answer: Mapping[str, Any], message: Mapping[str, Any]) -> None:
    click.echo(f"object key   {answer['object_key']}")
    click.echo(f"bucket       {answer['bucket']}   etag {answer['etag']}")
    click.echo(f"SQS message  {json.dumps(message)}")
    click.echo(f"engine       {answer['engine']}   seed {answer['seed']}   {answer['width']}x{answer['height']}")
    remembered = f", mask cache {answer['mask_cache']}" if "mask_cache" in answer else ""
    click.echo(f"mask         {answer['mask_source']}{remembered}")
    click.echo("stage times  " + "  ".join(f"{stage} {ms:.0f} ms" for stage, ms in answer["timings_ms"].items()))


def png(picture: Any) -> bytes:
    """The bytes of a PNG file with these pixels."""
    file = io.BytesIO()
    Pillow.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def _pings(url: str) -> bool:
    try:
        return requests.get(f"{url}/ping", timeout=2).status_code == 200
    except requests.exceptions.RequestException:
        return False
