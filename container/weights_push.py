"""Weights into S3, as a prefix that SageMaker's ModelDataSource takes: S3Prefix, uncompressed.

Each object's metadata holds the hash of its file, so that what has arrived is known without fetching it. The record is
the last to be replaced, and the engine's files go after those of the masker, which it could do without: whatever a push
that broke off leaves behind, the service refuses to load.
Source: ModelDataSource in SageMaker's API, whose prefix ends in "/" and holds no objects that stand for folders.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Callable

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
)

from model.artifact import MASKER_PART, Artifact, measured
from model.weights import RECORD, Entry, record_of

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

URI = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<prefix>([A-Za-z0-9!_.'()-]+/)+)")
FILES_AT_ONCE, PARTS_AT_ONCE = 4, 3  # of 8 MB each; more would starve each other on a slow line
CONNECTIONS = FILES_AT_ONCE * PARTS_AT_ONCE
HASH = "sha256"  # in an object's metadata
NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)
OUTAGES = ("RequestTimeout", "BadDigest", "XAmzContentChecksumMismatch", "IncompleteBody", "NoSuchUpload", "SlowDown")
OUTAGE_STATUSES = (408, 409, 429)
SERVER_ERROR = 500


class PushError(Exception):
    """The weights are not whole in S3; the text is one sentence.

    PushError
        PushRefused             the caller's fault
            DestinationInvalid  no bucket with a prefix
            PrefixTaken         something else is under the prefix
        PushFailed              an outage: a repeat goes on
    """


class PushRefused(PushError):
    """S3 refuses, and would again."""


class DestinationInvalid(PushRefused):
    """It is no bucket with a prefix that ends in a slash."""


class PrefixTaken(PushRefused):
    """Something under the prefix is no part of these weights; SageMaker would fetch it, too, or fail on it."""


class PushFailed(PushError):
    """S3 did not answer, or not in time; what has arrived stays, and a repeat goes on from it."""


@dataclass(frozen=True)
class Destination:
    """A prefix in a bucket; `prefix` ends in a slash."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, uri: str) -> Destination:
        """The destination that "s3://bucket/prefix/" names.

        Raises:
            DestinationInvalid: it has another form.
        """
        match = URI.fullmatch(uri)
        if match is None or any(part in (".", "..") for part in match["prefix"].split("/")):
            raise DestinationInvalid(f"{uri!r} is not of the form s3://bucket/prefix/, with a slash at its end")
        return cls(match["bucket"], match["prefix"])


@dataclass(frozen=True)
class Pushed:
    """How many files were `sent`, and how many were `there` already."""

    sent: int
    there: int


def push(s3: S3Client, artifact: Artifact, destination: Destination, progress: Callable[[int], object]) -> Pushed:
    """Send what is not there yet, the record last.

    Args:
        s3: with `CONNECTIONS`.
        artifact: the weights.
        destination: holds nothing, or an earlier push of files of these names.
        progress: is told the bytes of each step, from several threads; those of files that are there, too.
    Raises:
        PushRefused, PrefixTaken, PushFailed.
        WeightsError: a file changed, or cannot be read; its object is as it was.
    """
    record = Entry(len(artifact.record), sha256(artifact.record).hexdigest())
    with _told_apart(destination):
        there = _there(s3, {**artifact.files, RECORD: record}, destination)
    missing = [name for name in artifact.files if name not in there]
    progress(sum(artifact.files[name].bytes for name in artifact.files if name in there))
    course = _Course(s3, artifact, destination, progress)
    for group in _in_order(artifact, missing):
        course.send(group)
    if missing or RECORD not in there:
        with _told_apart(destination):
            s3.put_object(
                Bucket=destination.bucket,
                Key=destination.prefix + RECORD,
                Body=artifact.record,
                Metadata={HASH: record.sha256},
            )
    return Pushed(len(missing), len(artifact.files) - len(missing))


class _Course:
    """One push under way."""

    def __init__(
        self, s3: S3Client, artifact: Artifact, destination: Destination, progress: Callable[[int], object]
    ) -> None:
        self._s3 = s3
        self._artifact = artifact
        self._destination = destination
        self._progress = progress
        self._ended = False

    def send(self, names: Sequence[str]) -> None:
        """Sends files side by side; with the first that fails, and with Ctrl-C, all of them end."""
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            sent: list[Future[None]] = [pool.submit(self._send, name) for name in names]
            try:
                for each in as_completed(sent):
                    each.result()
            except BaseException:
                self._ended = True
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _send(self, name: str) -> None:
        path, entry = self._artifact.directory / name, self._artifact.files[name]
        # boto3 reads once what it cannot seek in, sends again from memory, and makes the object after the last bytes.
        with measured(path, entry, lambda _: None, "pushed") as stream, _told_apart(self._destination):
            self._s3.upload_fileobj(
                stream,
                self._destination.bucket,
                self._destination.prefix + name,
                ExtraArgs={"Metadata": {HASH: entry.sha256}},
                Callback=self._tell,
                Config=TransferConfig(max_concurrency=PARTS_AT_ONCE),
            )

    def _tell(self, sent: int) -> None:
        if self._ended:
            raise PushFailed("another file failed")  # nobody sees it: it ends the transfer that asked
        self._progress(sent)


def _there(s3: S3Client, wanted: dict[str, Entry], destination: Destination) -> set[str]:
    """Which of the wanted files lie under the prefix, whole and as wanted.

    Raises:
        PrefixTaken: so does something else.
    """
    there = set()
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=destination.bucket, Prefix=destination.prefix)
    for found in (found for page in pages for found in page.get("Contents", [])):
        name = found["Key"][len(destination.prefix) :]
        if name not in wanted:
            raise PrefixTaken(f"s3://{destination.bucket}/{found['Key']} is no part of these weights")
        if found["Size"] == wanted[name].bytes:
            metadata = s3.head_object(Bucket=destination.bucket, Key=found["Key"])["Metadata"]
            if metadata.get(HASH) == wanted[name].sha256:
                there.add(name)
    return there


def _in_order(artifact: Artifact, names: Sequence[str]) -> Iterator[list[str]]:
    """Those that only the masker reads, then those of the engine."""
    masker = [part for part in artifact.parts if part == MASKER_PART]
    alone = set(record_of(artifact.directory, masker).files)
    yield [name for name in names if name in alone]
    yield [name for name in names if name not in alone]


@contextmanager
def _told_apart(destination: Destination) -> Iterator[None]:
    """Turns what boto3 raises inside the block into refusals and outages.

    Raises:
        PushRefused, PushFailed.
    """
    where = f"s3://{destination.bucket}/{destination.prefix}"
    try:
        yield
    except ClientError as exc:
        code, status = exc.response["Error"]["Code"], exc.response["ResponseMetadata"]["HTTPStatusCode"]
        if status >= SERVER_ERROR or status in OUTAGE_STATUSES or code in OUTAGES:
            raise PushFailed(f"{where} was not written whole: S3 answered {code}; repeat the push to go on") from exc
        raise PushRefused(f"{where} refuses {exc.operation_name}: S3 answered {code}") from exc
    except NO_CREDENTIALS as exc:
        raise PushRefused(f"{where} cannot be written without credentials: {exc}") from exc
    except BotoCoreError as exc:
        raise PushFailed(f"{where} was not reached: {type(exc).__name__}; repeat the push to go on") from exc
