"""http_and_json: what is no good request is refused before anything happens, in time, and without an echo."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

from ..registry import row
from ..services import Answer, Service, patience
from ..stage import FIELD_OF, Stage

BODY_LIMIT = 64 * 1024
BODY_TIMEOUT_S = 5.0
TRIES = 6  # where milliseconds are promised, the best counts: others use the machine too
MAX_HEADER_BYTES = 60_000  # what h11 takes in all is 64 KiB
INVALID = "A field of the request is missing, unknown or out of range."


def head(length: int, *more: str, content_type: str = "application/json") -> bytes:
    """The head of a POST that announces a body of this length."""
    lines = ["POST /invocations HTTP/1.1", "Host: x", f"Content-Type: {content_type}", f"Content-Length: {length}"]
    return "\r\n".join([*lines, *more, "", ""]).encode()


def raw(service: Service, sent: bytes, limit_s: float = 15.0) -> tuple[bytes, float]:
    """What comes back on a bare connection until the other side closes it, and after how many seconds."""
    began, received = time.monotonic(), b""
    with socket.create_connection(("127.0.0.1", service.port), timeout=limit_s) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(65536):
                received += chunk
    return received, time.monotonic() - began


def parsed(received: bytes, seconds: float = 0.0) -> Answer:
    """An answer read from a bare connection."""
    start, _, content = received.partition(b"\r\n\r\n")
    lines = start.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return Answer(int(lines[0].split()[1]), headers, content, seconds)


def refuses_field(stage: Stage, name: str, value: object) -> None:
    """The request with this value is refused, naming the field in a fixed sentence and nothing of the value."""
    answer = stage.ask(stage.service, **{name: value})
    error = answer.refused(422, "invalid_request", field=name, message=INVALID, retryable=False)
    told = json.dumps({key: member for key, member in error.items() if key not in ("field", "message", "request_id")})
    assert not isinstance(value, str) or len(value) < 3 or value not in told, "the value is echoed"


@row("H01")
def empty_body(stage: Stage) -> None:
    """Nothing is no JSON."""
    with stage.nothing_happens(stage.service):
        stage.send(stage.service, b"").refused(400, "invalid_json")


@row("H02")
def cut_json(stage: Stage) -> None:
    """Neither is half of it."""
    with stage.nothing_happens(stage.service):
        stage.send(stage.service, b'{"person_image_url":').refused(400, "invalid_json")


@row("H03")
def json_that_is_no_object(stage: Stage) -> None:
    """JSON, but no request."""
    with stage.nothing_happens(stage.service):
        for body in (b"null", b"[]", b'"x"', b"7"):
            stage.send(stage.service, body).refused(422, "invalid_request")


@row("H04")
def missing_fields(stage: Stage) -> str:
    """Each is named."""
    marker = "https://images.example/echoed-nowhere.png"
    with stage.nothing_happens(stage.service):
        for name in (*FIELD_OF.values(), "userId", "timestamp"):
            others = {other: marker for other in FIELD_OF.values() if other != name}
            answer = stage.ask(stage.service, **{**others, name: None})
            answer.refused(422, "invalid_request", field=name, message=INVALID)
            assert b"echoed-nowhere" not in answer.content
    stage.ask(stage.service, cloth_type=None).done()
    return "cloth_type may be left out: it is documented to be `overall` then"


@row("H05")
def unknown_field(stage: Stage) -> None:
    """Whatever it says, it is not used."""
    with stage.nothing_happens(stage.service):
        refuses_field(stage, "attn_ckpt", "/etc/passwd")


@row("H06")
def unknown_cloth_type(stage: Stage) -> None:
    """The set is closed, and knows small letters only."""
    with stage.nothing_happens(stage.service):
        for value in ("hat", "OVERALL", "", "overall "):
            refuses_field(stage, "cloth_type", value)


@row("H07")
def wrong_types(stage: Stage) -> None:
    """Nothing is coerced."""
    service = stage.service
    wrong: list[tuple[str, Any]] = [("userId", 7), ("timestamp", None), ("person_image_url", [])]
    with stage.nothing_happens(service):
        for name, value in wrong:
            stage.post(service, {**stage.fields(), name: value}).refused(422, "invalid_request", field=name)


@row("H14")
def large_body(stage: Stage) -> None:
    """Refused at the announcement: no byte of the body is ever sent here."""
    received, seconds = raw(stage.service, head(BODY_LIMIT + 1024))
    stage.keep(parsed(received)).refused(413, "request_too_large")
    assert seconds < BODY_TIMEOUT_S / 2, f"answered after {seconds:.1f} s: it waited for the body"


@row("H16", lane="waiting")
def slow_body(stage: Stage) -> str:
    """A body that does not come costs five seconds of a connection and no place."""
    service = stage.service
    received, seconds = raw(service, head(50_000) + b"{")
    stage.keep(parsed(received)).refused(408, "request_timeout")
    assert BODY_TIMEOUT_S - 0.5 < seconds < BODY_TIMEOUT_S + patience(), f"after {seconds:.1f} s"
    assert service.metric("vton_in_flight") == 0
    stage.keep(parsed(*raw(service, head(1_000_000)))).refused(413, "request_too_large")
    return "with 50,000 bytes announced; 1,000,000 are refused as too large at once"


@row("H18")
def endless_headers(stage: Stage) -> None:
    """A header of 1 MB and 5,000 headers end in a refusal or a closed connection, and take no memory."""
    service = stage.service
    start = b"GET /ping HTTP/1.1\r\nHost: x\r\n"
    for more in (b"X: " + b"a" * 1_000_000 + b"\r\n", b"".join(b"X-%d: a\r\n" % number for number in range(5000))):
        with service.peak() as grown:
            received, _ = raw(service, start + more + b"\r\n")
        assert received == b"" or 400 <= parsed(received).status < 500, received[:100]
        assert grown[0] < 20e6, f"memory grew by {grown[0]} bytes"
        assert service.alive
        stage.ask(service).done()


@row("H19")
def other_content_types(stage: Stage) -> str:
    """Refused by the header alone, at once."""
    service, good = stage.service, json.dumps(stage.fields()).encode()
    dashes = "-" * MAX_HEADER_BYTES
    kinds = ["text/plain", f"multipart/form-data; boundary={dashes}", "application/octet-stream", ""]
    with stage.nothing_happens(service):
        for kind in kinds:
            answers = [stage.send(service, good, {"Content-Type": kind}) for _ in range(TRIES)]
            for answer in answers:
                answer.refused(415, "unsupported_content_type")
            best = min(answer.seconds for answer in answers)
            assert best < 0.05 * patience(), f"{kind[:30]}: {best:.3f} s"
        received, _ = raw(service, head(2, content_type="multipart/form-data; boundary=" + "-" * 1_000_000) + b"--")
        assert received == b"" or 400 <= parsed(received).status < 500, received[:100]
    return "a boundary of 60,000 dashes is 415; with 1 MB the header itself is refused, as in H18"


@row("H22")
def other_paths_and_methods(stage: Stage) -> None:
    """Our error body for whatever is not served."""
    service, since = stage.service, stage.service.log_size()
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        stage.keep(service.call(method, "/invocations")).refused(405, "method_not_allowed")
    stage.keep(service.call("POST", "/ping")).refused(405, "method_not_allowed")
    for path in ("/", "/nothing", "/ping/", "//ping", "/invocations/../ping"):
        stage.keep(service.call("GET", path)).refused(404, "not_found")
    assert b"Traceback" not in service.log.read_bytes()[since:]


@row("H24")
def no_docs(stage: Stage) -> None:
    """The pages that describe the API are not served unless a setting says so."""
    for path in ("/docs", "/openapi.json", "/redoc"):
        stage.keep(stage.service.call("GET", path)).refused(404, "not_found")


@row("H25")
def client_leaves(stage: Stage) -> str:
    """The job is done once or not at all, its place is free, and nobody is alarmed."""
    service, since = stage.service, stage.service.log_size()
    fields = stage.fields()
    body = json.dumps(fields).encode()
    with service.pace(2), socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(head(len(body)) + body)
        service.wait_for("vton_in_flight", 1)
        connection.close()
        service.wait_for("vton_in_flight", 0)
        time.sleep(0.5)  # what runs on without its caller
    made = stage.keys(f"users/{stage.row.lower()}/")
    messages = [message for message in stage.messages() if message["initial_timestamp"] == fields["timestamp"]]
    assert len(made) == len(messages) <= 1, f"{len(made)} objects, {len(messages)} messages"
    loud = [line for line in service.lines(since) if line.get("level") not in ("debug", "info")]
    assert not loud, f"logged {loud}"
    return "it was finished" if made else "it was dropped unrun"
