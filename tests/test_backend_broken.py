"""The example of a backend, where answers break off or cannot be read, and messages or objects are not its own."""

from __future__ import annotations

import json
import threading
import uuid
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from faulty_aws import client_of, faulty_aws

from deploy.demo import BUCKET, FAKE_KEYS, local_cloud
from examples import backend

PATIENCE_S = 60.0
GOOD = (200, {}, b'{"object_key": "users/7/vton_result/1/result.jpg"}')
DEEP = b"[" * 100_000
CHUNKED = {"Transfer-Encoding": "chunked"}
BROKEN_OFF = (200, CHUNKED, b'64\r\n{"object_key"')
DENIED = (403, {}, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
ABSENT = (404, {}, b"<Error><Code>NoSuchKey</Code><Message>Not there</Message></Error>")
FAILED = (200, {}, b'{"error": {"code": "image_not_found", "message": "It is gone.", "retryable": false}}')
SUBMITTED = backend.Submitted("1", "s3://bucket/outputs/1.out", "s3://bucket/failures/1-error.out")


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name, value in FAKE_KEYS.items():
        monkeypatch.setenv(name, value)


@contextmanager
def hanging_up(after):
    """A server that sends these bytes and no more."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(after)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(5)


REFUSED = b"HTTP/1.1 424 Failed\r\nx-amzn-errortype: ModelError\r\n"
BREAKS = {
    "before the head": b"",
    "in the head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "in a body of a length": b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"object_key"',
    "in a chunk": b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n{"object_key"',
    "in a refusal of a length": REFUSED + b'Content-Length: 100\r\n\r\n{"OriginalStat',
    "in a chunk of a refusal": REFUSED + b'Transfer-Encoding: chunked\r\n\r\n64\r\n{"OriginalStat',
    "no JSON": b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n<html>at work</",
    "no text": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xfe",
    "no object": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
    "nested too deep": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + DEEP,
    "a refusal nested too deep": REFUSED + b"Content-Length: 100000\r\n\r\n" + DEEP,
}


@pytest.mark.parametrize("answer", BREAKS.values(), ids=BREAKS)
def test_an_answer_that_cannot_be_read_is_an_unknown_outcome(answer):
    with hanging_up(answer) as url, pytest.raises(backend.TryOnFailed) as raised:
        backend.try_on(backend.runtime_client(endpoint_url=url), "vton", {})
    assert (raised.value.code, raised.value.retryable) == (backend.UNKNOWN, False)


def test_one_broken_answer_of_many_costs_no_other():
    with faulty_aws(GOOD, BROKEN_OFF, GOOD) as endpoint:
        runtime = backend.runtime_client(endpoint_url=endpoint.url)
        made = backend.try_on_many(runtime, "vton", [{"timestamp": str(number)} for number in range(4)], places=1)
        outcomes = {request["timestamp"]: outcome for request, outcome in made}
    lost = outcomes.pop("1")
    assert isinstance(lost, backend.TryOnFailed)
    assert lost.code == backend.UNKNOWN
    assert [outcome["object_key"] for outcome in outcomes.values()] == ["users/7/vton_result/1/result.jpg"] * 3


def refused_with(message):
    body = json.dumps({"OriginalStatusCode": 422, "OriginalMessage": message}).encode()
    return (424, {"x-amzn-errortype": "ModelError"}, body)


def test_a_refusal_tells_which_field_is_wrong():
    error = {"code": "invalid_request", "message": "It is unknown.", "retryable": False, "field": "person_image_url"}
    told = refused_with(json.dumps({"error": error}))
    with faulty_aws(told) as endpoint, pytest.raises(backend.TryOnFailed) as raised:
        backend.try_on(backend.runtime_client(endpoint_url=endpoint.url), "vton", {})
    assert str(raised.value) == "invalid_request: It is unknown. (field: person_image_url)"
    assert raised.value.field == "person_image_url"


TOO_DEEP = pytest.param('{"error": ' + DEEP.decode(), id="nested too deep")


@pytest.mark.parametrize("message", ["", "plain text", "[]", '{"error": "text"}', TOO_DEEP])
def test_a_refusal_without_an_error_of_the_endpoint_has_the_name_of_the_platform_s(message):
    with faulty_aws(refused_with(message)) as endpoint, pytest.raises(backend.TryOnFailed) as raised:
        backend.try_on(backend.runtime_client(endpoint_url=endpoint.url), "vton", {})
    assert (raised.value.code, raised.value.field) == ("ModelError", "")


def test_an_asynchronous_answer_without_the_places_of_its_outcome_is_unknown():
    with faulty_aws((200, {}, b"")) as aws, pytest.raises(backend.TryOnFailed) as raised:
        runtime = backend.runtime_client(endpoint_url=aws.url)
        backend.submit(runtime, client_of("s3", aws.url), "vton", {}, bucket="bucket")
    assert raised.value.code == backend.UNKNOWN


def test_a_call_that_boto3_does_not_send_has_the_name_of_its_error_for_a_code():
    with faulty_aws((200, {}, b"")) as aws, pytest.raises(backend.TryOnFailed) as raised:
        runtime = backend.runtime_client(endpoint_url=aws.url)
        backend.submit(runtime, client_of("s3", aws.url), "vton", {}, bucket="bucket", timeout_s=0)
    assert raised.value.code == "ParamValidationError"


@pytest.mark.parametrize("before", [[DENIED, DENIED], [ABSENT, DENIED], [BROKEN_OFF, ABSENT]])
def test_polling_goes_on_while_s3_denies_what_is_not_there_or_breaks_off(before):
    with faulty_aws(*before, GOOD) as aws:
        answer = backend.wait_by_polling(client_of("s3", aws.url), SUBMITTED, limit_s=PATIENCE_S, poll_s=0.01)
    assert answer["object_key"]
    assert len(aws.calls) == 3


def test_polling_finds_the_failure_where_s3_denies_the_answer_that_is_not_there():
    with faulty_aws(DENIED, FAILED) as aws, pytest.raises(backend.TryOnFailed) as raised:
        backend.wait_by_polling(client_of("s3", aws.url), SUBMITTED, limit_s=PATIENCE_S, poll_s=0.01)
    assert raised.value.code == "image_not_found"


def test_polling_that_is_denied_to_the_end_says_so():
    with faulty_aws(DENIED) as aws, pytest.raises(backend.TryOnFailed, match="AccessDenied") as raised:
        backend.wait_by_polling(client_of("s3", aws.url), SUBMITTED, limit_s=0.1, poll_s=0.01)
    assert raised.value.code == backend.UNKNOWN


def test_polling_ends_at_once_where_s3_refuses_for_another_reason():
    gone = (404, {}, b"<Error><Code>NoSuchBucket</Code><Message>No such bucket</Message></Error>")
    with faulty_aws(gone) as aws, pytest.raises(backend.TryOnFailed) as raised:
        backend.wait_by_polling(client_of("s3", aws.url), SUBMITTED, limit_s=PATIENCE_S)
    assert raised.value.code == "NoSuchBucket"


@pytest.fixture(scope="module")
def cloud():
    with local_cloud() as started:
        yield started


class Outcomes:
    """A queue of its own for each test, whose messages are hidden from nobody who has read them."""

    def __init__(self, cloud):
        self.s3, self.sqs = cloud.client("s3"), cloud.client("sqs")
        name = uuid.uuid4().hex
        made = self.sqs.create_queue(QueueName=name, Attributes={"VisibilityTimeout": "0"})
        self.url = made["QueueUrl"]
        self.job = backend.Submitted(name, f"s3://{BUCKET}/outputs/{name}", f"s3://{BUCKET}/failures/{name}")

    def tell(self, body):
        self.sqs.send_message(QueueUrl=self.url, MessageBody=body)

    def tell_of_the_job(self, **event):
        self.tell(json.dumps({"inferenceId": self.job.inference_id, **event}))

    def put(self, uri, content):
        self.s3.put_object(Bucket=BUCKET, Key=uri.partition(f"{BUCKET}/")[2], Body=content)

    def wait(self, *, limit_s=PATIENCE_S):
        return backend.wait_by_message(self.sqs, self.s3, self.url, [self.job], limit_s=limit_s)

    def outcome(self, **options):
        ((_, outcome),) = self.wait(**options)
        return outcome

    def left(self):
        received = self.sqs.receive_message(QueueUrl=self.url, MaxNumberOfMessages=10)
        return [message["Body"] for message in received.get("Messages", [])]


@pytest.fixture
def outcomes(cloud):
    return Outcomes(cloud)


FOREIGN = [
    "not json",
    "[]",
    "7",
    "{}",
    '{"inferenceId": []}',
    '{"Type": "Notification", "Message": "plain text"}',
    '{"Type": "Notification", "Message": {"not": "text"}}',
    '{"Type": "Notification"}',
    TOO_DEEP,
    '{"inferenceId": "of somebody else", "invocationStatus": "Completed"}',
]


@pytest.mark.parametrize("foreign", FOREIGN)
def test_messages_of_others_end_no_wait_and_stay_in_the_queue(outcomes, foreign):
    outcomes.tell(foreign)
    outcomes.put(outcomes.job.output, GOOD[2])
    outcomes.tell_of_the_job(invocationStatus="Completed")
    assert outcomes.outcome()["object_key"]
    assert outcomes.left() == [foreign]


@pytest.mark.parametrize("stored", [None, b"<html>", b"[]"])
def test_an_answer_that_is_told_of_and_cannot_be_read_is_an_unknown_outcome(outcomes, stored):
    if stored is not None:
        outcomes.put(outcomes.job.output, stored)
    outcomes.tell_of_the_job(invocationStatus="Completed")
    outcome = outcomes.outcome()
    assert isinstance(outcome, backend.TryOnFailed)
    assert outcome.code == backend.UNKNOWN


def test_a_failure_that_is_no_text_is_an_outcome(outcomes):
    outcomes.put(outcomes.job.failure, b"\xff\xfe")
    outcomes.tell_of_the_job(invocationStatus="Failed")
    assert outcomes.outcome().code == "InvocationFailed"


def test_a_failure_that_is_not_in_s3_has_the_reason_of_its_message(outcomes):
    outcomes.tell_of_the_job(invocationStatus="Failed", failureReason="ClientError: it expired")
    assert str(outcomes.outcome()) == "InvocationFailed: ClientError: it expired"


def test_a_message_that_cannot_be_deleted_costs_no_outcome(outcomes):
    outcomes.put(outcomes.job.output, GOOD[2])
    outcomes.tell_of_the_job(invocationStatus="Completed")
    told = outcomes.wait()
    _, answer = next(told)
    outcomes.sqs.delete_queue(QueueUrl=outcomes.url)
    assert answer["object_key"]
    assert list(told) == []


def test_a_queue_that_cannot_be_read_has_a_code(outcomes):
    outcomes.sqs.delete_queue(QueueUrl=outcomes.url)
    with pytest.raises(backend.TryOnFailed) as raised:
        outcomes.outcome()
    assert "NonExistentQueue" in raised.value.code or "QueueDoesNotExist" in raised.value.code


def test_the_queue_is_never_asked_without_a_wait(outcomes):
    waits_s = []
    asking = "provide-client-params.sqs.ReceiveMessage"
    outcomes.sqs.meta.events.register(asking, lambda params, **_: waits_s.append(params["WaitTimeSeconds"]))
    assert outcomes.outcome(limit_s=0.5).code == backend.UNKNOWN
    assert waits_s == [1]
