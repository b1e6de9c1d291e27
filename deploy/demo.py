"""The main job on one machine, with nothing stubbed but the cloud: real boto3, real HTTP, the real serving process.

moto stands for S3 and SQS, `local_runtime` for SageMaker's front; the container process is the one that is deployed.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from botocore.exceptions import BotoCoreError, ClientError
from PIL import Image as Pillow

from container.get_vton import Pictures, prepare
from deploy.local_cloud import (
    BUCKET,
    FAKE_KEYS,
    REGION,
    LocalCloud,
    client,
    http_server,
    image_host,
    local_cloud,
    reach_this_machine,
)
from deploy.local_container import REPOSITORY, ContainerFailed, ContainerLimits, Launch, free_port, running
from deploy.local_runtime import create_runtime
from model import geometry
from model.embedded import demo_pictures
from model.interface import Image

__all__ = [  # what tests and benchmarks build their stages of
    "BUCKET",
    "ENDPOINT_NAME",
    "FAKE_KEYS",
    "REGION",
    "REPOSITORY",
    "LocalCloud",
    "client",
    "container_environment",
    "free_port",
    "http_server",
    "image_host",
    "local_cloud",
    "png",
    "run_demo",
    "serving",
]

ENDPOINT_NAME = "vton-demo"
START_LIMIT_S = 120.0
EXIT_SETTINGS = 78  # sysexits: configuration
STEPS = 8
GUIDANCE = "1"  # off: the embedded model is nearest to the truth without it (`bench.quality`)
OUTFITS = {"result": ("upper", "lower"), "result_dress": ("dress",)}  # picture -> garments, with the drawn mask
UNMASKED = ("result_no_mask", ("upper", "lower"))  # without one
GARMENT_FIELDS = {"upper": "upper_cloth_url", "lower": "lower_cloth_url", "dress": "overall_cloth_url"}
WHAT_IT_IS = (
    "The embedded model is a small CatVTON trained on drawn figures at 192x256 and enlarged: it shows the way of a\n"
    "request and that the garment arrives. Photographs need the published weights."
)


@contextmanager
def serving(environ: Mapping[str, str], log: Path) -> Iterator[str]:
    """The container's own process, as its URL, ready; stopped as SageMaker stops it when the block ends.

    Raises:
        ContainerFailed: it ended or was not ready in time; the text names the log.
    """
    with running(Launch(log, environ), ContainerLimits(start_s=START_LIMIT_S)) as container:
        yield container.wait_until_ready(START_LIMIT_S)


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

    Pictures go to `output`. What stands in the way ends the process with a sentence; SIGTERM ends its container too.
    """
    reach_this_machine(os.environ)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        _run(output)
    except (ContainerFailed, BotoCoreError, ClientError, RuntimeError, OSError) as exc:
        click.echo(f"vton demo cannot go on: {exc}", err=True)
        sys.exit(EXIT_SETTINGS)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    pictures = demo_pictures()
    files = {f"{name}.png": png(picture) for name, picture in pictures.items()}
    for name, content in files.items():
        (output / name).write_bytes(content)
    with ExitStack() as stack:
        cloud = stack.enter_context(local_cloud())
        host = stack.enter_context(image_host(files))
        click.echo("starting the container process ...")
        environ = {**container_environment(cloud, host), "VTON_GUIDANCE": GUIDANCE}
        container = stack.enter_context(serving(environ, output / "serve.log"))
        runtime = stack.enter_context(http_server(create_runtime(container, name=ENDPOINT_NAME)))
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
