"""How much of what an engine can do the service delivers: `python -m bench.service --help`.

In one run and in turns: the engine alone, called in a loop, and the serving process with the same engine, asked by as
many callers as it has places. The process stands between an image host, S3 and SQS in a process of their own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.server import ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Callable

import click
import httpcore
import psutil
import requests

from bench import waiting_service
from bench.files import end_of, json_option, write_report
from container.get_vton import MODEL_HEIGHT, MODEL_WIDTH, Pictures, prepare
from container.images import encode
from container.settings import Settings
from deploy.demo import LocalCloud, container_environment, free_port, image_host, local_cloud, png
from model import load_engine
from model.embedded import demo_pictures
from model.interface import EMBEDDED, Engine, EngineOptions, GenerationSettings, TryOnInputs

REPOSITORY = Path(__file__).resolve().parent.parent
ENGINES = {"waiting": waiting_service.NAME, EMBEDDED: "catvton"}  # what is measured -> the engine's name
PROMISED = {"waiting": 0.95, EMBEDDED: 0.85}  # share of the bare engine's throughput
PLACES = int(Settings.model_fields["max_in_flight"].default)
GUIDANCE = float(Settings.model_fields["guidance"].default)
START_LIMIT_S = 120.0
STOP_LIMIT_S = 40.0
ANSWER_LIMIT_S = 600.0
DEADLINE_S = "600"  # of the service: where others use the machine too, a picture shall be late, not refused
PICTURE_S = click.FloatRange(0, ANSWER_LIMIT_S)
JSON_HEADERS = [("Content-Type", "application/json")]
OK = 200


@dataclass(frozen=True)
class Answer:
    """One request from when it was due.

    Attributes:
        ended: time.monotonic() value.
        seconds: from when it was due to its answer.
        late_s: from when it was due to when it was sent: the client's own fault.
        status: of HTTP; 0 where there was no answer.
        content: the body.
    """

    ended: float
    seconds: float
    late_s: float
    status: int
    content: bytes


@dataclass(frozen=True)
class Service:
    """A serving process, where it is reached, and the host of its pictures."""

    url: str
    images: str
    process: psutil.Process

    def memory_mb(self) -> float:
        """Resident size of the process and its decoders, without the forks that live for one file."""
        return sum(process.memory_info().rss for process in self._processes()) / 2**20

    def cpu_s(self) -> float:
        """Processor seconds of the process and its decoders so far, with all of their forks that have ended."""
        times = [process.cpu_times() for process in self._processes()]
        return float(sum(each.user + each.system + each.children_user + each.children_system for each in times))

    def _processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children()]


class Caller:
    """Sends requests, no two alike, on connections that are kept."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._numbers = itertools.count()
        self._pool = httpcore.AsyncConnectionPool(max_connections=None, keepalive_expiry=30.0)

    async def __aenter__(self) -> Caller:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.aclose()

    async def ask(self, due: float) -> Answer:
        """A picture."""
        fields = {
            **{f"{role}_image_url": f"http://{self._service.images}/{role}" for role in ("person", "mask")},
            **{f"{role}_cloth_url": f"http://{self._service.images}/{role}" for role in ("upper", "lower")},
            "userId": "bench",
            "timestamp": f"{time.time_ns()}-{next(self._numbers)}",
        }
        return await self._send("POST", "/invocations", json.dumps(fields).encode(), due)

    async def ping(self, due: float) -> Answer:
        """Whether the process is well."""
        return await self._send("GET", "/ping", b"", due)

    async def _send(self, method: str, path: str, body: bytes, due: float) -> Answer:
        limits = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), ANSWER_LIMIT_S)}
        sent = time.monotonic()
        status, content = 0, b""
        with suppress(httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException):
            response = await self._pool.request(
                method, self._service.url + path, headers=JSON_HEADERS, content=body, extensions=limits
            )
            status, content = response.status, response.content
        ended = time.monotonic()
        return Answer(ended, ended - due, sent - due, status, content)


async def closed_loop(caller: Caller, seconds: float, places: int) -> tuple[list[Answer], float]:
    """`places` callers who ask, and again as soon as they are answered, for so long after the first answer.

    Returns:
        Every answer, and when the asking ended (time.monotonic()).
    """
    ends = math.inf
    answers = []

    async def keep_asking() -> None:
        nonlocal ends
        while time.monotonic() < ends:
            answers.append(await caller.ask(time.monotonic()))
            ends = min(ends, time.monotonic() + seconds)

    await asyncio.gather(*(keep_asking() for _ in range(places)))
    return answers, ends


def goodput(answers: Sequence[Answer], ends: float) -> float:
    """Pictures per second, from the first one to the first one that came after `ends` (time.monotonic()).

    Both ends are pictures where there are any, so that a short run is not off by half of one.
    """
    done = sorted(answer.ended for answer in answers if answer.status == OK)
    if not done or done[0] >= ends:
        return 0.0
    last = next((ended for ended in done if ended >= ends), ends)
    return sum(done[0] < ended <= last for ended in done) / (last - done[0])


@contextmanager
def surroundings() -> Iterator[tuple[LocalCloud, str]]:
    """S3, SQS and a host of a person, garments and a mask, in a process of their own until the block ends."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_surround, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        ours.close()
        process.join(STOP_LIMIT_S)


def _surround(parent: Connection) -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # moto's web server logs every call
    ThreadingHTTPServer.request_queue_size = 128  # the requests of all places fetch their pictures at once
    files = {
        name: png(picture) if name == "mask" else encode(picture, "jpeg", 95)
        for name, picture in demo_pictures().items()
    }
    with local_cloud() as cloud, image_host(files) as host:
        parent.send((cloud, host))
        with suppress(EOFError):
            parent.recv()  # nothing is ever sent: it ends with the parent


@contextmanager
def serving(cloud: LocalCloud, images: str, environ: Mapping[str, str], log: Path) -> Iterator[Service]:
    """The serving process, ready, until the block ends.

    Raises:
        click.ClickException: it ended or was not ready in time; the text has the end of the log.
    """
    port = free_port()
    settings = {**container_environment(cloud, images), "VTON_DEADLINE_S": DEADLINE_S, **environ}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.waiting_service"],
            cwd=REPOSITORY,
            env={**os.environ, **settings, "SAGEMAKER_BIND_TO_PORT": str(port)},
            stderr=file,
        )
    try:
        service = Service(f"http://127.0.0.1:{port}", images, psutil.Process(process.pid))
        ends = time.monotonic() + START_LIMIT_S
        while not _is_well(service.url):
            if process.poll() is not None or time.monotonic() > ends:
                raise click.ClickException(f"the service did not become ready; its log ends with\n{end_of(log)}")
            time.sleep(0.1)
        yield service
    finally:
        process.terminate()
        process.wait(STOP_LIMIT_S)


def _is_well(url: str) -> bool:
    with suppress(requests.exceptions.RequestException):
        return requests.get(f"{url}/ping", timeout=2).status_code == OK
    return False


def engine_environment(engine: str, picture_s: float, steps: int) -> dict[str, str]:
    """What makes a serving process run that engine, and no masker: every request brings its mask."""
    return {
        "VTON_ENGINE": ENGINES[engine],
        "VTON_MASKER": "off",
        "VTON_STEPS": str(steps),
        waiting_service.PICTURE_S: str(picture_s),
    }


def machine() -> dict[str, Any]:
    """What was measured on, and how busy it was with other things."""
    return {
        "cores": os.cpu_count(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


@click.command()
@click.option("--engine", type=click.Choice(list(ENGINES)), default="waiting", show_default=True)
@click.option("--seconds", type=click.FloatRange(0.5), default=20.0, show_default=True, help="Of each turn.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Turns of each.")
@click.option(
    "--picture-s", type=PICTURE_S, default=0.25, show_default=True, help="Seconds that the waiting engine waits."
)
@click.option("--steps", type=click.IntRange(1, 100), default=20, show_default=True, help="Of the embedded model.")
@json_option("Write the figures here too, beside those of the other engine.")
def main(engine: str, seconds: float, rounds: int, picture_s: float, steps: int, json_path: Path | None) -> None:
    """Measure an engine alone and behind the service, in turns; print the throughput of both and their ratio."""
    known = _known(json_path)
    about = {"engine": engine, **machine(), "seconds": seconds, "places": PLACES}
    about["picture_s" if engine == "waiting" else "steps"] = picture_s if engine == "waiting" else steps
    # As the service does, and before torch is imported: threads that spin for each other starve on shared cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    bare = waiting_service.WaitingEngine(picture_s) if engine == "waiting" else _embedded()
    with tempfile.TemporaryDirectory() as folder, surroundings() as (cloud, images):
        environ = engine_environment(engine, picture_s, steps)
        with serving(cloud, images, environ, Path(folder) / "serve.log") as service:
            figures = {**about, **asyncio.run(_measure(bare, service, seconds, rounds, steps))}
    figures["promised_ratio"] = PROMISED[engine]
    click.echo(_text(figures))
    write_report(json_path, {**known, engine: figures})


def _known(path: Path | None) -> dict[str, Any]:
    """What the file has so far.

    Raises:
        click.UsageError: it holds something else than figures.
    """
    if path is None or not path.is_file():
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise click.UsageError(f"{path} is no JSON: {exc}") from exc
    if not isinstance(known, dict):
        raise click.UsageError(f"{path} holds no figures by engine")
    return known


def _embedded() -> Engine:
    return load_engine(ENGINES[EMBEDDED], EngineOptions(EMBEDDED))


@dataclass(frozen=True)
class _Turn:
    """What the engine alone and the service did in the same time, one after the other."""

    bare_per_s: float
    service_per_s: float
    service_cpu_s: float
    answers: Sequence[Answer]


async def _measure(bare: Engine, service: Service, seconds: float, rounds: int, steps: int) -> dict[str, Any]:
    settings = GenerationSettings(steps, GUIDANCE, 42, MODEL_WIDTH, MODEL_HEIGHT)
    picture = partial(bare.generate, _inputs(), settings)
    async with Caller(service) as caller:
        await _turn(picture, service, caller, 0.0)  # warm-up
        turns = [await _turn(picture, service, caller, seconds) for _ in range(rounds)]
    answers = [json.loads(answer.content) for turn in turns for answer in turn.answers]
    stages = {stage: [answer["timings_ms"][stage] for answer in answers] for stage in answers[0]["timings_ms"]}
    return {
        "bare_per_s": [round(turn.bare_per_s, 3) for turn in turns],
        "service_per_s": [round(turn.service_per_s, 3) for turn in turns],
        "ratio": round(statistics.median(turn.service_per_s / turn.bare_per_s for turn in turns), 3),
        "pictures": len(answers),
        "service_cpu_s_per_picture": round(sum(turn.service_cpu_s for turn in turns) / len(answers), 3),
        "stages_median_ms": {stage: round(statistics.median(times), 1) for stage, times in stages.items()},
    }


async def _turn(picture: Callable[[], object], service: Service, caller: Caller, seconds: float) -> _Turn:
    bare_per_s = _throughput(picture, seconds)
    cpu_before_s = service.cpu_s()
    answers, ends = await closed_loop(caller, seconds, PLACES)
    wrong = [answer for answer in answers if answer.status != OK]
    if wrong:
        raise click.ClickException(f"{len(wrong)} of {len(answers)} requests failed: {wrong[0]}")
    return _Turn(bare_per_s, goodput(answers, ends), service.cpu_s() - cpu_before_s, answers)


def _throughput(picture: Callable[[], object], seconds: float) -> float:
    """Pictures per second of an engine that is called in a loop; at least one is made."""
    began, made = time.monotonic(), 0
    while made == 0 or time.monotonic() - began < seconds:
        picture()
        made += 1
    return made / (time.monotonic() - began)


def _inputs() -> TryOnInputs:
    pictures = demo_pictures()
    return prepare(Pictures(pictures["person"], [pictures["upper"], pictures["lower"]], pictures["mask"]), "clean")


def _text(figures: Mapping[str, Any]) -> str:
    lists = ("bare_per_s", "service_per_s", "stages_median_ms")
    lines = ["  ".join(f"{name} {value}" for name, value in figures.items() if name not in lists)]
    for name in lists[:2]:
        lines.append(f"{name.replace('_', ' '):<16}" + "".join(f"{rate:>9g}" for rate in figures[name]))
    lines.append("median ms  " + "  ".join(f"{stage} {ms:g}" for stage, ms in figures["stages_median_ms"].items()))
    verdict = "holds" if figures["ratio"] >= figures["promised_ratio"] else "BROKEN"
    lines.append(f"{verdict}  the service delivers at least {figures['promised_ratio']:.0%} of the bare engine")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
