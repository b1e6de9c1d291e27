"""fetch_faults: whatever a host of images does, the caller learns in time whose fault it was."""

from __future__ import annotations

from ..image_host import announces, drips, resets_in_the_body, says
from ..pictures import file_of, ramp
from ..registry import row
from ..services import Answer, patience
from ..stage import SIGNATURE, Stage, presigned
from .ssrf import ask_with

MAX_BYTES = 15 * 1024 * 1024
TOTAL_S = 10.0
BUFFERS = 8 * 1024 * 1024  # bytes that the sender's side has given away and nobody has read: TLS and two sockets
EXPIRED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"


def once(stage: Stage, name: str, status: int) -> Answer:
    """The answer to a request whose person is answered with this status; the host is asked once."""
    answer = ask_with(stage, stage.host.behave(name, says(status, b"not here")))
    assert stage.host.asked(name) == 1, f"asked {stage.host.asked(name)} times"
    return answer


@row("F01")
def image_that_is_not_there(stage: Stage) -> None:
    """Asked for once."""
    for status in (404, 403, 410):
        once(stage, f"F01/{status}", status).refused(422, "image_not_found", retryable=False)


@row("F02")
def host_that_fails(stage: Stage) -> str:
    """An outage, which the caller may try again."""
    for status in (500, 503, 429):
        once(stage, f"F02/{status}", status).refused(502, "image_source_failed", retryable=True)
    return "no retries are documented, and none are made"


@row("F03")
def connection_that_breaks(stage: Stage) -> None:
    """Refused, reset in the handshake, reset in the body."""
    broken = stage.host.behave("F03/reset", resets_in_the_body)
    for url in ("https://refuses.example/a.png", "https://resets.example/a.png", broken):
        ask_with(stage, url).refused(502, "image_source_failed", retryable=True)
    assert stage.hosts["resets.example"].connections > 0


@row("F04", lane="waiting")
def dripped_body(stage: Stage) -> str:
    """Five bytes a second end with the total time, though no single read ever waits long."""
    url = stage.host.behave("F04/drip", drips(b"12345", 1.0, content_length="100000"))
    answer = ask_with(stage, url)
    answer.refused(504, "image_source_timeout", retryable=True)
    assert -1 <= answer.seconds - TOTAL_S <= patience(), f"after {answer.seconds:.1f} s"
    return f"after {answer.seconds:.1f} s"


@row("F10")
def endless_body(stage: Stage) -> str:
    """Counted, and given up after the largest size."""
    service = stage.service
    with service.peak() as grown:
        ask_with(stage, stage.host.endless("F10/endless")).refused(422, "image_too_large", retryable=False)
    sent = stage.host.sent["/F10/endless"]
    assert MAX_BYTES <= sent + 65536 <= MAX_BYTES + BUFFERS, f"{sent} bytes were taken"
    assert grown[0] < 32 * 1024 * 1024, f"memory grew by {grown[0]} bytes"
    return f"{sent / 2**20:.1f} MiB taken, memory +{grown[0] / 2**20:.0f} MiB"


@row("F11")
def announced_too_large(stage: Stage) -> None:
    """Refused at the announcement: no byte of the body is ever sent here."""
    answer = ask_with(stage, stage.host.behave("F11/announced", announces(MAX_BYTES + 1)))
    answer.refused(422, "image_too_large", retryable=False)
    assert answer.seconds < TOTAL_S / 2, f"after {answer.seconds:.1f} s"


@row("F16")
def content_type_that_lies(stage: Stage) -> None:
    """The content decides."""
    photo = file_of(ramp(), "JPEG", quality=95)
    ask_with(stage, stage.host.put("F16/photo", photo, "text/html")).done()
    page = stage.host.put("F16/page", b"<!doctype html><html><body>no picture</body></html>", "image/jpeg")
    ask_with(stage, page).refused(422, "image_not_decodable")


@row("F17")
def expired_signature(stage: Stage) -> None:
    """As an image that is not there; of the answer and of the signature nothing is told or logged."""
    service, since = stage.service, stage.service.log_size()
    url = presigned(stage.host.behave("F17/photo.png", says(403, EXPIRED, content_type="application/xml")))
    answer = ask_with(stage, url)
    answer.refused(422, "image_not_found", retryable=False)
    logged = service.log.read_text()[since:]
    for secret in ("has expired", "AccessDenied", "<Error>", SIGNATURE, "X-Amz-"):
        assert secret not in answer.content.decode(), f"{secret} is told"
        assert secret not in logged, f"{secret} is logged"
