"""One asynchronous invocation: what was asked for, where its outcome lies, and the message that tells of it.

Source: botocore's service model of sagemaker-runtime; the messages are those of the developer guide.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from urllib.parse import unquote

from starlette.responses import Response

from deploy.local_invoke import forwarded
from deploy.platform_errors import validation_error

LOCATION = re.compile(
    r"s3://(?P<bucket>[^/]+)/(?P<key>.+)|"
    r"https://(s3[.-][^/]+/(?P<path>[^/?#]+)|(?P<host>[^/]+)\.s3[.-][^/]+)/(?P<quoted>[^?#]+)"
)
FILENAME = re.compile(r"(?!.*\..*\.)[a-zA-Z0-9][a-zA-Z0-9_.-]{0,31}")
EXTENSION = re.compile(r"(?!s3:|https:)[a-zA-Z0-9!_.*'()/-]{1,512}")
MAX_LOCATION_CHARACTERS = 1024
TTL_S = range(60, 21601)
INVOCATION_S = range(1, 3601)
PREFIX = "x-amzn-sagemaker-"


@dataclass(frozen=True)
class AsyncConfig:
    """An AsyncInferenceConfig, and what the platform allows.

    Attributes:
        output_path: S3OutputPath, "s3://bucket/prefix".
        failure_path: S3FailurePath.
        success_topic: ARN of SuccessTopic; without one nobody is told.
        error_topic: ARN of ErrorTopic.
        places: MaxConcurrentInvocationsPerInstance.
        ttl_s: RequestTTLSeconds of a request that names none.
        invocation_s: InvocationTimeoutSeconds of a request that names none.
        inline_bytes: of a body that comes with the call.
        payload_bytes: of an input in S3, and of an answer.
        backlog: jobs that wait or run; one more is refused.
    """

    output_path: str
    failure_path: str
    success_topic: str | None = None
    error_topic: str | None = None
    places: int = 1
    ttl_s: float = 21_600
    invocation_s: float = 900
    inline_bytes: int = 128_000
    payload_bytes: int = 2**30
    backlog: int = 1_000


@dataclass(frozen=True)
class S3Object:
    """Where something lies."""

    bucket: str
    key: str

    @property
    def uri(self) -> str:
        """ "s3://bucket/key"."""
        return f"s3://{self.bucket}/{self.key}"


@dataclass
class Job:
    """One accepted invocation.

    Attributes:
        endpoint: name that it was called by.
        inference_id: the caller's, or a new one.
        headers: what the container gets.
        body: the input, where it came with the call.
        input: where the input lies, else.
        output: where the answer will lie.
        failure: where the failure will lie.
        invocation_s: for the container to answer.
        expires_at: time.monotonic() value after which it does not begin.
        received_at: when it was accepted.
    """

    endpoint: str
    inference_id: str
    headers: Mapping[str, str]
    body: bytes
    input: S3Object | None
    output: S3Object
    failure: S3Object
    invocation_s: float
    expires_at: float
    received_at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    def accepted(self) -> Response:
        """What the caller gets."""
        headers = {
            "X-Amzn-SageMaker-OutputLocation": self.output.uri,
            "X-Amzn-SageMaker-FailureLocation": self.failure.uri,
        }
        content = json.dumps({"InferenceId": self.inference_id})
        return Response(content, status_code=202, media_type="application/json", headers=headers)


def new_job(endpoint: str, headers: Mapping[str, str], body: bytes, config: AsyncConfig) -> Job:
    """The job that a call asks for.

    Args:
        endpoint: name that was called.
        headers: of the call, by names in lower case; a character is a byte (Latin-1).
        body: of the call.
        config: of the endpoint.

    Raises:
        PlatformError: the call is wrong.
    """
    location = headers.get(PREFIX + "inputlocation")
    if bool(body) == (location is not None):
        raise validation_error("Provide exactly one of Body and InputLocation.")
    inference_id = headers.get(PREFIX + "inference-id") or str(uuid.uuid4())
    name = _matching(headers, "filename", FILENAME) or f"{inference_id}.out"
    extension = _matching(headers, "s3outputpathextension", EXTENSION)
    path = "/".join([config.output_path.rstrip("/"), *([extension.strip("/")] if extension else [])])
    named = {key: value for key, value in headers.items() if key.startswith(PREFIX)}
    return Job(
        endpoint=endpoint,
        inference_id=inference_id,
        headers=forwarded({**named, PREFIX + "inference-id": inference_id}),
        body=body,
        input=None if location is None else _input(location),
        output=_below(path, name),
        failure=_below(config.failure_path, f"{inference_id}-error.out"),
        expires_at=time.monotonic() + _seconds(headers, "requestttlseconds", TTL_S, config.ttl_s),
        invocation_s=_seconds(headers, "invocationtimeoutseconds", INVOCATION_S, config.invocation_s),
    )


def _input(location: str) -> S3Object:
    """The object that a header's value names: what stands after s3:// as it is, after https:// unquoted.

    Raises:
        PlatformError: it names none.
    """
    wrong = validation_error("InputLocation must be the URL of an object in S3.")
    try:
        location = location.encode("latin-1").decode()  # boto3 sends UTF-8
        match = LOCATION.fullmatch(location)
        unquoted = "" if match is None else unquote(match["quoted"] or "", errors="strict")
    except UnicodeError as exc:
        raise wrong from exc
    if match is None or len(location) > MAX_LOCATION_CHARACTERS:
        raise wrong
    return S3Object(match["bucket"] or match["path"] or match["host"], match["key"] or unquoted)


def _below(path: str, name: str) -> S3Object:
    """The object of a name in a folder of S3, "s3://bucket/prefix"."""
    bucket, _, prefix = path.partition("://")[2].partition("/")
    return S3Object(bucket, f"{prefix.strip('/')}/{name}".lstrip("/"))


def event(job: Job, status: str, **outcome: object) -> dict[str, object]:
    """The members of a message, but for the region."""
    content_type = job.headers.get("Content-Type")
    asked = {
        "contentType": content_type,
        "endpointName": job.endpoint,
        "inputLocation": None if job.input is None else job.input.uri,
    }
    return {
        "eventTime": _written(datetime.now(timezone.utc)),
        "receivedTime": _written(job.received_at),
        "invocationStatus": status,
        "requestParameters": {name: value for name, value in asked.items() if value is not None},
        **outcome,
        "inferenceId": job.inference_id,
        "eventVersion": "1.0",
        "eventSource": "aws:sagemaker",
        "eventName": "InferenceResult",
    }


def _written(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _matching(headers: Mapping[str, str], name: str, rule: re.Pattern[str]) -> str | None:
    value = headers.get(PREFIX + name)
    if value is not None and not rule.fullmatch(value):
        raise validation_error(f"{name} has a value that is not permitted.")
    return value


def _seconds(headers: Mapping[str, str], name: str, permitted: range, default: float) -> float:
    value = headers.get(PREFIX + name)
    if value is None:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) not in permitted:
        raise validation_error(f"{name} must be from {permitted.start} to {permitted.stop - 1}.")
    return float(value)
