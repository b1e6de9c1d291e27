"""The messages that tell a consumer that a picture or masks are there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from botocore.exceptions import BotoCoreError, ClientError

from container.errors import NotifyFailed
from container.request import CallContext, MaskRequest, TryOnRequest
from container.storage import StoredObject

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

Event = dict[str, str]
COMPLETED = "completed"


class Notifier(Protocol):
    """Sends completion messages, at least once each."""

    def send(self, event: Event) -> None:
        """Sends one message.

        Raises:
            NotifyFailed: it was not sent, or nobody knows.
        """


def completion(request: TryOnRequest, stored: StoredObject, bucket: str | None, context: CallContext) -> Event:
    """The message of a finished try-on; the first two names are what the deployed consumer reads."""
    event = {
        "userId": request.userId,
        "initial_timestamp": request.timestamp,
        "object_key": stored.key,
        "bucket": bucket or "",
        "job_id": stored.facts["job_id"],
        "status": COMPLETED,
    }
    return {**event, **_of_the_caller(context)}


def masks_completion(
    request: MaskRequest, stored: Mapping[str, StoredObject], bucket: str | None, context: CallContext
) -> Event:
    """The message of finished masks; `username` and `initial_timestamp` are what the deployed consumer reads.

    Args:
        request: whose masks they are.
        stored: the object of each type, at least one.
        bucket: that they lie in.
        context: of the call.
    """
    first = next(iter(stored.values()))
    event = {
        "username": request.userId,
        "userId": request.userId,
        "initial_timestamp": request.timestamp,
        "object_key": first.key.rpartition("/")[0] + "/",
        "cloth_types": ",".join(stored),
        "bucket": bucket or "",
        "job_id": first.facts["job_id"],
        "status": COMPLETED,
    }
    return {**event, **_of_the_caller(context)}


def _of_the_caller(context: CallContext) -> Event:
    """What the caller sent along for whoever reads the message."""
    given = {"inference_id": context.inference_id, "custom_attributes": context.custom_attributes}
    return {name: value for name, value in given.items() if value is not None}


class SqsNotifier:
    """Messages to one SQS queue.

    Args:
        client: with time limits and retries of its own.
        queue_url: the queue's.
    """

    def __init__(self, client: SQSClient, queue_url: str) -> None:
        self._client = client
        self._queue_url = queue_url

    def send(self, event: Event) -> None:
        """Sends one message; a FIFO queue would need a group id and is not supported."""
        try:
            self._client.send_message(QueueUrl=self._queue_url, MessageBody=json.dumps(event))
        except (BotoCoreError, ClientError) as exc:
            raise NotifyFailed(f"SQS: {type(exc).__name__}", object_key=event["object_key"]) from exc


class NullNotifier:
    """For work without AWS: nobody is told."""

    def send(self, event: Event) -> None:
        """Does nothing."""
