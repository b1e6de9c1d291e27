"""gpu_and_model: a device that fails costs one answer, or the process, and never the next one's picture."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..registry import not_applicable, row
from ..services import Service
from ..stage import Stage

EXIT_LIMIT_S = 5.0
START_LIMIT_S = 120.0

not_applicable("G08", "there is one engine yet; the others come with issues of their own")


@contextmanager
def injected(stage: Stage) -> Iterator[Service]:
    """A process with the real engine, which fails as told, until the block ends."""
    service = stage.start_injected()
    try:
        yield service.wait_until_ready(START_LIMIT_S)
    finally:
        service.stop()


def calls(service: Service) -> list[str]:
    """What each call of the pipeline met."""
    return (service.folder / "calls").read_text().split()


@row("G01", lane="models")
def out_of_memory(stage: Stage) -> str:
    """One answer says so, the cache is emptied, and the next picture is made."""
    with injected(stage) as service:
        service.fail_next("oom", times=100)
        stage.ask(service).refused(503, "gpu_failed", retryable=True)
        tried = calls(service).count("oom")
        (service.folder / "fault").unlink()
        emptied = (service.folder / "emptied").read_text().split()
        assert len(emptied) >= tried, f"{tried} times out of memory, {len(emptied)} times emptied"
        stage.ask(service).done()
        service.fail_next("oom")
        once = stage.ask(service)
        assert once.status == 200 or once.refused(503, "gpu_failed", retryable=True)
        stage.ask(service).done()
        for kind in ("nan", "constant"):
            made = stage.keys(f"users/{stage.row.lower()}/")
            service.fail_next(kind)
            stage.ask(service).refused(500, "generation_failed")
            assert stage.keys(f"users/{stage.row.lower()}/") == made, f"a picture of {kind} was stored"
        stage.ask(service).done()
        assert service.ping() == 200
    return f"tried {tried} times; out of memory just once is {once.status}; NaN and one grey are generation_failed"


@row("G03", lane="models")
def sticky_errors(stage: Stage) -> str:
    """The error latches: nobody touches the device again, the process ends, and its replacement serves."""
    told = []
    for kind in ("assert", "illegal"):
        with injected(stage) as service:
            service.fail_next(kind)
            stage.ask(service).refused(503, "gpu_failed", retryable=True)
            began, touched = time.monotonic(), len(calls(service))
            later = _until_it_ends(stage, service)
            took = time.monotonic() - began
            assert service.process.wait(EXIT_LIMIT_S) != 0
            assert took < EXIT_LIMIT_S, f"it lived on for {took:.1f} s"
            assert later, "it ended before anyone could be told"
            assert len(calls(service)) == touched, "the device was touched again"
        told.append(f"{kind}: {len(later)} later requests 503, ended after {took:.1f} s")
    with injected(stage) as replacement:
        stage.ask(replacement).done()
    return "; ".join(told)


def _until_it_ends(stage: Stage, service: Service) -> list[dict[str, Any]]:
    """The errors of what was asked until nobody answered; /ping is 503 all the while."""
    errors: list[dict[str, Any]] = []
    ends = time.monotonic() + EXIT_LIMIT_S
    while service.alive and time.monotonic() < ends:
        try:
            answer = stage.ask(service)
        except OSError:
            time.sleep(0.05)
            continue
        errors.append(answer.refused(503, answer.json()["error"]["code"], retryable=True))
        assert errors[-1]["code"] in ("gpu_failed", "draining"), errors[-1]
        assert service.ping() in (503, 0)
    return errors


@row("G05", lane="models")
def cuda_where_there_is_none(stage: Stage) -> None:
    """The start is refused in a sentence; the CPU is not taken silently."""
    environ = stage.environment(VTON_DEVICE="cuda", CUDA_VISIBLE_DEVICES="")
    service = stage.ground.zygote.serve("no CUDA", stage.new_folder("G05"), environ)
    assert service.process.wait(START_LIMIT_S) not in (0, None)
    (refusal,) = [line for line in service.lines() if line.get("event") == "start_refused"]
    assert "no CUDA device" in refusal["reason"], refusal
    assert "Traceback" not in service.log.read_text()


@row("G06")
def unknown_names(stage: Stage) -> None:
    """The start is refused, listing the names that there are."""
    for variable, names in (("VTON_ENGINE", ["catvton"]), ("VTON_MASKER", ["embedded", "off"])):
        service = stage.start_stand_in(**{variable: "paint"})
        status = service.process.wait(START_LIMIT_S)
        said = service.log.read_text()
        assert status == 2, f"{variable}: exit {status}"
        assert all(name in said for name in (variable, *names)), said
        assert len(said.splitlines()) == 1, said


@row("G07")
def numbers_out_of_range(stage: Stage) -> None:
    """The ranges are closed, and nothing beyond them reaches the engine."""
    service = stage.service
    wrong: list[tuple[str, object]] = [
        *(("num_inference_steps", value) for value in (0, -1, 10**6, 2.5, "3", True)),
        *(("guidance_scale", value) for value in (-5, 0.99, 10.01, 1e9, "2")),
        *(("seed", value) for value in (-2, 2**63, 2**64, 1.5)),
        ("width", 7),
    ]
    with stage.nothing_happens(service):
        for name, value in wrong:
            stage.ask(service, **{name: value}).refused(422, "invalid_request", field=name)
        for text in ("NaN", "Infinity", "1e400"):
            body = json.dumps({**stage.fields(), "guidance_scale": 0}).replace(
                '"guidance_scale": 0', f'"guidance_scale": {text}'
            )
            answer = stage.send(service, body.encode())
            assert answer.status in (400, 422), answer.content
    done = stage.ask(service, seed=-1).done()
    assert 0 <= done["seed"] < 2**63
