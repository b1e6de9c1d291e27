"""The stand-in for SageMaker's runtime, with boto3 before it and a small container behind it."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time

import pytest
import requests
from botocore.exceptions import ClientError, EventStreamError
from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

from deploy.demo import REPOSITORY, client, free_port, http_server
from deploy.local_runtime import ENDPOINT_NAME, MAX_BODY_BYTES, VARIANT, RuntimeLimits, create_runtime


class Seen:
    """What the container got and finished."""

    def __init__(self):
        self.calls = []
        self.finished = threading.Semaphore(0)


async def pieces(seen, way):
    yield b'{"part": 1}'
    await asyncio.sleep(0.05)
    if way == "breaks":
        raise ConnectionResetError
    if way == "stalls":
        await asyncio.sleep(5)
    yield b'{"part": 2}'


def container_app(seen):
    container = FastAPI()

    @container.post("/invocations")
    async def invocations(request: Request) -> Response:
        seen.calls.append((dict(request.headers), await request.body()))
        asked = request.headers.get("x-amzn-sagemaker-inference-id", "200")
        headers = {"X-Amzn-SageMaker-Custom-Attributes": "tenant=blue"}
        if asked.startswith("stream"):
            return StreamingResponse(pieces(seen, asked.partition("-")[2]), media_type="application/jsonlines")
        if asked == "slow":
            await asyncio.sleep(6)
            seen.finished.release()
        content = b"x" * 2000 if asked == "long" else b'{"a": 1}'
        status = int(asked) if asked.isdigit() else 200
        return Response(content, status_code=status, media_type="application/json", headers=headers)

    return container


@pytest.fixture(scope="module")
def seen():
    return Seen()


@pytest.fixture(scope="module")
def behind(seen):
    with http_server(container_app(seen)) as url:
        yield url


@pytest.fixture(scope="module")
def runtime(behind):
    with http_server(create_runtime(behind, name="vton")) as url:
        yield url


@pytest.fixture(scope="module")
def strict(behind):
    """A runtime whose limits are small enough to be reached."""
    limits = RuntimeLimits(model_s=1, stream_s=1.5, body_bytes=1000)
    with http_server(create_runtime(behind, name="vton", limits=limits)) as url:
        yield url


def invoke(url, **members):
    given = {"EndpointName": "vton", "ContentType": "application/json", "Body": b"{}", **members}
    answer = client("sagemaker-runtime", url).invoke_endpoint(**given)
    return {**answer, "Body": answer["Body"].read()}


def refused(url, **members):
    with pytest.raises(ClientError) as raised:
        invoke(url, **members)
    return raised.value.response


def stream(url, way):
    given = {"EndpointName": "vton", "ContentType": "application/json", "Body": b"{}", "InferenceId": way}
    return client("sagemaker-runtime", url).invoke_endpoint_with_response_stream(**given)


def test_the_answer_comes_through_with_the_callers_attributes(runtime, seen):
    answer = invoke(runtime, CustomAttributes="tenant=blue", Body=b'{"x": 1}', Accept="application/json")
    assert answer["Body"] == b'{"a": 1}'
    assert (answer["ContentType"], answer["CustomAttributes"]) == ("application/json", "tenant=blue")
    assert answer["InvokedProductionVariant"] == VARIANT
    headers, body = seen.calls[-1]
    assert body == b'{"x": 1}'
    assert headers["x-amzn-sagemaker-custom-attributes"] == "tenant=blue"
    assert headers["accept"] == "application/json"


def test_only_headers_of_the_allow_list_reach_the_container(runtime, seen):
    sent = {"X-Own": "1", "Cookie": "a=b", "Authorization": "AWS4", "Content-Type": "application/json"}
    assert requests.post(f"{runtime}/endpoints/vton/invocations", data=b"{}", headers=sent, timeout=30).ok
    assert set(seen.calls[-1][0]) == {"host", "content-length", "content-type", "accept"}


@pytest.mark.parametrize(("status", "side"), [("422", "client"), ("429", "client"), ("503", "server")])
def test_a_refusal_of_the_container_is_a_model_error(runtime, status, side):
    response = refused(runtime, InferenceId=status)
    assert response["Error"]["Code"] == "ModelError"
    assert response["ResponseMetadata"]["HTTPStatusCode"] == 424
    assert response["OriginalStatusCode"] == int(status)
    assert response["OriginalMessage"] == '{"a": 1}'
    assert response["LogStreamArn"].endswith("/aws/sagemaker/Endpoints/vton")
    assert f"Received {side} error ({status}) from primary" in response["Error"]["Message"]


@pytest.mark.parametrize("where", [f"http://127.0.0.1:{free_port()}", lambda: None])
def test_a_container_that_is_gone_is_a_model_error(where):
    with http_server(create_runtime(where)) as url:
        response = refused(url)
    assert (response["Error"]["Code"], response["OriginalStatusCode"]) == ("ModelError", 0)


@pytest.mark.parametrize("name", ["a" * 63, "a" + "-" * 61 + "b", "a"])
def test_a_name_of_the_permitted_length_is_an_endpoints(name):
    assert ENDPOINT_NAME.fullmatch(name)


@pytest.mark.parametrize("name", ["", "-a", "a-", "a_b", "a" * 64, "a" + "-" * 62 + "b", "a" + "-" * 100 + "b", "a\n"])
def test_a_name_that_is_too_long_or_of_other_characters_is_no_endpoints(name):
    assert not ENDPOINT_NAME.fullmatch(name)


@pytest.mark.parametrize("name", ["other", "vton-", "v" * 64])
def test_an_endpoint_that_is_not_there_is_a_validation_error(runtime, name):
    sent = requests.post(f"{runtime}/endpoints/{name}/invocations", data=b"{}", timeout=30)
    assert (sent.status_code, sent.headers["x-amzn-errortype"]) == (400, "ValidationError")
    assert "not found" in sent.json()["Message"]


@pytest.mark.parametrize("name", ["a/../b c", "..", "a?b", "a#b", "a/invocations"])
def test_a_name_that_boto3_sends_quoted_is_an_endpoint_that_is_not_there(runtime, name):
    response = refused(runtime, EndpointName=name)
    assert (response["Error"]["Code"], response["ResponseMetadata"]["HTTPStatusCode"]) == ("ValidationError", 400)
    assert f"Endpoint {name} of account" in response["Error"]["Message"]


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("Inference-Id", "x" * 65),
        ("Custom-Attributes", "x" * 1025),
        ("Target-Variant", "Other"),
        ("Session-Id", "-"),
        ("Content-Type", "x" * 1025),
        ("Accept", "x" * 1025),
    ],
)
def test_a_header_outside_the_service_model_is_a_validation_error(runtime, seen, header, value):
    before = len(seen.calls)
    headers = {f"X-Amzn-SageMaker-{header}": value}
    sent = requests.post(f"{runtime}/endpoints/vton/invocations", data=b"{}", headers=headers, timeout=30)
    assert (sent.status_code, sent.headers["x-amzn-errortype"]) == (400, "ValidationError")
    assert len(seen.calls) == before


@pytest.mark.parametrize(
    ("member", "value", "said"),
    [
        ("TargetModel", "x.tar.gz", "not a multi-model endpoint and does not support target model header"),
        ("TargetContainerHostname", "first", "does not support target container hostname header"),
        ("InferenceComponentName", "part", "does not support inference component name header"),
        ("EnableExplanations", "`true`", "does not support enable explanations header"),
        ("TargetVariant", "Other", "target-variant has a value that is not permitted"),
    ],
)
def test_what_only_another_kind_of_endpoint_takes_is_a_validation_error(runtime, seen, member, value, said):
    before = len(seen.calls)
    response = refused(runtime, **{member: value})
    assert (response["Error"]["Code"], response["ResponseMetadata"]["HTTPStatusCode"]) == ("ValidationError", 400)
    assert said in response["Error"]["Message"]
    assert len(seen.calls) == before


@pytest.mark.parametrize("member", ["ContentType", "Accept"])
def test_a_media_type_has_at_most_1024_characters(runtime, seen, member):
    name = {"ContentType": "content-type", "Accept": "accept"}[member]
    invoke(runtime, **{member: "x" * 1024})
    assert seen.calls[-1][0][name] == "x" * 1024
    before = len(seen.calls)
    response = refused(runtime, **{member: "x" * 1025})
    assert response["Error"]["Code"] == "ValidationError"
    assert f"{name} has a value that is not permitted" in response["Error"]["Message"]
    assert len(seen.calls) == before


def test_the_one_variant_may_be_named(runtime):
    assert invoke(runtime, TargetVariant=VARIANT)["InvokedProductionVariant"] == VARIANT


def test_the_variant_has_the_name_of_the_deployed_one():
    deployed = (REPOSITORY / "deploy" / "cdk_alarms.py").read_text()
    assert re.findall('^VARIANT = "(.*)"$', deployed, re.MULTILINE) == [VARIANT]


def test_attributes_that_are_empty_are_none(runtime, seen):
    invoke(runtime, CustomAttributes="")
    assert "x-amzn-sagemaker-custom-attributes" not in seen.calls[-1][0]


def test_every_answer_has_an_id_of_its_own(runtime):
    streamed = stream(runtime, "200")
    assert len(list(streamed["Body"])) == 1
    answers = [
        streamed,
        invoke(runtime),
        refused(runtime, InferenceId="422"),
        refused(runtime, EndpointName="other"),
        refused(runtime, Body=b"x" * (MAX_BODY_BYTES + 1)),
    ]
    ids = {answer["ResponseMetadata"]["RequestId"] for answer in answers}
    assert len(ids) == len(answers)
    assert requests.get(runtime, timeout=30).headers["x-amzn-RequestId"] not in ids


def test_a_body_of_the_platforms_limit_is_passed_on_and_one_byte_more_refused(runtime, seen):
    invoke(runtime, Body=b"x" * MAX_BODY_BYTES)
    assert len(seen.calls[-1][1]) == MAX_BODY_BYTES
    response = refused(runtime, Body=b"x" * (MAX_BODY_BYTES + 1))
    assert response["ResponseMetadata"]["HTTPStatusCode"] == 413
    assert response["Error"]["Message"] == "HTTP content length exceeded 6291456 bytes."


def test_an_answer_above_the_limit_is_a_model_error(strict):
    response = refused(strict, InferenceId="long")
    assert (response["Error"]["Code"], response["OriginalStatusCode"]) == ("ModelError", 0)


def test_a_call_ends_at_the_time_limit_and_the_container_is_left_to_finish(strict, seen):
    before, began = len(seen.calls), time.monotonic()
    response = refused(strict, InferenceId="slow")
    assert time.monotonic() - began < 5.5
    assert (response["Error"]["Code"], response["OriginalStatusCode"]) == ("ModelError", 0)
    assert "timed out while waiting for a response from container primary" in response["OriginalMessage"]
    assert len(seen.calls) == before + 1
    assert seen.finished.acquire(timeout=30)


def test_a_real_time_endpoint_takes_no_asynchronous_calls(runtime):
    with pytest.raises(ClientError, match="real-time endpoint"):
        client("sagemaker-runtime", runtime).invoke_endpoint_async(EndpointName="vton", InputLocation="s3://a/b")


def test_a_stream_brings_the_chunks_as_they_come(runtime, seen):
    answer = stream(runtime, "stream-well")
    parts = [event["PayloadPart"]["Bytes"] for event in answer["Body"]]
    assert parts == [b'{"part": 1}', b'{"part": 2}']
    assert answer["ContentType"] == "application/jsonlines"
    assert answer["InvokedProductionVariant"] == VARIANT


def test_an_answer_that_is_not_streamed_comes_as_a_stream_too(runtime):
    answer = stream(runtime, "200")
    assert b"".join(event["PayloadPart"]["Bytes"] for event in answer["Body"]) == b'{"a": 1}'
    assert answer["CustomAttributes"] == "tenant=blue"


def test_a_refusal_before_the_stream_is_a_model_error(runtime):
    with pytest.raises(ClientError) as raised:
        stream(runtime, "422")
    response = raised.value.response
    assert (response["Error"]["Code"], response["OriginalStatusCode"]) == ("ModelError", 422)
    assert json.loads(response["OriginalMessage"]) == {"a": 1}


@pytest.mark.parametrize(
    ("way", "code", "parts"),
    [
        ("stream-breaks", "StreamBroken", 1),
        ("stream-stalls", "ModelInvocationTimeExceeded", 1),
        ("slow", "ModelInvocationTimeExceeded", 0),
    ],
)
def test_what_ends_a_stream_early_is_its_last_event(strict, way, code, parts):
    body = stream(strict, way)["Body"]
    events = iter(body)
    for _ in range(parts):
        assert next(events)["PayloadPart"]["Bytes"]
    with pytest.raises(EventStreamError) as raised:
        next(events)
    body.close()
    assert raised.value.response["Error"]["Code"] == "ModelStreamError"
    # boto3 keeps the error's message and drops its code
    headers = {"X-Amzn-SageMaker-Inference-Id": way}
    raw = requests.post(f"{strict}/endpoints/vton/invocations-response-stream", b"{}", headers=headers, timeout=30)
    assert json.dumps(code).encode() in raw.content


def test_a_body_that_does_not_come_is_not_waited_for(behind):
    with http_server(create_runtime(behind, limits=RuntimeLimits(body_s=0.2))) as url:

        def never_ends():
            yield b"{"
            time.sleep(3)
            yield b"}"

        try:
            status = requests.post(f"{url}/endpoints/vton/invocations", data=never_ends(), timeout=30).status_code
        except requests.exceptions.ConnectionError:  # closed while it was still sending
            status = 408
    assert status == 408
