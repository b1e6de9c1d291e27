from __future__ import annotations

import json
from contextlib import ExitStack, contextmanager

import click
import pytest
from click.testing import CliRunner

from bench import load, ping, service
from bench.service import OK, Answer, goodput

PICTURE_S = "0.05"


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """One serving process with the waiting engine, for all tests here."""
    with ExitStack() as stack:
        cloud, images = stack.enter_context(service.surroundings())
        environ = service.engine_environment("waiting", float(PICTURE_S), steps=1)
        log = tmp_path_factory.mktemp("bench") / "serve.log"
        yield cloud, images, stack.enter_context(service.serving(cloud, images, environ, log))


@pytest.fixture
def staged(stage, monkeypatch):
    @contextmanager
    def surroundings():
        yield stage[:2]

    @contextmanager
    def serving(*_):
        yield stage[2]

    for bench in (load, service):
        monkeypatch.setattr(bench, "surroundings", surroundings)
        monkeypatch.setattr(bench, "serving", serving)


def run(bench, path, *arguments):
    done = CliRunner().invoke(bench.main, [*arguments, "--picture-s", PICTURE_S, "--json", str(path)])
    assert done.exit_code == 0, done.output
    return done.output, json.loads(path.read_text())


def test_load_prints_a_column_for_each_level_and_whether_the_promises_hold(staged, tmp_path):
    text, figures = run(load, tmp_path / "load.json", "--seconds", "1", "--levels", "50,1000")
    low, high = figures["levels"]
    assert (low["share"], high["share"]) == (0.5, 10.0)
    assert high["offered_per_s"] == pytest.approx(10 * figures["capacity_per_s"], abs=1)
    for level in (low, high):
        assert level["accepted"]["count"] > 0
        assert 0 < level["accepted"]["p50_ms"] <= level["accepted"]["p99_ms"]
        assert level["failed"] == level["pings_failed"] == 0
        assert level["ping"]["count"] == pytest.approx(50, abs=1)
        assert level["memory_last_quarter_mb"] > 20
    assert high["refused"]["count"] > 0
    assert len(figures["promises"]) == 5
    assert text.count("holds") + text.count("BROKEN") == 5
    assert "goodput of peak" in text
    assert {"cores", "load_average_before", "python", "seconds", "picture_s", "places"} <= set(figures)


def test_service_prints_its_share_of_the_bare_engine_and_keeps_what_the_file_has(staged, tmp_path):
    path = tmp_path / "service.json"
    path.write_text('{"embedded": {}}')
    text, figures = run(service, path, "--seconds", "0.5", "--rounds", "2")
    assert set(figures) == {"embedded", "waiting"}
    found = figures["waiting"]
    assert len(found["bare_per_s"]) == len(found["service_per_s"]) == 2
    assert all(rate <= 1 / float(PICTURE_S) for rate in found["bare_per_s"])
    assert 0 < found["ratio"] < 1.5
    assert found["service_cpu_s_per_picture"] > 0
    assert {"fetch", "decode", "generate", "store", "notify", "total"} <= set(found["stages_median_ms"])
    assert ("holds" in text) == (found["ratio"] >= found["promised_ratio"] == 0.95)


def test_the_service_without_a_waiting_engine_is_the_one_that_is_deployed():
    assert service.engine_environment("embedded", 1.0, steps=4)["VTON_ENGINE"] == "catvton"


@pytest.mark.parametrize("levels", ["", "high", "50,", "0", "-50", "nan"])
def test_a_level_that_is_no_share_is_a_usage_error(levels):
    done = CliRunner().invoke(load.main, ["--levels", levels])
    assert (done.exit_code, type(done.exception)) == (2, SystemExit)


@pytest.mark.parametrize("bench", [load, service])
@pytest.mark.parametrize("seconds", ["-1", "601", "long"])
def test_a_picture_takes_between_nothing_and_what_the_client_waits(bench, seconds):
    done = CliRunner().invoke(bench.main, ["--picture-s", seconds])
    assert (done.exit_code, type(done.exception)) == (2, SystemExit)
    assert "'--picture-s'" in done.output


@pytest.mark.parametrize("option", [["--seconds", "0"], ["--steps", "0"], ["--steps", "101"]])
def test_pings_are_asked_for_in_the_ranges_that_the_service_has(option):
    done = CliRunner().invoke(ping.main, option)
    assert (done.exit_code, type(done.exception)) == (2, SystemExit)
    assert f"'{option[0]}'" in done.output


@pytest.mark.parametrize("text", ["", "[1]", "figures"])
def test_a_file_that_holds_something_else_is_refused_before_it_is_measured(monkeypatch, tmp_path, text):
    monkeypatch.setattr(service, "surroundings", lambda: pytest.fail("measured"))
    path = tmp_path / "service.json"
    path.write_text(text)
    done = CliRunner().invoke(service.main, ["--json", str(path)])
    assert (done.exit_code, type(done.exception)) == (2, SystemExit)
    assert str(path) in done.output
    assert path.read_text() == text


def test_a_service_that_does_not_start_is_told_of_with_the_end_of_its_log(stage, tmp_path):
    cloud, images, _ = stage
    environ = {**service.engine_environment("waiting", 1.0, steps=1), "VTON_STEPS": "many"}
    serving = service.serving(cloud, images, environ, tmp_path / "serve.log")
    with pytest.raises(click.ClickException, match="VTON_STEPS"), serving:
        pass


# --- figures


def answered(*ends, status=OK):
    return [Answer(ended, seconds=ended, late_s=0.0, status=status, content=b"") for ended in ends]


def test_goodput_counts_pictures_from_the_first_to_the_first_after_the_end():
    assert goodput(answered(1, 2, 3, 4.5, 9), ends=4) == pytest.approx(3 / 3.5)
    assert goodput(answered(1, 2, 3), ends=5) == pytest.approx(2 / 4)  # then nothing came
    assert goodput([*answered(1, 2, 3), *answered(2.5, status=429)], ends=3) == pytest.approx(1)
    assert goodput(answered(5), ends=4) == goodput([], ends=4) == 0


def test_percentiles_are_of_the_nearest_rank():
    percentiles = load.percentiles_ms(answered(*(number / 1000 for number in range(1, 201))), 50, 99, 99.9)
    assert percentiles == {"p50_ms": 100, "p99_ms": 198, "p99.9_ms": 200}
    assert load.percentiles_ms([], 50) == {"p50_ms": None}


def test_arrivals_are_as_many_as_the_rate_says_and_within_the_level():
    times = load.arrivals(per_s=6, begins=100, ends=110)
    assert len(times) == 60
    assert times == sorted(times)
    assert 100 <= times[0] < times[-1] < 110


KEPT = {
    "share": 1.5,
    "goodput_of_peak": 0.97,
    "refused": {"p99_ms": 20.0},
    "ping": {"p99.9_ms": 30.0},
    "memory_second_quarter_mb": 200.0,
    "memory_last_quarter_mb": 205.0,
    "failed": 0,
    "pings_failed": 0,
}


def test_promises_hold():
    assert set(load.promises(KEPT).values()) == {True}
    assert load.promises({**KEPT, "share": 1.0}) == {}


@pytest.mark.parametrize(
    "figure",
    [
        {"goodput_of_peak": 0.94},
        {"refused": {"p99_ms": 100.0}},
        {"refused": {"p99_ms": None}},
        {"ping": {"p99.9_ms": 200.0}},
        {"memory_last_quarter_mb": 211.0},
        {"failed": 1},
        {"pings_failed": 1},
    ],
)
def test_one_figure_breaks_one_promise(figure):
    assert list(load.promises({**KEPT, **figure}).values()).count(False) == 1
