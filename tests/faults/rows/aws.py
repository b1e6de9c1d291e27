"""aws_storage_notify: faults of S3 and SQS are told for what they are, and nothing half done is left behind."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from deploy.demo import free_port

from ..aws import s3_says, silence, slow_reading, sqs_says
from ..registry import row
from ..services import Answer, Service, wait_until
from ..stage import Stage

DEADLINE_S = 55.0
MAX_ATTEMPTS = 3
POLICY = "arn:aws:iam::123456789012:role/secret is not allowed by the bucket policy AKIAIOSFODNN7EXAMPLE"
START_S = 20.0
PUT = "PUT"


def user(name: str) -> dict[str, str]:
    """A user of the row's own, by whose key the front tells the requests apart."""
    return {"userId": name}


def fails_to_store(stage: Stage, answer: Answer, name: str, *, retryable: bool = True) -> None:
    """The answer is `storage_failed` within the deadline; no object and no message is left."""
    answer.refused(502, "storage_failed", retryable=retryable)
    assert answer.seconds < DEADLINE_S, f"after {answer.seconds:.0f} s"
    assert not stage.keys(f"users/{name}/")
    assert not [message for message in stage.messages() if message["userId"] == name]


@row("A01")
def s3_recovers(stage: Stage) -> None:
    """Two failures are retried away."""
    with stage.front.failing(PUT, "users/a01-1/", s3_says(500, "InternalError"), s3_says(503, "SlowDown")):
        answer = stage.ask(stage.service, **user("a01-1"))
    done = answer.done()
    assert stage.front.count(PUT, "users/a01-1/") <= MAX_ATTEMPTS
    assert stage.keys("users/a01-1/") == [done["object_key"]]
    assert len(stage.messages(done["job_id"])) == 1
    assert answer.seconds < DEADLINE_S


@row("A02", lane="waiting")
def s3_stays_away(stage: Stage) -> str:
    """Told within the deadline, whichever way it stays away."""
    service = stage.service
    with ExitStack() as faults, ThreadPoolExecutor(3) as pool:
        faults.enter_context(stage.front.failing(PUT, "users/a02-503/", s3_says(503, "SlowDown"), forever=True))
        faults.enter_context(stage.front.failing(PUT, "users/a02-read/", silence, forever=True))
        asked = {name: pool.submit(stage.ask, service, **user(name)) for name in ("a02-503", "a02-read")}
        answers = {name: future.result() for name, future in asked.items()}
    with stage.proxy.swallowing():
        answers["a02-connect"] = stage.ask(service, **user("a02-connect"))
    with stage.proxy.resetting():
        answers["a02-reset"] = stage.ask(service, **user("a02-reset"))
    for name, answer in answers.items():
        fails_to_store(stage, answer, name)
    return ", ".join(f"{name[4:]} {answer.seconds:.0f} s" for name, answer in answers.items())


@row("A03")
def s3_refuses(stage: Stage) -> str:
    """Not worth a repeat, counted for an alarm, and nothing of what S3 says is told."""
    service = stage.service
    codes = {"AccessDenied": 403, "NoSuchBucket": 404, "InvalidAccessKeyId": 403, "ExpiredToken": 400}
    for code, status in codes.items():
        name = f"a03-{code.lower()}"
        before = service.metric("vton_requests_total", code="storage_failed")
        with stage.front.failing(PUT, f"users/{name}/", s3_says(status, code, POLICY), forever=True):
            answer = stage.ask(service, **user(name))
        fails_to_store(stage, answer, name, retryable=False)
        assert service.metric("vton_requests_total", code="storage_failed") == before + 1, "no metric for an alarm"
        for secret in ("secret", "policy", "AKIA", "arn:", code):
            assert secret not in answer.content.decode(), f"{secret} is told"
    with stage.front.failing("HEAD", "users/a03-head/", s3_says(403, "AccessDenied"), forever=True):
        fails_to_store(stage, stage.ask(service, **user("a03-head")), "a03-head", retryable=False)
    return "the metric is vton_requests_total{code=storage_failed}"


@row("A04", lane="waiting")
def s3_is_slow(stage: Stage) -> str:
    """The upload ends at the read timeout; meanwhile the engine serves others."""
    service = stage.service
    with stage.front.failing(PUT, "users/a04-slow/", slow_reading(1000), forever=True), ThreadPoolExecutor(1) as pool:
        slow = pool.submit(stage.ask, service, **user("a04-slow"))
        wait_until(lambda: stage.front.count(PUT, "users/a04-slow/") > 0, "an upload begun")
        other = stage.ask(service)
        other.done()
        assert not slow.done(), "the slow upload was over before the next job"
        answer = slow.result()
    fails_to_store(stage, answer, "a04-slow")
    assert answer.seconds > 5, f"after {answer.seconds:.1f} s: the upload was not slow"
    return f"after {answer.seconds:.0f} s; another job was done in {other.seconds:.1f} s meanwhile"


@row("A08")
def sqs_stays_away(stage: Stage) -> None:
    """The picture stays; a repeat only notifies."""
    service, fields = stage.service, stage.fields()
    with stage.front.failing("POST", "", sqs_says(500, "InternalFailure"), forever=True):
        error = stage.post(service, fields).refused(502, "notify_failed", retryable=True)
    made = service.generations()
    key = error["object_key"]
    assert stage.keys(f"users/{stage.row.lower()}/") == [key]
    assert not [message for message in stage.messages() if message["object_key"] == key]
    done = stage.post(service, fields).done()
    assert done["object_key"] == key
    assert service.generations() == made, "the engine ran again"
    assert len(stage.messages(done["job_id"])) == 1


@row("A13")
def cloud_out_of_reach(stage: Stage) -> None:
    """A process that cannot reach its bucket is not ready, and says why."""
    wrong = {
        "no such region": {"AWS_DEFAULT_REGION": "nowhere at all"},
        "endpoint unreachable": {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{free_port()}"},
    }
    failures = []
    for name, environ in wrong.items():
        service = stage.start_stand_in(**environ)
        try:
            failures += [f"{name}: {found}" for found in _not_refused(service)]
        finally:
            service.stop()
    assert not failures, "; ".join(failures)


def _not_refused(service: Service) -> list[str]:
    """What is wrong with a process that should refuse to start or not become ready."""
    ends = time.monotonic() + START_S
    while service.alive and time.monotonic() < ends:
        if service.ping() == 200:
            return ["/ping is 200"]
        if any("S3" in str(line) for line in service.lines()):
            return []  # alive, not ready, and it said why
        time.sleep(0.1)
    said = service.log.read_text()
    if service.alive:
        return ["it waits and does not say for what"]
    told = service.process.poll() != 0 and "S3" in said and "Traceback" not in said
    return [] if told else [f"ended with {service.process.poll()}: {said[-200:]!r}"]
