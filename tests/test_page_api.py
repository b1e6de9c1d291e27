"""The page's routes over a real socket, in front of a stand-in engine."""

from __future__ import annotations

import base64
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import numpy as np
import pytest
import requests
from click.testing import CliRunner
from stand_in import (
    FakeFetcher,
    RecordingNotifier,
    StandInEngine,
    StandInMasker,
    running_app,
    usual_files,
)

import container.page_api
from container.cli import main
from container.images import decode, decode_mask
from container.page_api import EXAMPLE_SEEDS, FOLDER
from container.page_cli import page_url
from container.server import doors
from deploy.demo import http_server
from model.embedded import demo_pictures
from model.interface import OutOfMemory, PersonNotFound

FILES = usual_files()
BOTH = {"person_image": FILES["person.png"], "cloth_image": FILES["upper.png"]}


class SteppingEngine(StandInEngine):
    """Tells of its steps, and waits after the first one."""

    def generate(self, inputs, settings):
        for step in range(settings.steps):
            settings.on_step(step + 1, settings.steps)
            if step == 0:
                self.begun.set()
                self.may_end.wait(10)
        return super().generate(inputs, settings)


class Page:
    """A served app with the page, and what stands behind it."""

    def __init__(self, url, app, engine, masker, fetcher, folder):
        self.url, self.app, self.engine, self.masker = url, app, engine, masker
        self.fetcher, self.folder = fetcher, folder

    def get(self, path, **headers):
        return requests.get(self.url + path, headers=headers, timeout=60)

    def mask(self, files=None, data=None, **headers):
        files = {"person_image": FILES["person.png"]} if files is None else files
        return requests.post(f"{self.url}/api/mask", files=files, data=data or {}, headers=headers, timeout=60)

    def stream(self, files=BOTH, data=None, **headers):
        return requests.post(
            f"{self.url}/api/try-on/stream", files=files, data=data or {}, headers=headers, timeout=20, stream=True
        )

    def plain(self, files=BOTH, data=None):
        return requests.post(f"{self.url}/api/try-on", files=files, data=data or {}, timeout=60)


@contextmanager
def opened(tmp_path, *, masker=True, **settings):
    engine, fetcher = SteppingEngine(), FakeFetcher()
    masker = StandInMasker() if masker else None
    ports = {"engine": engine, "fetcher": fetcher, "notifier": RecordingNotifier(), "masker": masker}
    with running_app(tmp_path, **ports, rest=True, **settings) as app, http_server(doors(app, page=True)) as url:
        yield Page(url, app, engine, masker, fetcher, tmp_path)
        until(lambda: app.admission.taken == 0)


@pytest.fixture
def page(tmp_path):
    with opened(tmp_path) as page:
        yield page


def until(happened, limit_s=10):
    ends = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < ends
        time.sleep(0.02)


def events_of(response):
    """The events of a whole stream, as (name, payload)."""
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    told = []
    for block in response.content.decode().split("\n\n"):
        if not block.startswith(":") and block:
            name, payload = re.fullmatch(r"event: (\w+)\ndata: (.*)", block).groups()
            told.append((name, json.loads(payload)))
    return told


def refused(response, status, code):
    told = response.json()
    assert (response.status_code, told["code"]) == (status, code), told
    assert set(told) == {"detail", "code", "retryable", "request_id"}
    return told["detail"]


# --- the page itself


def test_the_page_and_all_that_it_names_come_from_this_service_alone(page):
    html = page.get("/").text
    named = set(re.findall(r'(?:src|href)="([^"#]+)"', html))
    for module in FOLDER.glob("*.js"):
        named |= set(re.findall(r'from "([^"]+)"', module.read_text()))
    assert named == {f"/page/{path.name}" for path in FOLDER.iterdir() if path.name != "index.html"}
    for path in sorted(named):
        assert page.get(path).status_code == 200, path


def test_the_page_needs_no_outside_resource():
    for path in FOLDER.iterdir():
        urls = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", path.read_text())
        assert set(urls) <= {"http://www.w3.org/2000/svg"}, path


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page/main.js", "text/javascript; charset=utf-8"),
        ("/page/style.css", "text/css; charset=utf-8"),
        ("/page/icon.svg", "image/svg+xml"),
        ("/page/settings", "application/json"),
        ("/page/examples/0/person.png", "image/png"),
    ],
)
def test_each_answer_says_what_it_is_and_what_may_run(page, path, media_type):
    headers = page.get(path).headers
    assert headers["Content-Type"] == media_type
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    policy = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/page/none.js",
        "/page/..%2fcli.py",
        "/page/",
        "/page/examples/0/mask.png",
        "/page/examples/3/person.png",
        "/page/examples/-1/person.png",
        "/page/examples/00/person.png",
    ],
)
def test_nothing_else_is_there(page, path):
    assert page.get(path).status_code == 404


def test_the_page_is_closed_where_it_is_not_wanted(tmp_path):
    with running_app(tmp_path, rest=True) as app, http_server(doors(app)) as url:
        for path in ("/", "/page/main.js", "/page/settings"):
            assert requests.get(url + path, timeout=30).status_code == 404
        assert requests.post(f"{url}/api/mask", timeout=30).status_code == 404


def test_the_examples_are_the_drawn_figures(page):
    drawn = demo_pictures(seed=EXAMPLE_SEEDS[1])
    for name in ("person", "upper", "lower", "dress"):
        assert np.array_equal(decode(page.get(f"/page/examples/1/{name}.png").content), drawn[name])


def test_the_settings_say_what_the_fields_begin_with(tmp_path):
    with opened(tmp_path, steps=8, guidance=1, api_keys=("k" * 16,)) as page:
        told = page.get("/page/settings").json()
        assert (told["status"], told["steps"], told["guidance"], told["needs_key"]) == ("healthy", 8, 1, True)
        assert (told["quality"], told["fast_steps"]) == ("exact", 8)
        assert "kkkk" not in json.dumps(told)


def test_the_settings_say_whether_the_model_is_there(page, monkeypatch):
    page.app.admission.drain()
    assert page.get("/page/settings").json()["status"] == "unhealthy"
    page.app.admission._draining = False
    monkeypatch.setattr(type(page.app.worker), "ready", property(lambda _worker: False))
    assert page.get("/page/settings").json()["status"] == "loading"


# --- the mask


@pytest.mark.parametrize("kind", ["upper", "lower", "overall", "inner", "outer"])
def test_the_mask_of_a_photo_is_the_one_that_a_try_on_of_it_uses(page, kind):
    answer = page.mask(data={"cloth_type": kind})
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/png")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    person = decode(FILES["person.png"])
    assert np.array_equal(decode_mask(answer.content), StandInMasker().mask(person, kind))
    page.plain(data={"cloth_type": kind, "num_inference_steps": "2"})
    assert len(page.masker.seen) == 1


def test_a_mask_is_neither_stored_nor_told_of(page):
    assert page.mask().status_code == 200
    assert not any(page.folder.iterdir())
    assert not page.fetcher.asked


@pytest.mark.parametrize(
    ("files", "data", "field"),
    [
        ({"cloth_type": (None, "upper")}, {}, "person_image"),
        ({"person_image": (None, "https://images.example/person.png")}, {}, "person_image"),
        ({"person_image": (None, "sha256:" + "0" * 64)}, {}, "person_image"),
        (None, {"cloth_type": "hat"}, "cloth_type"),
        (None, {"seed": "1"}, "seed"),
        (BOTH, {}, "cloth_image"),
        ({"person_image": FILES["person.png"], "cloth_type": b"upper"}, {}, "cloth_type"),
    ],
)
def test_a_form_that_is_none_for_a_mask_is_refused_by_its_field(page, files, data, field):
    assert refused(page.mask(files, data), 422, "invalid_request").endswith(f"({field})")
    assert not page.masker.seen


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"no picture", "image_not_decodable"), (b"GIF89a" + bytes(200), "image_format_not_permitted")],
)
def test_a_photo_goes_through_the_decoder_of_all_uploads(page, content, code):
    refused(page.mask({"person_image": ("p.png", content)}), 422, code)
    assert page.mask().status_code == 200


def test_a_photo_of_nobody(page):
    page.masker.failures.append(PersonNotFound("nobody"))
    assert refused(page.mask(), 422, "person_not_found") == "No person was found in the photo."


def test_a_service_that_makes_no_masks_names_the_field_that_it_needs(tmp_path):
    with opened(tmp_path, masker=False) as page:
        assert refused(page.mask(), 422, "invalid_request").endswith("(mask_image)")


def test_a_mask_takes_a_place_of_the_service(tmp_path):
    with opened(tmp_path, max_in_flight=1) as page, ThreadPoolExecutor(1) as pool:
        page.engine.may_end.clear()
        running = pool.submit(page.plain)
        assert page.engine.begun.wait(10)
        answer = page.mask()
        refused(answer, 503, "overloaded")
        assert int(answer.headers["Retry-After"]) >= 1
        page.engine.may_end.set()
        assert running.result(20).status_code == 200
        assert page.mask().status_code == 200


@pytest.mark.parametrize("path", ["/api/mask", "/api/try-on/stream"])
def test_without_a_key_that_is_ours_nobody_enters(tmp_path, path):
    with opened(tmp_path, api_keys=("k" * 16,)) as page:
        assert requests.post(page.url + path, timeout=30).status_code == 401
        assert requests.post(page.url + path, headers={"X-API-Key": "m" * 16}, timeout=30).status_code == 403
        assert page.mask(**{"X-API-Key": "k" * 16}).status_code == 200
        assert page.get("/").status_code == 200


# --- a try-on with its steps


def test_a_try_on_is_told_step_by_step_and_ends_with_the_picture(page):
    told = events_of(page.stream(data={"num_inference_steps": "5", "seed": "7"}))
    assert [name for name, _ in told[-1:]] == ["result"]
    steps = [payload for name, payload in told[:-1] if name == "progress"]
    assert len(steps) == len(told) - 1
    assert all(step["total"] == 5 and 0 <= step["done"] <= 5 for step in steps)
    assert [step["done"] for step in steps] == sorted({step["done"] for step in steps})
    result = told[-1][1]
    assert (result["seed"], result["mask_source"], result["engine"]) == ("7", "auto", "stand-in")
    assert (result["width"], result["height"]) == ("768", "1024")


@pytest.mark.parametrize("mask", [False, True])
def test_the_same_form_makes_the_same_job_and_the_same_bytes_as_the_rest_door(page, mask):
    files = {**BOTH, "mask_image": FILES["mask.png"]} if mask else BOTH
    data = {"cloth_type": "outer", "num_inference_steps": "3", "output_size": "person", "output_format": "png"}
    (_, result) = events_of(page.stream(files, data))[-1]
    plain = page.plain(files, data)
    assert result["job_id"] == plain.headers["X-Job-Id"]
    assert result["imageBase64"] == plain.json()["imageBase64"]
    assert base64.b64decode(result["imageBase64"], validate=True).startswith(b"\x89PNG")


def test_a_seed_that_was_drawn_is_told_to_the_last_digit(page):
    (_, result) = events_of(page.stream(data={"seed": "-1", "num_inference_steps": "2"}))[-1]
    assert int(result["seed"]) == page.engine.made[-1].seed


def test_steps_are_told_while_they_happen(page):
    page.engine.may_end.clear()
    with closing(page.stream(data={"num_inference_steps": "4"})) as response:
        lines = response.iter_lines(chunk_size=1, decode_unicode=True)
        told = []
        while '"done": 1' not in (told[-1] if told else ""):
            told.append(next(lines))
        assert page.app.admission.taken == 1
        page.engine.may_end.set()
        assert any(line == "event: result" for line in lines)


def test_whoever_waits_long_gets_signs_of_life(page, monkeypatch):
    monkeypatch.setattr(container.page_api, "ALIVE_S", 0.05)
    page.engine.may_end.clear()
    with closing(page.stream()) as response:
        lines = response.iter_lines(chunk_size=1, decode_unicode=True)
        assert next(line for line in lines if line.startswith(":")) == ": waiting"
        page.engine.may_end.set()
        assert any(line == "event: result" for line in lines)


@pytest.mark.parametrize(
    ("data", "field"),
    [({"num_inference_steps": "101"}, "num_inference_steps"), ({"seed": "x"}, "seed"), ({"colour": "red"}, "colour")],
)
def test_a_wrong_field_has_a_status_of_its_own_and_no_stream(page, data, field):
    assert field in refused(page.stream(data=data), 422, "invalid_request")
    assert not page.engine.made


def test_what_is_no_form_is_refused(page):
    answer = requests.post(f"{page.url}/api/try-on/stream", json={}, timeout=30)
    refused(answer, 415, "unsupported_content_type")


def test_a_failure_after_the_beginning_is_the_last_event(page):
    page.engine.failures.append(OutOfMemory("CUDA out of memory"))
    (name, told) = events_of(page.stream())[-1]
    assert (name, told["code"], told["retryable"]) == ("error", "gpu_failed", True)
    assert told["detail"] == "GPU out of memory. Image may be too large. Error: gpu_failed"
    assert set(told) == {"detail", "code", "retryable", "request_id"}
    assert events_of(page.stream())[-1][0] == "result"


def test_a_picture_that_cannot_be_decoded_is_the_last_event(page):
    (name, told) = events_of(page.stream({**BOTH, "cloth_image": b"no picture"}))[-1]
    assert (name, told["code"], told["retryable"]) == ("error", "image_not_decodable", False)


def test_a_service_whose_places_are_taken_says_so_before_a_stream_begins(tmp_path):
    with opened(tmp_path, max_in_flight=1) as page, ThreadPoolExecutor(1) as pool:
        page.engine.may_end.clear()
        running = pool.submit(lambda: page.stream().content)
        assert page.engine.begun.wait(10)
        answer = page.stream()
        refused(answer, 503, "overloaded")
        assert int(answer.headers["Retry-After"]) >= 1
        page.engine.may_end.set()
        assert b"event: result" in running.result(20)


def test_a_picture_that_is_too_late_is_the_last_event_with_when_to_come_back(tmp_path):
    with opened(tmp_path, deadline_s=1) as page:
        page.engine.may_end.clear()
        (name, told) = events_of(page.stream())[-1]
        page.engine.may_end.set()
        assert (name, told["code"], told["retryable"]) == ("error", "deadline_exceeded", True)


def test_a_caller_who_leaves_the_queue_costs_no_picture(tmp_path, caplog):
    with opened(tmp_path, max_in_flight=2) as page, ThreadPoolExecutor(1) as pool:
        page.engine.may_end.clear()
        first = pool.submit(lambda: page.stream().content)
        assert page.engine.begun.wait(10)
        second = page.stream(data={"seed": "1"})
        assert second.status_code == 200  # it waits for the engine
        second.close()
        time.sleep(1)  # the server must see that it left
        page.engine.may_end.set()
        assert b"event: result" in first.result(20)
        until(lambda: page.app.admission.taken == 0)
        assert [settings.seed for settings in page.engine.made] == [42]
        counted = page.app.metrics.registry.get_sample_value("vton_requests_total", {"code": "caller_left"})
        assert counted == 1
        assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


def test_a_caller_who_leaves_while_it_is_made_gives_the_place_back(page):
    page.engine.may_end.clear()
    left = page.stream()
    assert page.engine.begun.wait(10)
    left.close()
    page.engine.may_end.set()
    until(lambda: page.app.admission.taken == 0)
    assert events_of(page.stream())[-1][0] == "result"


def test_a_reader_who_reads_nothing_holds_no_place(page):
    body = requests.Request(
        "POST", page.url, files=BOTH, data={"num_inference_steps": "100", "output_format": "png"}
    ).prepare()
    host, port = page.url.rpartition("/")[2].split(":")
    head = (
        f"POST /api/try-on/stream HTTP/1.1\r\nHost: {host}\r\nContent-Type: {body.headers['Content-Type']}\r\n"
        f"Content-Length: {len(body.body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + body.body)
        until(lambda: page.engine.made)
        until(lambda: page.app.admission.taken == 0)


def test_a_try_on_that_the_end_of_the_process_cuts_off_is_told_so(tmp_path):
    engine = SteppingEngine()
    engine.may_end.clear()
    with running_app(tmp_path, engine=engine, masker=StandInMasker(), rest=True) as app:
        with http_server(doors(app, page=True)) as url:
            response = requests.post(f"{url}/api/try-on/stream", files=BOTH, timeout=20, stream=True)
            assert engine.begun.wait(10)
        (name, told) = events_of(response)[-1]
        assert (name, told["code"], told["retryable"]) == ("error", "draining", True)


def test_requests_are_counted_by_how_they_end(page):
    events_of(page.stream())
    events_of(page.stream({**BOTH, "cloth_image": b"no picture"}))
    counted = page.app.metrics.registry.get_sample_value
    until(lambda: counted("vton_requests_total", {"code": "image_not_decodable"}) == 1)
    assert counted("vton_requests_total", {"code": "ok"}) == 1


# --- the command


def test_a_port_that_is_taken_is_refused_before_a_browser_opens_the_page_of_somebody_else(page):
    port = page.url.rpartition(":")[2]
    result = CliRunner().invoke(main, ["demo", "--web", "--port", port], env={"BROWSER": "false"})
    assert result.exit_code == 78
    assert "in use" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("options", "environ", "status", "said"),
    [
        (["--port", "0"], {}, 2, "--port"),
        (["--host", "no such host"], {}, 78, "VTON_HOST"),
        ([], {"VTON_STEPS": "0"}, 78, "VTON_STEPS"),
        ([], {"VTON_STEP": "8"}, 78, "VTON_STEP"),
    ],
)
def test_a_wrong_option_is_refused_with_a_sentence(options, environ, status, said):
    result = CliRunner().invoke(main, ["demo", "--web", "--no-browser", *options], env=environ)
    assert result.exit_code == status
    assert said in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000/"),
        ("0.0.0.0", "http://127.0.0.1:8000/"),
        ("::1", "http://[::1]:8000/"),
        ("localhost", "http://localhost:8000/"),
    ],
)
def test_the_address_of_the_page_is_one_that_a_browser_here_can_open(host, url):
    assert page_url(host, 8000) == url
