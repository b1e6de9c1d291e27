from __future__ import annotations

import importlib
import json
import os
import stat
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from bench.files import LOG_CHARS, end_of, json_option, write_report, write_whole

COMMANDS = ("coldstart", "counters", "drift", "load", "masker", "ping", "pipeline", "quality", "service")
REPORT = {"ms": 1.5}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("wrong", ["missing/report.json", "file/report.json", "folder"])
def test_every_bench_refuses_a_report_that_cannot_be_written_before_it_measures(command, wrong, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    main = importlib.import_module(f"bench.{command}").main
    done = CliRunner().invoke(main, ["--json", str(tmp_path / wrong)])
    assert (done.exit_code, type(done.exception)) == (2, SystemExit)
    assert "Invalid value for '--json'" in done.output


def test_a_contact_sheet_that_cannot_be_written_is_refused_as_early(tmp_path):
    main = importlib.import_module("bench.quality").main
    done = CliRunner().invoke(main, ["--sheet", str(tmp_path / "missing" / "sheet.png")])
    assert done.exit_code == 2
    assert "Invalid value for '--sheet'" in done.output


@click.command()
@json_option()
def bench(json_path):
    click.echo("figures")
    write_report(json_path, REPORT)


@pytest.mark.parametrize("before", [None, "before"])
def test_a_report_is_written_and_nothing_beside_it(tmp_path, before):
    path = tmp_path / "report.json"
    if before is not None:
        path.write_text(before)
    done = CliRunner().invoke(bench, ["--json", str(path)])
    assert done.exit_code == 0, done.output
    assert json.loads(path.read_text()) == REPORT
    assert list(tmp_path.iterdir()) == [path]


def test_no_report_is_written_where_none_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(bench).exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    assert CliRunner().invoke(bench, ["--json", str(tmp_path / ("x" * 300))]).exit_code != 0


def test_a_report_that_fails_later_comes_after_the_figures_and_without_a_traceback(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    path = tmp_path / "report.json"
    done = CliRunner().invoke(bench, ["--json", str(path)])
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    assert done.output == f"figures\nError: {path} cannot be written: No space left on device\n"


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    for text in ("before", "after"):
        write_whole(path, text)
        assert path.read_text() == text
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half\ud800")
    assert path.read_text() == "after"


def test_what_is_no_file_is_written_into(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        done = CliRunner().invoke(bench, ["--json", str(pipe)])
        assert done.exit_code == 0, done.output
        assert json.loads(os.read(reader, 999)) == REPORT
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_the_end_of_a_log_is_its_last_lines_whatever_bytes_it_has(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"\xff" + b"first\n" * 1000 + b"the last line\n")
    assert end_of(log).endswith("first\nthe last line")
    assert len(end_of(log)) < LOG_CHARS
