"""A loop-back stand-in for RunPod's job service, for the SDK's own worker loop: hands out jobs, keeps what is posted.

Only what the loop asks for: one job or a batch to take, jobs to stop, results, and signs of life.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .services import REPOSITORY, clean_environment

HOLD_S = 0.2
WAIT_S = 90.0
STOP_S = 60.0
IN_PROGRESS = "IN_PROGRESS"
STAND_IN = Path(__file__).with_name("runpod_stand_in.py")  # the worker with the painter for an engine
WORKER = ("-m", "container.runpod_handler")


@dataclass(frozen=True)
class Post:
    """What a worker posted for a job: its result, or how far it is."""

    job_id: str
    body: dict[str, Any]
    at: float


class JobPlane(ThreadingHTTPServer):
    """The service, on a port of its own.

    Attributes:
        posts: everything that workers posted, in order.
        batches: how many jobs each question for several asked for.
        pings: how often a worker told that it lives.
        hold_s: a question for jobs is answered with 204 after that.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.posts: list[Post] = []
        self.batches: list[int] = []
        self.pings = 0
        self.hold_s = HOLD_S
        self._jobs: queue.Queue[dict[str, Any]] = queue.Queue()
        self._stops: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def put(self, *jobs: dict[str, Any]) -> None:
        """Lets workers take these jobs."""
        for job in jobs:
            self._jobs.put(job)

    def stop_job(self, job_id: str) -> None:
        """Lets the worker that does the job stop it."""
        self._stops.put(job_id)

    def take(self, most: int) -> list[dict[str, Any]]:
        """Up to so many jobs; none after a while."""
        taken = []
        with suppress(queue.Empty):
            taken.append(self._jobs.get(timeout=self.hold_s))
            while len(taken) < most:
                taken.append(self._jobs.get_nowait())
        return taken

    def take_stop(self) -> list[str]:
        """The job to be stopped; none after a while."""
        with suppress(queue.Empty):
            return [self._stops.get(timeout=HOLD_S)]
        return []

    def results(self) -> dict[str, dict[str, Any]]:
        """The result of each job that has one."""
        return {post.job_id: post.body for post in self.posts if post.body.get("status") != IN_PROGRESS}

    def progress(self, job_id: str) -> list[dict[str, Any]]:
        """How far the worker said that a job was."""
        mine = [post.body for post in self.posts if post.job_id == job_id]
        return [body["output"] for body in mine if body.get("status") == IN_PROGRESS]

    def result(self, job_id: str) -> dict[str, Any]:
        """The result of a job, waited for."""
        ends = time.monotonic() + WAIT_S
        while job_id not in self.results():
            assert time.monotonic() < ends, f"no result for {job_id}; posted: {[post.job_id for post in self.posts]}"
            time.sleep(0.02)
        return self.results()[job_id]

    def environment(self) -> dict[str, str]:
        """What the platform tells a worker."""
        base = f"http://127.0.0.1:{self.server_address[1]}/v2/EP"
        return {
            "RUNPOD_POD_ID": "pod1",
            "RUNPOD_AI_API_KEY": "key",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=x",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=x",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=x",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }


class _Answers(BaseHTTPRequestHandler):
    server: JobPlane

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        kind = url.path.split("/")[3]
        if kind == "ping":
            self.server.pings += 1
            self._answer({})
        elif kind == "job-stop":
            stops = self.server.take_stop()
            self._answer({"jobsToStop": stops} if stops else None)
        elif kind == "job-take-batch":
            size = int(parse_qs(url.query)["batch_size"][0])
            self.server.batches.append(size)
            self._answer(self.server.take(size) or None)
        else:
            jobs = self.server.take(1)
            self._answer(jobs[0] if jobs else None)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        job_id = urlsplit(self.path).path.split("/")[5]
        self.server.posts.append(Post(job_id, body, time.monotonic()))
        self._answer({})

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _answer(self, body: object) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        with suppress(OSError):  # a worker that ends hangs up
            self.send_response(204 if body is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)


@contextmanager
def job_plane() -> Iterator[JobPlane]:
    """The service, until the block ends."""
    plane = JobPlane()
    try:
        yield plane
    finally:
        plane.shutdown()
        plane.server_close()


@contextmanager
def worker_process(
    folder: Path, environ: Mapping[str, str], *arguments: str, what: tuple[str, ...] = WORKER
) -> Iterator[subprocess.Popen[bytes]]:
    """A worker until the block ends; it says `out` and `err`, in the folder."""
    whole = clean_environment({"FAULTS_CONTROL": str(folder), **environ})
    with (folder / "out").open("ab") as out, (folder / "err").open("ab") as err:
        process = subprocess.Popen(
            [sys.executable, *what, *arguments],
            cwd=REPOSITORY,
            env=whole,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_S)
