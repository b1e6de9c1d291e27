"""Batch Transform: every line of every input file is one invocation, every input file has one output file.

As on the platform, a file's output is written only if all of its records succeeded, the other files go on, and the job
has failed if one file failed. What a container refuses with 429 or 5xx, or does not answer, is tried again; any other
refusal of the same record would be the same. Lines go singly (SplitType Line, BatchStrategy SingleRecord) and answers
come back in the order of the lines (AssembleWith Line).
Source: botocore's service model of sagemaker (CreateTransformJob).
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Callable, Protocol

import structlog
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import BotoCoreError, ClientError

from deploy.local_invoke import AnswerTooLarge, NoAnswer, Where, call, page

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MB = 2**20
MAX_PAYLOAD_MB = 100  # of one record, and of all that are under way
DEFAULT_PAYLOAD_MB = 6
DEFAULT_TRANSFORMS = 1
MAX_RETRIES = 3
TIMEOUT_S = range(1, 3601)
PARAMETERS_S = 5.0
RETRY_EVERY_S = 1.0
SINGLE_RECORD = "SINGLE_RECORD"
IN_MEMORY_BYTES = MB  # of an output; more of it goes to a temporary file
TOO_MANY_REQUESTS = 429
SERVER_ERROR = 500
OK = 200
SUFFIX = ".out"
BATCH_ENVIRONMENT = {"SAGEMAKER_BATCH": "true", "SAGEMAKER_BATCH_STRATEGY": SINGLE_RECORD}
UNLIMITED = (
    "MaxPayloadInMB 0 is for payloads without limit that are sent in chunks; a line is sent whole, "
    f"and has from 1 to {MAX_PAYLOAD_MB} MB"
)

log = structlog.get_logger()


class TransformError(Exception):
    """The job cannot run as asked for; the text says why."""


class RecordFailed(Exception):
    """One record failed, and its file with it; the text says which and why."""


class Folder(Protocol):
    """Where the files of a job come from or go to."""

    def names(self) -> list[str]:
        """Every file's name below the folder."""

    def open(self, name: str) -> IO[bytes]:
        """A file, from its beginning."""

    def put(self, name: str, file: IO[bytes]) -> str:
        """Keeps a file; where it lies."""

    def try_to_keep(self) -> None:
        """Returns if files could be kept here now."""


@dataclass(frozen=True)
class TransformOptions:
    """What a CreateTransformJob request says; None leaves it to the container, and then to the platform.

    Attributes:
        max_concurrent_transforms: records under way at a time; 0 is as None.
        max_payload_mb: of one record, MiB.
        max_retries: InvocationsMaxRetries, 0-3.
        timeout_s: InvocationsTimeoutInSeconds, 1-3600.
        content_type: of each record.
    Raises:
        TransformError: one is out of range.
    """

    max_concurrent_transforms: int | None = None
    max_payload_mb: int | None = None
    max_retries: int = MAX_RETRIES
    timeout_s: int = 600
    content_type: str = "application/json"

    def __post_init__(self) -> None:
        if self.max_payload_mb == 0:
            raise TransformError(UNLIMITED)
        _check_product(self.max_concurrent_transforms or 1, self.max_payload_mb or 1)
        if self.max_retries not in range(MAX_RETRIES + 1) or self.timeout_s not in TIMEOUT_S:
            raise TransformError(f"retries are 0 to {MAX_RETRIES}, the timeout is 1 to {TIMEOUT_S.stop - 1} s")

    def environ(self) -> dict[str, str]:
        """What the container is told of the job: what the request says itself."""
        said = {
            "SAGEMAKER_MAX_CONCURRENT_TRANSFORMS": self.max_concurrent_transforms,
            "SAGEMAKER_MAX_PAYLOAD_IN_MB": self.max_payload_mb,
        }
        return {**BATCH_ENVIRONMENT, **{name: str(value) for name, value in said.items() if value}}


@dataclass(frozen=True)
class TransformJob:
    """What can begin once a container serves; `prepare` makes it."""

    source: Folder
    target: Folder
    names: Sequence[str]
    options: TransformOptions


@dataclass
class TransformResult:
    """How a job ended.

    Attributes:
        completed: input file -> where its output lies.
        failed: input file -> why.
        records: that were answered well.
    """

    completed: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    records: int = 0

    @property
    def status(self) -> str:
        """TransformJobStatus."""
        return "Failed" if self.failed else "Completed"


def prepare(source: Folder, target: Folder, options: TransformOptions) -> TransformJob:
    """A job that has input and a place for its output: what else stands in its way is the container's.

    Args:
        source: of the input files.
        target: of the output files.
        options: of the job.

    Raises:
        TransformError: there is no input, or the input or output cannot be reached.
    """
    try:
        names = source.names()
        target.try_to_keep()
    except (BotoCoreError, ClientError, OSError) as exc:
        raise TransformError(str(exc)) from exc
    if not names:
        raise TransformError("there is no input")
    return TransformJob(source, target, names, options)


def transform(where: Where, job: TransformJob, told: Callable[[int], Any] = lambda _records: None) -> TransformResult:
    """Runs a job to its end.

    Args:
        where: the container.
        job: from `prepare`.
        told: is called with 1 after each record.

    Raises:
        TransformError: what the container offers is out of range, or the input or output cannot be reached.
    """
    try:
        return asyncio.run(_Run(where, job, told).to_its_end())
    except (BotoCoreError, ClientError, S3UploadFailedError, OSError) as exc:
        raise TransformError(str(exc)) from exc


class _Run:
    def __init__(self, where: Where, job: TransformJob, told: Callable[[int], Any]) -> None:
        self._where = where
        self._source = job.source
        self._target = job.target
        self._names = job.names
        self._options = job.options
        self._told = told
        self._records = 0

    async def to_its_end(self) -> TransformResult:
        transforms, payload_mb = await self._parameters()
        result = TransformResult()
        for name in self._names:
            try:
                result.completed[name] = await self._file(name, transforms, payload_mb * MB)
            except RecordFailed as exc:
                log.warning("transform_failed", file=name, reason=str(exc))
                result.failed[name] = str(exc)
        result.records = self._records
        return result

    async def _parameters(self) -> tuple[int, int]:
        """MaxConcurrentTransforms and MaxPayloadInMB: what the job says, else the container, else the platform."""
        offered = await _execution_parameters(self._where)
        if offered.get("BatchStrategy", SINGLE_RECORD) != SINGLE_RECORD:
            raise TransformError("the container wants several records at a time; this sends single ones")
        options = self._options
        transforms = options.max_concurrent_transforms or offered.get("MaxConcurrentTransforms") or DEFAULT_TRANSFORMS
        payload_mb = options.max_payload_mb or offered.get("MaxPayloadInMB") or DEFAULT_PAYLOAD_MB
        if not (isinstance(transforms, int) and isinstance(payload_mb, int)):
            raise TransformError("the container's /execution-parameters are no numbers")
        _check_product(transforms, payload_mb)
        return transforms, payload_mb

    async def _file(self, name: str, transforms: int, max_bytes: int) -> str:
        """Where the output of a file lies.

        Raises:
            RecordFailed: one of its records did.
        """
        with tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES) as output:
            with self._source.open(name) as file:
                async with _window(transforms) as under_way:
                    for number, record in _records(file, max_bytes):
                        if len(under_way) == transforms:
                            self._keep(output, await under_way.popleft())
                        under_way.append(asyncio.create_task(self._record(number, record, max_bytes)))
                    while under_way:
                        self._keep(output, await under_way.popleft())
            output.seek(0)
            return await asyncio.to_thread(self._target.put, name + SUFFIX, output)

    def _keep(self, output: IO[bytes], content: bytes) -> None:
        output.write(content + b"\n")
        self._records += 1
        self._told(1)

    async def _record(self, number: int, record: bytes, max_bytes: int) -> bytes:
        """The answer to one record, in as many attempts as are permitted."""
        headers = {"Content-Type": self._options.content_type}
        limit_s = self._options.timeout_s
        for attempt in range(self._options.max_retries + 1):
            if attempt:
                await asyncio.sleep(RETRY_EVERY_S * 2 ** (attempt - 1))
            try:
                answer = await call(self._where, headers, record, limit_s=limit_s, max_bytes=max_bytes)
            except AnswerTooLarge as exc:
                reason = str(exc)
                break
            except NoAnswer as exc:
                reason = str(exc)
                continue
            if answer.head.ok:
                return answer.content
            reason = f"{answer.head.status} {answer.content.decode(errors='replace')}"
            if answer.head.status != TOO_MANY_REQUESTS and answer.head.status < SERVER_ERROR:
                break
        raise RecordFailed(f"record {number}: {reason}")


@asynccontextmanager
async def _window(size: int) -> AsyncIterator[deque[asyncio.Task[bytes]]]:
    """Tasks in order; those that are left when the block ends are ended with it."""
    under_way: deque[asyncio.Task[bytes]] = deque(maxlen=size)
    try:
        yield under_way
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


def _records(file: IO[bytes], max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, without their ends, by their numbers from 1.

    Raises:
        RecordFailed: a line is too long.
    """
    for number, line in enumerate(iter(lambda: file.readline(max_bytes + 2), b""), start=1):
        record = line[:-1] if line.endswith(b"\n") else line
        if len(record) > max_bytes:
            raise RecordFailed(f"record {number}: it is larger than MaxPayloadInMB, {max_bytes // MB}")
        if record.strip():
            yield number, record


def _check_product(transforms: int, payload_mb: int) -> None:
    if transforms < 1 or payload_mb < 1 or transforms * payload_mb > MAX_PAYLOAD_MB:
        raise TransformError(f"MaxConcurrentTransforms * MaxPayloadInMB must be from 1 to {MAX_PAYLOAD_MB}")


async def _execution_parameters(where: Where) -> dict[str, Any]:
    """What the container offers; nothing where it has no such page."""
    if where() is None:
        raise TransformError("no container serves")
    try:
        answer = await page(where, "/execution-parameters", PARAMETERS_S)
        offered = json.loads(answer.content) if answer.head.status == OK else {}
    except (NoAnswer, ValueError):
        return {}
    return offered if isinstance(offered, dict) else {}


class LocalFolder:
    """A file, or all files below a folder of this machine.

    Args:
        path: of the file or the folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        """Every file's name below the folder, or the one file's own."""
        if self._path.is_file():
            return [self._path.name]
        return sorted(str(path.relative_to(self._path)) for path in self._path.rglob("*") if path.is_file())

    def open(self, name: str) -> IO[bytes]:
        """A file."""
        return (self._path if self._path.is_file() else self._path / name).open("rb")

    def put(self, name: str, file: IO[bytes]) -> str:
        """Keeps a file, whole or not at all."""
        path = self._path / name
        if self._path.resolve() not in path.resolve().parents:
            raise TransformError(f"{name} is not the name of a file below {self._path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        with part.open("wb") as kept:
            while chunk := file.read(MB):
                kept.write(chunk)
        part.replace(path)
        return str(path)

    def try_to_keep(self) -> None:
        """Makes the folder, and a file without a name in it."""
        self._path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._path):
            pass


class S3Folder:
    """The objects of a bucket whose keys begin so.

    Args:
        client: with time limits.
        uri: "s3://bucket/prefix".
    """

    def __init__(self, client: S3Client, uri: str) -> None:
        self._client = client
        self._bucket, _, self._prefix = uri.partition("://")[2].partition("/")

    def names(self) -> list[str]:
        """Every key that begins with the prefix, from the prefix's last "/" on."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
        keys = [found["Key"] for page in pages for found in page.get("Contents", [])]
        return [key[len(self._folder()) :] for key in keys if not key.endswith("/")]

    def open(self, name: str) -> IO[bytes]:
        """An object, in a temporary file: its records take their time, and a connection may not last so long."""
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
        self._client.download_fileobj(self._bucket, self._folder() + name, file)
        file.seek(0)
        return file

    def put(self, name: str, file: IO[bytes]) -> str:
        """Keeps an object below the prefix."""
        key = f"{self._prefix.rstrip('/')}/{name}".lstrip("/")
        self._client.upload_fileobj(file, self._bucket, key)
        return f"s3://{self._bucket}/{key}"

    def try_to_keep(self) -> None:
        """Asks for the bucket; whether it takes an object only an object can tell."""
        self._client.head_bucket(Bucket=self._bucket)

    def _folder(self) -> str:
        return self._prefix[: self._prefix.rfind("/") + 1]
