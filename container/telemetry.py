"""What the service says of itself: JSON log lines, metrics, and the time each stage took.

One line per event, an event name and fields, never a sentence with values in it. No query strings, no user ids. Where a
namespace is set, the last line of each request is one that CloudWatch makes metrics of (its embedded metric format).
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import sys
import time
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import TextIO

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from container.errors import Draining, NotReady, Overloaded, Refusal

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 600)
QUERY = re.compile(r"(\w://[^\s?#]*)[?#]\S*")  # presigned URLs carry their signature behind the question mark
MAX_FIELD_CHARACTERS = 2000
CUT = " ... "

OUTCOME = "outcome"  # the only dimension: each value of one is a metric of its own, to be paid for
DONE, REFUSED, TURNED_AWAY, FAILED, LEFT = OUTCOMES = ("done", "refused", "turned_away", "failed", "left")
AT_FAULT_IS_THE_CALLER = frozenset(refusal.code for refusal in Refusal.__subclasses__())
AT_FAULT_IS_THE_LOAD = frozenset(outage.code for outage in (Overloaded, NotReady, Draining))
REQUESTS = "requests"
COUNTED_STAGES = ("queue", "fetch", "mask", "generate", "store", "total")
METRIC_UNITS = {REQUESTS: "Count", **{f"{stage}_ms": "Milliseconds" for stage in COUNTED_STAGES}}


def configure_logging(level: str, stream: TextIO = sys.stderr, *, metrics_namespace: str | None = None) -> None:
    """Makes every log line of the process, libraries' included, one line of JSON on `stream`.

    Args:
        level: the least severe level that is written; the ends of requests are "INFO".
        stream: where to.
        metrics_namespace: CloudWatch's, for the metrics of the requests; without one there are none in the log.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        redact,
    ]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.JSONRenderer()],
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for chatty in ("botocore", "urllib3", "PIL", "filelock"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every piece of a broken form
    for own_handlers in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(own_handlers).handlers[:] = []
        logging.getLogger(own_handlers).propagate = True
        logging.getLogger(own_handlers).setLevel(logging.NOTSET)
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    counted = [] if metrics_namespace is None else [partial(embed_metrics, metrics_namespace)]
    structlog.configure(
        processors=[*shared, *counted, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(root.level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def redact(_logger: object, _method: str, event: MutableMapping[str, object]) -> MutableMapping[str, object]:
    """Cuts queries off URLs and bounds the length of every text, wherever in a field it stands."""
    event.pop("color_message", None)  # uvicorn's line a second time, for terminals
    for name, value in event.items():
        if not name.startswith("_"):  # structlog's own
            event[name] = _redacted(value)
    return event


def _redacted(value: object) -> object:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, dict):
        return {str(name): _redacted(member) for name, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redacted(member) for member in value]
    text = QUERY.sub(r"\1", value if isinstance(value, str) else repr(value))
    if len(text) <= MAX_FIELD_CHARACTERS:
        return text
    half = (MAX_FIELD_CHARACTERS - len(CUT)) // 2
    return text[:half] + CUT + text[-half:]  # a traceback names its error at the end


def embed_metrics(
    namespace: str, _logger: object, _method: str, event: MutableMapping[str, object]
) -> MutableMapping[str, object]:
    """Makes CloudWatch count the line, and its stage times, where it tells the end of a request.

    Source: the CloudWatch embedded metric format: `_aws` names members of the same line.
    """
    outcome = _outcome(event)
    if outcome is None:
        return event
    times = event.get("timings_ms")
    spent = {f"{stage}_ms": ms for stage, ms in times.items()} if isinstance(times, dict) else {}
    values = {REQUESTS: 1, **{name: ms for name, ms in spent.items() if name in METRIC_UNITS}}
    directive = {
        "Namespace": namespace,
        "Dimensions": [[OUTCOME]],
        "Metrics": [{"Name": name, "Unit": METRIC_UNITS[name]} for name in values],
    }
    meaning = {"Timestamp": time.time_ns() // 1_000_000, "CloudWatchMetrics": [directive]}
    event.update({**values, OUTCOME: outcome, "_aws": meaning})
    return event


def _outcome(event: MutableMapping[str, object]) -> str | None:
    """How the request ended whose last line this is; None for any other line."""
    if event.get("event") == "request_done":
        return DONE
    if event.get("event") == "caller_left":
        return LEFT
    if event.get("event") != "request_failed":
        return None
    if event.get("code") in AT_FAULT_IS_THE_CALLER:
        return REFUSED
    return TURNED_AWAY if event.get("code") in AT_FAULT_IS_THE_LOAD else FAILED


class Pseudonyms:
    """Names for users in logs: the same for one user wherever the salt is the same, and no way back to the id.

    Args:
        salt: secret; without one it is random, and the names end with the process.
    """

    def __init__(self, salt: str | None) -> None:
        self._key = secrets.token_bytes(32) if salt is None else salt.encode()

    def of(self, user_id: str) -> str:
        """16 hex digits."""
        return hmac.new(self._key, user_id.encode(), hashlib.sha256).hexdigest()[:16]


class StageTimes:
    """How long each stage of one request took."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Adds the time inside the block to a stage's."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.add(stage, time.monotonic() - began)

    def add(self, stage: str, seconds: float) -> None:
        """Adds seconds to a stage's."""
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Seconds per stage, in the order in which the stages first ended."""
        return dict(self._seconds)

    def milliseconds(self) -> dict[str, float]:
        """What the answer says: milliseconds per stage, and `total` since the request was admitted."""
        times = {stage: round(1000 * seconds, 1) for stage, seconds in self._seconds.items()}
        return {**times, "total": round(1000 * (time.monotonic() - self._began), 1)}


class Metrics:
    """The numbers behind `/metrics`, in a registry of their own. Labels come from closed sets."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vton_requests", "Requests by the code they ended with", ["code"], registry=self.registry
        )
        self.generations = Counter("vton_generations", "Pictures that the engine made", registry=self.registry)
        self.mask_cache = Counter(
            "vton_mask_cache",
            "Photos to be masked, by whether their masks were remembered",
            ["outcome"],
            registry=self.registry,
        )
        self.in_flight = Gauge("vton_in_flight", "Requests admitted and not yet answered", registry=self.registry)
        self.ready = Gauge("vton_ready", "1 while the service takes requests", registry=self.registry)
        self.stage_seconds = Histogram(
            "vton_stage_seconds", "Time per stage", ["stage"], registry=self.registry, buckets=SECONDS
        )
        self.request_seconds = Histogram(
            "vton_request_seconds", "Time from admission to answer", registry=self.registry, buckets=SECONDS
        )

    def observe(self, times: StageTimes) -> None:
        """Counts the stage times of one request."""
        for stage, seconds in times.seconds().items():
            self.stage_seconds.labels(stage).observe(seconds)
