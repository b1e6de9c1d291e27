"""The message that tells a consumer that a picture is there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Protocol

from botocore.exceptions import BotoCoreError, ClientError

from container.errors import NotifyFailed
from container.request import CallContext, TryOnRequest
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
    if context.inference_id is not None:
        event["inference_id"] = context.inference_id
    if context.custom_attributes is not None:
        event["custom_attributes"] = context.custom_attributes
    return event


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
