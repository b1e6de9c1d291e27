from __future__ import annotations

import json
import socket
import time

import pytest
from faulty_aws import client_of, faulty_aws
from moto.server import ThreadedMotoServer

from container.errors import NotifyFailed
from container.notify import NullNotifier, SqsNotifier, completion
from container.request import CallContext, parse
from container.storage import StoredObject

REQUEST = parse(
    {
        "userId": "7",
        "timestamp": "241108-230001",
        "person_image_url": "https://images.example/p.jpg",
        "overall_cloth_url": "https://images.example/c.jpg",
    }
)
STORED = StoredObject("users/7/vton_result/241108-230001/result.jpg", "e", {"job_id": "a" * 64})
EVENT = completion(REQUEST, STORED, "results", CallContext("r-1"))


@pytest.fixture(scope="module")
def sqs():
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = client_of("sqs", f"http://{host}:{port}")
    yield client
    client.close()
    server.stop()


@pytest.fixture
def queue_url(sqs):
    url = sqs.create_queue(QueueName="done")["QueueUrl"]
    yield url
    sqs.delete_queue(QueueUrl=url)


@pytest.fixture
def impatient(monkeypatch):
    """boto3 retries at once."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def fault(status, code):
    body = json.dumps({"__type": f"com.amazonaws.sqs#{code}", "message": "arn:aws:sqs:::policy"}).encode()
    return status, {"Content-Type": "application/x-amz-json-1.0"}, body


def send_to(url):
    SqsNotifier(client_of("sqs", url), f"{url}/1/done").send(EVENT)


def test_the_message_has_what_the_deployed_consumer_reads():
    assert (EVENT["userId"], EVENT["initial_timestamp"]) == ("7", "241108-230001")


def test_the_message_says_where_the_picture_is():
    assert {name: EVENT[name] for name in ("object_key", "bucket", "job_id", "status")} == {
        "object_key": STORED.key,
        "bucket": "results",
        "job_id": "a" * 64,
        "status": "completed",
    }


def test_without_a_bucket_its_name_is_empty():
    assert completion(REQUEST, STORED, None, CallContext("r-1"))["bucket"] == ""


def test_what_the_caller_gave_the_platform_is_echoed():
    event = completion(REQUEST, STORED, "results", CallContext("r-1", "call-1", "campaign=2"))
    assert (event["inference_id"], event["custom_attributes"]) == ("call-1", "campaign=2")


def test_what_the_caller_did_not_give_is_left_out():
    assert EVENT.keys() & {"inference_id", "custom_attributes"} == set()


def test_the_message_arrives_once_as_json(sqs, queue_url):
    SqsNotifier(sqs, queue_url).send(EVENT)
    received = sqs.receive_message(QueueUrl=queue_url, MaxNumberOfMessages=10)["Messages"]
    assert [json.loads(message["Body"]) for message in received] == [EVENT]


def test_every_text_of_the_caller_arrives_as_it_was(sqs, queue_url):
    context = CallContext("r-1", 'a"b\\c\n', "\u00e9\U0001f455")
    event = completion(REQUEST, STORED, "results", context)
    SqsNotifier(sqs, queue_url).send(event)
    received = sqs.receive_message(QueueUrl=queue_url)["Messages"]
    assert json.loads(received[0]["Body"]) == event


def test_a_queue_that_does_not_exist_is_a_failure(sqs, queue_url):
    with pytest.raises(NotifyFailed):
        SqsNotifier(sqs, queue_url + "-not").send(EVENT)


def test_three_failures_of_sqs_are_a_failure_with_the_key_of_the_picture(impatient):
    with faulty_aws(fault(500, "InternalFailure")) as aws, pytest.raises(NotifyFailed) as caught:
        send_to(aws.url)
    assert caught.value.body("r-1")["error"]["object_key"] == STORED.key
    assert (caught.value.retryable, aws.calls) == (True, ["POST"] * 3)


def test_two_failures_of_sqs_are_overcome(impatient):
    sent = (200, {"Content-Type": "application/x-amz-json-1.0"}, b'{"MessageId": "1"}')
    with faulty_aws(fault(500, "InternalFailure"), fault(503, "ServiceUnavailable"), sent) as aws:
        send_to(aws.url)
    assert aws.calls == ["POST"] * 3


@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (400, "QueueDoesNotExist"), (403, "ExpiredToken"), (400, "Throttled")]
)
def test_a_refusal_of_sqs_is_a_failure_that_tells_no_policy(impatient, status, code):
    with faulty_aws(fault(status, code)) as aws, pytest.raises(NotifyFailed) as caught:
        send_to(aws.url)
    told = f"{caught.value.body('r-1')} {caught.value}"
    assert not any(secret in told for secret in ("s3cr3t", "AKIAKEY", "arn:aws", "policy"))


def test_an_sqs_that_cannot_be_reached_is_a_failure(impatient):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(NotifyFailed) as caught:
        send_to(f"http://127.0.0.1:{port}")
    assert caught.value.object_key == STORED.key


def test_without_a_queue_nobody_is_told():
    assert NullNotifier().send(EVENT) is None
