"""Asynchronous invocations: boto3 before the runtime, S3 and SNS beside it, a small container behind it."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import threading
import time
import weakref
from contextlib import contextmanager

import pytest
import requests
from botocore.exceptions import ClientError
from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

from deploy.async_job import AsyncConfig, new_job
from deploy.demo import client, http_server
from deploy.local_async import AsyncEndpoint
from deploy.local_cloud import BUCKET, REGION, local_cloud
from deploy.local_runtime import create_runtime

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
JSON = {"ContentType": "application/json"}


class Seen:
    def __init__(self):
        self.calls = []
        self.at_once = self.most_at_once = 0


def container_app(seen):
    """Does what the body asks for."""
    container = FastAPI()

    @container.post("/invocations")
    async def invocations(request: Request) -> Response:
        body = await request.body()
        seen.calls.append((dict(request.headers), body))
        seen.at_once += 1
        seen.most_at_once = max(seen.most_at_once, seen.at_once)
        try:
            return await answered(json.loads(body))
        finally:
            seen.at_once -= 1

    async def answered(asked):
        await asyncio.sleep(asked.get("seconds", 0))
        if asked.get("streamed"):
            return StreamingResponse(iter([b"{}"]), media_type="application/json")
        headers = {"X-Long": "x" * asked.get("header_bytes", 0)}
        content = b"x" * asked["bytes"] if "bytes" in asked else json.dumps({"echo": asked}).encode()
        return Response(content, asked.get("status", 200), headers, "application/json")

    return container


@pytest.fixture(scope="module")
def cloud():
    with local_cloud() as built:
        yield built


@pytest.fixture(scope="module")
def topics(cloud):
    """ARNs of the success and the error topic, and the URL of a queue that subscribes to both."""
    sns, sqs = cloud.client("sns"), cloud.client("sqs")
    queue = sqs.create_queue(QueueName="async-outcomes")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    made = [sns.create_topic(Name=name)["TopicArn"] for name in ("async-success", "async-error")]
    for topic in made:
        sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn, Attributes={"RawMessageDelivery": "true"})
    return *made, queue


class Stage:
    def __init__(self, cloud, topics, url, seen):
        self.cloud, self.topics, self.url, self.seen = cloud, topics, url, seen
        self.told = {}

    def put(self, asked, key="asynchronous/inputs/one.json"):
        content = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
        self.cloud.client("s3").put_object(Bucket=BUCKET, Key=key, Body=content)
        return f"s3://{BUCKET}/{key}"

    def call(self, asked=None, **members):
        given = {"EndpointName": "vton", **JSON, **members}
        if asked is not None:
            given["InputLocation"] = self.put(asked, f"asynchronous/inputs/{time.time_ns()}.json")
        return client("sagemaker-runtime", self.url).invoke_endpoint_async(**given)

    def message(self, inference_id, limit_s=20):
        """The one message about a job."""
        sqs, ends = self.cloud.client("sqs"), time.monotonic() + limit_s
        while inference_id not in self.told:
            assert time.monotonic() < ends, "no message"
            received = sqs.receive_message(QueueUrl=self.topics[2], MaxNumberOfMessages=10, WaitTimeSeconds=1)
            for each in received.get("Messages", []):
                sqs.delete_message(QueueUrl=self.topics[2], ReceiptHandle=each["ReceiptHandle"])
                event = json.loads(each["Body"])
                assert event["inferenceId"] not in self.told, "told twice"
                self.told[event["inferenceId"]] = event
        return self.told[inference_id]

    def stored(self, uri):
        bucket, _, key = uri.partition("://")[2].partition("/")
        return self.cloud.client("s3").get_object(Bucket=bucket, Key=key)


@contextmanager
def staged(cloud, topics, where=None, **config):
    seen = Seen()
    given = {
        "output_path": f"s3://{BUCKET}/out",
        "failure_path": f"s3://{BUCKET}/fail/",
        "success_topic": topics[0],
        "error_topic": topics[1],
        "places": 2,
        **config,
    }
    endpoint = AsyncEndpoint(AsyncConfig(**given), cloud.client("s3"), cloud.client("sns"))
    with http_server(container_app(seen)) as behind:
        runtime = create_runtime(where(behind) if where else behind, name="vton", asynchronous=endpoint)
        with http_server(runtime) as url:
            yield Stage(cloud, topics, url, seen)


@pytest.fixture(scope="module")
def stage(cloud, topics):
    with staged(cloud, topics) as built:
        yield built


def test_a_job_is_accepted_stored_and_told_of_as_on_the_platform(stage):
    location = stage.put({"x": 1})
    answer = stage.call(InputLocation=location, InferenceId="job-1", CustomAttributes="tenant=blue")
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 202
    assert answer["ResponseMetadata"]["RequestId"]
    assert answer["InferenceId"] == "job-1"
    assert answer["OutputLocation"] == f"s3://{BUCKET}/out/job-1.out"
    assert answer["FailureLocation"] == f"s3://{BUCKET}/fail/job-1-error.out"
    event = stage.message("job-1")
    assert TIME.fullmatch(event.pop("eventTime"))
    assert TIME.fullmatch(event.pop("receivedTime"))
    assert event == {
        "awsRegion": REGION,
        "invocationStatus": "Completed",
        "requestParameters": {
            "contentType": "application/json",
            "endpointName": "vton",
            "inputLocation": location,
        },
        "responseParameters": {"contentType": "application/json", "outputLocation": answer["OutputLocation"]},
        "inferenceId": "job-1",
        "eventVersion": "1.0",
        "eventSource": "aws:sagemaker",
        "eventName": "InferenceResult",
    }
    output = stage.stored(answer["OutputLocation"])
    assert (json.loads(output["Body"].read()), output["ContentType"]) == ({"echo": {"x": 1}}, "application/json")
    headers = stage.seen.calls[-1][0]
    assert headers["content-type"] == "application/json"
    assert headers["x-amzn-sagemaker-custom-attributes"] == "tenant=blue"
    assert headers["x-amzn-sagemaker-inference-id"] == "job-1"


def test_the_output_can_be_named(stage):
    answer = stage.call({}, InferenceId="named", Filename="my-result.json", S3OutputPathExtension="tenant/blue")
    assert answer["OutputLocation"] == f"s3://{BUCKET}/out/tenant/blue/my-result.json"
    stage.message("named")
    assert stage.stored(answer["OutputLocation"])["Body"].read()


def test_an_id_is_made_where_none_is_given(stage):
    first, second = stage.call({}), stage.call({})
    assert first["InferenceId"] != second["InferenceId"]
    assert stage.message(first["InferenceId"])["invocationStatus"] == "Completed"


def test_a_large_answer_arrives_whole(stage):
    answer = stage.call({"bytes": 3_000_000}, InferenceId="large")
    stage.message("large")
    assert len(stage.stored(answer["OutputLocation"])["Body"].read()) == 3_000_000


@pytest.mark.parametrize(
    ("asked", "reason", "stored"),
    [
        ({"status": 500}, r"Received server error \(500\) from model\. See the SageMaker", r'\(500\).*"echo"'),
        ({"status": 422}, r"Received client error \(422\) from model", r'message "\{"echo"'),
        ({"streamed": True}, "did not specify the required Content-Length header", "Content-Length"),
        ({"header_bytes": 4096}, "larger than 4096 bytes", "4096"),
        ({"seconds": 3}, "timed out", "timed out"),
    ],
)
def test_a_job_that_fails_leaves_a_failure_and_a_message(stage, asked, reason, stored):
    members = {"InvocationTimeoutSeconds": 1} if "seconds" in asked else {}
    answer = stage.call(asked, **members)
    event = stage.message(answer["InferenceId"])
    assert event["invocationStatus"] == "Failed"
    assert re.search(f"^ClientError: .*{reason}", event["failureReason"])
    assert event["failureLocation"] == answer["FailureLocation"]
    assert event["requestParameters"]["endpointName"] == "vton"
    assert "responseParameters" not in event
    assert re.search(stored, stage.stored(answer["FailureLocation"])["Body"].read().decode())
    with pytest.raises(ClientError, match="NoSuchKey"):
        stage.stored(answer["OutputLocation"])


@pytest.mark.parametrize(
    ("key", "location"),
    [
        ("in/é 日.json", "s3://{bucket}/in/é 日.json"),
        ("in/a%20b.json", "s3://{bucket}/in/a%20b.json"),
        ("in/a?b#c.json", "s3://{bucket}/in/a?b#c.json"),
        ("in/é b.json", "https://{bucket}.s3.eu-central-1.amazonaws.com/in/%C3%A9%20b.json"),
        ("in/a+b c.json", "https://s3.eu-central-1.amazonaws.com/{bucket}/in/a+b%20c.json"),
    ],
)
def test_an_input_is_found_by_every_name_that_it_can_have(stage, key, location):
    stage.put({"key": key}, key)
    answer = stage.call(InputLocation=location.format(bucket=BUCKET))
    event = stage.message(answer["InferenceId"])
    assert event["requestParameters"]["inputLocation"] == f"s3://{BUCKET}/{key}"
    assert json.loads(stage.stored(answer["OutputLocation"])["Body"].read()) == {"echo": {"key": key}}


def test_an_input_that_is_not_there_fails_the_job(stage):
    answer = stage.call(InputLocation=f"s3://{BUCKET}/asynchronous/inputs/nothing.json")
    assert "could not be downloaded" in stage.message(answer["InferenceId"])["failureReason"]


def test_a_bucket_of_outputs_that_is_not_there_is_told_of(cloud, topics):
    with staged(cloud, topics, output_path="s3://no-such-bucket/out") as stage:
        answer = stage.call({})
        assert "could not be uploaded" in stage.message(answer["InferenceId"])["failureReason"]


def inline(stage, body, **headers):
    named = {f"X-Amzn-SageMaker-{name}": value for name, value in headers.items()}
    return requests.post(f"{stage.url}/endpoints/vton/async-invocations", data=body, headers=named, timeout=10)


def test_an_input_can_come_with_the_call_up_to_its_limit(stage):
    body = json.dumps({"x": "y" * 127_980}).encode()[:128_000]
    body = body[:-2] + b'"}'
    assert len(body) <= 128_000
    sent = inline(stage, body, **{"Content-Type": "application/json"})
    assert sent.status_code == 202
    event = stage.message(sent.json()["InferenceId"])
    assert event["invocationStatus"] == "Completed"
    assert "inputLocation" not in event["requestParameters"]
    assert stage.seen.calls[-1][1] == body


def test_boto3_sends_an_inline_body_where_it_knows_it(stage):
    runtime = client("sagemaker-runtime", stage.url)
    known = runtime.meta.service_model.operation_model("InvokeEndpointAsync").input_shape.members
    if "Body" not in known:
        with pytest.raises(Exception, match="Body"):
            runtime.invoke_endpoint_async(EndpointName="vton", **JSON, Body=b"{}")
        return
    answer = runtime.invoke_endpoint_async(EndpointName="vton", **JSON, Body=b'{"x": 5}')
    assert stage.message(answer["InferenceId"])["invocationStatus"] == "Completed"
    headers, body = stage.seen.calls[-1]
    assert (headers["content-type"], body) == ("application/json", b'{"x": 5}')


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"x" * 128_001, {}),
        (b"", {}),
        (b"{}", {"InputLocation": f"s3://{BUCKET}/a"}),
        (b"", {"InputLocation": "http://elsewhere/a"}),
        (b"", {"InputLocation": f"s3://{BUCKET}"}),
        (b"", {"InputLocation": f"s3://{BUCKET}/é".encode("latin-1")}),
        (b"", {"InputLocation": f"https://{BUCKET}.s3.eu-central-1.amazonaws.com/a%ff"}),
        (b"", {"InputLocation": f"https://{BUCKET}.s3.eu-central-1.amazonaws.com/a?versionId=1"}),
        (b"", {"InputLocation": f"https://s3.eu-central-1.amazonaws.com/{BUCKET}/a?versionId=1"}),
        (b"", {"InputLocation": f"s3://{BUCKET}/{'a' * 1024}"}),
        (b"{}", {"RequestTTLSeconds": "59"}),
        (b"{}", {"RequestTTLSeconds": "soon"}),
        (b"{}", {"InvocationTimeoutSeconds": "3601"}),
        (b"{}", {"Filename": "a.b.c"}),
        (b"{}", {"S3OutputPathExtension": "s3://other"}),
        (b"{}", {"Inference-Id": "x" * 65}),
    ],
)
def test_a_wrong_call_is_a_validation_error_at_once(stage, body, headers):
    before = len(stage.seen.calls)
    sent = inline(stage, body, **headers)
    assert (sent.status_code, sent.headers["x-amzn-errortype"]) == (400, "ValidationError")
    assert len(stage.seen.calls) == before


def test_an_asynchronous_endpoint_takes_no_other_calls(stage):
    runtime = client("sagemaker-runtime", stage.url)
    for call in (runtime.invoke_endpoint, runtime.invoke_endpoint_with_response_stream):
        with pytest.raises(ClientError, match="asynchronous endpoint") as raised:
            call(EndpointName="vton", Body=b"{}")
        assert raised.value.response["Error"]["Code"] == "ValidationError"


def test_no_more_jobs_run_at_once_than_there_are_places(cloud, topics):
    with staged(cloud, topics) as stage:
        ids = [stage.call({"seconds": 0.15})["InferenceId"] for _ in range(6)]
        assert [stage.message(each)["invocationStatus"] for each in ids] == ["Completed"] * 6
        assert stage.seen.most_at_once == 2


def test_a_job_that_is_not_begun_in_its_time_expires_and_never_begins(cloud, topics):
    with staged(cloud, topics, places=1, ttl_s=0.5) as stage:
        running = stage.call({"seconds": 8})["InferenceId"]
        began = time.monotonic()
        waiting = stage.call({"late": True})
        event = stage.message(waiting["InferenceId"])
        assert time.monotonic() - began < 7.5  # told when it expires, not when its turn would have come
        assert event["invocationStatus"] == "Failed"
        assert "RequestTTLSeconds" in event["failureReason"]
        assert b"RequestTTLSeconds" in stage.stored(waiting["FailureLocation"])["Body"].read()
        assert stage.message(running)["invocationStatus"] == "Completed"
        assert stage.message(stage.call({"next": True})["InferenceId"])["invocationStatus"] == "Completed"
        assert [json.loads(body) for _, body in stage.seen.calls if b"late" in body] == []


def is_kept(reference, limit_s=20):
    ends = time.monotonic() + limit_s
    while reference() is not None and time.monotonic() < ends:
        gc.collect()
        time.sleep(0.05)
    return reference() is not None


def test_nothing_is_kept_of_a_job_that_has_ended(cloud, topics, monkeypatch):
    """While the queue goes on: of one that expired behind another, and of one that was answered."""
    made = []

    def remembered(*asked):
        job = new_job(*asked)
        made.append(weakref.ref(job))
        return job

    monkeypatch.setattr("deploy.local_async.new_job", remembered)
    with staged(cloud, topics, places=1, ttl_s=0.5) as stage:
        running = stage.call({"seconds": 6}, RequestTTLSeconds=60)["InferenceId"]
        waiting = stage.call({"late": True})["InferenceId"]
        assert stage.message(waiting)["invocationStatus"] == "Failed"
        assert not is_kept(made[1], limit_s=2)
        assert stage.message(running)["invocationStatus"] == "Completed"
        assert not is_kept(made[0])


def test_jobs_wait_while_no_container_serves(cloud, topics):
    serving = threading.Event()
    with staged(cloud, topics, where=lambda url: lambda: url if serving.is_set() else None) as stage:
        ids = [stage.call({"number": number})["InferenceId"] for number in range(3)]
        time.sleep(0.2)
        assert stage.seen.calls == []
        serving.set()
        assert [stage.message(each)["invocationStatus"] for each in ids] == ["Completed"] * 3


def test_a_queue_that_is_full_refuses(cloud, topics):
    with staged(cloud, topics, places=1, backlog=1) as stage:
        first = stage.call({"seconds": 1})["InferenceId"]
        with pytest.raises(ClientError) as raised:
            stage.call({})
        assert raised.value.response["Error"]["Code"] == "ServiceUnavailable"
        assert stage.message(first)["invocationStatus"] == "Completed"
        assert stage.message(stage.call({})["InferenceId"])["invocationStatus"] == "Completed"


def test_an_endpoint_is_made_where_no_event_loop_is(cloud):
    asyncio.run(asyncio.sleep(0))  # after it the thread has none
    assert AsyncEndpoint(AsyncConfig("s3://a/out", "s3://a/fail"), cloud.client("s3"))
