"""How a backend calls the try-on endpoint with boto3: one picture, many at once, and asynchronously.

Against AWS it needs credentials and the endpoint's name; against `vton local`, the variables that it prints.

    python examples/backend.py one --endpoint-name vton --person URL --upper URL --lower URL

Three rules keep a picture from being paid for more than once. The client sends a call once and waits longer than the
platform does. A try-on has one `timestamp` for ever: the same request again finds the picture that is stored. And what
failed is sent again only where the endpoint says that a repeat may succeed, or where the call cannot have reached it.
"""

from __future__ import annotations

import json
import logging
import random
import time
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
import click
from botocore import exceptions as aws
from botocore.config import Config
from urllib3.exceptions import HTTPError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client as S3
    from mypy_boto3_sagemaker_runtime import SageMakerRuntimeClient as Runtime
    from mypy_boto3_sqs import SQSClient as SQS

READ_S = 70.0  # the platform ends a real-time call after 60 s: its error is better than none
RETRY_S = 180.0  # from the first call of a try-on to its last
CONNECTS = 4  # calls in a row that find nobody, with 7 to 11 s between them: a wrong region stays wrong
FIRST_WAIT_S, MAX_WAIT_S, POLL_S = 1.0, 30.0, 2.0
JITTER = 0.5  # up to so much is added to each wait, so that callers who were refused together do not return together
PLACES = 8  # VTON_MAX_IN_FLIGHT of each instance: more callers than that are refused with 429
INPUTS = "asynchronous/inputs/"  # where the stack lets the endpoint read, and lets what it has read expire
UNKNOWN, UNREACHABLE = "outcome_unknown", "unreachable"
UNREADABLE = (ValueError, RecursionError)  # the second is what a text of JSON that is nested too deep ends with
TURNED_AWAY = ("ServiceUnavailable", "ThrottlingException")  # by the platform, before the endpoint
NOT_YET = ("NoSuchKey", "AccessDenied", UNKNOWN, UNREACHABLE)  # denied is also what is not there, without s3:ListBucket

Request = Mapping[str, Any]  # the fields of /invocations, `timestamp` among them
Answer = dict[str, Any]


class TryOnFailed(Exception):
    """A try-on that brought no picture.

    Attributes:
        code: of the endpoint ("overloaded"), `outcome_unknown`, `unreachable`, or the name of an AWS error.
        retryable: whether the same request may succeed.
        retry_after_s: how long it should wait, where the endpoint says so.
        field: of the request, where the endpoint says which one is wrong; else empty.
    """

    def __init__(
        self, code: str, message: str, *, retryable: bool = False, retry_after_s: float | None = None, field: str = ""
    ) -> None:
        super().__init__(f"{code}: {message} (field: {field})" if field else f"{code}: {message}")
        self.code, self.field = code, field
        self.retryable, self.retry_after_s = retryable, retry_after_s


def runtime_client(*, places: int = PLACES, read_timeout_s: float = READ_S, endpoint_url: str | None = None) -> Runtime:
    """A client that sends each call once.

    Args:
        places: calls at a time, each on its own connection.
        read_timeout_s: above the platform's limit, or it hangs up on a picture that is paid for.
        endpoint_url: where the runtime is, if not where the environment and the region say.
    """
    once = Config(
        connect_timeout=5, read_timeout=read_timeout_s, retries={"total_max_attempts": 1}, max_pool_connections=places
    )
    return boto3.client("sagemaker-runtime", config=once, endpoint_url=endpoint_url)


def new_timestamp() -> str:
    """The name of a new try-on, to be kept with the order: whoever repeats the request repeats it."""
    return f"{time.strftime('%y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"


def try_on(
    runtime: Runtime, endpoint: str, request: Request, *, retry_for_s: float = RETRY_S, stop: Event | None = None
) -> Answer:
    """The endpoint's answer; its `object_key` is the picture's.

    Args:
        runtime: of `runtime_client`.
        retry_for_s: within which calls are begun.
        stop: once it is set, no call is repeated.

    Raises:
        TryOnFailed: a repeat would not help, or did not in the time; or nobody knows.
    """
    gives_up, stop = time.monotonic() + retry_for_s, stop or Event()
    wait_s, unconnected = FIRST_WAIT_S, 0
    while True:
        try:
            with _calling():
                body = json.dumps(request)
                response = runtime.invoke_endpoint(EndpointName=endpoint, ContentType="application/json", Body=body)
                return _object(response["Body"].read())
        except TryOnFailed as failed:
            unconnected = unconnected + 1 if failed.code == UNREACHABLE else 0
            pause_s = max(wait_s, failed.retry_after_s or 0.0) * (1 + random.uniform(0, JITTER))  # noqa: S311
            ends = not failed.retryable or unconnected == CONNECTS or time.monotonic() + pause_s > gives_up
            if ends or stop.wait(pause_s):
                raise
        wait_s = min(2 * wait_s, MAX_WAIT_S)


def try_on_many(
    runtime: Runtime, endpoint: str, requests: Iterable[Request], *, places: int = PLACES
) -> Generator[tuple[Request, Answer | TryOnFailed], None, None]:
    """Each request with its answer or its failure, as they come.

    Where the loop is left, nothing new begins, and the calls under way are waited for: they are paid for. Where it is
    interrupted by Ctrl-C, it gives the outcomes of those before it is left.

    Args:
        runtime: of `runtime_client` with as many places.
        requests: each with a `timestamp` of its own, taken when there is a place for it.
        places: of the endpoint: `VTON_MAX_IN_FLIGHT` times its instances.
    """
    stop, asked = Event(), dict[Future[Answer], Request]()
    with ThreadPoolExecutor(places) as pool:
        try:
            for request in requests:
                asked[pool.submit(try_on, runtime, endpoint, request, stop=stop)] = request
                yield from _ended(asked, places - 1)
            yield from _ended(asked, 0)
        except KeyboardInterrupt:
            stop.set()
            logging.getLogger(__name__).warning("interrupted; %d calls under way are waited for", len(asked))
            yield from _ended(asked, 0)
            raise
        finally:
            stop.set()


@dataclass(frozen=True)
class Submitted:
    """An asynchronous try-on that was accepted."""

    inference_id: str  # of the messages that tell of it
    output: str  # "s3://bucket/key" where the answer will lie
    failure: str  # where the failure will lie


def submit(
    runtime: Runtime, s3: S3, endpoint: str, request: Request, *, bucket: str, timeout_s: int = 900, ttl_s: int = 3600
) -> Submitted:
    """Puts a try-on into the queue of an asynchronous endpoint.

    Args:
        bucket: that the endpoint reads inputs of, below `INPUTS`.
        timeout_s: for the picture to be made, 1-3600.
        ttl_s: for it to be begun, 60-21600.

    Raises:
        TryOnFailed: S3 or the endpoint did not take it; or nobody knows.
    """
    inference_id = uuid.uuid4().hex
    key, body = f"{INPUTS}{inference_id}.json", json.dumps(request).encode()
    with _calling():
        s3.put_object(Bucket=bucket, Key=key, Body=body, ContentType="application/json")
        accepted = runtime.invoke_endpoint_async(
            EndpointName=endpoint,
            ContentType="application/json",
            InputLocation=f"s3://{bucket}/{key}",
            InferenceId=inference_id,
            InvocationTimeoutSeconds=timeout_s,
            RequestTTLSeconds=ttl_s,
        )
        return Submitted(inference_id, accepted["OutputLocation"], accepted["FailureLocation"])


def wait_by_polling(s3: S3, submitted: Submitted, *, limit_s: float, poll_s: float = POLL_S) -> Answer:
    """The answer to an asynchronous try-on, as soon as it lies in S3.

    Raises:
        TryOnFailed: its failure lies there; S3 refuses; or neither could be read after `limit_s`.
    """
    gives_up = time.monotonic() + limit_s
    while True:
        try:
            return _stored(s3, submitted)
        except TryOnFailed as failed:
            if failed.code not in NOT_YET:
                raise
            if time.monotonic() > gives_up:
                raise TryOnFailed(UNKNOWN, f"neither answer nor failure after {limit_s:g} s ({failed})") from failed
        time.sleep(poll_s)


def wait_by_message(
    sqs: SQS, s3: S3, queue_url: str, submitted: Iterable[Submitted], *, limit_s: float
) -> Iterator[tuple[Submitted, Answer | TryOnFailed]]:
    """Each asynchronous try-on with its answer or failure, as the messages about them come.

    Args:
        queue_url: of a queue that subscribes to the endpoint's success and error topics.
        submitted: what is waited for; messages about anything else stay in the queue.
        limit_s: after which, or up to 1 s later, the rest is given as failed with `outcome_unknown`.

    Raises:
        TryOnFailed: the queue cannot be read.
    """
    open_ones = {each.inference_id: each for each in submitted}
    gives_up = time.monotonic() + limit_s
    while open_ones and time.monotonic() < gives_up:
        wait_s = max(1, min(20, int(gives_up - time.monotonic())))  # with 0, SQS would be asked without a pause
        with _calling():
            received = sqs.receive_message(QueueUrl=queue_url, MaxNumberOfMessages=10, WaitTimeSeconds=wait_s)
        for message in received.get("Messages", []):
            event = _event(message["Body"])
            ours = open_ones.pop(str(event.get("inferenceId")), None)
            if ours is None:
                continue  # somebody else's, or told twice
            yield ours, _outcome(s3, ours, event)
            with suppress(TryOnFailed), _calling():  # else it comes again, as one that is told twice
                sqs.delete_message(QueueUrl=queue_url, ReceiptHandle=message["ReceiptHandle"])
    for left in open_ones.values():
        yield left, TryOnFailed(UNKNOWN, f"no message within {limit_s:g} s")


def _ended(asked: dict[Future[Answer], Request], most: int) -> Iterator[tuple[Request, Answer | TryOnFailed]]:
    """Takes out what ends, until at most so many are under way."""
    while len(asked) > most:
        for done in wait(asked, return_when=FIRST_COMPLETED).done:
            failed = done.exception()
            yield asked.pop(done), failed if isinstance(failed, TryOnFailed) else done.result()


@contextmanager
def _calling() -> Iterator[None]:
    """Tells every error of boto3 as TryOnFailed."""
    try:
        yield
    except (aws.ConnectTimeoutError, aws.EndpointConnectionError) as exc:  # nothing was sent
        raise TryOnFailed(UNREACHABLE, str(exc), retryable=True) from exc
    except (aws.HTTPClientError, aws.IncompleteReadError, HTTPError, KeyError, *UNREADABLE) as exc:
        raise TryOnFailed(UNKNOWN, "no answer to be read; the same request finds the picture if it is made") from exc
    except aws.ClientError as exc:
        kind = exc.response["Error"]["Code"]
        if kind != "ModelError":
            raise TryOnFailed(kind, str(exc), retryable=kind in TURNED_AWAY) from exc
        if exc.response.get("OriginalStatusCode"):
            raise _failed(kind, str(exc.response.get("OriginalMessage", ""))) from exc
        raise TryOnFailed(UNKNOWN, str(exc)) from exc  # too late, or cut off: the container may still be at work
    except aws.BotoCoreError as exc:
        raise TryOnFailed(type(exc).__name__, str(exc)) from exc


def _failed(kind: str, text: str) -> TryOnFailed:
    """The endpoint's own error, `{"error": {...}}`, out of a text that has it in the middle."""
    try:
        error = json.JSONDecoder().raw_decode(text, max(0, text.find('{"error"')))[0]["error"]
        code, message = str(error["code"]), str(error["message"])
    except (KeyError, TypeError, *UNREADABLE):
        return TryOnFailed(kind, text)
    retryable, after, field = error.get("retryable") is True, error.get("retry_after_s"), error.get("field")
    after_s = float(after) if isinstance(after, (int, float)) else None
    return TryOnFailed(code, message, retryable=retryable, retry_after_s=after_s, field=str(field or ""))


def _object(text: str | bytes) -> Answer:
    """The JSON object in a text; raises one of UNREADABLE where there is none."""
    parsed = json.loads(text)
    if not isinstance(parsed, dict):
        raise ValueError("not an object of JSON")  # noqa: TRY004 - of the text, not of the call
    return parsed


def _event(body: str) -> Answer:
    """The message of the endpoint, with or without the envelope of SNS; nothing, where it is none."""
    try:
        event = _object(body)
        return _object(event["Message"]) if event.get("Type") == "Notification" else event
    except (KeyError, TypeError, *UNREADABLE):
        return {}


def _outcome(s3: S3, submitted: Submitted, event: Mapping[str, Any]) -> Answer | TryOnFailed:
    try:
        return _stored(s3, submitted)
    except TryOnFailed as failed:
        if failed.code not in NOT_YET:
            return failed
        if event.get("invocationStatus") == "Completed":
            return TryOnFailed(UNKNOWN, f"the answer is made and cannot be read ({failed})")
        return _failed("InvocationFailed", str(event.get("failureReason")))


def _stored(s3: S3, submitted: Submitted) -> Answer:
    """The answer that lies in S3; raises TryOnFailed where its failure does, or neither can be read."""
    try:
        with _calling():
            return _object(_content(s3, submitted.output))
    except TryOnFailed as missing:
        outcome = missing
        with suppress(TryOnFailed), _calling():
            outcome = _failed("InvocationFailed", _content(s3, submitted.failure).decode(errors="replace"))
        raise outcome from missing.__cause__


def _content(s3: S3, uri: str) -> bytes:
    place = urlsplit(uri)
    return s3.get_object(Bucket=place.netloc, Key=place.path.lstrip("/"))["Body"].read()


_ENDPOINT = click.option("--endpoint-name", default="vton", show_default=True)
_URLS = ("person_image_url", "upper_cloth_url", "lower_cloth_url", "overall_cloth_url", "mask_image_url")


def _request_options(command: Any) -> Any:  # noqa: ANN401 - click's
    for name in reversed(_URLS):
        flag = f"--{name.partition('_')[0]}"
        command = click.option(flag, name, required=flag == "--person", help=f"The {name}.")(command)
    command = click.option("--user-id", "userId", default="7", show_default=True)(command)
    return click.option("--timestamp", default=new_timestamp, help="Of an earlier try-on, to repeat it.")(command)


def _request(options: Mapping[str, str | None]) -> dict[str, str]:
    click.echo(f"timestamp {options['timestamp']}", err=True)
    return {name: value for name, value in options.items() if value is not None}


def _show(outcome: Answer | TryOnFailed, **asked: object) -> bool:
    """Prints an outcome, with what was asked where it failed; whether it is a picture."""
    if isinstance(outcome, TryOnFailed):
        outcome = {**asked, "error": {"code": outcome.code, "retryable": outcome.retryable, "message": str(outcome)}}
    click.echo(json.dumps(outcome))
    return "error" not in outcome


@click.group()
def main() -> None:
    """Calls a try-on endpoint; ends with 1 where a picture is missing."""


@main.command()
@_ENDPOINT
@_request_options
def one(endpoint_name: str, **options: str | None) -> None:
    """One picture, waited for."""
    _show(try_on(runtime_client(), endpoint_name, _request(options)))


@main.command()
@_ENDPOINT
@click.option("--places", default=PLACES, show_default=True, type=click.IntRange(1), help="Calls at a time.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def many(endpoint_name: str, places: int, file: Path) -> None:
    """Every request of a FILE of JSON Lines, each with its own timestamp."""
    asked, shown = [], []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            asked += [_object(line)] if line.strip() else []
        except UNREADABLE as exc:
            shown.append(_show(TryOnFailed("invalid_json", str(exc)), line=number))
    with closing(try_on_many(runtime_client(places=places), endpoint_name, asked, places=places)) as outcomes:
        shown += [_show(outcome, timestamp=request.get("timestamp")) for request, outcome in outcomes]
    raise SystemExit(not all(shown))


@main.command("async")
@_ENDPOINT
@click.option("--bucket", required=True, help="That the endpoint reads inputs of.")
@click.option("--queue-url", help="Of the outcomes; without one S3 is polled.")
@click.option("--limit", "limit_s", default=900.0, show_default=True, help="Seconds to wait.")
@_request_options
def asynchronous(endpoint_name: str, bucket: str, queue_url: str | None, limit_s: float, **options: str | None) -> None:
    """One picture by the endpoint's queue."""
    s3, sqs = boto3.client("s3"), boto3.client("sqs")
    submitted = submit(runtime_client(), s3, endpoint_name, _request(options), bucket=bucket)
    click.echo(f"accepted; the answer will be {submitted.output}", err=True)
    if queue_url is None:
        raise SystemExit(not _show(wait_by_polling(s3, submitted, limit_s=limit_s)))
    ((_, outcome),) = wait_by_message(sqs, s3, queue_url, [submitted], limit_s=limit_s)
    raise SystemExit(not _show(outcome))


if __name__ == "__main__":
    try:
        main()
    except TryOnFailed as failed:
        raise SystemExit(not _show(failed)) from failed
    except (aws.BotoCoreError, ValueError) as exc:  # ValueError: an endpoint URL that is none
        raise SystemExit(f"AWS cannot be asked: {exc}") from exc
