"""The stand-in for SageMaker's runtime, with boto3 before it and a small container behind it."""

from __future__ import annotations

import pytest
from botocore.exceptions import ClientError
from fastapi import FastAPI, Request, Response

from deploy.demo import client, free_port, http_server
from deploy.local_runtime import MAX_BODY_BYTES, create_runtime


@pytest.fixture(scope="module")
def seen():
    return []


@pytest.fixture(scope="module")
def runtime(seen):
    container = FastAPI()

    @container.post("/invocations")
    async def invocations(request: Request) -> Response:
        seen.append((dict(request.headers), await request.body()))
        status = int(request.headers.get("x-amzn-sagemaker-inference-id", "200"))
        headers = {"X-Amzn-SageMaker-Custom-Attributes": "tenant=blue"}
        return Response(b'{"a": 1}', status_code=status, media_type="application/json", headers=headers)

    with http_server(container) as behind, http_server(create_runtime(behind)) as url:
        yield url


def invoke(url, **members):
    given = {"EndpointName": "vton", "ContentType": "application/json", "Body": b"{}", **members}
    return client("sagemaker-runtime", url).invoke_endpoint(**given)


def test_the_answer_comes_through_with_the_callers_attributes(runtime, seen):
    answer = invoke(runtime, CustomAttributes="tenant=blue", Body=b'{"x": 1}')
    assert answer["Body"].read() == b'{"a": 1}'
    assert (answer["ContentType"], answer["CustomAttributes"]) == ("application/json", "tenant=blue")
    assert answer["InvokedProductionVariant"] == "AllTraffic"
    headers, body = seen[-1]
    assert body == b'{"x": 1}'
    assert headers["x-amzn-sagemaker-custom-attributes"] == "tenant=blue"
    assert "authorization" not in headers


@pytest.mark.parametrize(("status", "side"), [("422", "client"), ("503", "server")])
def test_a_refusal_of_the_container_is_a_model_error(runtime, status, side):
    with pytest.raises(ClientError) as raised:
        invoke(runtime, InferenceId=status)
    response = raised.value.response
    assert response["Error"]["Code"] == "ModelError"
    assert response["ResponseMetadata"]["HTTPStatusCode"] == 424
    assert response["OriginalStatusCode"] == int(status)
    assert response["OriginalMessage"] == '{"a": 1}'
    assert f"Received {side} error ({status}) from primary" in response["Error"]["Message"]


def test_a_container_that_is_gone_is_a_model_error():
    with http_server(create_runtime(f"http://127.0.0.1:{free_port()}")) as url, pytest.raises(ClientError) as raised:
        invoke(url)
    assert raised.value.response["OriginalStatusCode"] == 0


def test_a_body_above_the_platforms_limit_is_refused(runtime):
    with pytest.raises(ClientError, match="6291456"):
        invoke(runtime, Body=b"x" * (MAX_BODY_BYTES + 1))
