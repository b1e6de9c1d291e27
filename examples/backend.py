"""How a backend calls the try-on endpoint with boto3: one picture, many at once, and asynchronously.

Against AWS it needs credentials and the endpoint's name; against `vton local`, the variables that it prints.

    python examples/backend.py one --endpoint-name vton --person URL --upper URL --lower URL

Three rules keep a picture from being paid for more than once. The client sends a call once and waits longer than the
platform does. A try-on has one `timestamp` for ever: the same request again finds the picture that is stored. And what
failed is sent again only where the endpoint says that a repeat may succeed.
"""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
import click
from botocore import exceptions as aws
from botocore.config import Config

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_sagemaker_runtime import SageMakerRuntimeClient
    from mypy_boto3_sqs import SQSClient

READ_TIMEOUT_S = 70.0  # the platform ends a real-time call after 60 s: its error is better than none
RETRY_FOR_S = 180.0  # from the first call of a try-on to its last
FIRST_WAIT_S = 1.0
MAX_WAIT_S = 30.0
JITTER = 0.5  # up to so much is added to each wait, so that callers who were refused together do not return together
PLACES = 8  # VTON_MAX_IN_FLIGHT of each instance: more callers than that are refused with 429
POLL_S = 2.0
INPUTS = "asynchronous/inputs/"  # where the stack lets the endpoint read, and lets what it has read expire
UNKNOWN = "outcome_unknown"
UNREACHABLE = "unreachable"
TURNED_AWAY = ("ServiceUnavailable", "ThrottlingException")  # by the platform, before the endpoint


class TryOnFailed(Exception):
    """A try-on that brought no picture.

    Attributes:
        code: of the endpoint ("overloaded"), `outcome_unknown`, `unreachable`, or the name of an AWS error.
        retryable: whether the same request may succeed.
        retry_after_s: how long it should wait, where the endpoint says so.
    """

    def __init__(self, code: str, message: str, *, retryable: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.retryable = retryable
        self.retry_after_s = retry_after_s


def runtime_client(
    *, places: int = PLACES, read_timeout_s: float = READ_TIMEOUT_S, endpoint_url: str | None = None
) -> SageMakerRuntimeClient:
    """A client that sends each call once.

    Args:
        places: calls at a time, each on its own connection.
        read_timeout_s: above the platform's limit, or it hangs up on a picture that is paid for.
        endpoint_url: where the runtime is, if not where the environment and the region say.
    """
    once = Config(
        connect_timeout=5,
        read_timeout=read_timeout_s,
        retries={"total_max_attempts": 1},
        max_pool_connections=places,
    )
    return boto3.client("sagemaker-runtime", config=once, endpoint_url=endpoint_url)


def new_timestamp() -> str:
    """The name of a new try-on, to be kept with the order: whoever repeats the request repeats it."""
    return f"{time.strftime('%y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"


def try_on(
    runtime: SageMakerRuntimeClient, endpoint: str, request: Mapping[str, Any], *, retry_for_s: float = RETRY_FOR_S
) -> dict[str, Any]:
    """The endpoint's answer; its `object_key` is the picture's.

    Args:
        runtime: of `runtime_client`.
        endpoint: its name.
        request: the fields of /invocations, `timestamp` among them.
        retry_for_s: within which calls are begun.

    Raises:
        TryOnFailed: a repeat would not help, or did not in the time; or nobody knows.
    """
    gives_up = time.monotonic() + retry_for_s
    wait_s = FIRST_WAIT_S
    while True:
        try:
            return _invoke(runtime, endpoint, request)
        except TryOnFailed as failed:
            pause_s = max(wait_s, failed.retry_after_s or 0.0) * (1 + random.uniform(0, JITTER))  # noqa: S311
            if not failed.retryable or time.monotonic() + pause_s > gives_up:
                raise
        time.sleep(pause_s)
        wait_s = min(2 * wait_s, MAX_WAIT_S)


def try_on_many(
    runtime: SageMakerRuntimeClient,
    endpoint: str,
    requests: Iterable[Mapping[str, Any]],
    *,
    places: int = PLACES,
    retry_for_s: float = RETRY_FOR_S,
) -> Iterator[tuple[Mapping[str, Any], dict[str, Any] | TryOnFailed]]:
    """Each request with its answer or its failure, as they come.

    Args:
        runtime: of `runtime_client` with as many places.
        endpoint: its name.
        requests: each with a `timestamp` of its own.
        places: of the endpoint: `VTON_MAX_IN_FLIGHT` times its instances.
        retry_for_s: as for `try_on`.
    """

    def outcome(request: Mapping[str, Any]) -> dict[str, Any] | TryOnFailed:
        try:
            return try_on(runtime, endpoint, request, retry_for_s=retry_for_s)
        except TryOnFailed as failed:
            return failed

    with ThreadPoolExecutor(places) as pool:
        asked = {pool.submit(outcome, request): request for request in requests}
        for done in as_completed(asked):
            yield asked[done], done.result()


@dataclass(frozen=True)
class Submitted:
    """An asynchronous try-on that was accepted.

    Attributes:
        inference_id: of the messages that tell of it.
        output: "s3://bucket/key" where the answer will lie.
        failure: where the failure will lie.
    """

    inference_id: str
    output: str
    failure: str


def submit(
    runtime: SageMakerRuntimeClient,
    s3: S3Client,
    endpoint: str,
    request: Mapping[str, Any],
    *,
    bucket: str,
    timeout_s: int = 900,
    ttl_s: int = 3600,
) -> Submitted:
    """Puts a try-on into the queue of an asynchronous endpoint.

    Args:
        runtime: of `runtime_client`.
        s3: a client.
        endpoint: its name.
        request: as for `try_on`.
        bucket: that the endpoint reads inputs of, below `INPUTS`.
        timeout_s: for the picture to be made, 1-3600.
        ttl_s: for it to be begun, 60-21600.
    """
    inference_id = uuid.uuid4().hex
    key = f"{INPUTS}{inference_id}.json"
    s3.put_object(Bucket=bucket, Key=key, Body=json.dumps(request).encode(), ContentType="application/json")
    accepted = runtime.invoke_endpoint_async(
        EndpointName=endpoint,
        ContentType="application/json",
        InputLocation=f"s3://{bucket}/{key}",
        InferenceId=inference_id,
        InvocationTimeoutSeconds=timeout_s,
        RequestTTLSeconds=ttl_s,
    )
    return Submitted(inference_id, accepted["OutputLocation"], accepted["FailureLocation"])


def wait_by_polling(s3: S3Client, submitted: Submitted, *, limit_s: float, poll_s: float = POLL_S) -> dict[str, Any]:
    """The answer to an asynchronous try-on, as soon as it lies in S3.

    Raises:
        TryOnFailed: its failure lies there, or neither does after `limit_s`.
    """
    gives_up = time.monotonic() + limit_s
    while time.monotonic() < gives_up:
        output = _stored(s3, submitted.output)
        if output is not None:
            answer: dict[str, Any] = json.loads(output)
            return answer
        failure = _stored(s3, submitted.failure)
        if failure is not None:
            raise _failed("InvocationFailed", failure.decode(errors="replace"))
        time.sleep(poll_s)
    raise TryOnFailed(UNKNOWN, f"neither answer nor failure after {limit_s:g} s")


def wait_by_message(
    sqs: SQSClient, s3: S3Client, queue_url: str, submitted: Iterable[Submitted], *, limit_s: float
) -> Iterator[tuple[Submitted, dict[str, Any] | TryOnFailed]]:
    """Each asynchronous try-on with its answer or failure, as the messages about them come.

    Args:
        sqs: a client.
        s3: a client.
        queue_url: of a queue that subscribes to the endpoint's success and error topics.
        submitted: what is waited for; messages about anything else stay in the queue.
        limit_s: after which the rest is given as failed with `outcome_unknown`.
    """
    open_ones = {each.inference_id: each for each in submitted}
    gives_up = time.monotonic() + limit_s
    while open_ones and time.monotonic() < gives_up:
        wait_s = max(0, min(20, int(gives_up - time.monotonic())))
        received = sqs.receive_message(QueueUrl=queue_url, MaxNumberOfMessages=10, WaitTimeSeconds=wait_s)
        for message in received.get("Messages", []):
            event = _event(message["Body"])
            ours = open_ones.pop(event.get("inferenceId", ""), None)
            if ours is None:
                continue  # somebody else's, or told twice
            yield ours, _outcome(s3, ours, event)
            sqs.delete_message(QueueUrl=queue_url, ReceiptHandle=message["ReceiptHandle"])
    for left in open_ones.values():
        yield left, TryOnFailed(UNKNOWN, f"no message within {limit_s:g} s")


def _invoke(runtime: SageMakerRuntimeClient, endpoint: str, request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        response = runtime.invoke_endpoint(
            EndpointName=endpoint, ContentType="application/json", Body=json.dumps(request)
        )
        answer: dict[str, Any] = json.loads(response["Body"].read())
    except (aws.ConnectTimeoutError, aws.EndpointConnectionError) as exc:  # nothing was sent
        raise TryOnFailed(UNREACHABLE, str(exc), retryable=True) from exc
    except (aws.ReadTimeoutError, aws.ConnectionClosedError) as exc:
        raise TryOnFailed(UNKNOWN, "no answer; the same request will find the picture if it is made") from exc
    except aws.ClientError as exc:
        raise refusal(exc) from exc
    return answer


def refusal(error: aws.ClientError) -> TryOnFailed:
    """What an error of boto3 says about a try-on."""
    kind = error.response["Error"]["Code"]
    if kind != "ModelError":
        return TryOnFailed(kind, str(error), retryable=kind in TURNED_AWAY)
    response: Mapping[str, Any] = error.response
    if response.get("OriginalStatusCode") == 0:  # the container gave no answer in time, and may still be at work
        return TryOnFailed(UNKNOWN, str(response.get("OriginalMessage")))
    return _failed("ModelError", str(response.get("OriginalMessage", "")))


def _failed(kind: str, text: str) -> TryOnFailed:
    """The endpoint's own error, `{"error": {...}}`, out of a text that has it in the middle."""
    begin = text.find('{"error"')
    try:
        error = json.JSONDecoder().raw_decode(text[begin:])[0]["error"] if begin >= 0 else {}
        code, message = str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        return TryOnFailed(kind, text)
    after = error.get("retry_after_s")
    return TryOnFailed(
        code,
        message,
        retryable=error.get("retryable") is True,
        retry_after_s=float(after) if isinstance(after, (int, float)) else None,
    )


def _event(body: str) -> dict[str, Any]:
    """The message of the endpoint, with or without the envelope of SNS."""
    event: dict[str, Any] = json.loads(body)
    if event.get("Type") == "Notification":
        event = json.loads(event["Message"])
    return event


def _outcome(s3: S3Client, submitted: Submitted, event: Mapping[str, Any]) -> dict[str, Any] | TryOnFailed:
    if event["invocationStatus"] == "Completed":
        answer: dict[str, Any] = json.loads(_stored(s3, submitted.output) or b"{}")
        return answer
    failure = _stored(s3, submitted.failure)
    return _failed("InvocationFailed", str(event.get("failureReason")) if failure is None else failure.decode())


def _stored(s3: S3Client, uri: str) -> bytes | None:
    """An object, or None while there is none."""
    place = urlsplit(uri)
    try:
        return s3.get_object(Bucket=place.netloc, Key=place.path.lstrip("/"))["Body"].read()
    except aws.ClientError as exc:
        if exc.response["Error"]["Code"] not in ("NoSuchKey", "404"):
            raise
        return None


_ENDPOINT = click.option("--endpoint-name", default="vton", show_default=True)
_URLS = ("person_image_url", "upper_cloth_url", "lower_cloth_url", "overall_cloth_url", "mask_image_url")


def _request_options(command: Any) -> Any:  # noqa: ANN401 - click's
    for name in reversed(_URLS):
        flag = f"--{name.partition('_')[0]}"
        command = click.option(flag, name, required=flag == "--person", help=f"The {name}.")(command)
    command = click.option("--user-id", "userId", default="7", show_default=True)(command)
    return click.option("--timestamp", help="Of an earlier try-on, to repeat it; by default a new one.")(command)


def _request(options: Mapping[str, str | None]) -> dict[str, str]:
    request = {name: value for name, value in options.items() if value is not None}
    request.setdefault("timestamp", new_timestamp())
    click.echo(f"timestamp {request['timestamp']}", err=True)
    return request


def _show(outcome: Mapping[str, Any] | TryOnFailed) -> bool:
    """Prints an outcome; whether it is a picture."""
    if isinstance(outcome, TryOnFailed):
        told = {"code": outcome.code, "retryable": outcome.retryable, "message": str(outcome)}
        click.echo(json.dumps({"error": told}))
        return False
    click.echo(json.dumps(outcome))
    return True


@click.group()
def main() -> None:
    """Calls a try-on endpoint; ends with 1 where a picture is missing."""


@main.command()
@_ENDPOINT
@_request_options
def one(endpoint_name: str, **options: str | None) -> None:
    """One picture, waited for."""
    try:
        outcome: dict[str, Any] | TryOnFailed = try_on(runtime_client(), endpoint_name, _request(options))
    except TryOnFailed as failed:
        outcome = failed
    raise SystemExit(not _show(outcome))


@main.command()
@_ENDPOINT
@click.option("--places", default=PLACES, show_default=True, type=click.IntRange(1), help="Calls at a time.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def many(endpoint_name: str, places: int, file: Path) -> None:
    """Every request of a FILE of JSON Lines, each with its own timestamp."""
    requests = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    outcomes = try_on_many(runtime_client(places=places), endpoint_name, requests, places=places)
    shown = [_show(outcome) for _, outcome in outcomes]
    raise SystemExit(not all(shown))


@main.command("async")
@_ENDPOINT
@click.option("--bucket", required=True, help="That the endpoint reads inputs of.")
@click.option("--queue-url", help="Of the outcomes; without one S3 is polled.")
@click.option("--limit", "limit_s", default=900.0, show_default=True, help="Seconds to wait.")
@_request_options
def asynchronous(endpoint_name: str, bucket: str, queue_url: str | None, limit_s: float, **options: str | None) -> None:
    """One picture by the endpoint's queue."""
    s3 = boto3.client("s3")
    submitted = submit(runtime_client(), s3, endpoint_name, _request(options), bucket=bucket)
    click.echo(f"accepted; the answer will be {submitted.output}", err=True)
    outcome: dict[str, Any] | TryOnFailed
    if queue_url is None:
        try:
            outcome = wait_by_polling(s3, submitted, limit_s=limit_s)
        except TryOnFailed as failed:
            outcome = failed
    else:
        ((_, outcome),) = wait_by_message(boto3.client("sqs"), s3, queue_url, [submitted], limit_s=limit_s)
    raise SystemExit(not _show(outcome))


if __name__ == "__main__":
    try:
        main()
    except aws.BotoCoreError as exc:
        raise SystemExit(f"AWS cannot be asked: {exc}") from exc
