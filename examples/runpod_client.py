"""How an app calls the try-on worker on RunPod: one picture at once, one that is asked for and fetched later, and many.

RunPod's HTTP only, by `requests`. RUNPOD_API_KEY is the key, RUNPOD_ENDPOINT_ID the endpoint.

    python examples/runpod_client.py sync --person person.jpg --cloth top.jpg --output dressed.jpg
    python examples/runpod_client.py async --person person.jpg --cloth top.jpg --output dressed.jpg
    python examples/runpod_client.py many --person person.jpg --cloth red.jpg --cloth blue.jpg --output folder

What failed is asked again only where the worker says that this may help, after the time that it names, until an end.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable
from urllib.parse import quote

import requests

BASE_URL = "https://api.runpod.ai/v2"
RUN_BYTES, RUNSYNC_BYTES = 10_000_000, 20_000_000  # of a request, by the platform
CONNECT_S, ANSWER_S = 10.0, 120.0  # /runsync is held for 90 s
LIMIT_S = 600.0  # for one try-on, its repeats and all
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 10.0  # a result of /runsync is kept for a minute
JITTER = 0.5  # up to so much is added to each wait, so that callers who were refused together do not return together
PLACES = 4
NOT_DONE = ("IN_QUEUE", "IN_PROGRESS", "RUNNING")
ENDED = {"CANCELLED": "cancelled", "TIMED_OUT": "timed_out"}
TURNED_AWAY = (429, 503)
BEFORE_THE_WORK = ("overloaded", "not_ready", "draining", "gpu_failed")  # where only the text of an error arrives
NOT_CONNECTED = ("NewConnectionError", "NameResolutionError")  # urllib3's: nothing was sent
UNKNOWN = "outcome_unknown"

Progress = Callable[[Mapping[str, Any]], None]


class TryOnFailed(Exception):
    """A try-on that brought no picture.

    Attributes:
        code: the worker's ("image_not_found"), or one of ours: `unreachable`, `turned_away`, `refused`, `too_slow`,
            `too_large`, `cancelled`, `timed_out`, `outcome_unknown` (it may run, and be paid for).
        retryable: whether the same request may succeed.
        retry_after_s: how long it should wait, where that is known.
    """

    def __init__(self, code: str, message: str, *, retryable: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.retryable = retryable
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Endpoint:
    """A serverless endpoint.

    Attributes:
        url: of its operations, without a slash at the end.
        api_key: sent as a bearer token, never shown; "" for the SDK's local server, which wants none.
        limit_s: seconds from the first call of a try-on to its result.
    """

    url: str
    api_key: str = field(default="", repr=False)
    limit_s: float = LIMIT_S

    def try_on(
        self, asked: Mapping[str, Any], *, wait: bool = True, on_progress: Progress = lambda _progress: None
    ) -> dict[str, Any]:
        """The worker's answer; `result_image` is the picture in base64.

        Args:
            asked: the input of the job (`person_image`, `cloth_image`, ...).
            wait: ask by /runsync, which answers with the result if that is there within 90 s; else by /run.
            on_progress: told what the worker says of a job that is running.
        Raises:
            TryOnFailed: after all repeats that the worker's errors allow and `limit_s` has time for.
        """
        ends, wait_s = time.monotonic() + self.limit_s, FIRST_WAIT_S
        while True:
            try:
                return self._once(asked, ends, wait, on_progress)
            except TryOnFailed as exc:
                pause_s = max(wait_s, exc.retry_after_s or 0.0) * (1 + JITTER * random.random())  # noqa: S311
                if not exc.retryable or time.monotonic() + pause_s >= ends:
                    raise
            time.sleep(pause_s)
            wait_s = min(LONGEST_WAIT_S, 2 * wait_s)

    def try_on_many(
        self, many: Sequence[Mapping[str, Any]], places: int = PLACES
    ) -> list[dict[str, Any] | TryOnFailed]:
        """An answer or an error for each, in their order; at most `places` are asked for at a time."""

        def one(asked: Mapping[str, Any]) -> dict[str, Any] | TryOnFailed:
            try:
                return self.try_on(asked, wait=False)
            except TryOnFailed as exc:
                return exc

        with ThreadPoolExecutor(places) as pool:
            return list(pool.map(one, many))

    def submit(self, asked: Mapping[str, Any]) -> str:
        """The id of a new job, for `result`; its result is kept for 30 minutes."""
        return str(self._post("run", asked, RUN_BYTES)["id"])

    def result(self, job_id: str, ends: float, on_progress: Progress = lambda _progress: None) -> dict[str, Any]:
        """The answer of a job, asked for more and more rarely until `ends` (time.monotonic()); then it is cancelled."""
        wait_s = FIRST_WAIT_S
        while True:
            job = self._status(job_id)
            if job.get("status") not in NOT_DONE:
                return output_of(job)
            if isinstance(job.get("output"), dict):
                on_progress(job["output"])
            if time.monotonic() + wait_s >= ends:
                with suppress(requests.RequestException):  # it ends by itself, then
                    self._call("POST", f"cancel/{quote(job_id, safe='')}")
                raise TryOnFailed("too_slow", f"no result of {job_id} in time")
            time.sleep(wait_s * (1 + JITTER * random.random()))  # noqa: S311
            wait_s = min(LONGEST_WAIT_S, 1.5 * wait_s)

    def _once(self, asked: Mapping[str, Any], ends: float, wait: bool, on_progress: Progress) -> dict[str, Any]:
        job = self._post("runsync", asked, RUNSYNC_BYTES) if wait else self._post("run", asked, RUN_BYTES)
        return self.result(job["id"], ends, on_progress) if job["status"] in NOT_DONE else output_of(job)

    def _post(self, operation: str, asked: Mapping[str, Any], most: int) -> dict[str, Any]:
        body = json.dumps({"input": asked}).encode()
        if len(body) > most:
            raise TryOnFailed("too_large", f"{len(body)} bytes where the platform takes {most}; send URLs")
        try:
            return _job(self._call("POST", operation, body))
        except requests.RequestException as exc:
            reason = getattr(exc.args[0], "reason", None) if exc.args else None
            if isinstance(exc, requests.ConnectTimeout) or type(reason).__name__ in NOT_CONNECTED:
                raise TryOnFailed("unreachable", "no connection", retryable=True) from exc
            raise TryOnFailed(UNKNOWN, type(exc).__name__) from exc  # whoever asks again may pay twice

    def _status(self, job_id: str) -> dict[str, Any]:
        """What is known of a job; a question that comes to nothing is one without news."""
        with suppress(requests.RequestException):
            answer = self._call("GET", f"status/{quote(job_id, safe='')}")
            if answer.status_code == 405:  # the SDK's local server
                answer = self._call("POST", f"status/{quote(job_id, safe='')}")
            if answer.status_code not in TURNED_AWAY and answer.status_code < 500:
                return _job(answer)
        return {"status": NOT_DONE[0]}

    def _call(self, method: str, operation: str, body: bytes | None = None) -> requests.Response:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        timeout = (CONNECT_S, ANSWER_S)
        return requests.request(method, f"{self.url}/{operation}", data=body, headers=headers, timeout=timeout)


def _job(answer: requests.Response) -> dict[str, Any]:
    """The job in an answer of the platform; its refusals raise."""
    if answer.status_code in TURNED_AWAY:
        after = answer.headers.get("Retry-After", "")
        after_s = float(after) if after.isdigit() else None
        raise TryOnFailed("turned_away", f"status {answer.status_code}", retryable=True, retry_after_s=after_s)
    if answer.status_code >= 500:
        raise TryOnFailed(UNKNOWN, f"status {answer.status_code}")
    try:
        job = answer.json()
    except ValueError:
        job = None
    if not answer.ok or not isinstance(job, dict) or not {"id", "status"} <= job.keys():
        raise TryOnFailed("refused", f"status {answer.status_code}")
    return job


def output_of(job: Mapping[str, Any]) -> dict[str, Any]:
    """The output of a job that has ended well; raises TryOnFailed for any other."""
    output, status = job.get("output"), job["status"]
    if status == "COMPLETED" and isinstance(output, dict):
        return output
    told: Mapping[str, Any] = output if isinstance(output, dict) else {}
    if status in ENDED:
        raise TryOnFailed(ENDED[status], "the platform ended the job")
    code, _, message = str(job.get("error") or "").partition(": ")
    if "code" not in told and not code.isidentifier():  # not by our worker
        raise TryOnFailed("failed", f"the job is {status}")
    code = str(told.get("code", code))
    retryable = bool(told.get("retryable", code in BEFORE_THE_WORK))
    raise TryOnFailed(code, message, retryable=retryable, retry_after_s=told.get("retry_after_s"))


def picture(text: str) -> str:
    """What stands in a job for a file or a URL."""
    return text if "://" in text else base64.b64encode(Path(text).read_bytes()).decode()


def _told(answered: dict[str, Any] | TryOnFailed, output: Path) -> int:
    """Writes a picture, or says why there is none; 0 or 1."""
    if isinstance(answered, TryOnFailed) or "result_image" not in answered:
        sys.stderr.write(f"{output}: no picture: {answered}\n")
        return 1
    output.write_bytes(base64.b64decode(answered["result_image"]))
    facts = {name: answered.get(name) for name in ("job_id", "seed", "engine")}
    sys.stdout.write(json.dumps({"output": str(output), **facts}) + "\n")
    return 0


def main() -> int:
    """The exit status: 0 where all pictures are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=("sync", "async", "many"))
    parser.add_argument("--person", required=True, help="a file or a URL, as all pictures")
    parser.add_argument("--cloth", required=True, action="append", help="several of them for many")
    parser.add_argument("--lower-cloth", help="the bottom, with --cloth-type overall")
    parser.add_argument("--mask")
    parser.add_argument("--cloth-type", default="upper")
    parser.add_argument("--output", required=True, type=Path, help="a file; for many a folder")
    parser.add_argument("--endpoint", default=os.environ.get("RUNPOD_ENDPOINT_ID", ""), help="its id")
    parser.add_argument("--base-url", default=os.environ.get("RUNPOD_ENDPOINT_BASE_URL", BASE_URL))
    options = parser.parse_args()
    url = f"{options.base_url.rstrip('/')}/{options.endpoint}".rstrip("/")
    endpoint = Endpoint(url, os.environ.get("RUNPOD_API_KEY", ""))
    roles = {"person_image": options.person, "lower_cloth_image": options.lower_cloth, "mask_image": options.mask}
    try:
        asked = {name: picture(value) for name, value in roles.items() if value is not None}
        many = [{**asked, "cloth_type": options.cloth_type, "cloth_image": picture(cloth)} for cloth in options.cloth]
        if options.way == "many":
            options.output.mkdir(parents=True, exist_ok=True)
            outputs = [options.output / f"{number}.jpg" for number in range(len(many))]
            return max(map(_told, endpoint.try_on_many(many), outputs))
        return _told(endpoint.try_on(many[0], wait=options.way == "sync"), options.output)
    except (TryOnFailed, OSError) as exc:
        sys.stderr.write(f"{exc}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
