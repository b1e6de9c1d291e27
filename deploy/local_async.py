"""Asynchronous invocations: accepted at once, read from S3, made in turn, written to S3, told of by SNS.

Messages go to SNS topics as on the platform, so that what reads them here (a queue that subscribes to the topics) reads
them there. The queue lives in the memory of the runtime: an accepted job ends with an output object, or with a failure
object, for as long as the runtime lives.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import IO, TYPE_CHECKING, Any, Callable

import structlog
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import BotoCoreError, ClientError

from deploy.async_job import AsyncConfig, Job, S3Object, event, new_job
from deploy.local_invoke import TIMED_OUT, Content, Head, NoAnswer, NotReached, Where, opened
from deploy.platform_errors import NO_STATUS, PlatformError, of_model, received

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

POLL_S = 0.05
CHUNK_BYTES = 2**20
IN_MEMORY_BYTES = 2**20  # of an answer; more of it goes to a temporary file
MAX_HEADER_BYTES = 4096  # of a container's answer
EXPIRED = "The request was in the queue for longer than RequestTTLSeconds."
NO_LENGTH = "The response of container primary did not specify the required Content-Length header."
LONG_HEADERS = f"The response headers of container primary are larger than {MAX_HEADER_BYTES} bytes."
MAX_REFUSAL_BYTES = 2**16  # of a container's refusal that a failure object repeats

log = structlog.get_logger()


class JobFailed(Exception):
    """What became of one job.

    Args:
        text: of the failure object.
        reason: of the message; the text where it is left out.
    """

    def __init__(self, text: str, reason: str | None = None) -> None:
        super().__init__(text)
        self.reason = f"ClientError: {reason or text}"


class AsyncEndpoint:
    """The queue of an asynchronous endpoint and the places that it is worked off in.

    Args:
        config: of the endpoint.
        s3: with time limits.
        sns: a boto3 client with time limits, where the configuration names topics.
    """

    def __init__(self, config: AsyncConfig, s3: S3Client, sns: Any = None) -> None:  # noqa: ANN401 - no types for SNS
        self.config = config
        self._s3 = s3
        self._sns = sns
        self._queue: asyncio.Queue[int] | None = None  # it belongs to the event loop that it is made on
        self._numbers = itertools.count()
        self._waiting: dict[int, tuple[Job, asyncio.TimerHandle]] = {}  # the one place that keeps a job until it begins
        self._tasks: set[asyncio.Task[None]] = set()
        self._unfinished = 0

    def lifespan(self, where: Where) -> Callable[[object], AbstractAsyncContextManager[None]]:
        """What an ASGI application does from its start to its end: it works off the queue.

        Args:
            where: the container.
        """

        @asynccontextmanager
        async def working(_app: object) -> AsyncIterator[None]:
            queue: asyncio.Queue[int] = asyncio.Queue()
            self._queue = queue
            for _ in range(self.config.places):
                self._begin(self._work(queue, where))
            try:
                yield
            finally:
                log.info("queue_closed", unfinished=self._unfinished)
                for task in list(self._tasks):
                    task.cancel()

        return working

    def submit(self, endpoint: str, headers: Mapping[str, str], body: bytes) -> Job:
        """A job that is in the queue; on the event loop of the application.

        Args:
            endpoint: name that was called.
            headers: of the call, by names in lower case.
            body: of the call, within `inline_bytes`.

        Raises:
            PlatformError: the call is wrong, or the queue is full.
        """
        if self._queue is None or self._unfinished >= self.config.backlog:
            raise PlatformError(503, "ServiceUnavailable", f"{self._unfinished} invocations are in the queue.")
        job = new_job(endpoint, headers, body, self.config)
        number = next(self._numbers)
        self._let_wait(number, job)
        self._unfinished += 1
        self._queue.put_nowait(number)
        return job

    def _let_wait(self, number: int, job: Job) -> None:
        """Keeps a job until it begins or expires."""
        timer = asyncio.get_running_loop().call_later(job.expires_at - time.monotonic(), self._expire, number)
        self._waiting[number] = (job, timer)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _expire(self, number: int) -> None:
        job, _ = self._waiting.pop(number)
        self._begin(self._end_expired(job))

    async def _end_expired(self, job: Job) -> None:
        try:
            await self._fail(job, JobFailed(EXPIRED))
        finally:
            self._unfinished -= 1

    async def _work(self, queue: asyncio.Queue[int], where: Where) -> None:
        """One place: a job, and then the next."""
        while True:
            await self._take(await queue.get(), where)

    async def _take(self, number: int, where: Where) -> None:
        """One job to its end, where it does not expire before it begins."""
        while number in self._waiting:
            if where() is None:
                await asyncio.sleep(POLL_S)
                continue
            job, timer = self._waiting.pop(number)
            timer.cancel()
            try:
                await self._finish(job, where)
            except NotReached:  # the container went in between, and nothing was sent
                self._let_wait(number, job)
                await asyncio.sleep(POLL_S)
                continue
            except Exception:  # a job's failure that cannot be told is not the queue's end
                log.exception("outcome_lost", inference_id=job.inference_id)
            self._unfinished -= 1

    async def _finish(self, job: Job, where: Where) -> None:
        """The answer or the failure of a job, stored and told of.

        Raises:
            NotReached: nothing was sent to the container.
        """
        try:
            head = await self._make(job, where)
        except NotReached:
            raise
        except JobFailed as exc:
            await self._fail(job, exc)
        except Exception:  # one job's failure is not the queue's
            log.exception("invocation_failed", inference_id=job.inference_id)
            await self._fail(job, JobFailed("Internal failure."))
        else:
            told = {"contentType": head.get("Content-Type") or "", "outputLocation": job.output.uri}
            await self._tell(self.config.success_topic, event(job, "Completed", responseParameters=told))

    async def _make(self, job: Job, where: Where) -> Head:
        content, length = await self._input(job)
        with tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES) as file:
            try:
                exchange = self._exchange(where, {**job.headers, "Content-Length": str(length)}, content, file)
                head = await asyncio.wait_for(exchange, job.invocation_s)
            except NotReached:
                raise
            except NoAnswer as exc:
                raise JobFailed(received(job.endpoint, NO_STATUS, str(exc)), of_model(NO_STATUS)) from exc
            except asyncio.TimeoutError as exc:
                raise JobFailed(received(job.endpoint, NO_STATUS, TIMED_OUT), TIMED_OUT) from exc
            file.seek(0)
            if not head.ok:
                body = (await asyncio.to_thread(file.read, MAX_REFUSAL_BYTES)).decode(errors="replace")
                raise JobFailed(received(job.endpoint, head.status, body), of_model(head.status))
            _check_headers(head)
            await self._store(job.output, file, head.get("Content-Type"))
        return head

    async def _exchange(self, where: Where, headers: Mapping[str, str], content: Content, file: IO[bytes]) -> Head:
        size = 0
        async with opened(where, headers, content) as (head, chunks):
            async for chunk in chunks:
                size += len(chunk)
                if size > self.config.payload_bytes:
                    raise JobFailed(
                        f"The response of container primary is larger than {self.config.payload_bytes} bytes."
                    )
                file.write(chunk)
        return head

    async def _input(self, job: Job) -> tuple[Content, int]:
        """The input and its bytes.

        Raises:
            JobFailed: it is not there, or too large.
        """
        if job.input is None:
            return job.body, len(job.body)
        try:
            found = await asyncio.to_thread(self._s3.get_object, Bucket=job.input.bucket, Key=job.input.key)
        except (BotoCoreError, ClientError) as exc:
            raise JobFailed(f"The input {job.input.uri} could not be downloaded: {exc}") from exc
        if found["ContentLength"] > self.config.payload_bytes:
            raise JobFailed(f"The input {job.input.uri} is larger than {self.config.payload_bytes} bytes.")
        body, uri = found["Body"], job.input.uri

        async def chunks() -> AsyncIterator[bytes]:
            try:
                while chunk := await asyncio.to_thread(body.read, CHUNK_BYTES):
                    yield chunk
            except BotoCoreError as exc:
                raise JobFailed(f"The input {uri} could not be downloaded: {exc}") from exc

        return chunks(), found["ContentLength"]

    async def _store(self, place: S3Object, file: IO[bytes], content_type: str | None) -> None:
        """Puts an object.

        Raises:
            JobFailed: S3 did not take it.
        """
        extra = {"ContentType": content_type} if content_type else {}
        try:
            await asyncio.to_thread(self._s3.upload_fileobj, file, place.bucket, place.key, ExtraArgs=extra)
        except (BotoCoreError, ClientError, S3UploadFailedError) as exc:
            raise JobFailed(f"The output {place.uri} could not be uploaded: {exc}") from exc

    async def _fail(self, job: Job, failed: JobFailed) -> None:
        log.info("invocation_failed", inference_id=job.inference_id, reason=failed.reason)
        try:
            await self._store(job.failure, io.BytesIO(str(failed).encode()), "text/plain; charset=utf-8")
        except JobFailed as exc:
            log.warning("failure_not_stored", inference_id=job.inference_id, reason=exc.reason)
        told = {"failureReason": failed.reason, "failureLocation": job.failure.uri}
        await self._tell(self.config.error_topic, event(job, "Failed", **told))

    async def _tell(self, topic: str | None, told: Mapping[str, object]) -> None:
        if topic is None:
            return
        message = json.dumps({"awsRegion": self._s3.meta.region_name, **told})
        try:
            await asyncio.to_thread(self._sns.publish, TopicArn=topic, Message=message)
        except (BotoCoreError, ClientError) as exc:
            log.warning("notification_failed", inference_id=told["inferenceId"], reason=str(exc))


def _check_headers(head: Head) -> None:
    if head.get("Content-Length") is None:
        raise JobFailed(NO_LENGTH)
    if sum(len(name) + len(value) + len(": \r\n") for name, value in head.headers) > MAX_HEADER_BYTES:
        raise JobFailed(LONG_HEADERS)
