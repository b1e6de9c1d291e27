"""The SageMaker door over a real socket, in front of a stand-in engine."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from stand_in import FakeFetcher, RecordingNotifier, StandInEngine, running_app, usual_request
from structlog.testing import capture_logs

from container.vton_api import create_app
from deploy.demo import http_server
from model.interface import EngineError

JSON = {"Content-Type": "application/json"}
ERROR_MEMBERS = {"code", "message", "retryable", "request_id", "retry_after_s", "field", "object_key"}


class Door:
    """A served app and what stands behind it."""

    def __init__(self, url, app, engine, fetcher, notifier, folder):
        self.url, self.app, self.engine, self.fetcher = url, app, engine, fetcher
        self.notifier, self.folder = notifier, folder

    def post(self, body, **headers):
        return requests.post(f"{self.url}/invocations", data=body, headers={**JSON, **headers}, timeout=60)

    def ask(self, **changes):
        return self.post(json.dumps(usual_request(**changes)))

    def raw(self, sent, timeout_s=10.0):
        """What comes back on a bare socket until the other side closes it."""
        host, port = self.url.rpartition("/")[2].split(":")
        received = b""
        with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(sent)
            with contextlib.suppress(ConnectionError, socket.timeout):
                while chunk := connection.recv(65536):
                    received += chunk
        return received

    def nothing_happened(self):
        return not self.fetcher.asked and not self.notifier.events and not any(self.folder.rglob("result*"))


@pytest.fixture
def door(tmp_path):
    engine, fetcher, notifier = StandInEngine(), FakeFetcher(), RecordingNotifier()
    running = running_app(tmp_path, engine=engine, fetcher=fetcher, notifier=notifier)
    with running as app, http_server(create_app(app)) as url:
        yield Door(url, app, engine, fetcher, notifier, tmp_path)
        assert app.admission.taken == 0


def code_of(response):
    error = response.json()["error"]
    assert set(error) <= ERROR_MEMBERS
    assert {"code", "message", "retryable", "request_id"} <= set(error)
    return response.status_code, error["code"], error.get("field")


def test_a_good_request_is_answered_with_the_contracts_members(door):
    answer = door.ask()
    assert answer.status_code == 200
    assert set(answer.json()) == {
        *("object_key", "bucket", "s3_uri", "etag", "job_id", "seed", "width", "height", "engine"),
        *("mask_source", "timings_ms", "message"),
    }
    assert answer.headers["content-length"] == str(len(answer.content))


@pytest.fixture
def hurried(tmp_path):
    """A door whose engine ends when it is told, and whose requests have a second."""
    engine, notifier = StandInEngine(), RecordingNotifier()
    running = running_app(tmp_path, engine=engine, notifier=notifier, deadline_s=1)
    with running as app, http_server(create_app(app)) as url:
        engine.begun.clear()
        engine.may_end.clear()
        yield Door(url, app, engine, None, notifier, tmp_path)


def until(condition):
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_a_picture_that_is_late_is_stored_and_a_repeat_finds_it(hurried):
    made = len(hurried.engine.made)
    answer = hurried.ask()
    assert code_of(answer) == (504, "deadline_exceeded", None)
    assert answer.json()["error"]["retry_after_s"] >= 1
    assert hurried.app.admission.taken == 1  # it has its place as long as it works
    hurried.engine.may_end.set()
    until(lambda: not hurried.app.admission.taken)
    assert len(hurried.notifier.events) == 1
    assert hurried.ask().status_code == 200
    assert len(hurried.engine.made) == made + 1


def test_a_repeat_waits_for_the_late_picture_and_begins_none(hurried):
    made = len(hurried.engine.made)
    assert hurried.ask().status_code == 504
    with ThreadPoolExecutor(1) as pool:
        repeat = pool.submit(hurried.ask)
        until(lambda: hurried.app.admission.taken == 2)
        hurried.engine.may_end.set()
        assert repeat.result().status_code == 200
    assert len(hurried.engine.made) == made + 1


@pytest.mark.parametrize(
    ("failure", "code"), [(EngineError("torch said no"), "generation_failed"), (ValueError("a bug"), "internal")]
)
def test_a_late_picture_that_fails_is_told_of_and_gives_its_place_back(hurried, failure, code):
    with capture_logs() as lines:
        hurried.engine.failures.append(failure)
        assert hurried.ask().status_code == 504
        hurried.engine.may_end.set()
        until(lambda: any(line["event"] == "late_request_failed" for line in lines))
    assert next(line["code"] for line in lines if line["event"] == "late_request_failed") == code
    until(lambda: not hurried.app.admission.taken)
    assert hurried.ask().status_code == 200


def test_a_request_that_gets_no_thread_gives_its_place_back(door, monkeypatch):
    def submit(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(door.app.request_pool, "submit", submit)
    assert code_of(door.ask()) == (500, "internal", None)
    assert door.app.admission.taken == 0
    monkeypatch.undo()
    assert door.ask().status_code == 200


def test_ping_is_200_with_an_empty_body(door):
    answer = requests.get(f"{door.url}/ping", timeout=30)
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize(
    "body", [b"", b'{"person_image_url":', b"{'a': 1}", b"\xff\xfe", b'{"a": NaN}', b'{"a":1,"a":2}']
)
def test_h01_h02_what_is_no_json_is_400(door, body):
    assert code_of(door.post(body)) == (400, "invalid_json", None)
    assert door.nothing_happened()


def test_deeply_nested_json_and_endless_numbers_are_refused(door):
    assert door.post(b"[" * 30_000).status_code == 400
    assert door.post(b'{"seed": ' + b"9" * 5000 + b"}").status_code in (400, 422)
    assert door.post(json.dumps(usual_request(userId="\ud800"))).status_code == 422


@pytest.mark.parametrize("body", [b"null", b"[]", b'"x"', b"7"])
def test_h03_json_that_is_no_object_is_422(door, body):
    assert code_of(door.post(body)) == (422, "invalid_request", None)
    assert door.nothing_happened()


@pytest.mark.parametrize(
    "field", ["person_image_url", "upper_cloth_url", "lower_cloth_url", "mask_image_url", "userId", "timestamp"]
)
def test_h04_m06_a_missing_field_is_named(door, field):
    assert code_of(door.ask(**{field: None})) == (422, "invalid_request", field)
    assert door.nothing_happened()


def test_a_missing_cloth_type_is_overall(door):
    assert door.ask(cloth_type=None).status_code == 200


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"attn_ckpt": "/etc/passwd"}, "attn_ckpt"),  # H05
        ({"cloth_type": "hat"}, "cloth_type"),  # H06
        ({"cloth_type": "OVERALL"}, "cloth_type"),
        ({"cloth_type": ""}, "cloth_type"),
        ({"userId": 7}, "userId"),  # H07
        ({"person_image_url": []}, "person_image_url"),
        ({"num_inference_steps": 0}, "num_inference_steps"),  # G07
        ({"num_inference_steps": 10**6}, "num_inference_steps"),
        ({"guidance_scale": -5}, "guidance_scale"),
        ({"guidance_scale": 1e9}, "guidance_scale"),
        ({"seed": 2**64}, "seed"),
        ({"width": 7}, "width"),
        ({"userId": "../../etc"}, "userId"),  # K01
        ({"userId": "a/b"}, "userId"),
        ({"userId": "a\\b"}, "userId"),
        ({"userId": "."}, "userId"),
        ({"userId": ".."}, "userId"),
        ({"userId": ""}, "userId"),
        ({"userId": "u" * 65}, "userId"),
        ({"timestamp": "../x"}, "timestamp"),  # K03
        ({"timestamp": "240901-000000/../../y"}, "timestamp"),
        ({"timestamp": "t" * 10_000}, "timestamp"),
        ({"timestamp": "٢٤٠٩٠١"}, "timestamp"),
    ],
)
def test_a_field_out_of_its_range_is_named_and_never_echoed(door, change, field):
    answer = door.ask(**change)
    assert code_of(answer) == (422, "invalid_request", field)
    assert answer.json()["error"]["message"] == "A field of the request is missing, unknown or out of range."
    assert door.nothing_happened()


def test_h14_a_large_body_is_refused_before_it_is_read(door):
    head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 66560\r\n\r\n"
    began = time.monotonic()
    answer = door.raw(head)  # no body ever comes
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"request_too_large" in answer
    assert time.monotonic() - began < 3


def test_a_large_body_without_a_length_is_refused_while_it_is_read(door):
    head = (
        b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    assert door.raw(head + (b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 5).startswith(b"HTTP/1.1 413")


def test_a_large_body_that_is_sent_before_the_answer_is_read_is_answered(door):
    head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 6000000\r\n\r\n"
    for _ in range(5):
        assert door.raw(head + b" " * 6_000_000).startswith(b"HTTP/1.1 413")
    assert door.ask().status_code == 200


def test_no_more_than_some_of_a_large_body_is_read(door):
    head = (
        b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 90000000\r\n\r\n"
    )
    host, port = door.url.rpartition("/")[2].split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head)
        with pytest.raises(OSError):
            for _ in range(90):
                connection.sendall(b" " * 1_000_000)


def test_h16_a_body_that_does_not_come_is_408_and_the_connection_closes(door, monkeypatch):
    monkeypatch.setattr("container.vton_api.BODY_TIMEOUT_S", 0.3)
    head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    answer = door.raw(head)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in answer
    assert door.app.admission.taken == 0


ENDLESS_HEADERS = {
    "one_of_1_mb": b"X: " + b"a" * 1_000_000 + b"\r\n",
    "5000": b"".join(b"X-%d: a\r\n" % number for number in range(5000)),
}


@pytest.mark.parametrize("kind", ENDLESS_HEADERS)
def test_h18_endless_headers_end_in_a_refusal_and_the_next_request_passes(door, kind):
    before = psutil.Process().memory_info().rss
    answer = door.raw(b"GET /ping HTTP/1.1\r\nHost: x\r\n" + ENDLESS_HEADERS[kind] + b"\r\n", timeout_s=3)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert psutil.Process().memory_info().rss - before < 20e6
    assert door.ask().status_code == 200


@pytest.mark.parametrize(
    "content_type", ["text/plain", "multipart/form-data; boundary=" + "-" * 10_000, "application/octet-stream", ""]
)
def test_h19_another_content_type_is_415(door, content_type):
    answer = door.post(json.dumps(usual_request()), **{"Content-Type": content_type})
    assert code_of(answer) == (415, "unsupported_content_type", None)
    assert door.nothing_happened()


def test_a_charset_beside_the_content_type_is_fine(door):
    assert door.post(json.dumps(usual_request()), **{"Content-Type": "application/json; charset=UTF-8"}).ok


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/invocations", 405, "method_not_allowed"),
        ("PUT", "/invocations", 405, "method_not_allowed"),
        ("DELETE", "/invocations", 405, "method_not_allowed"),
        ("POST", "/ping", 405, "method_not_allowed"),
        ("GET", "/", 404, "not_found"),
        ("GET", "/ping/", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/redoc", 404, "not_found"),
        ("GET", "/openapi.json", 404, "not_found"),
    ],
)
def test_h22_h24_other_paths_and_methods_get_our_error_body(door, method, path, status, code):
    assert code_of(requests.request(method, door.url + path, timeout=30)) == (status, code, None)


def test_h22_a_path_that_climbs_is_not_found(door):
    answer = door.raw(b"GET /invocations/../ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404")


def test_docs_are_served_when_set(tmp_path):
    with running_app(tmp_path, docs=True) as app, http_server(create_app(app)) as url:
        assert requests.get(f"{url}/openapi.json", timeout=30).ok


def test_h25_a_client_that_leaves_costs_no_place(door):
    body = json.dumps(usual_request()).encode()
    head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    host, port = door.url.rpartition("/")[2].split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head % len(body) + body)
        assert door.engine.begun.wait(30)
    ends = time.monotonic() + 5
    while door.app.admission.taken and time.monotonic() < ends:
        time.sleep(0.02)
    assert door.app.admission.taken == 0
    assert len(door.notifier.events) <= 1


def test_a_client_that_leaves_while_it_waits_costs_no_picture(door):
    door.engine.may_end.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(door.ask, timestamp="first")
        assert door.engine.begun.wait(30)
        body = json.dumps(usual_request(timestamp="second")).encode()
        head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        host, port = door.url.rpartition("/")[2].split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head % len(body) + body)
            wait_until(lambda: len(door.app.worker._waiting) == 1)
        time.sleep(1)  # the server must see that it left
        door.engine.may_end.set()
        assert first.result(10).status_code == 200
    wait_until(lambda: door.app.admission.taken == 0)
    assert len(door.engine.made) == 1
    assert not (door.folder / "users/7/vton_result/second").exists()
    assert 'vton_requests_total{code="caller_left"} 1.0' in requests.get(f"{door.url}/metrics", timeout=30).text


def wait_until(condition, seconds=30.0):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_q01_one_more_than_fits_is_429_at_once_and_fetches_nothing(tmp_path):
    engine, fetcher = StandInEngine(), FakeFetcher()
    engine.may_end.clear()
    running = running_app(tmp_path, engine=engine, fetcher=fetcher, max_in_flight=2)
    with running as app, http_server(create_app(app)) as url, ThreadPoolExecutor(2) as pool:
        door = Door(url, app, engine, fetcher, None, tmp_path)
        accepted = [pool.submit(door.ask, timestamp=f"t{number}") for number in range(2)]
        while app.admission.taken < 2 or len(fetcher.asked) < 8:
            time.sleep(0.01)
        answer = door.ask(timestamp="t3")
        assert code_of(answer) == (429, "overloaded", None)
        assert answer.headers["retry-after"] == str(answer.json()["error"]["retry_after_s"])
        assert len(fetcher.asked) == 8
        assert requests.get(f"{url}/ping", timeout=30).status_code == 200
        engine.may_end.set()
        assert [future.result(10).status_code for future in accepted] == [200, 200]


def test_before_the_model_is_ready_ping_and_invocations_are_503(tmp_path):
    with running_app(tmp_path) as app, http_server(create_app(app)) as url:
        app.worker._loaded.clear()
        assert code_of(requests.get(f"{url}/ping", timeout=30)) == (503, "not_ready", None)
        assert code_of(Door(url, app, None, None, None, tmp_path).ask()) == (503, "not_ready", None)
        app.worker._loaded.set()


def test_while_draining_ping_and_invocations_are_503(door):
    door.app.admission.drain()
    assert code_of(requests.get(f"{door.url}/ping", timeout=30)) == (503, "draining", None)
    assert code_of(door.ask()) == (503, "draining", None)


def test_what_nobody_foresaw_is_500_internal_and_says_nothing(door):
    door.engine.failures.append(KeyError("/app/secret 0x7f0123456789"))
    answer = door.ask()
    assert code_of(answer) == (500, "internal", None)
    assert "0x" not in answer.text
    assert "secret" not in answer.text
    assert door.ask().status_code == 200


def test_the_callers_ids_come_back(door):
    answer = door.post(
        json.dumps(usual_request()),
        **{"X-Amzn-SageMaker-Inference-Id": "call-9", "X-Amzn-SageMaker-Custom-Attributes": "tenant=blue"},
    )
    assert answer.headers["X-Amzn-SageMaker-Custom-Attributes"] == "tenant=blue"
    (event,) = door.notifier.events
    assert (event["inference_id"], event["custom_attributes"]) == ("call-9", "tenant=blue")
    failed = door.post(b"{", **{"X-Amzn-SageMaker-Inference-Id": "call-10"})
    assert failed.json()["error"]["request_id"] == "call-10"


def test_an_inference_id_that_is_too_long_is_refused(door):
    answer = door.post(json.dumps(usual_request()), **{"X-Amzn-SageMaker-Inference-Id": "x" * 65})
    assert answer.status_code == 422


def test_execution_parameters_are_batch_transforms(door):
    assert requests.get(f"{door.url}/execution-parameters", timeout=30).json() == {
        "MaxConcurrentTransforms": 8,
        "BatchStrategy": "SINGLE_RECORD",
        "MaxPayloadInMB": 1,
    }


def test_metrics_are_prometheus_text(door):
    door.ask()
    door.ask(seed="x")
    text = requests.get(f"{door.url}/metrics", timeout=30).text
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert values["vton_requests_total", "ok"] == 1
    assert values["vton_requests_total", "invalid_request"] == 1
    assert values["vton_generations_total",] == 1
    assert values["vton_ready",] == 1
    assert values["vton_in_flight",] == 0
    assert values["vton_stage_seconds_count", "generate"] == 1


def test_ping_answers_while_pictures_are_made(door):
    door.engine.may_end.clear()
    thread = threading.Thread(target=door.ask)
    thread.start()
    assert door.engine.begun.wait(30)
    assert requests.get(f"{door.url}/ping", timeout=5).status_code == 200
    door.engine.may_end.set()
    thread.join()
