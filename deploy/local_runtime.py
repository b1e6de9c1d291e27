"""What boto3's `sagemaker-runtime` client needs of SageMaker, over HTTP, in front of a container on this machine.

Real-time invocations only. The platform's way with errors is kept: whatever the container refuses, the caller sees a
ModelError 424 with the container's status and body inside.
Source: botocore's service model of sagemaker-runtime.
"""

from __future__ import annotations

import json
import re

import requests
from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

ENDPOINT_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
MAX_BODY_BYTES = 6_291_456  # of a real-time request and of its answer
MODEL_LIMIT_S = 60.0
CONNECT_LIMIT_S = 2.0
FORWARDED = (
    "content-type",
    "accept",
    "x-amzn-sagemaker-custom-attributes",
    "x-amzn-sagemaker-inference-id",
    "x-amzn-sagemaker-target-variant",
)
VARIANT = "AllTraffic"
LOG_STREAM = "arn:aws:logs:local:000000000000:log-group:/aws/sagemaker/Endpoints/{name}"


def create_runtime(container_url: str) -> FastAPI:
    """The runtime in front of a container.

    Args:
        container_url: "http://host:port" of its /invocations.
    """
    api = FastAPI(openapi_url=None)

    @api.post("/endpoints/{name}/invocations")
    async def invoke(name: str, request: Request) -> Response:
        if not ENDPOINT_NAME.fullmatch(name):
            return _error(400, "ValidationError", Message=f"Endpoint {name[:80]} not found.")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                return _error(413, "ValidationError", Message="The body is larger than 6291456 bytes.")
        headers = {key: value for key, value in request.headers.items() if key in FORWARDED}
        return await run_in_threadpool(_forward, container_url, name, bytes(body), headers)

    return api


def _forward(container_url: str, name: str, body: bytes, headers: dict[str, str]) -> Response:
    try:
        answer = requests.post(
            f"{container_url}/invocations", data=body, headers=headers, timeout=(CONNECT_LIMIT_S, MODEL_LIMIT_S)
        )
    except requests.exceptions.RequestException as exc:
        return _model_error(name, 0, f"Your invocation got no response from container primary: {type(exc).__name__}")
    if not answer.ok:
        return _model_error(name, answer.status_code, answer.text)
    returned = {"x-Amzn-Invoked-Production-Variant": VARIANT}
    attributes: str | None = answer.headers.get("X-Amzn-SageMaker-Custom-Attributes")
    if attributes is not None:
        returned["X-Amzn-SageMaker-Custom-Attributes"] = attributes
    return Response(answer.content, media_type=answer.headers.get("Content-Type"), headers=returned)


def _model_error(name: str, status: int, message: str) -> Response:
    side = "client" if 400 <= status < 500 else "server"
    return _error(
        424,
        "ModelError",
        Message=f'Received {side} error ({status}) from primary with message "{message}".',
        OriginalStatusCode=status,
        OriginalMessage=message,
        LogStreamArn=LOG_STREAM.format(name=name),
    )


def _error(status: int, kind: str, **members: object) -> Response:
    return Response(
        json.dumps(members), status_code=status, media_type="application/json", headers={"x-amzn-errortype": kind}
    )
