"""Where finished pictures are kept. A key is written once and never overwritten."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import structlog
from botocore.exceptions import BotoCoreError, ClientError

from container.errors import JobConflict, StorageFailed
from container.images import FILE_OF
from container.request import MaskRequest, TryOnRequest

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

NOT_RETRYABLE = ("AccessDenied", "NoSuchBucket", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")
NOT_RETRYABLE_HEAD = ("400", "403")  # the same errors: the answer to a HEAD has no body to name them
PROBE_KEY = "users/none"  # no result has it
PROBE_PAUSE_S = 5.0
TAKEN = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")

log = structlog.get_logger()


@dataclass(frozen=True)
class StoredObject:
    """An object that is there.

    Attributes:
        key: its key.
        etag: its entity tag, without quotes.
        facts: what was written with it: `job_id` and what else the answer to a repeat needs.
    """

    key: str
    etag: str
    facts: Mapping[str, str]


class Storage(Protocol):
    """A place that keeps objects by key."""

    bucket: str | None

    def find(self, key: str) -> StoredObject | None:
        """The object at the key, or None."""

    def put(self, key: str, content: bytes, content_type: str, facts: Mapping[str, str]) -> StoredObject:
        """Stores the object unless the key is taken; a taken key with the same `job_id` gives what is there.

        Raises:
            JobConflict: the key belongs to another job.
            StorageFailed: nothing was stored, or nobody knows.
        """


def key_for(request: TryOnRequest, prefix: str) -> str:
    """Where the result of a request is kept."""
    return _result_key(request, prefix, request.output_format)


def all_keys_for(request: TryOnRequest, prefix: str) -> list[str]:
    """Where a result of this user and timestamp may lie, whatever its format."""
    return [_result_key(request, prefix, output_format) for output_format in FILE_OF]


def mask_key_for(request: MaskRequest, prefix: str, cloth_type: str) -> str:
    """Where the mask of one type is kept; the deployed system's backend builds the same key."""
    return f"{prefix}users/{request.userId}/masking/{request.timestamp}/{cloth_type}.png"


def _result_key(request: TryOnRequest, prefix: str, output_format: str) -> str:
    suffix, _ = FILE_OF[output_format]
    return f"{prefix}users/{request.userId}/vton_result/{request.timestamp}/result.{suffix}"


class S3Storage:
    """Objects in one S3 bucket.

    Args:
        client: with time limits and retries of its own.
        bucket: its name.
    """

    def __init__(self, client: S3Client, bucket: str) -> None:
        self._client = client
        self.bucket: str | None = bucket
        self._name = bucket

    def find(self, key: str) -> StoredObject | None:
        """The object at the key, or None."""
        try:
            head = self._client.head_object(Bucket=self._name, Key=key)
        except ClientError as exc:
            if exc.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
                return None
            raise _failed(exc.response) from exc
        except BotoCoreError as exc:
            raise _unreachable(exc) from exc
        return StoredObject(key, head["ETag"].strip('"'), _facts(head["Metadata"]))

    def put(self, key: str, content: bytes, content_type: str, facts: Mapping[str, str]) -> StoredObject:
        """Stores the object with If-None-Match, so that of two processes one wins."""
        try:
            stored = self._client.put_object(
                Bucket=self._name,
                Key=key,
                Body=content,
                ContentType=content_type,
                Metadata={name.replace("_", "-"): value for name, value in facts.items()},
                IfNoneMatch="*",
            )
        except ClientError as exc:
            if exc.response["Error"]["Code"] not in TAKEN:
                raise _failed(exc.response) from exc
            return self._same_job(key, facts)
        except BotoCoreError as exc:
            raise _unreachable(exc) from exc
        return StoredObject(key, stored["ETag"].strip('"'), dict(facts))

    def _same_job(self, key: str, facts: Mapping[str, str]) -> StoredObject:
        found = self.find(key)
        if found is None:
            raise StorageFailed("the key was taken and then free")
        return same_job(found, facts["job_id"])


class LocalStorage:
    """Objects as files below one directory, for work without AWS; one process at a time.

    Args:
        root: made when the first object is stored.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.bucket: str | None = None

    def path(self, key: str) -> Path:
        """Where the object of a key lies."""
        return self._root / key

    def find(self, key: str) -> StoredObject | None:
        """The object at the key, or None; a file that something else put there belongs to no job."""
        path = self.path(key)
        try:
            if not path.exists():
                return None
            return StoredObject(key, _etag(path.read_bytes()), _read_facts(_facts_path(path)))
        except (OSError, ValueError) as exc:
            raise StorageFailed(_reason(exc), retryable=False) from exc

    def put(self, key: str, content: bytes, content_type: str, facts: Mapping[str, str]) -> StoredObject:
        """Stores the object whole or not at all: its facts first, then its content, each by renaming."""
        del content_type  # a file has none
        found = self.find(key)
        if found is not None:
            return same_job(found, facts["job_id"])
        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(_facts_path(path), json.dumps(dict(facts)).encode())
            _write(path, content)
        except OSError as exc:
            raise StorageFailed(_reason(exc), retryable=False) from exc
        return StoredObject(key, _etag(content), dict(facts))


def same_job(found: StoredObject, job_id: str) -> StoredObject:
    """What was found, if it is this job's.

    Raises:
        JobConflict: it is another job's.
    """
    if found.facts.get("job_id") != job_id:
        raise JobConflict("the key belongs to another job")
    return found


def wait_until_reachable(storage: Storage, key_prefix: str, limit_s: float) -> None:
    """Returns once a key can be looked up; a new role or bucket may take a while to be known everywhere.

    Args:
        storage: that of the results.
        key_prefix: what every key begins with; a role need not reach others.
        limit_s: after which it raises what it met last.
    Raises:
        StorageFailed: there is no answer, or it is a refusal.
    """
    ends = time.monotonic() + limit_s
    while True:
        try:
            storage.find(key_prefix + PROBE_KEY)
        except StorageFailed as exc:
            log.warning("storage_not_reachable", reason=str(exc))
            if time.monotonic() >= ends:
                raise
        else:
            return
        time.sleep(PROBE_PAUSE_S)


def _facts(metadata: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("-", "_"): value for name, value in metadata.items()}


def _facts_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_facts(path: Path) -> dict[str, str]:
    facts = json.loads(path.read_text()) if path.exists() else {}
    if not isinstance(facts, dict):
        raise StorageFailed("the facts are no JSON object", retryable=False)
    return facts


def _etag(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()  # as S3 makes it


def _write(path: Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink()
        raise


def _reason(exc: OSError | ValueError) -> str:
    """Why, without the path, which has the user's id in it."""
    return f"{type(exc).__name__}: {exc.strerror if isinstance(exc, OSError) else exc}"


def _failed(response: Mapping[str, object]) -> StorageFailed:
    error = response["Error"]
    code = str(error["Code"]) if isinstance(error, dict) else ""
    return StorageFailed(f"S3 answered {code}", retryable=code not in NOT_RETRYABLE + NOT_RETRYABLE_HEAD)


def _unreachable(exc: Exception) -> StorageFailed:
    return StorageFailed(f"S3 was not reached: {type(exc).__name__}")
