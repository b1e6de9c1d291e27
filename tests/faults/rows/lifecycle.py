"""lifecycle_container: the process starts when it can serve, and stops without losing what it took on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..registry import NotApplicable, row
from ..services import REPOSITORY, Service, patience, pinging, start
from ..stage import Stage

PING_LIMIT_S = 0.2
PLATFORM_LIMIT_S = 2.0  # after which SageMaker counts a ping as failed
DRAIN_S, KILL_S = 25.0, 30.0
JOBS, JOB_S = 8, 4.0
READ_ONLY = (
    "mount --make-rprivate / && "
    "for at in $(awk '$2 !~ \"^/(proc|sys|dev|tmp)\" {print $2}' /proc/mounts | sort -u); do "
    'mount -o remount,bind,ro "$at" || exit 99; done; '
    'mount -t tmpfs -o size=64m tmpfs "$1" && export TMPDIR="$1" && shift && '
)
NEVER_ROOT = 12345
START_REFUSED_S = 120.0
IMPORT_LIMIT_S = 2.0
WATCHED = """
import sys, time
FORBIDDEN = ("socket.connect", "socket.bind", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.fork")
seen = []
def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
    probes = event == "socket.bind" and arguments[1][:2] == ("::1", 0)  # urllib3: is there IPv6?
    if writes and "__pycache__" not in str(arguments[0]) or event in FORBIDDEN and not probes:
        seen.append((event, str(arguments[0])))
sys.addaudithook(watch)
import container.vton_api
import json
print(json.dumps([time.process_time(), seen, "torch" in sys.modules]))
"""


@row("L01", lane="models")
def cold_start(stage: Stage) -> str:
    """503 until a picture was made, 200 from then on."""
    service = stage.embedded
    statuses = [status for status, _ in service.pings if status]
    assert set(statuses) <= {503, 200}, set(statuses)
    first = statuses.index(200)
    assert set(statuses[:first]) == {503}, "nobody saw it load"
    assert set(statuses[first:]) == {200}
    events = [str(line.get("event")) for line in service.lines()]
    assert events.index("starting") < events.index("ready")
    return f"shortened: no docker; `container/serve` was ready after {service.seconds_to_ready:.1f} s, embedded model"


@row("L02", lane="models")
def ping_answers_always(stage: Stage) -> str:
    """While the model loads, while eight pictures are under way, and while others are refused."""
    service = stage.embedded
    told = [_in_time("loading", [ping for ping in service.pings if ping[0]], {503, 200})]
    with ThreadPoolExecutor(JOBS) as pool:
        with pinging(service.port) as pings:
            jobs = [pool.submit(stage.ask, service, num_inference_steps=30) for _ in range(JOBS)]
            service.wait_for("vton_in_flight", JOBS)
            storm = [stage.ask(service, num_inference_steps=30)]  # before the first of them is done
            time.sleep(1)
        told.append(_in_time("8 jobs", pings, {200}))
        with pinging(service.port) as pings:
            storm += [stage.ask(service, num_inference_steps=30) for _ in range(100) if not jobs[-1].done()]
        told.append(_in_time("429 storm", pings, {200}))
        for job in jobs:
            job.result().done()
    assert any(answer.status == 429 for answer in storm), "nobody was refused"
    return ", ".join(told)


def _in_time(when: str, pings: list[tuple[int, float]], statuses: set[int]) -> str:
    assert pings, f"{when}: no ping"
    assert {status for status, _ in pings} <= statuses, f"{when}: {sorted({status for status, _ in pings})}"
    seconds = sorted(took for _, took in pings)
    p95, most = seconds[int(0.95 * (len(seconds) - 1))], seconds[-1]
    assert most < PLATFORM_LIMIT_S * patience(), f"{when}: {most:.2f} s"
    assert p95 < PING_LIMIT_S * patience(), f"{when}: p95 {p95:.2f} s"
    return f"{when}: p95 {p95 * 1000:.0f}, most {most * 1000:.0f} ms"


@row("L03")
def sigterm_idle(stage: Stage) -> str:
    """Ends at once, with 0."""
    service = stage.start_stand_in().wait_until_ready()
    began = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    status = service.process.wait(KILL_S)
    took = time.monotonic() - began
    assert (status, took < 2 * patience()) == (0, True), f"exit {status} after {took:.1f} s"
    return f"after {took:.1f} s"


@row("L04", lane="waiting")
def sigterm_at_work(stage: Stage) -> str:
    """What fits into 25 s is finished, the rest is told to come again, and nothing is lost."""
    service = stage.start_stand_in().wait_until_ready()
    try:
        with service.pace(JOB_S), ThreadPoolExecutor(JOBS) as pool:
            jobs = [stage.fields() for _ in range(JOBS)]
            answers = [pool.submit(stage.post, service, fields) for fields in jobs]
            service.wait_for("vton_in_flight", JOBS)
            began = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            _drains_at_once(stage, service)
            status = service.process.wait(KILL_S + 5)
            took = time.monotonic() - began
            ended = [future.exception() or future.result() for future in answers]
    finally:
        service.process.send_signal(signal.SIGKILL)
    cut = [str(one) for one in ended if isinstance(one, BaseException)]
    done = [one for one in ended if not isinstance(one, BaseException) and one.status == 200]
    told = [one for one in ended if not isinstance(one, BaseException) and one.status != 200]
    summary = f"{len(done)} done, {len(told)} told to come again, {len(cut)} cut off; exit {status} after {took:.1f} s"
    assert (status, took < KILL_S + patience() - 1) == (0, True), summary
    assert len(done) >= int(DRAIN_S / JOB_S) - 1, summary
    for one in told:
        one.refused(503, one.json()["error"]["code"], retryable=True)
    for one in done:
        assert one.json()["object_key"] in stage.keys(one.json()["object_key"]), "an answered picture is not there"
    _is_not_lost(stage, jobs)
    assert not cut, f"{summary}: {cut[0]}"
    return summary


def _drains_at_once(stage: Stage, service: Service) -> None:
    time.sleep(0.1)
    assert service.ping() == 503
    stage.ask(service).refused(503, "draining", retryable=True)


def _is_not_lost(stage: Stage, jobs: list[dict[str, object]]) -> None:
    """No message without an object, no object in parts; the same requests end well in the replacement."""
    keys = set(stage.keys(f"users/{stage.row.lower()}/"))
    assert {message["object_key"] for message in stage.messages() if message["userId"] == stage.row.lower()} <= keys
    for fields in jobs:
        done = stage.post(stage.service, fields).done()
        assert len(stage.stored(done["object_key"])) > 1000
        assert stage.messages(done["job_id"])


@row("L07", lane="models")
def read_only_root(stage: Stage) -> None:
    """Serves, and writes nowhere but to /tmp."""
    _needs_unshare()
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = READ_ONLY + '! touch /root-is-writable 2>/dev/null && exec "$@"'
    ours = [*REPOSITORY.parents, *Path(sys.executable).parents]
    temporary = stage.new_folder("tmp") if Path("/tmp") in ours else Path("/tmp")
    before = ["unshare", *as_root, "--mount", "sh", "-c", command, "sh", str(temporary)]
    _serves(stage, "read-only", before)


@row("L08", lane="models")
def any_user(stage: Stage) -> str:
    """Serves as a user whom the system does not know, and as root; whoever decodes has no privileges."""
    _needs_unshare()
    is_root = os.geteuid() == 0
    users = {
        "root": [] if is_root else ["unshare", "--user", "--map-root-user"],
        f"uid {NEVER_ROOT}": ["unshare", "--user", f"--map-user={NEVER_ROOT}", f"--map-group={NEVER_ROOT}"],
    }
    told = []
    for name, before in users.items():
        children = _serves(stage, name, before)
        privileged = [capabilities for capabilities in children if int(capabilities, 16)]
        # A root of a namespace with no other user in it can become nobody else.
        assert not privileged or (name == "root" and not is_root), f"{name}: a decoder has {privileged}"
        told.append(f"{name}: {len(children)} children without privileges")
    return "; ".join(told)


def _serves(stage: Stage, name: str, before: list[str]) -> list[str]:
    """A cold start behind this command makes a picture; the capabilities of its child processes, in hex."""
    folder = stage.new_folder(name.replace(" ", "-"))
    nowhere = {"HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"}
    service = start("embedded", folder, stage.environment(**nowhere), before=before)
    try:
        service.wait_until_ready()
        stage.ask(service).done()
        broken = stage.plain.put(f"{stage.row}/broken.png", b"\x89PNG")
        stage.ask(service, person_image_url=broken).refused(422, "image_not_decodable")
        capabilities = [_capabilities_of(child.pid) for child in service.processes()[1:]]
        assert any(capabilities), "no child process is left"
        return [of_one for of_one in capabilities if of_one is not None]
    finally:
        service.stop()


def _capabilities_of(pid: int) -> str | None:
    """In hex; None for a process that ended meanwhile, as the fork that decoded one picture does."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))


def _needs_unshare() -> None:
    if shutil.which("unshare") is None:
        raise NotApplicable("needs unshare, of util-linux")
    tried = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        raise NotApplicable(f"needs namespaces, which this machine refuses: {tried.stderr.strip()}")


@row("L10")
def wrong_settings(stage: Stage) -> None:
    """Each refuses the start with one sentence that names the variable."""
    wrong = {
        ("VTON_STEP", "3"): "unknown setting",
        ("NUM_STEP", "abc"): "integer",
        ("VTON_STEPS", "101"): "less than or equal to 100",
        ("VTON_MAX_IN_FLIGHT", "-1"): "greater than or equal to 1",
        ("VTON_DEADLINE_S", "nan"): "finite",
        ("VTON_DEVICE", "tpu"): "'cuda'",
    }
    environ = {name: value for name, value in stage.environment().items() if name != "VTON_STEPS"}
    services = {case: start(case[0], stage.new_folder("L10"), {**environ, case[0]: case[1]}) for case in wrong}
    for (name, value), service in services.items():
        status, said = service.process.wait(START_REFUSED_S), service.log.read_text()
        assert status == 2, f"{name}={value}: exit {status}"
        assert name in said, f"{name}={value}: {said}"
        assert wrong[name, value] in said, f"{name}={value}: {said}"
        assert len(said.splitlines()) == 1, said


@row("L12")
def importing_does_nothing(stage: Stage) -> str:
    """No file is written, no socket opened, no process started, and torch stays out."""
    del stage
    best = float("inf")
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", WATCHED], cwd=REPOSITORY, env={"PATH": os.environ["PATH"]}, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        seconds, seen, has_torch = json.loads(done.stdout)
        assert (seen, has_torch) == ([], False), f"{seen}, torch {has_torch}"
        best = min(best, seconds)
    assert best < IMPORT_LIMIT_S, f"{best:.1f} s"
    return f"{best:.1f} s of processor time"
