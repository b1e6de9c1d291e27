"""The REST door over a real socket, in front of a stand-in engine."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import requests
from stand_in import (
    FakeFetcher,
    RecordingNotifier,
    StandInEngine,
    StandInMasker,
    running_app,
    usual_files,
    usual_request,
)

import container.multipart
import container.rest_api
from container.fetch import MAX_BYTES
from container.server import doors
from container.settings import Settings, SettingsError
from deploy.demo import http_server
from model.interface import DeviceFailed, OutOfMemory

KEYS = ("k" * 16, "l" * 20)
FILES = usual_files()
STAND_IN = StandInMasker()


class Door:
    """A served app and what stands behind it."""

    def __init__(self, url, app, engine, fetcher, notifier, folder):
        self.url, self.app, self.engine, self.fetcher = url, app, engine, fetcher
        self.notifier, self.folder = notifier, folder

    def ask(self, files=None, data=None, **headers):
        files = {"person_image": FILES["person.png"], "cloth_image": FILES["upper.png"]} if files is None else files
        return requests.post(f"{self.url}/api/try-on", files=files, data=data or {}, headers=headers, timeout=60)

    def health(self):
        answer = requests.get(f"{self.url}/health", timeout=30)
        return answer.status_code, answer.json()["status"], answer.json()["message"]


@contextmanager
def opened(tmp_path, masker=STAND_IN, **settings):
    engine, fetcher, notifier = StandInEngine(), FakeFetcher(), RecordingNotifier()
    ports = {"engine": engine, "fetcher": fetcher, "notifier": notifier, "masker": masker}
    with running_app(tmp_path, **ports, rest=True, **settings) as app, http_server(doors(app)) as url:
        yield Door(url, app, engine, fetcher, notifier, tmp_path)
        assert app.admission.taken == 0


@pytest.fixture
def door(tmp_path):
    with opened(tmp_path) as door:
        yield door


def refused(response, status, code):
    told = response.json()
    assert (response.status_code, told["code"]) == (status, code), told
    assert set(told) == {"detail", "code", "retryable", "request_id"}
    return told["detail"]


# --- the document's own calls


def test_health(door):
    assert door.health() == (200, "healthy", "Service is ready")


def test_a_form_with_two_files_is_answered_with_the_picture(door):
    answer = door.ask(data={"cloth_type": "upper", "num_inference_steps": 50, "guidance_scale": 2.5})
    assert answer.status_code == 200
    assert set(answer.json()) == {"success", "imageBase64", "message"}
    assert (answer.json()["success"], answer.json()["message"]) == (True, "Try-on completed successfully")
    assert base64.b64decode(answer.json()["imageBase64"], validate=True).startswith(b"\xff\xd8")
    assert answer.headers["X-Seed"] == "42"


def test_nothing_is_fetched_stored_or_told(door):
    assert door.ask().status_code == 200
    assert not door.fetcher.asked
    assert not door.notifier.events
    assert not any(door.folder.iterdir())


def test_the_defaults_are_the_documents(door):
    door.ask()
    settings = door.engine.made[-1]
    assert (settings.steps, settings.guidance, settings.seed) == (50, 2.5, 42)


def test_where_a_form_says_nothing_the_settings_hold_and_fast_takes_its_steps(tmp_path):
    with opened(tmp_path, steps=30, guidance=3.5) as door:
        door.ask()
        door.ask(data={"quality": "fast"})
        door.ask(data={"quality": "fast", "num_inference_steps": "25"})
        made = [(each.quality, each.steps, each.guidance) for each in door.engine.made]
        assert made == [("exact", 30, 3.5), ("fast", 20, 3.5), ("fast", 25, 3.5)]


def test_a_quality_of_the_settings_holds_for_forms(tmp_path):
    with opened(tmp_path, quality="fast") as door:
        door.ask()
        assert (door.engine.made[0].quality, door.engine.made[0].steps) == ("fast", 20)


def test_seed_minus_one_draws_one_and_says_which(door):
    seeds = {door.ask(data={"seed": "-1"}).headers["X-Seed"] for _ in range(2)}
    assert len(seeds) == 2


# --- one core behind all doors


def test_the_same_request_makes_the_same_job_and_the_same_picture_through_both_doors(door):
    fields = usual_request(cloth_type="overall", output_format="jpeg", num_inference_steps=50, guidance_scale=2.5)
    stored = requests.post(f"{door.url}/invocations", json=fields, timeout=60).json()
    form = {
        "person_image": fields["person_image_url"],
        "cloth_image": fields["upper_cloth_url"],
        "lower_cloth_image": fields["lower_cloth_url"],
        "mask_image": fields["mask_image_url"],
        **{name: fields[name] for name in ("cloth_type", "userId", "timestamp")},
    }
    answer = door.ask(files={name: (None, value) for name, value in form.items()})
    assert answer.headers["X-Job-Id"] == stored["job_id"]
    assert base64.b64decode(answer.json()["imageBase64"]) == (door.folder / stored["object_key"]).read_bytes()


def test_the_same_files_make_the_same_job_whatever_they_are_called(door):
    named = door.ask(files={"person_image": ("a.png", FILES["person.png"]), "cloth_image": ("b", FILES["upper.png"])})
    other = door.ask(files={"person_image": FILES["upper.png"], "cloth_image": FILES["upper.png"]})
    assert named.headers["X-Job-Id"] == door.ask().headers["X-Job-Id"] != other.headers["X-Job-Id"]


def test_a_reference_to_a_file_that_did_not_come_along_is_no_url(tmp_path):
    digest = hashlib.sha256(FILES["person.png"]).hexdigest()
    with opened(tmp_path) as door:
        door.fetcher.files = {}
        answer = door.ask(files={"person_image": (None, f"sha256:{digest}"), "cloth_image": FILES["upper.png"]})
        refused(answer, 422, "image_not_found")  # the stand-in fetcher's; the real one refuses the scheme


@pytest.mark.parametrize(
    ("kind", "files", "used"),
    [
        ("upper", ("cloth_image",), {"upper_cloth_url"}),
        ("lower", ("cloth_image",), {"lower_cloth_url"}),
        ("overall", ("cloth_image",), {"overall_cloth_url"}),
        ("overall", ("cloth_image", "lower_cloth_image"), {"upper_cloth_url", "lower_cloth_url"}),
    ],
)
def test_a_garment_takes_the_place_that_its_type_has(kind, files, used):
    form = {"person_image": "p", "cloth_type": kind, **dict.fromkeys(files, "c")}
    made = container.rest_api.request_of(form)
    assert {name for name in ("upper_cloth_url", "lower_cloth_url", "overall_cloth_url") if getattr(made, name)} == used


def test_a_mask_that_came_along_is_used(door):
    answer = door.ask(
        files={
            "person_image": FILES["person.png"],
            "cloth_image": FILES["upper.png"],
            "mask_image": FILES["mask.png"],
        }
    )
    assert answer.status_code == 200
    assert door.ask().headers["X-Job-Id"] != answer.headers["X-Job-Id"]


# --- refusals


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"num_inference_steps": "many"}, "num_inference_steps"),
        ({"num_inference_steps": "101"}, "num_inference_steps"),
        ({"num_inference_steps": "5e1"}, "num_inference_steps"),
        ({"guidance_scale": "nan"}, "guidance_scale"),
        ({"seed": "-2"}, "seed"),
        ({"seed": "9" * 30}, "seed"),
        ({"cloth_type": "hat"}, "cloth_type"),
        ({"cloth_type": "upper", "lower_cloth_image": "https://images.example/lower.png"}, "lower_cloth_image"),
        ({"colour": "red"}, "colour"),
        ({"userId": "../x"}, "userId"),
    ],
)
def test_a_wrong_field_is_named_and_nothing_runs(door, data, field):
    detail = refused(door.ask(data=data), 422, "invalid_request")
    assert field in detail
    assert not door.engine.made


@pytest.mark.parametrize("missing", ["person_image", "cloth_image"])
def test_a_missing_picture_is_named(door, missing):
    files = {name: FILES["person.png"] for name in ("person_image", "cloth_image") if name != missing}
    assert missing in refused(door.ask(files=files), 422, "invalid_request")


def test_a_file_in_the_place_of_a_text_is_refused(door):
    files = {"person_image": FILES["person.png"], "cloth_image": FILES["upper.png"], "seed": b"42"}
    assert "seed" in refused(door.ask(files=files), 422, "invalid_request")


def test_a_field_that_is_there_twice_is_refused(door):
    files = [("person_image", FILES["person.png"]), ("person_image", FILES["person.png"])]
    refused(door.ask(files=files), 422, "invalid_request")


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"no picture", "image_not_decodable"), (b"GIF89a" + bytes(200), "image_format_not_permitted"), (b"", None)],
)
def test_an_upload_goes_through_the_same_decoder(door, content, code):
    answer = door.ask(files={"person_image": ("p.png", content), "cloth_image": FILES["upper.png"]})
    refused(answer, 422, code or "image_not_decodable")
    assert door.ask().status_code == 200


def test_a_file_above_the_limit_is_refused_and_named(door):
    files = {"person_image": bytes(MAX_BYTES + 1), "cloth_image": FILES["upper.png"]}
    assert "person_image" in refused(door.ask(files=files), 422, "image_too_large")


@pytest.mark.parametrize("body", [b"", b"--x\r\n", b"--b\r\nnot a header\r\n\r\nx\r\n--b--", b"\xff" * 100])
def test_what_is_no_form_is_refused(door, body):
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = requests.post(f"{door.url}/api/try-on", data=body, headers=headers, timeout=30)
    refused(answer, 422, "invalid_request")


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data", "", "text/plain"])
def test_another_content_type_is_refused(door, content_type):
    answer = requests.post(f"{door.url}/api/try-on", data=b"{}", headers={"Content-Type": content_type}, timeout=30)
    assert answer.status_code in (415, 422)
    assert set(answer.json()) == {"detail", "code", "retryable", "request_id"}


def test_a_form_that_is_announced_too_large_is_refused_unread(door):
    host, port = door.url.rpartition("/")[2].split(":")
    head = (
        f"POST /api/try-on HTTP/1.1\r\nHost: {host}\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        f"Content-Length: {container.multipart.MAX_FORM_BYTES + 1}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode())
        assert b" 413 " in connection.recv(65536).splitlines()[0]


def form_of(*parts, end=b"--B--\r\n"):
    """A form of (name, content) or (whole headers, content), whose boundary is B."""
    lines = [b"Content-Disposition: form-data; " + b"name=" + name if b":" not in name else name for name, _ in parts]
    return b"".join(b"--B\r\n" + line + b"\r\n\r\n" + part[1] + b"\r\n" for line, part in zip(lines, parts)) + end


def send(door, body, boundary="boundary=B"):
    headers = {"Content-Type": f"multipart/form-data; {boundary}"}
    return requests.post(f"{door.url}/api/try-on", data=body, headers=headers, timeout=60)


PICTURES = tuple(
    (b'Content-Disposition: form-data; name="%s"; filename="a"' % name, FILES[file])
    for name, file in ((b"person_image", "person.png"), (b"cloth_image", "upper.png"))
)


def test_a_file_that_nobody_chose_is_not_there(door):
    """Browsers send an empty part without a name for it."""
    empty = b'Content-Disposition: form-data; name="%s"; filename=""\r\nContent-Type: application/octet-stream'
    plain = send(door, form_of(*PICTURES))
    unchosen = send(door, form_of(*PICTURES, (empty % b"mask_image", b""), (empty % b"lower_cloth_image", b"")))
    assert (unchosen.status_code, unchosen.headers["X-Job-Id"]) == (200, plain.headers["X-Job-Id"])
    refused(send(door, form_of(PICTURES[0], (empty % b"cloth_image", b""))), 422, "invalid_request")


@pytest.mark.parametrize(
    "body",
    [
        form_of(*PICTURES, (b"seed", b"7"), end=b""),
        form_of(*PICTURES, (b"seed", b"7"), end=b"--B"),
        form_of(*PICTURES, (b"seed", b"7"))[:-12],
        form_of(*PICTURES, (b'Content-Disposition: form-data; name="mask_image"; filename="m"', FILES["mask.png"]))[
            :-90
        ],
    ],
    ids=["no_end", "half_an_end", "half_a_field", "half_a_file"],
)
def test_a_form_that_breaks_off_makes_no_other_picture(door, body):
    assert send(door, form_of(*PICTURES, (b"seed", b"7"))).headers["X-Seed"] == "7"
    made = len(door.engine.made)
    refused(send(door, body), 422, "invalid_request")
    assert len(door.engine.made) == made


@pytest.mark.parametrize(
    ("body", "boundary"),
    [
        (form_of((b"Content-Disposition: form-data; name*=utf-8''a; name*0=b", b"")), "boundary=B"),
        (form_of((b"Content-Disposition: form-data; name*" + b"1" * 5000 + b"=a", b"")), "boundary=B"),
        (form_of(*PICTURES), "boundary=B; a*=utf-8''x; a*0=y"),
        (form_of(*PICTURES), "boundary=B; charset=undefined"),
        (form_of((b"Content-Disposition: form-data", b"")), "boundary=B"),
    ],
    ids=["name_in_pieces", "endless_piece", "header_in_pieces", "undefined_charset", "no_name"],
)
def test_what_the_form_parser_stumbles_over_is_refused(door, body, boundary):
    answer = send(door, body, boundary)
    if answer.status_code != 200 or boundary == "boundary=B":  # later parsers take the odd headers
        refused(answer, 422, "invalid_request")


@pytest.mark.parametrize(
    "headers", [b"a:b\r\n" * 9, b"a: " + b"b" * 5000 + b"\r\n", b":\r\n" * 9], ids=["9", "5 kB", "empty"]
)
def test_a_part_has_few_headers_and_short_ones(door, headers):
    part = headers + PICTURES[0][0]
    refused(send(door, form_of((part, FILES["person.png"]), PICTURES[1])), 422, "invalid_request")
    assert send(door, form_of((b"a:b\r\n" + PICTURES[0][0], FILES["person.png"]), PICTURES[1])).status_code == 200


def test_endless_headers_of_a_part_hold_up_nobody(door):
    body = form_of((b"a:b\r\n" * 1_000_000 + PICTURES[0][0], b""))
    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        asked = pool.submit(send, door, body)
        assert door.health()[0] == 200
        asked.exception(20)  # refused, or the connection closed on it
        assert time.monotonic() - began < 5
    assert door.ask().status_code == 200


def test_a_caller_who_leaves_while_it_sends_is_no_failure_of_ours(door):
    host, port = door.url.rpartition("/")[2].split(":")
    for path, kind in (("/api/try-on", "multipart/form-data; boundary=B"), ("/invocations", "application/json")):
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: 5000\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(head.encode() + b"--B\r\n")
    counted, ends = "", time.monotonic() + 5
    while 'code="caller_left"} 2.0' not in counted and time.monotonic() < ends:
        counted = requests.get(f"{door.url}/metrics", timeout=30).text
    assert 'vton_requests_total{code="caller_left"} 2.0' in counted
    assert 'code="internal"' not in counted


def test_the_quality_of_the_file_is_chosen(door):
    small, large = (door.ask(data={"output_quality": quality}) for quality in (40, 95))
    assert len(small.json()["imageBase64"]) < len(large.json()["imageBase64"])
    assert large.headers["X-Job-Id"] == door.ask().headers["X-Job-Id"] != small.headers["X-Job-Id"]
    assert refused(door.ask(data={"output_quality": "101"}), 422, "invalid_request").endswith("(output_quality)")


def test_what_the_service_misses_has_the_name_of_the_form(tmp_path):
    with opened(tmp_path, masker=None) as door:
        assert refused(door.ask(), 422, "invalid_request").endswith("(mask_image)")


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "code"),
    [
        ("GET", "/api/try-on", {}, 405, "method_not_allowed"),
        ("POST", "/api/try-on/", {}, 404, "not_found"),
        ("POST", "/health", {}, 405, "method_not_allowed"),
        ("POST", "/api/try-on", {f"X-{number}": "a" for number in range(101)}, 413, "request_too_large"),
    ],
)
def test_below_its_paths_every_error_has_a_detail(door, method, path, headers, status, code):
    refused(requests.request(method, door.url + path, headers=headers, timeout=30), status, code)


def test_other_paths_keep_the_errors_of_the_sagemaker_door(door):
    assert requests.get(f"{door.url}/nothing", timeout=30).json()["error"]["code"] == "not_found"


def test_the_description_has_the_form_and_the_statuses(tmp_path):
    with opened(tmp_path, docs=True) as door:
        described = requests.get(f"{door.url}/openapi.json", timeout=30).json()["paths"]["/api/try-on"]["post"]
        form = described["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert form["required"] == ["person_image", "cloth_image"]
        images = {"person_image", "cloth_image", "lower_cloth_image", "mask_image"}
        assert set(form["properties"]) == {*images, *container.rest_api.NUMBERS, *container.rest_api.TEXTS}
        assert {"200", "413", "415", "422", "503", "504"} <= set(described["responses"])


def test_a_form_that_does_not_come_is_408_and_gives_its_place_back(door, monkeypatch):
    monkeypatch.setattr(container.multipart, "UPLOAD_S", 0.2)
    host, port = door.url.rpartition("/")[2].split(":")
    form = "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 99"
    head = f"POST /api/try-on HTTP/1.1\r\nHost: x\r\n{form}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode())
        assert b" 408 " in connection.recv(65536).splitlines()[0]
    assert door.ask().status_code == 200


# --- outages, in the document's sentences


def test_a_service_whose_places_are_taken_is_busy(tmp_path):
    with opened(tmp_path, max_in_flight=1) as door, ThreadPoolExecutor(1) as pool:
        door.engine.may_end.clear()
        running = pool.submit(door.ask)
        assert door.engine.begun.wait(30)
        answer = door.ask()
        detail = refused(answer, 503, "overloaded")
        door.engine.may_end.set()
        assert running.result(10).status_code == 200
    assert detail == "GPU is busy processing another request. Please try again later."
    assert int(answer.headers["Retry-After"]) >= 1


def test_out_of_memory(door):
    door.engine.failures.append(OutOfMemory("CUDA out of memory. Tried to allocate 2.00 GiB"))
    detail = refused(door.ask(), 503, "gpu_failed")
    assert detail == "GPU out of memory. Image may be too large. Error: gpu_failed"
    assert door.ask().status_code == 200


def test_a_failed_device_is_unhealthy(door):
    door.engine.failures.append(DeviceFailed("CUDA error: an illegal memory access was encountered"))
    refused(door.ask(), 503, "gpu_failed")
    assert door.health()[:2] == (503, "unhealthy")


def test_a_draining_service_is_unhealthy(door):
    door.app.admission.drain()
    assert door.health()[:2] == (503, "unhealthy")
    refused(door.ask(), 503, "draining")


def test_a_service_that_loads_says_so(tmp_path, monkeypatch):
    with opened(tmp_path) as door:
        monkeypatch.setattr(type(door.app.worker), "ready", property(lambda _worker: False))
        assert door.health() == (503, "loading", "Models are still loading. Please wait and try again.")
        assert refused(door.ask(), 503, "not_ready") == "Models are still loading. Please wait and try again."


# --- keys, rates and origins


@pytest.mark.parametrize("path", ["/api/try-on", "/invocations"])
def test_without_a_key_that_is_ours_nobody_enters(tmp_path, path):
    with opened(tmp_path, api_keys=KEYS) as door:
        for headers, status in (({}, 401), ({"X-API-Key": "m" * 16}, 403), ({"Authorization": "Bearer \xe9"}, 403)):
            encoded = {name: value.encode("latin-1") for name, value in headers.items()}
            assert requests.post(door.url + path, headers=encoded, timeout=30).status_code == status
        assert door.ask(**{"X-API-Key": KEYS[0]}).status_code == 200
        assert door.ask(Authorization=f"Bearer {KEYS[1]}").status_code == 200
        assert door.health()[0] == 200


def test_each_key_has_its_own_rate(tmp_path):
    with opened(tmp_path, api_keys=KEYS, rate_limit="2/minute") as door:
        answers = [door.ask(**{"X-API-Key": KEYS[0]}) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert refused(answers[-1], 429, "overloaded") == "This caller asks too often."
        assert 1 <= int(answers[-1].headers["Retry-After"]) <= 60
        assert door.ask(**{"X-API-Key": KEYS[1]}).status_code == 200


def test_without_keys_the_address_has_a_rate(tmp_path):
    with opened(tmp_path, rate_limit="1/hour") as door:
        assert [door.ask().status_code for _ in range(2)] == [200, 429]


def test_other_origins_are_closed_unless_they_are_set(tmp_path):
    origin = {"Origin": "https://shop.example"}
    with opened(tmp_path / "closed") as door:
        assert (
            "access-control-allow-origin" not in requests.get(f"{door.url}/health", headers=origin, timeout=30).headers
        )
    with opened(tmp_path / "open", cors_origins=("https://shop.example",)) as door:
        answer = requests.get(f"{door.url}/health", headers=origin, timeout=30)
        assert answer.headers["access-control-allow-origin"] == "https://shop.example"
        other = requests.get(f"{door.url}/health", headers={"Origin": "https://evil.example"}, timeout=30)
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    "environ",
    [
        {"VTON_API_KEYS": "short"},
        {"VTON_RATE_LIMIT": "often"},
        {"VTON_CORS_ORIGINS": "*"},
        {"VTON_REST": "perhaps"},
    ],
)
def test_a_wrong_setting_is_named_without_its_value(environ):
    ((name, value),) = environ.items()
    with pytest.raises(SettingsError, match=name) as caught:
        Settings.from_env(environ)
    assert value not in str(caught.value)


def test_keys_are_no_part_of_what_is_logged():
    settings = Settings.from_env({"VTON_API_KEYS": ",".join(KEYS)})
    assert not any(key in json.dumps(settings.model_dump(mode="json")) for key in KEYS)


def test_a_closed_rest_door_is_no_path(tmp_path):
    with running_app(tmp_path) as app, http_server(doors(app)) as url:
        assert requests.get(f"{url}/health", timeout=30).status_code == 404


def test_a_caller_that_leaves_while_it_waits_costs_no_picture(door):
    door.engine.may_end.clear()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(door.ask)
        assert door.engine.begun.wait(30)
        with pytest.raises(requests.exceptions.ReadTimeout):
            requests.post(
                f"{door.url}/api/try-on",
                files={"person_image": FILES["person.png"], "cloth_image": FILES["upper.png"]},
                timeout=0.5,
            )
        time.sleep(1)  # the server must see that it left
        door.engine.may_end.set()
        assert running.result(10).status_code == 200
    ends = time.monotonic() + 5
    while door.app.admission.taken and time.monotonic() < ends:
        time.sleep(0.02)
    assert len(door.engine.made) == 1
