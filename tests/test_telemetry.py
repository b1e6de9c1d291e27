from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import requests
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from python_multipart.multipart import MultipartParser

from container.errors import Outage, Refusal
from container.settings import Settings, SettingsError
from container.telemetry import (
    COUNTED_STAGES,
    MAX_FIELD_CHARACTERS,
    METRIC_UNITS,
    OUTCOMES,
    Metrics,
    Pseudonyms,
    StageTimes,
    configure_logging,
    redact,
)

SERVE = Path(__file__).resolve().parent.parent / "container" / "serve"
SIGNED = "https://bucket.s3.amazonaws.com/users/7/row.jpg?X-Amz-Signature=5ecret&X-Amz-Expires=60"


class Log(io.StringIO):
    def lines(self):
        return [json.loads(line) for line in self.getvalue().splitlines()]

    def line(self):
        (only,) = self.lines()
        return only


@pytest.fixture
def log():
    """Logging as in production, on a stream of our own; the root logger and the warning filters are put back."""
    root, stream = logging.getLogger(), Log()
    handlers, level = root.handlers[:], root.level
    with warnings.catch_warnings():
        configure_logging("INFO", stream)
        yield stream
    logging.captureWarnings(False)
    root.handlers[:], root.level = handlers, level
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


@pytest.fixture
def counted(log):
    """The same, with the metrics of requests on the lines."""
    configure_logging("INFO", log, metrics_namespace="vton/shop-realtime")
    return log


def fail(text):
    raise ValueError(text)


def test_the_pieces_of_a_broken_form_are_no_lines(log):
    parser = MultipartParser(b"B")
    for _ in range(3):
        parser.write(b"--B--\r\n" + b"what comes behind the end")
    logging.getLogger("python_multipart.multipart").error("broken itself")
    assert [line["event"] for line in log.lines()] == ["broken itself"]


def test_an_event_is_one_json_object_with_its_fields(log):
    structlog.get_logger().info("request_ended", code="ok", total_ms=12.5)
    line = log.line()
    assert (line["event"], line["level"], line["code"], line["total_ms"]) == ("request_ended", "info", "ok", 12.5)
    assert line["timestamp"].endswith("Z")


def test_a_librarys_line_is_one_json_object_too(log):
    logging.getLogger("some.library").warning("lost %s of %d", "one", 3)
    assert (log.line()["event"], log.line()["level"]) == ("lost one of 3", "warning")


def test_uvicorns_lines_are_json_and_come_once(log):
    logging.getLogger("uvicorn.error").info("Started")
    assert log.line()["event"] == "Started"


def test_a_warning_is_one_json_object_too(log):
    warnings.warn("old name", DeprecationWarning, stacklevel=1)
    assert "old name" in log.line()["event"]


def test_fields_of_a_librarys_line_are_kept(log):
    logging.getLogger("some.library").info("done", extra={"attempt": 2})
    assert log.line()["attempt"] == 2


def test_the_requests_id_is_on_every_line_of_the_request(log):
    structlog.contextvars.bind_contextvars(request_id="r-1")
    structlog.get_logger().info("own")
    logging.getLogger("some.library").info("foreign")
    assert [line["request_id"] for line in log.lines()] == ["r-1", "r-1"]


def test_lines_below_the_level_are_not_written(log):
    structlog.get_logger().debug("detail")
    logging.getLogger("some.library").debug("detail")
    assert log.getvalue() == ""


@pytest.mark.parametrize("library", ["botocore.endpoint", "urllib3.connectionpool", "PIL.Image", "filelock"])
def test_chatty_libraries_are_heard_from_warning_on(log, library):
    logging.getLogger(library).info("chat")
    logging.getLogger(library).warning("trouble")
    assert log.line()["event"] == "trouble"


@pytest.mark.parametrize("text", ['x\n{"event": "forged", "level": "info"}', "x\r\ny", "x\u2028y", "x\x85y", "\x1b[2J"])
def test_a_newline_in_a_value_cannot_forge_a_line(log, text):
    structlog.get_logger().info("event", detail=text)
    logging.getLogger("some.library").info("said %s", text)
    structlog.get_logger().info(text)
    assert [line["event"] == "forged" for line in log.lines()] == [False] * 3
    assert log.getvalue().count("\n") == 3


@given(st.text(max_size=50), st.text(min_size=1, max_size=10), st.text(max_size=50))
@settings(deadline=None)
def test_any_text_in_any_place_is_one_line_of_json(event, name, value):
    line = structlog.processors.JSONRenderer()(None, "info", redact(None, "info", {"event": event, name: value}))
    assert len(line.splitlines()) == 1
    json.loads(line)


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        (SIGNED, SIGNED.partition("?")[0]),
        (f"GET '{SIGNED}' failed", "GET 'https://bucket.s3.amazonaws.com/users/7/row.jpg failed"),
        (f"{SIGNED}\nthen {SIGNED}", "\nthen ".join([SIGNED.partition("?")[0]] * 2)),
        ("https://host/a#fragment", "https://host/a"),
        ("https://host?signature=1", "https://host"),
        ("s3://bucket/key?versionId=1", "s3://bucket/key"),
        ("no URL? none", "no URL? none"),
    ],
)
def test_the_query_of_a_url_is_cut_off(text, cut):
    assert redact(None, "info", {"event": text}) == {"event": cut}


def test_no_signature_gets_into_the_log_by_an_events_field(log):
    structlog.get_logger().info("fetched", url=SIGNED)
    assert "5ecret" not in log.getvalue()


def test_no_signature_gets_into_the_log_by_a_librarys_line(log):
    logging.getLogger("some.library").warning("retrying %s", SIGNED)
    assert "5ecret" not in log.getvalue()


def test_no_signature_gets_into_the_log_by_the_requests_context(log):
    structlog.contextvars.bind_contextvars(custom_attributes=SIGNED)
    structlog.get_logger().info("event")
    assert "5ecret" not in log.getvalue()


def test_no_signature_gets_into_the_log_by_a_traceback(log):
    try:
        fail(SIGNED)
    except ValueError:
        structlog.get_logger().exception("failed")
        logging.getLogger("some.library").exception("failed")
    assert ["ValueError" in line["exception"] for line in log.lines()] == [True, True]
    assert "5ecret" not in log.getvalue()


@pytest.mark.parametrize("value", [ValueError(SIGNED), [SIGNED], {"url": SIGNED}, (SIGNED,), SIGNED.encode()], ids=type)
def test_no_signature_gets_into_the_log_inside_another_value(log, value):
    structlog.get_logger().info("failed", error=value)
    assert "5ecret" not in log.getvalue()


@pytest.mark.parametrize("value", [ValueError("x" * 100_000), ["x" * 100_000], b"x" * 100_000], ids=type)
def test_a_long_value_of_any_type_is_bounded(log, value):
    structlog.get_logger().info("failed", error=value)
    assert len(log.getvalue()) < 2 * MAX_FIELD_CHARACTERS


def test_numbers_and_small_structures_keep_their_type(log):
    structlog.get_logger().info("ended", times={"fetch": 1.5}, ok=True, none=None, count=3)
    line = log.line()
    assert (line["times"], line["ok"], line["none"], line["count"]) == ({"fetch": 1.5}, True, None, 3)


def test_the_text_of_an_exception_is_bounded(log):
    try:
        fail("x" * 100_000)
    except ValueError:
        structlog.get_logger().exception("failed")
    assert len(log.line()["exception"]) <= MAX_FIELD_CHARACTERS


def test_the_end_of_a_bounded_traceback_still_names_the_error(log):
    try:
        try:
            fail("x" * 100_000)
        except ValueError as exc:
            raise OSError("the last word") from exc
    except OSError:
        structlog.get_logger().exception("failed")
    assert log.line()["exception"].endswith("OSError: the last word")


def test_every_field_is_bounded(log):
    logging.getLogger("some.library").info("x" * 100_000)
    assert len(log.line()["event"]) <= MAX_FIELD_CHARACTERS


def test_a_line_that_cannot_be_formatted_does_not_stop_the_next(log):
    structlog.get_logger().info("odd", value=object())
    structlog.get_logger().info("next")
    assert [line["event"] for line in log.lines()] == ["odd", "next"]


def test_the_time_of_a_stage_is_the_time_inside_its_block():
    times = StageTimes()
    with times.measure("fetch"):
        time.sleep(0.02)
    assert 0.02 <= times.seconds()["fetch"] < 2


def test_a_stage_that_fails_is_measured_too():
    times = StageTimes()
    with pytest.raises(ValueError, match="no"), times.measure("decode"):
        fail("no")
    assert "decode" in times.seconds()


def test_two_spells_of_a_stage_are_added():
    times = StageTimes()
    times.add("store", 0.5)
    times.add("store", 0.25)
    assert times.seconds() == {"store": 0.75}


def test_the_answer_has_milliseconds_in_the_order_of_the_stages_and_a_total():
    times = StageTimes()
    times.add("fetch", 0.0123456)
    times.add("decode", 0.5)
    milliseconds = times.milliseconds()
    assert list(milliseconds) == ["fetch", "decode", "total"]
    assert (milliseconds["fetch"], milliseconds["decode"]) == (12.3, 500.0)
    assert milliseconds["total"] >= 0


def test_what_seconds_returns_is_a_copy():
    times = StageTimes()
    times.seconds()["fetch"] = 1.0
    assert times.seconds() == {}


def test_the_stages_of_a_request_are_counted_in_the_metrics():
    metrics, times = Metrics(), StageTimes()
    times.add("fetch", 0.2)
    metrics.observe(times)
    assert metrics.registry.get_sample_value("vton_stage_seconds_count", {"stage": "fetch"}) == 1
    assert metrics.registry.get_sample_value("vton_stage_seconds_sum", {"stage": "fetch"}) == 0.2


def test_two_sets_of_metrics_share_nothing():
    one, other = Metrics(), Metrics()
    one.generations.inc()
    assert other.registry.get_sample_value("vton_generations_total") == 0


def test_every_metric_is_named_for_its_noun():
    assert all(family.name.startswith("vton_") for family in Metrics().registry.collect())


def test_a_user_has_one_pseudonym_per_salt_and_another_in_every_process_without_one():
    salted = Pseudonyms("sixteen characters")
    assert salted.of("7") == Pseudonyms("sixteen characters").of("7")
    assert salted.of("7") != salted.of("8")
    assert re.fullmatch("[0-9a-f]{16}", salted.of("7"))
    assert Pseudonyms(None).of("7") != Pseudonyms(None).of("7")
    assert Pseudonyms("another salt, long").of("7") != salted.of("7")


def end_a_request(event, **fields):
    structlog.contextvars.bind_contextvars(request_id="r-1", user="0123456789abcdef")
    structlog.get_logger().info(event, **fields)


def metrics_of(line):
    """Name to value and unit, as CloudWatch extracts them, and the dimensions with their values."""
    meaning = line["_aws"]
    (directive,) = meaning["CloudWatchMetrics"]
    assert set(meaning) == {"Timestamp", "CloudWatchMetrics"}
    assert set(directive) == {"Namespace", "Dimensions", "Metrics"}
    assert directive["Namespace"] == "vton/shop-realtime"
    (dimensions,) = directive["Dimensions"]
    return {metric["Name"]: (line[metric["Name"]], metric["Unit"]) for metric in directive["Metrics"]}, {
        name: line[name] for name in dimensions
    }


def test_the_end_of_a_request_is_a_metric_line_whose_names_are_members_of_the_same_object(counted):
    end_a_request("request_done", timings_ms={"fetch": 12.5, "generate": 900.0, "prepare": 1.0, "total": 950.2})
    metrics, dimensions = metrics_of(counted.line())
    assert metrics == {
        "requests": (1, "Count"),
        "fetch_ms": (12.5, "Milliseconds"),
        "generate_ms": (900.0, "Milliseconds"),
        "total_ms": (950.2, "Milliseconds"),
    }
    assert dimensions == {"outcome": "done"}
    assert counted.line()["timings_ms"]["prepare"] == 1.0


def test_a_metric_line_has_the_time_in_milliseconds(counted):
    before = time.time() * 1000 - 1
    end_a_request("request_done")
    assert before <= counted.line()["_aws"]["Timestamp"] <= time.time() * 1000 + 1
    assert isinstance(counted.line()["_aws"]["Timestamp"], int)


@pytest.mark.parametrize("code", [error.code for error in Refusal.__subclasses__()])
def test_what_the_caller_did_wrong_counts_as_refused(counted, code):
    end_a_request("request_failed", code=code)
    assert metrics_of(counted.line()) == ({"requests": (1, "Count")}, {"outcome": "refused"})


@pytest.mark.parametrize("code", sorted({error.code for error in Outage.__subclasses__()}))
def test_what_we_did_wrong_counts_as_failed_unless_it_was_the_load(counted, code):
    end_a_request("request_failed", code=code)
    outcome = "turned_away" if code in ("overloaded", "not_ready", "draining") else "failed"
    assert metrics_of(counted.line())[1] == {"outcome": outcome}


def test_a_caller_who_left_is_counted_apart(counted):
    end_a_request("caller_left")
    assert metrics_of(counted.line())[1] == {"outcome": "left"}


def test_a_traceback_on_the_line_leaves_it_a_metric_line(counted):
    try:
        fail("of the code")
    except ValueError:
        structlog.get_logger().exception("request_failed", code="internal")
    assert metrics_of(counted.line())[1] == {"outcome": "failed"}
    assert "of the code" in counted.line()["exception"]


def test_no_value_of_a_caller_is_a_dimension(counted):
    end_a_request("request_failed", code="internal", outcome="mine", custom_attributes="a" * 1024)
    metrics, dimensions = metrics_of(counted.line())
    assert set(dimensions.values()) <= set(OUTCOMES)
    assert set(metrics) <= set(METRIC_UNITS)


def test_any_other_line_and_a_librarys_with_the_same_words_carry_no_metrics(counted):
    structlog.get_logger().info("ready")
    logging.getLogger("some.library").info("request_done")
    assert ["_aws" in line for line in counted.lines()] == [False, False]


def test_without_a_namespace_no_line_carries_metrics(log):
    end_a_request("request_done", timings_ms={"total": 1.0})
    assert not {"_aws", "outcome", "requests", "total_ms"} & set(log.line())


def test_the_stages_that_are_counted_are_stages():
    times = StageTimes()
    for stage in COUNTED_STAGES:
        times.add(stage, 1.0)
    assert set(METRIC_UNITS) == {"requests", *(f"{stage}_ms" for stage in times.milliseconds())}


def test_the_real_process_ends_a_request_with_a_metric_line(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    own = {
        "VTON_OUTPUT_DIR": str(tmp_path),
        "VTON_PORT": str(port),
        "VTON_METRICS_NAMESPACE": "vton/shop-realtime",
        "OMP_NUM_THREADS": "1",
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("VTON_", "SAGEMAKER_"))}
    written = tmp_path / "serve.log"
    with written.open("wb") as log:
        process = subprocess.Popen([sys.executable, str(SERVE)], env={**clean, **own}, stderr=log)
    try:
        assert post_when_it_listens(f"http://127.0.0.1:{port}/invocations", b"no JSON", 60) == 400
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(10)
    (line,) = [line for line in map(json.loads, written.read_text().splitlines()) if "_aws" in line]
    assert metrics_of(line) == ({"requests": (1, "Count")}, {"outcome": "refused"})


def post_when_it_listens(url, body, limit_s):
    ends = time.monotonic() + limit_s
    while True:
        try:
            return requests.post(url, body, headers={"Content-Type": "application/json"}, timeout=60).status_code
        except requests.exceptions.ConnectionError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.05)


def test_metrics_need_the_lines_that_they_ride_on():
    with pytest.raises(SettingsError, match="needs VTON_LOG_LEVEL INFO"):
        Settings.from_env({"VTON_METRICS_NAMESPACE": "vton/shop", "SAGEMAKER_CONTAINER_LOG_LEVEL": "30"})
    assert Settings.from_env({"VTON_METRICS_NAMESPACE": "vton/shop"}).metrics_namespace == "vton/shop"
