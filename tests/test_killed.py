"""A process that is killed between any two steps of a request loses nothing: the same request brings all of it."""

from __future__ import annotations

import http.client
import io
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import requests
from PIL import Image as Pillow
from stand_in import usual_files, usual_request

from bench.waiting_service import NAME, PICTURE_S
from deploy.demo import BUCKET, REPOSITORY, client, container_environment, free_port, image_host


class Front(ThreadingHTTPServer):
    """Passes everything on to another server; `before` and `after` see (method, path) of what is passed on."""

    daemon_threads = True

    def __init__(self, port):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind = port
        self.before = self.after = lambda _method, _path: None
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def _pass_on(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.before(self.command, self.path)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=20)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        self.server.after(self.command, self.path)
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = _pass_on

    def log_message(self, *_):
        pass


class Stage:
    """The serving process between an image host and S3 and SQS, each behind a front."""

    def __init__(self, cloud, images, aws):
        self.cloud, self.images, self.aws = cloud, images, aws
        self.process, self.url = None, ""

    def start(self):
        port = free_port()
        trusted = self.images.url.partition("//")[2]
        environment = {**container_environment(self.cloud, trusted), "VTON_ENGINE": NAME, "VTON_MASKER": "off"}
        environment = {
            **os.environ,
            **environment,
            "AWS_ENDPOINT_URL_S3": self.aws.url,
            "AWS_ENDPOINT_URL_SQS": self.aws.url,
            "VTON_QUEUE_URL": self.cloud.queue_url.replace(self.cloud.url, self.aws.url),
            PICTURE_S: "0.5",
            "SAGEMAKER_BIND_TO_PORT": str(port),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.waiting_service"], cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL
        )
        self.url = f"http://127.0.0.1:{port}"
        ends = time.monotonic() + 180
        while not self._pings():
            assert time.monotonic() < ends
            assert self.process.poll() is None
            time.sleep(0.05)

    def _pings(self):
        try:
            return requests.get(f"{self.url}/ping", timeout=30).status_code == 200
        except requests.exceptions.ConnectionError:
            return False

    def ask(self, timestamp):
        urls = {
            name: f"{self.images.url}/{name.split('_')[0]}.png"
            for name in ("person_image_url", "upper_cloth_url", "lower_cloth_url", "mask_image_url")
        }
        return requests.post(f"{self.url}/invocations", json=usual_request(timestamp=timestamp, **urls), timeout=30)

    def kill(self):
        self.process.kill()
        self.process.wait(10)

    def objects(self, timestamp):
        folder = f"users/7/vton_result/{timestamp}/"
        listed = client("s3", self.cloud.url).list_objects_v2(Bucket=BUCKET, Prefix=folder)
        return [each["Key"] for each in listed.get("Contents", [])]

    def messages(self, timestamp):
        received = client("sqs", self.cloud.url).receive_message(
            QueueUrl=self.cloud.queue_url, MaxNumberOfMessages=10, WaitTimeSeconds=0
        )
        told = [json.loads(message["Body"]) for message in received.get("Messages", [])]
        return [message for message in told if message["initial_timestamp"] == timestamp]


@pytest.fixture(scope="module")
def running(endpoint):
    with ExitStack() as stack:
        queue_url = endpoint.cloud.client("sqs").create_queue(QueueName="killed")["QueueUrl"]
        cloud = replace(endpoint.cloud, queue_url=queue_url)
        images = Front(int(stack.enter_context(image_host(usual_files())).rpartition(":")[2]))
        aws = Front(int(cloud.url.rpartition(":")[2]))
        built = Stage(cloud, images, aws)
        stack.callback(built.kill)
        for front in (images, aws):
            stack.callback(front.server_close)
            stack.callback(front.shutdown)
        yield built


STEPS = {  # where the process is killed -> which front, before or after it passes on what method and part of a path
    "before the photo is fetched": ("images", "before", "GET", "person"),
    "while the last picture comes": ("images", "after", "GET", "mask"),
    "before the picture is stored": ("aws", "before", "PUT", "result"),
    "before it knows that the picture is stored": ("aws", "after", "PUT", "result"),
    "before the message is sent": ("aws", "before", "POST", "/"),
    "before it knows that the message is sent": ("aws", "after", "POST", "/"),
}


@pytest.mark.parametrize("step", [*STEPS, "while the picture is made"])
def test_after_a_kill_the_same_request_brings_one_object_and_its_message(running, step):
    timestamp = f"killed-{[*STEPS, step].index(step)}"
    key = f"users/7/vton_result/{timestamp}/result.png"
    killed = threading.Event()

    def kill():
        if not killed.is_set():
            killed.set()
            running.kill()

    def kill_at(method, path):
        if (method, True) == (wanted, part in path):
            kill()

    if running.process is None or running.process.poll() is not None:
        running.start()
    if step in STEPS:
        front, when, wanted, part = STEPS[step]
        setattr(getattr(running, front), when, kill_at)
    else:
        running.images.after = lambda _, path: "mask" in path and threading.Timer(0.25, kill).start()
    with pytest.raises(requests.exceptions.ConnectionError):
        running.ask(timestamp)
    assert killed.is_set()
    for front in (running.images, running.aws):
        front.before = front.after = lambda _method, _path: None
    assert running.objects(timestamp) in ([], [key])
    told = running.messages(timestamp)
    assert not told or running.objects(timestamp)

    running.start()
    answer = running.ask(timestamp)
    assert answer.status_code == 200
    assert running.objects(timestamp) == [key]
    content = client("s3", running.cloud.url).get_object(Bucket=BUCKET, Key=key)["Body"].read()
    with Pillow.open(io.BytesIO(content)) as picture:
        assert np.asarray(picture).shape == (1024, 768, 3)
    told += running.messages(timestamp)
    assert told
    assert {message["job_id"] for message in told} == {answer.json()["job_id"]}
