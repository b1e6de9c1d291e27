"""What the rows of one lane play on: hosts, a cloud, a network and the processes under test."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moto.server import ThreadedMotoServer

from deploy.demo import FAKE_KEYS, REGION, client

from .aws import AwsFront, TcpProxy
from .certificates import Authority
from .image_host import Canary, ImageHost, ResettingHost
from .network import SLOW_NAME, WORLD, World
from .pictures import good_files
from .services import JSON_TYPE, LAUNCHER, Answer, Service, Zygote, pinging, start

ACCOUNT = "123456789012"  # moto's
PUBLIC = "52.216.10.{number}"  # addresses of other people's, which only the test's dialler ever sees
ROLES = ("person", "upper", "lower", "mask")
FIELD_OF = {role: f"{role}_cloth_url" if role in ("upper", "lower") else f"{role}_image_url" for role in ROLES}
SPECIAL_NAMES = {
    "loopback.example": ["127.0.0.1"],
    "private.example": ["10.0.0.5"],
    "metadata.example": ["169.254.169.254"],
    "metadata6.example": ["fd00:ec2::254"],
    "mixed.example": [PUBLIC.format(number=1), "127.0.0.1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    SLOW_NAME: ["10.0.0.6"],
}


@dataclass(frozen=True)
class Body:
    """One error body, for the row that looks at all of them."""

    row: str
    status: int
    content: bytes


class Ground:
    """What all lanes share: one moto, one authority, one zygote, the error bodies of all rows, and a folder."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vton-fault-"))
        self.authority = Authority(self.folder)
        self.bodies: list[Body] = []
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        self.moto_port: int = self._moto.get_host_and_port()[1]
        self._zygote: Zygote | None = None
        self._lock = threading.Lock()

    @property
    def zygote(self) -> Zygote:
        """Started by whoever asks first."""
        with self._lock:
            self._zygote = self._zygote or Zygote(self.folder)
            return self._zygote

    def close(self, *, keep: bool) -> None:
        """Ends what it started; keeps the folder where there is something to look at."""
        if self._zygote is not None:
            self._zygote.close()
        self._moto.stop()
        if not keep:
            shutil.rmtree(self.folder)


class Stage:
    """One lane's hosts, cloud and processes.

    Attributes:
        host: the image host of images.example, by TLS.
        plain: an image host on loopback that the processes trust, by http, for those on the real network.
        front, proxy: what stands between the processes and moto.
        row: the id of the row that is on.
    """

    def __init__(self, ground: Ground, lane: str) -> None:
        self.ground = ground
        self.lane = lane
        self.row = "none"
        self.folder = ground.folder / lane
        self.folder.mkdir()
        self._stack = ExitStack()
        self._numbers = itertools.count()
        self._services: dict[str, Service] = {}
        self.touched: set[str] = set()
        self.front = AwsFront(ground.moto_port)
        self.proxy = TcpProxy(self.front.server_address[1])
        self._make_hosts()
        self._make_cloud()

    # --- hosts and names

    def _make_hosts(self) -> None:
        tls = self.ground.authority
        self.host = ImageHost(tls.context("images.example"), "https://images.example")
        self.plain = ImageHost()
        self.canary = Canary()
        self._canary6 = Canary(family=10, port=self.canary.port) if Path("/proc/net/if_inet6").exists() else None
        hosts = {
            "images.example": self.host,
            "self-signed.example": ImageHost(tls.context("self-signed.example", self_signed=True)),
            "expired.example": ImageHost(tls.context("expired.example", days=-1)),
            "wrong-name.example": ImageHost(tls.context("another.example")),
            "old-tls.example": ImageHost(tls.old_context("old-tls.example")),
            "resets.example": ResettingHost(),
        }
        self.hosts = hosts
        names, dials = dict(SPECIAL_NAMES), {}
        for number, (name, host) in enumerate(hosts.items(), start=1):
            names[name] = [PUBLIC.format(number=number)]
            dials[f"{PUBLIC.format(number=number)}:443"] = host.port
        closed = ImageHost()
        closed.close()
        names["refuses.example"] = [PUBLIC.format(number=99)]
        dials[f"{PUBLIC.format(number=99)}:443"] = closed.port
        self._names, self._dials = names, dials
        for role, content in good_files().items():
            for host in (self.host, self.plain):
                host.put(f"good/{role}.png", content)

    @property
    def canary_hits(self) -> int:
        """How often something was dialled that must not be."""
        return self.canary.connections + (self._canary6.connections if self._canary6 else 0)

    @contextmanager
    def nothing_dialled(self, service: Service) -> Iterator[None]:
        """AssertionError if the process dialled any image host inside the block."""
        before = self.dialled(service)
        yield
        dialled = self.dialled(service)[len(before) :]
        assert not dialled, f"dialled {dialled}"

    def dialled(self, service: Service) -> list[list[Any]]:
        """Every address that the process dialled but for our cloud's: ["dial", address, port, where it led]."""
        record = service.folder / "network"
        lines = record.read_text().splitlines() if record.exists() else []
        return [entry for entry in map(json.loads, lines) if entry[0] == "dial"]

    # --- the cloud

    def _make_cloud(self) -> None:
        self.bucket = f"results-{self.lane}"
        moto = f"http://127.0.0.1:{self.ground.moto_port}"
        self.s3, self.sqs = client("s3", moto), client("sqs", moto)
        self.s3.create_bucket(Bucket=self.bucket, CreateBucketConfiguration={"LocationConstraint": REGION})
        self.sqs.create_queue(QueueName=self.bucket)
        self._queue = f"{moto}/{ACCOUNT}/{self.bucket}"
        self._messages: list[dict[str, Any]] = []

    @property
    def aws_url(self) -> str:
        """Where the processes find S3 and SQS."""
        return f"http://127.0.0.1:{self.proxy.port}"

    def keys(self, prefix: str = "") -> list[str]:
        """The keys in the bucket."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def stored(self, key: str) -> bytes:
        """The bytes of an object."""
        content: bytes = self.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return content

    def messages(self, job_id: str | None = None) -> list[dict[str, Any]]:
        """Every message that was sent until now, or those of one job."""
        while received := self.sqs.receive_message(QueueUrl=self._queue, MaxNumberOfMessages=10, WaitTimeSeconds=0).get(
            "Messages"
        ):
            for message in received:
                self._messages.append(json.loads(message["Body"]))
                self.sqs.delete_message(QueueUrl=self._queue, ReceiptHandle=message["ReceiptHandle"])
        return [message for message in self._messages if job_id in (None, message["job_id"])]

    @contextmanager
    def nothing_happens(self, service: Service) -> Iterator[None]:
        """AssertionError if an object, a message or a picture is made inside the block."""
        before = (self.keys(), len(self.messages()), service.generations())
        yield
        after = (self.keys(), len(self.messages()), service.generations())
        new = sorted(set(after[0]) - set(before[0]))
        assert after == before, f"new keys {new}, messages {after[1] - before[1]}, pictures {after[2] - before[2]}"

    # --- processes

    def environment(self, **more: str) -> dict[str, str]:
        """The settings of a process on the real network: our cloud, our plain host, pictures in two steps."""
        return {
            **FAKE_KEYS,
            "AWS_ENDPOINT_URL_S3": self.aws_url,
            "AWS_ENDPOINT_URL_SQS": self.aws_url,
            "VTON_BUCKET": self.bucket,
            "VTON_QUEUE_URL": f"{self.aws_url}/{ACCOUNT}/{self.bucket}",
            "VTON_TRUSTED_HOSTS": f"127.0.0.1:{self.plain.port}",
            "VTON_STEPS": "2",
            **more,
        }

    def stand_in_environment(self, folder: Path, **more: str) -> dict[str, str]:
        """The settings of a process on the test's network with the stand-in engine."""
        world = World(
            self._names, self._dials, [self.proxy.port, self.plain.port], self.canary.port, str(folder / "network")
        )
        stand_in = {"VTON_ENGINE": "stand-in", "VTON_MASKER": "off", "SSL_CERT_FILE": str(self.ground.authority.file)}
        return {**self.environment(), **stand_in, WORLD: world.text(), **more}

    def new_folder(self, name: str) -> Path:
        """A folder for a process."""
        folder = self.folder / f"{name}-{next(self._numbers)}"
        folder.mkdir()
        return folder

    def start_stand_in(self, **more: str) -> Service:
        """A process of its own with the stand-in engine, not yet ready; the row stops it."""
        folder = self.new_folder(f"stand-in-{self.row}")
        return start("stand-in", folder, self.stand_in_environment(folder, **more), script=LAUNCHER)

    @contextmanager
    def stand_in(self, **more: str) -> Iterator[Service]:
        """A ready process of its own with the stand-in engine, until the block ends."""
        service = self.start_stand_in(**more)
        try:
            yield service.wait_until_ready()
        finally:
            service.stop()

    @property
    def service(self) -> Service:
        """The lane's process with the stand-in engine."""
        return self._kept("service", lambda: self.start_stand_in().wait_until_ready())

    @property
    def embedded(self) -> Service:
        """The lane's unmodified `container/serve` with the embedded model, started cold."""
        return self._kept("embedded", self._start_embedded)

    def _start_embedded(self) -> Service:
        began = time.monotonic()
        service = start("embedded", self.new_folder("embedded"), self.environment(VTON_REST="1"))
        with pinging(service.port) as pings:
            service.wait_until_ready()
        service.seconds_to_ready, service.pings = time.monotonic() - began, pings
        return service

    def start_injected(self) -> Service:
        """A process whose real engine fails on request, not yet ready; the row stops it."""
        folder = self.new_folder("injected")
        more = {"VTON_ENGINE": "catvton", "FAULTS_INJECT": "1"}
        return self.ground.zygote.serve("injected", folder, self.stand_in_environment(folder, **more), LAUNCHER)

    def _kept(self, name: str, make: Any) -> Service:
        self.touched.add(name)
        if name not in self._services:
            self._services[name] = make()
        return self._services[name]

    # --- requests

    def fields(self, **changes: object) -> dict[str, object]:
        """The fields of a good request that nobody made before; a change to None takes a field away."""
        return self.fields_from(self.host, **changes)

    def fields_from(self, host: ImageHost, **changes: object) -> dict[str, object]:
        """The same with the pictures of a host."""
        fields: dict[str, object] = {FIELD_OF[role]: f"{host.base}/good/{role}.png" for role in ROLES}
        fields.update(cloth_type="overall", userId=self.row.lower(), timestamp=f"t{next(self._numbers)}")
        fields.update(changes)
        return {name: value for name, value in fields.items() if value is not None}

    def ask(self, service: Service, **changes: object) -> Answer:
        """The answer to a good request with these changes."""
        host = self.plain if service.name == "embedded" else self.host
        return self.post(service, self.fields_from(host, **changes))

    def post(self, service: Service, fields: object, headers: Mapping[str, str] | None = None) -> Answer:
        """The answer to these fields."""
        return self.send(service, json.dumps(fields).encode(), headers)

    def send(self, service: Service, body: bytes, headers: Mapping[str, str] | None = None) -> Answer:
        """The answer to this body."""
        return self.keep(service.call("POST", "/invocations", body, {**JSON_TYPE, **(headers or {})}))

    def keep(self, answer: Answer) -> Answer:
        """The same answer; its body is kept if it is an error's."""
        if answer.status >= 400:
            self.ground.bodies.append(Body(self.row, answer.status, answer.content))
        return answer

    # --- after each row

    def check(self) -> None:
        """AssertionError unless every process of the lane lives, serves a good request, and has nothing in flight."""
        for name in sorted(self.touched & self._services.keys() or self._services):
            service = self._services[name]
            assert service.alive, f"{name} ended with {service.process.poll()}"
            for leftover in ("hold", "pace", "fault", "keep"):
                assert not (service.folder / leftover).exists(), f"the row left {leftover} behind"
            done = self.ask(service, cloth_type="upper", lower_cloth_url=None).done()
            assert done["object_key"] in self.keys(done["object_key"]), "a good request left no object"
            service.wait_for("vton_in_flight", 0)

    def replace(self) -> None:
        """Ends the processes of the lane; whoever needs one gets a new one."""
        for service in self._services.values():
            service.stop()
        self._services.clear()

    def close(self) -> None:
        """Ends everything."""
        self.replace()
        self.proxy.close()
        self.front.shutdown()
        for host in (*self.hosts.values(), self.plain, self.canary):
            host.close()


def presigned(url: str) -> str:
    """The URL with the query of a presigned one; what must not be read again anywhere is `SIGNATURE`."""
    credential = "AKIASECRETSECRET%2F20241108%2Feu-central-1%2Fs3%2Faws4_request"
    signed = f"X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={credential}&X-Amz-Expires=900"
    return f"{url}?{signed}&X-Amz-Signature={SIGNATURE}"


SIGNATURE = base64.b16encode(b"the signature of nobody at all!!").decode().lower()
